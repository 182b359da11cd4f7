// SPDX-License-Identifier: Apache-2.0
// The sparse convolution against seven plain loops: every case in several memory layouts and thread counts, float32 and
// float64, compared for equality; and the same bits again on a second run with data that does round.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "check.h"
#include "conv2d_reference.h"
#include "cpu/conv2d/conv2d.h"
#include "cpu/conv2d/run.h"
#include "cpu/dispatch.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

// How a tensor lies in memory.
enum class Layout {
  kBatchLast,   // C, H, W, N
  kBatchFirst,  // N, C, H, W
  kGaps,        // batch last with unused elements between rows, pixels and channels, and a start off any alignment
};

const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::kBatchLast:
      return "batch_last";
    case Layout::kBatchFirst:
      return "batch_first";
    case Layout::kGaps:
      return "gaps";
  }
  return "?";
}

// A tensor of one layout in memory that ends with its last element.
template <class T>
class Tensor {
 public:
  Tensor(Layout layout, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w)
      : n_(n), c_(c), h_(h), w_(w), strides_(strides(layout, n, c, h, w)), start_(layout == Layout::kGaps ? 1 : 0),
        memory_(start_ + 1 + (n - 1) * strides_.batch + (c - 1) * strides_.channel + (h - 1) * strides_.row +
                (w - 1) * strides_.column) {}

  Images<T> images() { return {memory_.data() + start_, strides_.batch, strides_.channel, strides_.row, strides_.column}; }
  Images<const T> images() const {
    return {memory_.data() + start_, strides_.batch, strides_.channel, strides_.row, strides_.column};
  }

  // visit(element, index in NCHW order)
  template <class F>
  void each(F&& visit) {
    std::size_t i = 0;
    for (std::int64_t n = 0; n < n_; ++n)
      for (std::int64_t c = 0; c < c_; ++c)
        for (std::int64_t h = 0; h < h_; ++h)
          for (std::int64_t w = 0; w < w_; ++w)
            visit(memory_[start_ + n * strides_.batch + c * strides_.channel + h * strides_.row + w * strides_.column],
                  i++);
  }
  void set(const std::vector<double>& values) {
    each([&](T& element, std::size_t i) { element = static_cast<T>(values[i]); });
  }
  std::int64_t count() const { return n_ * c_ * h_ * w_; }
  Buffer<T>& memory() { return memory_; }

 private:
  struct Strides {
    std::int64_t batch, channel, row, column;
  };
  static Strides strides(Layout layout, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w) {
    if (layout == Layout::kBatchFirst) return {c * h * w, h * w, w, 1};
    const std::int64_t gap = layout == Layout::kGaps ? 1 : 0;
    const std::int64_t column = n + gap;
    const std::int64_t row = w * column + 3 * gap;
    return {1, h * row + 5 * gap, row, column};
  }

  std::int64_t n_, c_, h_, w_;
  Strides strides_;
  std::int64_t start_;
  Buffer<T> memory_;
};

Conv2dGeometry geometry_of(const ConvCase& c) {
  return {c.batch,    c.height, c.width, c.out_height(), c.out_width(), c.stride_h, c.stride_w,
          c.pad_h, c.pad_w,  c.dilation_h, c.dilation_w};
}

WeightShape shape_of(const ConvCase& c) {
  return {c.out_channels, c.group_channels(), c.kernel_h, c.kernel_w, c.groups};
}

// The kept elements of a dense weight, in the plan's order.
template <class T>
Buffer<T> packed(const std::vector<double>& dense, const std::vector<std::uint8_t>& mask) {
  Buffer<T> values(std::count(mask.begin(), mask.end(), 1));
  std::int64_t next = 0;
  for (std::size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] != 0) values[next++] = static_cast<T>(dense[i]);
  }
  return values;
}

template <class T>
Buffer<T> vector_of(const std::vector<double>& values) {
  Buffer<T> result(static_cast<std::int64_t>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) result[static_cast<std::int64_t>(i)] = static_cast<T>(values[i]);
  return result;
}

template <class T>
void expect_equal(const char* what, const Buffer<T>& got, const Buffer<T>& expected) {
  for (std::int64_t i = 0; i < expected.size(); ++i) {
    if (got[i] == expected[i]) continue;
    CHECK(false, std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " +
                     std::to_string(expected[i]));
    return;
  }
  CHECK(true, "");
}

template <class T>
void expect_equal(const char* what, Tensor<T>& got, const std::vector<double>& expected) {
  std::string message;
  got.each([&](T& element, std::size_t i) {
    if (static_cast<double>(element) != expected[i] && message.empty()) {
      message = std::string(what) + "[" + std::to_string(i) + " in NCHW order] is " + std::to_string(element) +
                ", expected " + std::to_string(expected[i]);
    }
  });
  CHECK(message.empty(), message);
  // Every element was checked above and is far from the fill, so what still holds it are the gaps.
  const auto untouched = std::count(got.memory().begin(), got.memory().end(), T(1e30));
  CHECK(untouched == got.memory().size() - got.count(), std::string(what) + ": something was written between its elements");
}

// One case, completely.
template <class T>
struct Operands {
  Operands(const ConvCase& c, const ConvData& data, Layout layout)
      : x(layout, c.batch, c.in_channels, c.height, c.width),
        grad_y(layout, c.batch, c.out_channels, c.out_height(), c.out_width()),
        y(layout, c.batch, c.out_channels, c.out_height(), c.out_width()),
        grad_x(layout, c.batch, c.in_channels, c.height, c.width),
        values(packed<T>(data.w, data.mask)),
        bias(vector_of<T>(data.bias)),
        grad_values(values.size()),
        grad_bias(c.out_channels) {
    x.set(data.x);
    grad_y.set(data.grad_y);
  }

  void compute(const CompiledPlan& plan, const Conv2dGeometry& geometry, int threads) {
    const Tensor<T>& x_read = x;
    const Tensor<T>& grad_read = grad_y;
    conv2d_forward<T>(plan, geometry, x_read.images(), values.data(), bias.data(), y.images(), threads);
    conv2d_input_grad<T>(plan, geometry, grad_read.images(), values.data(), grad_x.images(), threads);
    conv2d_weight_grad<T>(plan, geometry, x_read.images(), grad_read.images(), grad_values.data(), grad_bias.data(),
                          threads);
  }

  Tensor<T> x, grad_y, y, grad_x;
  Buffer<T> values, bias, grad_values, grad_bias;
};

template <class T>
void check_exact(const ConvCase& c, const ConvData& data, const ConvResult& expected, const CompiledPlan& plan,
                 Layout layout, int threads) {
  begin_case(c.name + " " + name_of(layout) + (sizeof(T) == 4 ? " f32" : " f64") + " threads=" + std::to_string(threads));
  Operands<T> operands(c, data, layout);
  operands.compute(plan, geometry_of(c), threads);
  expect_equal("y", operands.y, expected.y);
  expect_equal("grad_x", operands.grad_x, expected.grad_x);
  expect_equal("grad_values", operands.grad_values, packed<T>(expected.grad_w, data.mask));
  expect_equal("grad_bias", operands.grad_bias, vector_of<T>(expected.grad_bias));
}

bool same_bits(const Buffer<float>& a, const Buffer<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(float)) == 0;
}

void check_repeatable(const ConvCase& c, ConvData data, const CompiledPlan& plan, int threads) {
  begin_case(c.name + " repeated, threads=" + std::to_string(threads));
  Random random(7);
  for (std::vector<double>* values : {&data.x, &data.w, &data.bias, &data.grad_y}) {
    for (double& value : *values) value = random.uniform() - 0.5;
  }
  Operands<float> first(c, data, Layout::kBatchLast);
  first.compute(plan, geometry_of(c), threads);
  for (int run = 0; run < 3; ++run) {
    Operands<float> again(c, data, Layout::kBatchLast);
    again.compute(plan, geometry_of(c), threads);
    CHECK(same_bits(first.y.memory(), again.y.memory()), "y");
    CHECK(same_bits(first.grad_x.memory(), again.grad_x.memory()), "grad_x");
    CHECK(same_bits(first.grad_values, again.grad_values), "grad_values");
    CHECK(same_bits(first.grad_bias, again.grad_bias), "grad_bias");
  }
}

void check_all_cases(const std::string& prefix) {
  std::uint64_t seed = 1;
  for (ConvCase c : conv_cases()) {
    c.name = prefix + c.name;
    const ConvData data = make_data(c, seed++);
    const ConvResult expected = reference(c, data);
    const CompiledPlan plan(data.mask.data(), shape_of(c));
    check_exact<float>(c, data, expected, plan, Layout::kBatchLast, 1);
    check_exact<float>(c, data, expected, plan, Layout::kBatchFirst, 1);
    check_exact<double>(c, data, expected, plan, Layout::kGaps, 1);
    check_exact<double>(c, data, expected, plan, Layout::kBatchLast, 2);
    // Threads take units of several images, so few batch sizes show all there is to see with more of them.
    if (c.batch != 5 && c.batch != 33) continue;
    check_exact<float>(c, data, expected, plan, Layout::kBatchLast, 2);
    check_exact<float>(c, data, expected, plan, Layout::kGaps, 3);
    if (c.batch == 33) check_repeatable(c, data, plan, 2);
  }
}

}  // namespace

FEDPAI_SUITE(conv2d) {
  for (const Walk walk : {Walk::kTiled, Walk::kStreamed}) {
    force_walk(walk);
    check_all_cases(walk == Walk::kTiled ? "tiled " : "streamed ");
  }
  force_walk(Walk::kChoose);
}

// Few non-zeros per channel are streamed, many are tiled; and what cannot be streamed is tiled.
FEDPAI_SUITE(walk_choice) {
  const auto walk_of = [](int kept_of_100, bool adjacent) {
    const WeightShape shape{64, 64, 3, 3, 1};
    std::vector<std::uint8_t> mask(64 * 64 * 9);
    for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<int>(i * 37 % 100) < kept_of_100;
    const Plan plan(mask.data(), shape);
    const Conv2dGeometry geometry{64, 32, 32, 32, 32, 1, 1, 1, 1, 1, 1};
    const SourceStrides strides{32 * 32 * 64, 32 * 64, 64};
    const ScheduleChoice choice =
        choose_schedule(plan, {Direction::kForward, geometry, 8, 14, 4, adjacent, strides, Walk::kChoose});
    return choice.streamed() ? Walk::kStreamed : Walk::kTiled;
  };
  begin_case("by density");
  CHECK(walk_of(1, true) == Walk::kStreamed, "1 %");
  CHECK(walk_of(40, true) == Walk::kTiled, "40 %");
  begin_case("images that are not adjacent");
  CHECK(walk_of(1, false) == Walk::kTiled, "");
}

// Whatever a cost model may choose gives the same: tilings that it would never try among them.
FEDPAI_SUITE(tilings) {
  Random random(3);
  const auto pick = [&](std::initializer_list<std::int64_t> from) {
    return from.begin()[static_cast<std::size_t>(random.uniform() * static_cast<double>(from.size()))];
  };
  const Conv2dKernels<float>& kernels = conv2d_kernels<float>();
  for (int round = 0; round < 60; ++round) {
    ConvCase c{"", pick({1, 7, 31, 40, 97}), pick({1, 3, 9}), pick({1, 5, 12}), pick({3, 8, 11}), pick({2, 7}), 3, 3};
    c.pad_h = c.pad_w = 1;
    c.stride_h = pick({1, 1, 2});
    const ConvData data = make_data(c, static_cast<std::uint64_t>(round));
    const ConvResult expected = reference(c, data);
    const CompiledPlan plan(data.mask.data(), shape_of(c));
    const Conv2dGeometry geometry = geometry_of(c);
    const Layout layout = pick({0, 0, 1}) == 0 ? Layout::kBatchLast : Layout::kBatchFirst;
    const int threads = static_cast<int>(pick({1, 2, 3}));
    const auto any_tiling = [&](int accumulators) {
      Tiling t;
      t.blocks = static_cast<int>(pick({1, 2, 3, 5}));
      t.groups = static_cast<int>(pick({1, 2, 3, 8}));
      t.tile_rows = pick({1, 2});
      t.tile_columns = std::max<std::int64_t>(1, std::min(pick({1, 2, 3}), accumulators / (t.tile_rows * t.blocks)));
      t.patch_rows = pick({1, 2, 8});
      t.patch_columns = pick({1, 3});
      t.channel_block = pick({1, 2, c.in_channels});
      return t;
    };
    const Tiling sums = any_tiling(kernels.accumulators), grads = any_tiling(kernels.pinned);
    const auto words = [](const Tiling& t) {
      return " groups=" + std::to_string(t.groups) + " blocks=" + std::to_string(t.blocks) + " channel_block=" +
             std::to_string(t.channel_block);
    };
    begin_case("round " + std::to_string(round) + " batch=" + std::to_string(c.batch) + " " + name_of(layout) +
               " threads=" + std::to_string(threads) + words(sums) + words(grads));

    Operands<float> o(c, data, layout);
    const Tensor<float>&x = o.x, &grad_y = o.grad_y;
    const VectorShape vector{kernels.lanes, kernels.accumulators, sizeof(float)};
    run_tiled<float>(tiled_pass(forward_axes(plan.plan, geometry), plan.plan.by_output(), vector, sums), kernels, c.batch,
                     x.images(), o.values.data(), o.bias.data(), o.y.images(), threads);
    for (const PassAxes& axes : input_grad_axes(plan.plan, geometry)) {
      run_tiled<float>(tiled_pass(axes, plan.plan.by_input(), vector, sums), kernels, c.batch, grad_y.images(),
                       o.values.data(), nullptr, o.grad_x.images(), threads);
    }
    std::fill(o.grad_values.begin(), o.grad_values.end(), 0.0F);  // taps that only ever read padding are in no pass
    run_tiled_grad<float>(tiled_pass(forward_axes(plan.plan, geometry), plan.plan.by_output(), vector, grads), kernels,
                          c.batch, x.images(), grad_y.images(), o.grad_values.data(), o.grad_bias.data(), threads);
    expect_equal("y", o.y, expected.y);
    expect_equal("grad_x", o.grad_x, expected.grad_x);
    expect_equal("grad_values", o.grad_values, packed<float>(expected.grad_w, data.mask));
    expect_equal("grad_bias", o.grad_bias, vector_of<float>(expected.grad_bias));
  }
}

// A choice is always possible to run, and no unit of it is larger than a thread should keep.
FEDPAI_SUITE(tiling_choice) {
  for (const std::int64_t batch : {1, 100, 100000}) {
    for (const std::int64_t channels : {0, 1, 600, 100000}) {
      for (const std::int64_t size : {1, 5, 64}) {
        for (const bool weight_grad : {false, true}) {
          const std::int64_t halo = size > 1 ? 2 : 0;
          const TilingProblem problem{size, size, halo, halo, 1, 1, batch, 64, channels, channels * 7, 4, 8, 12,
                                      weight_grad, true};
          const Tiling t = choose_tiling(problem);
          begin_case(std::to_string(batch) + " images of " + std::to_string(size) + ", " + std::to_string(channels) +
                     " channels");
          CHECK(t.cycles >= 0 && t.cycles < 1e30, "cycles");
          CHECK(t.tile_rows * t.tile_columns * t.blocks <= 12, "the tile does not fit the registers");
          CHECK(t.groups >= 1 && (t.groups - 1) * t.blocks * 8 < batch, "groups without images");
          const double pixels = static_cast<double>(std::min(size, t.tile_rows * t.patch_rows) *
                                                    std::min(size, t.tile_columns * t.patch_columns));
          const double bytes = pixels * 32.0 * static_cast<double>(t.blocks * t.groups * t.channel_block);
          CHECK(t.groups == 1 || bytes <= 4e6, "a unit of " + std::to_string(bytes) + " bytes");
        }
      }
    }
  }
}

// The forward pass and the weight gradient of one image size have one schedule between them where they would go alike.
FEDPAI_SUITE(schedules_shared) {
  std::vector<std::uint8_t> mask(64 * 64 * 9);
  for (std::size_t i = 0; i < mask.size(); ++i) mask[i] = i * 37 % 100 < 2;
  const CompiledPlan plan(mask.data(), {64, 64, 3, 3, 1});
  const Conv2dGeometry geometry{64, 8, 8, 8, 8, 1, 1, 1, 1, 1, 1};
  const auto key = [&](Direction direction, Walk walk, const Conv2dGeometry& g) {
    const SourceStrides strides{g.in_h * g.in_w * 64, g.in_w * 64, 64};
    return ScheduleKey{direction, g, 8, 12, 4, true, strides, walk};
  };
  for (const Walk walk : {Walk::kTiled, Walk::kStreamed}) {
    begin_case(walk == Walk::kTiled ? "tiled" : "streamed");
    const ScheduleKey forward = key(Direction::kForward, walk, geometry);
    const ScheduleKey weight_grad = key(Direction::kWeightGrad, walk, geometry);
    const bool alike = choose_schedule(plan.plan, forward) == choose_schedule(plan.plan, weight_grad);
    const auto schedule = plan.schedules.get(plan.plan, forward);
    CHECK(alike == (plan.schedules.get(plan.plan, weight_grad) == schedule), "weight gradient");
    CHECK(alike, "chosen alike");
    CHECK(plan.schedules.get(plan.plan, key(Direction::kInputGrad, walk, geometry)) != schedule, "input gradient");
    Conv2dGeometry larger = geometry;
    larger.in_h = larger.out_h = 9;
    CHECK(plan.schedules.get(plan.plan, key(Direction::kWeightGrad, walk, larger)) != schedule, "another image");
  }
}

// The output gradient that sum() gives: one element, seen everywhere.
FEDPAI_SUITE(conv2d_expanded_gradient) {
  ConvCase c{"expanded", 19, 5, 7, 6, 8, 3, 3};
  c.pad_h = c.pad_w = 1;
  c.stride_w = 2;
  ConvData data = make_data(c, 3);
  std::fill(data.grad_y.begin(), data.grad_y.end(), 2.0);
  const ConvResult expected = reference(c, data);
  const CompiledPlan plan(data.mask.data(), shape_of(c));
  begin_case(c.name);

  Buffer<float> one(1);
  one[0] = 2.0F;
  const Images<const float> grad_y{one.data(), 0, 0, 0, 0};
  Operands<float> operands(c, data, Layout::kBatchLast);
  const Tensor<float>& x = operands.x;
  conv2d_input_grad<float>(plan, geometry_of(c), grad_y, operands.values.data(), operands.grad_x.images(), 2);
  conv2d_weight_grad<float>(plan, geometry_of(c), x.images(), grad_y, operands.grad_values.data(),
                            operands.grad_bias.data(), 2);
  expect_equal("grad_x", operands.grad_x, expected.grad_x);
  expect_equal("grad_values", operands.grad_values, packed<float>(expected.grad_w, data.mask));
  expect_equal("grad_bias", operands.grad_bias, vector_of<float>(expected.grad_bias));
}

FEDPAI_SUITE(conv2d_no_images) {
  ConvCase c{"no_images", 0, 5, 7, 6, 8, 3, 3};
  const CompiledPlan plan(std::vector<std::uint8_t>(static_cast<std::size_t>(c.w_size()), 1).data(), shape_of(c));
  begin_case(c.name);
  float unread = 0.0F;
  const Images<const float> nothing{&unread, 1, 1, 1, 1};
  Buffer<float> values(c.w_size()), grad_values(c.w_size()), grad_bias(c.out_channels);
  std::fill(grad_values.begin(), grad_values.end(), 7.0F);
  std::fill(grad_bias.begin(), grad_bias.end(), 7.0F);
  conv2d_forward<float>(plan, geometry_of(c), nothing, values.data(), nullptr, {&unread, 1, 1, 1, 1}, 2);
  conv2d_input_grad<float>(plan, geometry_of(c), nothing, values.data(), {&unread, 1, 1, 1, 1}, 2);
  conv2d_weight_grad<float>(plan, geometry_of(c), nothing, nothing, grad_values.data(), grad_bias.data(), 2);
  CHECK(std::all_of(grad_values.begin(), grad_values.end(), [](float g) { return g == 0.0F; }), "grad_values");
  CHECK(std::all_of(grad_bias.begin(), grad_bias.end(), [](float g) { return g == 0.0F; }), "grad_bias");
}

FEDPAI_SUITE(plan) {
  const std::vector<std::uint8_t> mask{0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1};
  const WeightShape shape{2, 3, 2, 1, 1};

  begin_case("indices are those of the kept weights, ascending");
  const Plan plan(mask.data(), shape);
  CHECK(plan.nnz() == 4, std::to_string(plan.nnz()));
  Buffer<std::int64_t> indices(4);
  plan.flat_indices(indices.data());
  const std::vector<std::int64_t> expected{1, 4, 5, 11};
  CHECK(std::equal(expected.begin(), expected.end(), indices.begin()), "");

  begin_case("the lists by output and by input hold the same entries");
  CHECK(plan.by_output().rows() == 2, "");
  CHECK(plan.by_input().rows() == 3, "");
  IndexVector values = plan.by_input().value;
  std::sort(values.begin(), values.end());
  CHECK(values == plan.by_output().value, "");

  const auto refusal = [](const std::vector<std::uint8_t>& bytes, const WeightShape& wrong) -> std::string {
    try {
      const Plan refused(bytes.data(), wrong);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  begin_case("what cannot be a plan is refused by name");
  CHECK(refusal(std::vector<std::uint8_t>(12), shape).rfind("mask", 0) == 0, "no weight survives");
  CHECK(refusal(mask, {2, 0, 2, 1, 1}).rfind("mask", 0) == 0, "an empty dimension");
  CHECK(refusal(mask, {2, 3, 2, 1, 3}).rfind("groups", 0) == 0, "groups that do not divide");
}
