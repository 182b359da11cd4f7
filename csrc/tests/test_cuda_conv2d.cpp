// SPDX-License-Identifier: Apache-2.0
// The CUDA convolution on the CPU: the functions that a GPU's threads run, lane by lane in plain loops over the blocks of
// a launch, against the same reference and cases as the CPU's kernels. Integers of a few bits: compared for equality.
// Clients that share a launch have one mask, and nothing else in common.
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

// Batch-last images of K clients: (K, C, H, W, N), ending where their heap block ends.
template <class T>
struct HostImages {
  HostImages(std::int64_t k, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w)
      : n_(n), c_(c), pixels_(h * w), memory(k * n * c * h * w) {
    for (T& element : memory) assign(element, 1e30F);
  }

  void set(std::int64_t client, const std::vector<double>& values) {
    each(client, [&](T& element, std::size_t i) { assign(element, static_cast<float>(values[i])); });
  }
  void expect(const char* what, std::int64_t client, const std::vector<double>& expected) {
    std::string message;
    each(client, [&](T& element, std::size_t i) {
      T rounded;
      assign(rounded, static_cast<float>(expected[i]));
      if (as_float(element) == as_float(rounded) || !message.empty()) return;
      message = std::string(what) + "[" + std::to_string(i) + " in NCHW order] of client " + std::to_string(client) + " is " +
                std::to_string(as_float(element)) + ", expected " + std::to_string(as_float(rounded));
    });
    CHECK(message.empty(), message);
  }

 private:
  // visit(element, index in NCHW order)
  template <class F>
  void each(std::int64_t client, const F& visit) {
    std::size_t i = 0;
    for (std::int64_t n = 0; n < n_; ++n)
      for (std::int64_t c = 0; c < c_; ++c)
        for (std::int64_t p = 0; p < pixels_; ++p) visit(memory[((client * c_ + c) * pixels_ + p) * n_ + n], i++);
  }

  std::int64_t n_, c_, pixels_;

 public:
  Buffer<T> memory;
};

// ---- operands of several clients --------------------------------------------------------------------------------

// One of each for every client; all with the mask of the first.
struct Clients {
  Clients(const ConvCase& c, std::int64_t count, std::uint64_t seed) : mask(make_data(c, seed).mask) {
    for (std::int64_t k = 0; k < count; ++k) {
      data.push_back(make_data(c, seed + 1000 * static_cast<std::uint64_t>(k)));
      data.back().mask = mask;
      expected.push_back(reference(c, data.back()));
    }
  }
  std::int64_t count() const { return static_cast<std::int64_t>(data.size()); }

  std::vector<std::uint8_t> mask;
  std::vector<ConvData> data;
  std::vector<ConvResult> expected;
};

// What of(client) gives for each of them, one behind the other.
template <class Of>
Buffer<float> stacked(std::int64_t clients, const Of& of) {
  std::vector<double> all;
  for (std::int64_t k = 0; k < clients; ++k) {
    for (const float element : of(static_cast<std::size_t>(k))) all.push_back(element);
  }
  return vector_of<float>(all);
}

// ---- one case ---------------------------------------------------------------------------------------------------

struct Streams {
  Streams(const Plan& plan, const Spread& spread)
      : by_output(forward_stream(plan, spread)), by_input(input_grad_stream(plan, spread)), by_group(weight_grad_stream(plan, spread)) {}

  static FedpaiRowStream view(const RowStream& s) {
    return {s.entries.data(), s.row_begin.data(), s.row_order.data(), static_cast<std::int64_t>(s.entries.size())};
  }
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
FedpaiConv2d conv_of(const ConvCase& c, std::int64_t clients) {
  return {clients, c.batch, c.in_channels, c.height, c.width, c.out_channels, c.out_height(), c.out_width(), c.stride_h, c.stride_w,
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
  Case(const ConvCase& c, const Clients& clients, const Streams& streams)
      : conv_(conv_of<T>(c, clients.count())), clients_(clients), streams_(streams),
        x_(clients.count(), c.batch, c.in_channels, c.height, c.width),
        dy_(clients.count(), c.batch, c.out_channels, c.out_height(), c.out_width()),
        values_(stacked(clients.count(), [&](std::size_t k) { return packed<float>(clients.data[k].w, clients.mask); })),
        bias_(stacked(clients.count(), [&](std::size_t k) { return vector_of<float>(clients.data[k].bias); })) {
    for (std::int64_t k = 0; k < clients.count(); ++k) {
      x_.set(k, clients.data[static_cast<std::size_t>(k)].x);
      dy_.set(k, clients.data[static_cast<std::size_t>(k)].grad_y);
    }
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
    HostImages<T> y(conv_.clients, conv_.batch, conv_.out_channels, conv_.out_h, conv_.out_w);
    run(forward_args<T>(conv_, Streams::view(streams_.by_output), launch, x_.memory.data(), values_.data(), bias_.data(), y.memory.data()), launch);
    for (std::int64_t k = 0; k < conv_.clients; ++k) y.expect("y", k, clients_.expected[static_cast<std::size_t>(k)].y);
  }
  void check_input_grad(const GatherLaunch& launch) const {
    HostImages<T> dx(conv_.clients, conv_.batch, conv_.in_channels, conv_.in_h, conv_.in_w);
    run(input_grad_args<T>(conv_, Streams::view(streams_.by_input), launch, dy_.memory.data(), values_.data(), dx.memory.data()), launch);
    for (std::int64_t k = 0; k < conv_.clients; ++k) dx.expect("grad_x", k, clients_.expected[static_cast<std::size_t>(k)].grad_x);
  }
  void check_weight_grad(const WeightGradLaunch& launch, bool with_bias) const {
    const FedpaiGroupStream stream = streams_.groups();
    Buffer<float> partial(conv_.clients * launch.splits * (stream.entry_count + conv_.out_channels)),
        dvalues(conv_.clients * stream.entry_count), dbias(conv_.clients * conv_.out_channels);
    run(weight_grad_args<T>(conv_, stream, launch, x_.memory.data(), dy_.memory.data(), partial.data(), with_bias), launch, stream.group_count);
    const FinishArgs finish{partial.data(), streams_.by_group.entries.data(), dvalues.data(), with_bias ? dbias.data() : nullptr,
                            static_cast<std::int32_t>(stream.entry_count), static_cast<std::int32_t>(conv_.out_channels), launch.splits};
    run(finish, launch);
    const auto& expected = clients_.expected;
    expect_equal("grad_values", dvalues,
                 stacked(conv_.clients, [&](std::size_t k) { return packed<float>(expected[k].grad_w, clients_.mask); }));
    if (!with_bias) return;
    expect_equal("grad_bias", dbias, stacked(conv_.clients, [&](std::size_t k) { return vector_of<float>(expected[k].grad_bias); }));
  }

  FedpaiConv2d conv_;
  const Clients& clients_;
  const Streams& streams_;
  HostImages<T> x_, dy_;
  Buffer<float> values_, bias_;
};

template <class T>
void check_case(const ConvCase& c, const Clients& clients, const Streams& streams) {
  const bool narrow = sizeof(T) == 2;
  const std::string name = c.name + " clients=" + std::to_string(clients.count()) + " n=" + std::to_string(c.batch) +
                           (narrow ? " bf16" : " f32");
  const Case<T> on_host(c, clients, streams);
  for (const int sms : {1, 132}) {
    begin_case(name + " as on " + std::to_string(sms) + " SMs");
    on_host.check_chosen(sms);
  }
  // Types differ in how elements are moved, and clients in where they begin: neither in which a strip takes.
  if (narrow || clients.count() > 1) return;
  for (const Strip& strip : {Strip{4, 4}, Strip{4, 2}, Strip{4, 1}, Strip{1, 2}}) {
    begin_case(name + " strips of " + std::to_string(strip.images) + " x " + std::to_string(strip.pixels));
    on_host.check_strip(strip);
  }
}

void check_batch(ConvCase c, std::int64_t batch, std::uint64_t seed, std::int64_t count = 1) {
  c.batch = batch;
  const Clients clients(c, count, seed);
  const Plan plan(clients.mask.data(), shape_of(c));
  const Streams streams(plan, spread_of(c));
  check_case<float>(c, clients, streams);
  check_case<BFloat16>(c, clients, streams);
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

FEDPAI_SUITE(cuda_host_conv2d_clients) {
  std::uint64_t seed = 1;
  for (const ConvCase& c : conv_cases()) {
    check_batch(c, std::min<std::int64_t>(c.batch, 3), seed, 2);
    check_batch(c, 4, seed, 5);  // in vectors of four
    ++seed;
  }
}

FEDPAI_SUITE(cuda_host_conv2d_nothing) {
  ConvCase c{"nothing", 0, 5, 7, 6, 8, 3, 3};
  check_batch(c, 0, 1);
  check_batch(c, 0, 1, 3);
  check_batch(c, 4, 1, 0);
}

// A launch for a whole network's layers: every row on every tile once, and splits that share out all tiles.
FEDPAI_SUITE(cuda_host_launch) {
  for (const std::int64_t width : {1, 2, 3, 4, 7, 8, 16, 32, 56}) {
    for (const std::int64_t batch : {1, 4, 12, 64, 128, 200}) {
      for (const std::int64_t channels : {1, 3, 64, 512}) {
        begin_case("width " + std::to_string(width) + " batch " + std::to_string(batch) + " channels " + std::to_string(channels));
        const FedpaiConv2d c{1, batch, channels, width, width, channels, width, width, 1, 1, FEDPAI_CUDA_F32};
        CHECK(check_size(c, channels) == FEDPAI_CUDA_OK, "");
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

        // Clients fill the device in the place of splits and of shorter strips.
        FedpaiConv2d shared = c;
        std::int32_t splits = grad.splits;
        int pixels = launch.strip.pixels;
        for (shared.clients = 2; shared.clients <= 8192; shared.clients *= 2) {
          const std::int32_t fewer = weight_grad_launch(shared, 2 * channels, 132).splits;
          const int longer = forward_launch(shared, 132).strip.pixels;
          CHECK(fewer <= splits && fewer * 2 >= splits, "half the splits for twice the clients");
          CHECK(longer >= pixels, "strips as long or longer");
          splits = fewer, pixels = longer;
        }
        CHECK(splits == 1, "no splits where the clients are enough");
        CHECK(pixels == choose_strip({width, width, batch, 1, 1}).pixels, "whole strips there");
      }
    }
  }

  begin_case("what indices cannot hold is refused");
  const FedpaiConv2d good{1, 128, 64, 32, 32, 64, 32, 32, 1, 1, FEDPAI_CUDA_F32};
  const auto refused = [&](const auto& change) {
    FedpaiConv2d c = good;
    change(c);
    return check_size(c, 1000) == FEDPAI_CUDA_TOO_LARGE;
  };
  CHECK(!refused([](FedpaiConv2d&) {}), "");
  CHECK(refused([](FedpaiConv2d& c) { c.batch = 32768; }), "2^31 elements");
  CHECK(!refused([](FedpaiConv2d& c) { c.batch = 32767; }), "one image less");
  CHECK(refused([](FedpaiConv2d& c) { c.clients = 256; }), "2^31 elements of all clients");
  CHECK(!refused([](FedpaiConv2d& c) { c.clients = 255; }), "one client less");
  const auto tiny = [](std::int64_t clients, std::int64_t entry_count) {
    return check_size({clients, 1, 1, 1, 1, 1, 1, 1, 1, 1, FEDPAI_CUDA_F32}, entry_count);
  };
  CHECK(tiny(65535, 32768) == FEDPAI_CUDA_OK, "");
  CHECK(tiny(65535, 32769) == FEDPAI_CUDA_TOO_LARGE, "2^31 values of all clients");
  CHECK(tiny(65536, 1) == FEDPAI_CUDA_TOO_LARGE, "more clients than a grid has");
  CHECK(tiny(-1, 1) == FEDPAI_CUDA_TOO_LARGE, "a negative number of clients");
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
