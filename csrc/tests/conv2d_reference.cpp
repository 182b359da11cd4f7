// SPDX-License-Identifier: Apache-2.0
#include "conv2d_reference.h"

namespace fedpai::tests {
namespace {

constexpr int kBound = 3;

std::vector<double> integers(Random& random, std::int64_t size) {
  std::vector<double> values(static_cast<std::size_t>(size));
  for (double& value : values) value = random.integer(kBound);
  return values;
}

// Blocks of channels, each tap by itself; cut inside a group of the convolution.
std::vector<std::uint8_t> mask_of(const ConvCase& c, Random& random) {
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(c.w_size()));
  const std::int64_t rows_per_group = c.out_channels / c.groups, taps = c.kernel_h * c.kernel_w;
  const std::int64_t row = c.group_channels() * taps;
  for (std::int64_t o = 0; o < c.out_channels; ++o) {
    for (std::int64_t i = 0; i < c.group_channels(); ++i) {
      for (std::int64_t t = 0; t < taps; ++t) {
        const std::int64_t first_row = o - o % rows_per_group % c.block_rows, first_column = i - i % c.block_columns;
        std::uint8_t& kept = mask[static_cast<std::size_t>(o * row + i * taps + t)];
        kept = o == first_row && i == first_column
                   ? random.uniform() < c.density
                   : mask[static_cast<std::size_t>(first_row * row + first_column * taps + t)];
      }
    }
  }
  if (c.lost > 0) {
    for (std::uint8_t& kept : mask) kept = kept != 0 && random.uniform() >= c.lost;
  }
  return mask;
}

}  // namespace

ConvData make_data(const ConvCase& c, std::uint64_t seed) {
  Random random(seed);
  ConvData data;
  data.mask = mask_of(c, random);
  data.mask[random.next() % data.mask.size()] = 1;  // a plan needs one
  data.x = integers(random, c.x_size());
  data.w = integers(random, c.w_size());
  data.bias = integers(random, c.out_channels);
  data.grad_y = integers(random, c.y_size());
  return data;
}

ConvResult reference(const ConvCase& c, const ConvData& data) {
  const auto zeros = [](std::int64_t size) { return std::vector<double>(static_cast<std::size_t>(size)); };
  ConvResult result{zeros(c.y_size()), zeros(c.x_size()), zeros(c.w_size()), zeros(c.out_channels)};
  const std::int64_t out_per_group = c.out_channels / c.groups;
  for (std::int64_t n = 0; n < c.batch; ++n) {
    for (std::int64_t o = 0; o < c.out_channels; ++o) {
      for (std::int64_t p = 0; p < c.out_height(); ++p) {
        for (std::int64_t q = 0; q < c.out_width(); ++q) {
          const auto at_y = static_cast<std::size_t>(((n * c.out_channels + o) * c.out_height() + p) * c.out_width() + q);
          const double grad = data.grad_y[at_y];
          double sum = data.bias[static_cast<std::size_t>(o)];
          for (std::int64_t g = 0; g < c.group_channels(); ++g) {
            const std::int64_t channel = o / out_per_group * c.group_channels() + g;
            for (std::int64_t r = 0; r < c.kernel_h; ++r) {
              const std::int64_t h = p * c.stride_h - c.pad_h + r * c.dilation_h;
              if (h < 0 || h >= c.height) continue;
              for (std::int64_t s = 0; s < c.kernel_w; ++s) {
                const std::int64_t w = q * c.stride_w - c.pad_w + s * c.dilation_w;
                if (w < 0 || w >= c.width) continue;
                const auto at_w =
                    static_cast<std::size_t>(((o * c.group_channels() + g) * c.kernel_h + r) * c.kernel_w + s);
                if (!data.mask[at_w]) continue;
                const auto at_x = static_cast<std::size_t>(((n * c.in_channels + channel) * c.height + h) * c.width + w);
                sum += data.w[at_w] * data.x[at_x];
                result.grad_x[at_x] += data.w[at_w] * grad;
                result.grad_w[at_w] += data.x[at_x] * grad;
              }
            }
          }
          result.y[at_y] = sum;
          result.grad_bias[static_cast<std::size_t>(o)] += grad;
        }
      }
    }
  }
  return result;
}

std::vector<ConvCase> conv_cases() {
  std::vector<ConvCase> cases;
  // name, N, C, H, W, OC, KH, KW
  ConvCase plain{"3x3_pad1", 16, 7, 9, 6, 11, 3, 3};
  plain.pad_h = plain.pad_w = 1;

  for (std::int64_t batch = 1; batch <= 65; ++batch) {
    ConvCase c = plain;
    c.name = "batch_" + std::to_string(batch);
    c.batch = batch;
    c.in_channels = 3;
    c.height = 5;
    c.width = 4;
    c.out_channels = 4;
    cases.push_back(c);
  }

  const auto add = [&cases](ConvCase c, const std::string& name) {
    for (const std::int64_t batch : {1, 5, 16, 33}) {
      c.batch = batch;
      c.name = name + "_n" + std::to_string(batch);
      cases.push_back(c);
    }
  };
  add(plain, "3x3_pad1");

  const auto varied = [&](const std::string& name, auto change) {
    ConvCase c = plain;
    change(c);
    add(c, name);
  };
  varied("1x1", [](ConvCase& c) { c.kernel_h = c.kernel_w = 1, c.pad_h = c.pad_w = 0; });
  varied("1x1_stride2", [](ConvCase& c) { c.kernel_h = c.kernel_w = 1, c.pad_h = c.pad_w = 0, c.stride_h = c.stride_w = 2; });
  varied("5x5_pad2", [](ConvCase& c) { c.kernel_h = c.kernel_w = 5, c.pad_h = c.pad_w = 2; });
  varied("kernel_not_square", [](ConvCase& c) { c.kernel_h = 2, c.kernel_w = 5, c.pad_h = 0, c.pad_w = 3; });
  varied("no_padding", [](ConvCase& c) { c.pad_h = c.pad_w = 0; });
  varied("stride_2_odd_size", [](ConvCase& c) { c.stride_h = c.stride_w = 2, c.height = 11, c.width = 7; });
  varied("stride_2_even_size", [](ConvCase& c) { c.stride_h = c.stride_w = 2, c.height = 8, c.width = 10; });
  varied("stride_3_1", [](ConvCase& c) { c.stride_h = 3; });
  varied("stride_larger_than_kernel", [](ConvCase& c) { c.stride_h = 4, c.stride_w = 5, c.height = 13, c.width = 12; });
  varied("dilation_2", [](ConvCase& c) { c.dilation_h = c.dilation_w = 2, c.pad_h = c.pad_w = 2; });
  varied("taps_that_only_read_padding", [](ConvCase& c) { c.dilation_h = c.dilation_w = 40, c.pad_h = c.pad_w = 40; });
  varied("padding_larger_than_image", [](ConvCase& c) { c.pad_h = 13, c.pad_w = 12; });
  varied("dilation_3_1_stride_2", [](ConvCase& c) { c.dilation_h = 3, c.stride_h = c.stride_w = 2, c.pad_h = 2; });
  varied("padding_larger_than_kernel", [](ConvCase& c) { c.pad_h = 4, c.pad_w = 5; });
  varied("padding_everywhere_tiny_image", [](ConvCase& c) { c.height = c.width = 1; });
  varied("image_2x2", [](ConvCase& c) { c.height = c.width = 2, c.in_channels = 19, c.out_channels = 23; });
  varied("groups", [](ConvCase& c) { c.groups = 3, c.in_channels = 6, c.out_channels = 9; });
  varied("depthwise", [](ConvCase& c) { c.groups = c.in_channels = c.out_channels = 6, c.density = 0.6; });
  varied("depthwise_multiplier", [](ConvCase& c) { c.groups = c.in_channels = 5, c.out_channels = 10, c.stride_h = 2; });
  varied("same_even_kernel", [](ConvCase& c) { c.kernel_h = 2, c.kernel_w = 4, c.pad_h = 0, c.pad_more_h = c.pad_more_w = 1; });
  varied("one_nonzero", [](ConvCase& c) { c.density = 0.0; });
  varied("empty_rows_and_columns", [](ConvCase& c) { c.density = 0.01; });
  varied("full_dense", [](ConvCase& c) { c.density = 1.1; });
  varied("one_channel", [](ConvCase& c) { c.in_channels = c.out_channels = 1, c.density = 0.7; });
  varied("matrix", [](ConvCase& c) {
    c.kernel_h = c.kernel_w = c.height = c.width = 1, c.pad_h = c.pad_w = 0, c.in_channels = 53, c.out_channels = 37;
  });
  varied("wide_rows", [](ConvCase& c) { c.height = 3, c.width = 37, c.in_channels = 2; });
  // More vectors a row than register tiles have, for the longest vectors too, and more entries than go through a row together.
  varied("wide_rows_dense", [](ConvCase& c) { c.height = 6, c.width = 37, c.in_channels = 2, c.density = 0.9; });
  varied("wide_rows_strided", [](ConvCase& c) {
    c.height = 7, c.width = 59, c.in_channels = 2, c.density = 0.9, c.stride_h = c.stride_w = 2;
  });
  varied("tall_columns", [](ConvCase& c) { c.height = 37, c.width = 3, c.in_channels = 2; });
  varied("many_channels", [](ConvCase& c) { c.in_channels = 67, c.out_channels = 41, c.height = c.width = 4, c.density = 0.1; });
  // Panels of every height, with what does not fill one.
  for (const std::int64_t rows : {2, 3, 4, 7, 16}) {
    varied("blocks_of_" + std::to_string(rows), [&](ConvCase& c) { c.block_rows = rows, c.out_channels = 18; });
  }
  varied("square_blocks", [](ConvCase& c) { c.block_rows = c.block_columns = 4, c.in_channels = 10, c.out_channels = 13; });
  varied("wide_blocks", [](ConvCase& c) { c.block_columns = 8, c.in_channels = 19; });
  varied("blocks_of_1x1", [](ConvCase& c) { c.kernel_h = c.kernel_w = 1, c.pad_h = c.pad_w = 0, c.block_rows = 4; });
  varied("blocks_strided", [](ConvCase& c) { c.block_rows = c.block_columns = 4, c.stride_h = c.stride_w = 2; });
  varied("blocks_in_groups", [](ConvCase& c) { c.groups = 2, c.in_channels = 6, c.out_channels = 14, c.block_rows = 4; });
  varied("one_block", [](ConvCase& c) { c.block_rows = c.block_columns = 64, c.density = 1.1; });
  varied("empty_block_rows", [](ConvCase& c) { c.block_rows = 4, c.out_channels = 40, c.density = 0.01; });
  varied("nearly_blocks", [](ConvCase& c) { c.block_rows = c.block_columns = 8, c.out_channels = 21, c.lost = 0.1; });
  varied("nearly_dense", [](ConvCase& c) { c.density = 0.9; });
  return cases;
}

}  // namespace fedpai::tests
