// SPDX-License-Identifier: Apache-2.0
// The sparse convolution against seven plain loops: every case in several memory layouts and thread counts, float32 and
// float64, compared for equality; and the same bits again on a second run with data that does round.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "check.h"
#include "conv2d_operands.h"
#include "cpu/dispatch.h"

using namespace fedpai;
using namespace fedpai::tests;

namespace {

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
  expect_equal("joint grad_x", operands.joint_grad_x, expected.grad_x);
  expect_equal("joint grad_values", operands.joint_grad_values, packed<T>(expected.grad_w, data.mask));
  expect_equal("joint grad_bias", operands.joint_grad_bias, vector_of<T>(expected.grad_bias));
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
    CHECK(same_bits(first.joint_grad_x.memory(), again.joint_grad_x.memory()), "joint grad_x");
    CHECK(same_bits(first.joint_grad_values, again.joint_grad_values), "joint grad_values");
    CHECK(same_bits(first.joint_grad_bias, again.joint_grad_bias), "joint grad_bias");
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

// A result too large for the caches goes past them: more and fewer entries a row than one round takes, and images that leave
// no line to two rows.
FEDPAI_SUITE(conv2d_past_caches) {
  force_walk(Walk::kStreamed);
  for (const bool many_out : {true, false}) {
    for (const double density : {0.2, 0.9}) {
      ConvCase c{many_out ? "large_output" : "large_input", 64, 2, 32, 32, 2, 3, 3};
      (many_out ? c.out_channels : c.in_channels) = 33;
      c.pad_h = c.pad_w = 1;
      c.density = density;
      const ConvData data = make_data(c, 5);
      const ConvResult expected = reference(c, data);
      const CompiledPlan plan(data.mask.data(), shape_of(c));
      check_exact<float>(c, data, expected, plan, Layout::kBatchLast, 2);
      check_exact<double>(c, data, expected, plan, Layout::kBatchLast, 1);
    }
  }
  force_walk(Walk::kChoose);
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
  conv2d_weight_grad<float>(plan, geometry_of(c), x.images(), nullptr, grad_y, operands.grad_values.data(),
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
  conv2d_forward<float>(plan, geometry_of(c), nothing, nullptr, values.data(), nullptr, {&unread, 1, 1, 1, 1}, 2);
  conv2d_input_grad<float>(plan, geometry_of(c), nothing, values.data(), {&unread, 1, 1, 1, 1}, 2);
  conv2d_weight_grad<float>(plan, geometry_of(c), nothing, nullptr, nothing, grad_values.data(), grad_bias.data(), 2);
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
