// SPDX-License-Identifier: Apache-2.0
// The CUDA convolution on the CPU: the functions that a GPU's threads run, lane by lane in plain loops over the blocks of
// a launch, against the same reference and cases as the CPU's kernels. Integers of a few bits: compared for equality.
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "check.h"
#include "conv2d_operands.h"
#include "cuda_elements.h"
#include "cuda_host.h"

using namespace fedpai;
using namespace fedpai::tests;
using namespace fedpai::cuda;

namespace {

// Batch-last images: (C, H, W, N), ending where their heap block ends.
template <class T>
struct HostImages {
  HostImages(std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w) : n_(n), c_(c), pixels_(h * w), memory(n * c * h * w) {
    for (T& element : memory) assign(element, 1e30F);
  }

  void set(const std::vector<double>& values) {
    each([&](T& element, std::size_t i) { assign(element, static_cast<float>(values[i])); });
  }
  void expect(const char* what, const std::vector<double>& expected) {
    std::string message;
    each([&](T& element, std::size_t i) {
      T rounded;
      assign(rounded, static_cast<float>(expected[i]));
      if (as_float(element) == as_float(rounded) || !message.empty()) return;
      message = std::string(what) + "[" + std::to_string(i) + " in NCHW order] is " + std::to_string(as_float(element)) +
                ", expected " + std::to_string(as_float(rounded));
    });
    CHECK(message.empty(), message);
  }

 private:
  // visit(element, index in NCHW order)
  template <class F>
  void each(const F& visit) {
    std::size_t i = 0;
    for (std::int64_t n = 0; n < n_; ++n)
      for (std::int64_t c = 0; c < c_; ++c)
        for (std::int64_t p = 0; p < pixels_; ++p) visit(memory[(c * pixels_ + p) * n_ + n], i++);
  }

  std::int64_t n_, c_, pixels_;

 public:
  Buffer<T> memory;
};

// ---- one case ---------------------------------------------------------------------------------------------------

struct Streams {
  Streams(const Plan& plan, const Spread& spread)
      : by_output(forward_stream(plan, spread)), by_input(input_grad_stream(plan, spread)), by_group(weight_grad_stream(plan, spread)) {}

  static FedpaiRowStream view(const RowStream& s) { return {s.entries.data(), s.row_begin.data(), s.row_order.data()}; }
  FedpaiGroupStream groups() const {
    return {by_group.entries.data(), by_group.groups.data(), static_cast<std::int64_t>(by_group.entries.size()),
            static_cast<std::int64_t>(by_group.groups.size())};
  }

  RowStream by_output, by_input;
  GroupStream by_group;
};

Spread spread_of(const ConvCase& c) {
  const auto narrow = [](std::int64_t i) { return static_cast<std::int32_t>(i); };
  return {narrow(c.stride_h), narrow(c.stride_w), narrow(c.pad_h), narrow(c.pad_w), narrow(c.dilation_h), narrow(c.dilation_w)};
}

template <class T>
FedpaiConv2d conv_of(const ConvCase& c) {
  return {c.batch, c.in_channels, c.height, c.width, c.out_channels, c.out_height(), c.out_width(), c.stride_h, c.stride_w,
          sizeof(T) == 2 ? FEDPAI_CUDA_BF16 : FEDPAI_CUDA_F32};
}

// Another strip than the one that was chosen, for the same grid.
template <class Launch>
void set_strip(Launch& launch, const GridShape& grid, const Strip& strip, std::int64_t element_size) {
  launch.strip = strip;
  launch.tiles = choose_tiles(grid, strip, line_vectors(element_size, strip));
}

template <class T>
class Case {
 public:
  Case(const ConvCase& c, const ConvData& data, const ConvResult& expected, const Streams& streams)
      : conv_(conv_of<T>(c)), data_(data), expected_(expected), streams_(streams),
        x_(c.batch, c.in_channels, c.height, c.width), dy_(c.batch, c.out_channels, c.out_height(), c.out_width()),
        values_(packed<float>(data.w, data.mask)), bias_(vector_of<float>(data.bias)) {
    x_.set(data.x);
    dy_.set(data.grad_y);
  }

  // As launched on a GPU of so many SMs.
  void check_chosen(int sms) const {
    check_forward(forward_launch(conv_, sms));
    check_input_grad(input_grad_launch(conv_, sms));
    check_weight_grad(weight_grad_launch(conv_, streams_.groups().group_count, sms), true);
  }

  // With a strip that the launch might have chosen; images that go together are neighbours of one batch.
  void check_strip(const Strip& strip) const {
    if (conv_.batch % strip.images != 0) return;
    const FedpaiConv2d& c = conv_;
    const GridShape out{c.out_h, c.out_w, c.batch, c.stride_h, c.stride_w};
    const GridShape in{divided_up(c.in_h, c.stride_h), divided_up(c.in_w, c.stride_w), c.batch, 1, 1};
    GatherLaunch forward = forward_launch(c, 1), input_grad = input_grad_launch(c, 1);
    forward.warps = 4, input_grad.warps = 4;
    set_strip(forward, out, strip, sizeof(T));
    set_strip(input_grad, in, strip, sizeof(T));
    forward.blocks = divided_up(c.out_channels, 4) * forward.tiles.count();
    input_grad.blocks = divided_up(c.in_channels, 4) * input_grad.tiles.count();
    check_forward(forward);
    check_input_grad(input_grad);
    WeightGradLaunch weight_grad = weight_grad_launch(c, streams_.groups().group_count, 1);
    set_strip(weight_grad, out, strip, sizeof(T));
    weight_grad.splits = 3;  // more than some have tiles
    check_weight_grad(weight_grad, false);
  }

 private:
  void check_forward(const GatherLaunch& launch) const {
    HostImages<T> y(conv_.batch, conv_.out_channels, conv_.out_h, conv_.out_w);
    run(forward_args<T>(conv_, Streams::view(streams_.by_output), launch, x_.memory.data(), values_.data(), bias_.data(), y.memory.data()), launch);
    y.expect("y", expected_.y);
  }
  void check_input_grad(const GatherLaunch& launch) const {
    HostImages<T> dx(conv_.batch, conv_.in_channels, conv_.in_h, conv_.in_w);
    run(input_grad_args<T>(conv_, Streams::view(streams_.by_input), launch, dy_.memory.data(), values_.data(), dx.memory.data()), launch);
    dx.expect("grad_x", expected_.grad_x);
  }
  void check_weight_grad(const WeightGradLaunch& launch, bool with_bias) const {
    const FedpaiGroupStream stream = streams_.groups();
    Buffer<float> partial(launch.splits * (stream.entry_count + conv_.out_channels)), dvalues(stream.entry_count), dbias(conv_.out_channels);
    run(weight_grad_args<T>(conv_, stream, launch, x_.memory.data(), dy_.memory.data(), partial.data(), with_bias), launch, stream.group_count);
    const FinishArgs finish{partial.data(), streams_.by_group.entries.data(), dvalues.data(), with_bias ? dbias.data() : nullptr,
                            static_cast<std::int32_t>(stream.entry_count), static_cast<std::int32_t>(conv_.out_channels), launch.splits};
    for (std::int64_t slot = 0; slot < stream.entry_count + conv_.out_channels + 3; ++slot) add_splits(finish, slot);
    expect_equal("grad_values", dvalues, packed<float>(expected_.grad_w, data_.mask));
    if (with_bias) expect_equal("grad_bias", dbias, vector_of<float>(expected_.grad_bias));
  }

  FedpaiConv2d conv_;
  const ConvData& data_;
  const ConvResult& expected_;
  const Streams& streams_;
  HostImages<T> x_, dy_;
  Buffer<float> values_, bias_;
};

template <class T>
void check_case(const ConvCase& c, const ConvData& data, const ConvResult& expected, const Streams& streams) {
  const bool narrow = sizeof(T) == 2;
  const std::string name = c.name + " n=" + std::to_string(c.batch) + (narrow ? " bf16" : " f32");
  const Case<T> on_host(c, data, expected, streams);
  for (const int sms : {1, 132}) {
    begin_case(name + " as on " + std::to_string(sms) + " SMs");
    on_host.check_chosen(sms);
  }
  if (narrow) return;  // the types differ in how elements are moved, not in which
  for (const Strip& strip : {Strip{4, 4}, Strip{4, 2}, Strip{4, 1}, Strip{1, 2}}) {
    begin_case(name + " strips of " + std::to_string(strip.images) + " x " + std::to_string(strip.pixels));
    on_host.check_strip(strip);
  }
}

void check_batch(ConvCase c, std::int64_t batch, std::uint64_t seed) {
  c.batch = batch;
  const ConvData data = make_data(c, seed);
  const ConvResult expected = reference(c, data);
  const Plan plan(data.mask.data(), shape_of(c));
  const Streams streams(plan, spread_of(c));
  check_case<float>(c, data, expected, streams);
  check_case<BFloat16>(c, data, expected, streams);
}

}  // namespace

FEDPAI_SUITE(cuda_host_conv2d) {
  std::uint64_t seed = 1;
  for (const ConvCase& c : conv_cases()) {
    check_batch(c, c.batch, seed);
    // Odd batches go one image at a time; the geometries are to be seen in vectors of four as well.
    if (c.batch == 5) check_batch(c, 8, seed);
    if (c.batch == 33) check_batch(c, 36, seed);
    ++seed;
  }
}

FEDPAI_SUITE(cuda_host_conv2d_no_images) {
  ConvCase c{"no_images", 0, 5, 7, 6, 8, 3, 3};
  check_batch(c, 0, 1);
}

// A launch for a whole network's layers: every row on every tile once, and splits that share out all tiles.
FEDPAI_SUITE(cuda_host_launch) {
  for (const std::int64_t width : {1, 2, 3, 4, 7, 8, 16, 32, 56}) {
    for (const std::int64_t batch : {1, 4, 12, 64, 128, 200}) {
      for (const std::int64_t channels : {1, 3, 64, 512}) {
        begin_case("width " + std::to_string(width) + " batch " + std::to_string(batch) + " channels " + std::to_string(channels));
        const FedpaiConv2d c{batch, channels, width, width, channels, width, width, 1, 1, FEDPAI_CUDA_F32};
        CHECK(check_size(c) == FEDPAI_CUDA_OK, "");
        const GatherLaunch launch = forward_launch(c, 132);
        CHECK(launch.warps >= 1 && launch.warps <= kMostWarps, std::to_string(launch.warps));
        CHECK(batch % launch.strip.images == 0, "vectors of whole images");
        const Tiles& t = launch.tiles;
        CHECK(t.log_vectors + t.log_across + t.log_down == 5, "32 lanes");
        CHECK(std::int64_t{t.in_width} * (1 << t.log_across) * launch.strip.pixels >= width, "all columns");
        CHECK(std::int64_t{t.in_height} * (1 << t.log_down) >= width, "all rows");
        CHECK(std::int64_t{t.in_batch} * (1 << t.log_vectors) * launch.strip.images >= batch, "all images");
        std::vector<int> seen(static_cast<std::size_t>(channels * t.count()));
        for (std::int64_t block = 0; block < launch.blocks; ++block) {
          for (int warp = 0; warp < launch.warps; ++warp) {
            const GatherWork work = gather_work(static_cast<std::int32_t>(channels), launch.warps, static_cast<std::uint32_t>(block), warp);
            if (work.rank < channels) ++seen[static_cast<std::size_t>(work.tile * channels + work.rank)];
          }
        }
        CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }), "each row and tile once");

        const WeightGradLaunch grad = weight_grad_launch(c, 2 * channels, 132);
        std::uint32_t next = 0;
        for (std::int32_t split = 0; split < grad.splits; ++split) {
          const SplitRange range = tiles_of_split(static_cast<std::uint32_t>(grad.tiles.count()),
                                                  static_cast<std::uint32_t>(grad.splits), static_cast<std::uint32_t>(split));
          CHECK(range.begin == next && range.end >= next, "splits follow one another");
          next = range.end;
        }
        CHECK(next == grad.tiles.count(), "all tiles");
      }
    }
  }

  begin_case("what indices cannot hold is refused");
  const FedpaiConv2d good{128, 64, 32, 32, 64, 32, 32, 1, 1, FEDPAI_CUDA_F32};
  const auto refused = [&](const auto& change) {
    FedpaiConv2d c = good;
    change(c);
    return check_size(c) == FEDPAI_CUDA_TOO_LARGE;
  };
  CHECK(!refused([](FedpaiConv2d&) {}), "");
  CHECK(refused([](FedpaiConv2d& c) { c.batch = 32768; }), "2^31 elements");
  CHECK(!refused([](FedpaiConv2d& c) { c.batch = 32767; }), "one image less");
  CHECK(refused([](FedpaiConv2d& c) { c.in_channels = std::int64_t{1} << 40; }), "a product beyond 64 bits");
  CHECK(refused([](FedpaiConv2d& c) { c.stride_h = std::int64_t{1} << 24; }), "a stride beyond 31 bits");
  CHECK(refused([](FedpaiConv2d& c) { c.stride_h = c.stride_w = 256; }), "more passes than a grid has");
}

// Every entry in exactly one place of every stream, in the order that the kernels rely on.
FEDPAI_SUITE(cuda_host_streams) {
  std::uint64_t seed = 1;
  for (const ConvCase& c : conv_cases()) {
    begin_case(c.name);
    const ConvData data = make_data(c, seed++);
    const Plan plan(data.mask.data(), shape_of(c));
    const Streams streams(plan, spread_of(c));
    const auto values_once = [&](const std::vector<Entry>& entries) {
      std::vector<std::int32_t> values;
      for (const Entry& entry : entries) values.push_back(entry.value);
      std::sort(values.begin(), values.end());
      bool ascending = static_cast<std::int64_t>(values.size()) == plan.nnz();
      for (std::size_t i = 0; i < values.size(); ++i) ascending = ascending && values[i] == static_cast<std::int32_t>(i);
      return ascending;
    };
    CHECK(values_once(streams.by_output.entries), "forward");
    CHECK(values_once(streams.by_input.entries), "input gradient");
    CHECK(values_once(streams.by_group.entries), "weight gradient");
    for (const RowStream* s : {&streams.by_output, &streams.by_input}) {
      const auto at = [&](std::int32_t pass, std::int32_t row) { return static_cast<std::size_t>(pass * (s->rows + 1) + row); };
      for (std::int32_t pass = 0; pass < s->passes; ++pass) {
        std::int32_t before = static_cast<std::int32_t>(plan.nnz());
        for (std::int32_t rank = 0; rank < s->rows; ++rank) {
          const std::int32_t row = s->row_order[static_cast<std::size_t>(pass * s->rows + rank)];
          const std::int32_t begin = s->row_begin[at(pass, row)], end = s->row_begin[at(pass, row + 1)];
          CHECK(end - begin <= before, "rows by falling length");
          before = end - begin;
          for (std::int32_t e = begin + 1; e < end; ++e) {
            CHECK(s->entries[static_cast<std::size_t>(e)].column >= s->entries[static_cast<std::size_t>(e) - 1].column, "ascending columns");
          }
        }
      }
    }
    std::vector<int> firsts(static_cast<std::size_t>(c.out_channels));
    std::int32_t next = 0;
    for (const Group& group : streams.by_group.groups) {
      CHECK(group.begin == next && group.count >= 0 && group.count <= kGroupEntries, "groups follow one another");
      next = group.begin + group.count;
      firsts[static_cast<std::size_t>(group.row)] += group.first_of_row;
    }
    CHECK(next == plan.nnz(), "all entries");
    CHECK(std::all_of(firsts.begin(), firsts.end(), [](int count) { return count == 1; }), "one group of each row for the bias");
  }
}
