// SPDX-License-Identifier: Apache-2.0
// Forward pass and input gradient of the sparse convolution: every dest pixel gathers what its row's entries name.
//
//   dest[row, q * dest_step + pass, n] = bias[row] + sum over entries e of (pass, row)
//                                        values[e.value] * source[e.column, q * source_step + (e.dy, e.dx), n]
//
// What lies outside the source is zero. dest is overwritten; all pixels of all rows, also of rows without entries.
//
// One launch serves K clients that share the entries, each with images, values and a bias of its own.
//
// Layout: source and dest are batch-last without gaps, (K, C, H, W, N), float32 or BFloat16, fewer than 2^31 elements, and with
// V = 4 images a lane aligned to four elements: the channels of client k + 1 follow those of client k, so a client is an
// offset to the channel. values (K, entries) and bias (K, rows) are float32, sums are float32. streams.h has the entries.
//
// A warp computes one row on one tile (tiles.h): a lane keeps P pixels x V images in registers while the row's entries
// pass by, 32 at a time: each lane scales one entry to elements and fetches its weight into shared memory, from where all
// read them by broadcast. Weights and offsets are the same in all lanes, so nothing diverges but the border.
//
//   operand     one vector load per V multiply-adds and pixel; the 16 bytes of a record serve 32 * P * V of them
//   L1          4 bytes (BFloat16: 2) per multiply-add at 128 bytes per clock and SM, of 128 multiply-adds: 1/4 (BFloat16: 1/2)
//               of the float32 peak is the ceiling
//   reuse       the warps of a block compute rows of nearly equal length on one tile. Entries ascend by column, so they
//               pass over the source's channels together: a line that one of them brings into L1 serves the others,
//               density * taps * rows of the block times on average
//   DRAM        bytes = (source + dest) * element size + 20 * entries * tiles, operations = 2 * entries * pixels * N
//   clients     K times all that, but for 16 of the 20 bytes, which are the same for all of them
//
// For a 3 x 3 layer of C channels that gives the floors max(bytes / 3.35 TB/s, operations / 16.7 TFLOP/s) of an H100:
// batch 128, density 0.02, float32: 64 channels at 32 x 32: 67 MB and 0.19 GFLOP, so 20 us, of DRAM; 512 channels at
// 4 x 4: 8.4 MB and 0.19 GFLOP, so 12 us, of L1. The latter for ten clients with batches of 32: 0.48 GFLOP, so 29 us in one
// launch, where each alone has work for 2.9 us, about what it takes to launch it.
// Measured: not yet, no GPU was at hand (docs/gpu.md says how).
//
// Rows longest first inside a tile (Sputnik's row swizzle), so that what a block waits for at its end is short.
#pragma once

#include "cuda/common/vector.h"
#include "cuda/common/warp.h"
#include "cuda/conv2d/streams.h"
#include "cuda/conv2d/tiles.h"

namespace fedpai::cuda {

template <class T>
struct GatherArgs {
  const T* source;
  T* dest;
  const float* values;
  const float* bias;  // null: none
  const Entry* entries;
  const std::int32_t* row_begin;
  const std::int32_t* row_order;
  Tiles tiles;  // of the first pass, which no other exceeds
  std::int32_t entry_count, rows, columns, batch;
  std::int32_t source_h, source_w, dest_h, dest_w;
  std::int32_t source_step_h, source_step_w, dest_step_h, dest_step_w;
};

// An entry, scaled. Offsets wrap: the sum of offset and a lane's position is exact wherever the pixel lies in the source.
struct alignas(16) Record {
  float weight;
  std::uint32_t offset;  // elements
  std::int32_t dy, dx;
};

// Reaches no pixel from anywhere: what fills the last records of a row.
constexpr std::int32_t kNowhere = INT32_MIN;

// Vector loads that a lane has under way at a time.
constexpr int kLoadsInFlight = 4;

FEDPAI_DEVICE std::uint32_t element_at(std::int32_t channel, std::int32_t y, std::int32_t x, std::int32_t height,
                                       std::int32_t width, std::int32_t batch) {
  const auto u = [](std::int32_t i) { return static_cast<std::uint32_t>(i); };
  return ((u(channel) * u(height) + u(y)) * u(width) + u(x)) * u(batch);
}

FEDPAI_DEVICE bool within(std::int32_t i, std::int32_t extent) {
  return static_cast<std::uint32_t>(i) < static_cast<std::uint32_t>(extent);
}

// A strip of the source, for the lanes that walk it.
struct SourceStrip {
  std::uint32_t at;    // of its first pixel, were the entry's offset none
  std::uint32_t step;  // from one pixel to the next, elements
  std::int32_t y, x, step_x;
  bool live;

  // x_extent: the source's width where this entry's row lies in the source, else 0, which no pixel is within.
  FEDPAI_DEVICE std::int32_t extent(const Record& record, std::int32_t height, std::int32_t width) const {
    return live && within(y + record.dy, height) ? width : 0;
  }
};

template <int V, int P, class T>
FEDPAI_DEVICE void load_strip(const T* source, const SourceStrip& strip, const Record& record, std::int32_t height,
                              std::int32_t width, Floats<V> (&to)[P]) {
  const std::int32_t extent = strip.extent(record, height, width);
  FEDPAI_DEVICE_UNROLL
  for (int p = 0; p < P; ++p) {
    const bool inside = within(strip.x + p * strip.step_x + record.dx, extent);
    to[p] = inside ? load<V>(source + (strip.at + record.offset + static_cast<std::uint32_t>(p) * strip.step)) : zeros<V>();
  }
}

// Computes row `row` of client `client` on tile `tile` in pass `pass`. records: room for kWarp, of this warp alone.
template <class T, int V, int P, class Warp>
FEDPAI_DEVICE void gather_row(const GatherArgs<T>& a, const Warp& warp, Record* records, std::int32_t row,
                              std::uint32_t tile, std::int32_t pass, std::int32_t client) {
  static_assert(kLoadsInFlight % P == 0, "whole entries are loaded together");
  constexpr int together = kLoadsInFlight / P;
  static_assert(kWarp % together == 0, "records are filled up to a multiple of this");
  struct Lane {
    Floats<V> sum[P];
    SourceStrip strip;
    Place place;
  };
  typename Warp::template PerLane<Lane> state;
  const std::int32_t first_y = pass / a.dest_step_w, first_x = pass % a.dest_step_w;
  // How much of the dest this pass computes: ceil((extent - first) / step).
  const std::int32_t grid_h = (a.dest_h - first_y + a.dest_step_h - 1) / a.dest_step_h;
  const std::int32_t grid_w = (a.dest_w - first_x + a.dest_step_w - 1) / a.dest_step_w;
  const std::int32_t own_row = client * a.rows + row;
  const float first = a.bias != nullptr ? a.bias[own_row] : 0.0f;

  // Locate.
  warp.lanes([&](int lane) {
    Lane& own = state[lane];
    const Place place = place_of<V, P>(a.tiles, tile, lane);
    const std::int32_t y = place.y * a.source_step_h, x = place.x * a.source_step_w;
    own.place = place;
    own.strip = {element_at(client * a.columns, y, x, a.source_h, a.source_w, a.batch) + static_cast<std::uint32_t>(place.n),
                 static_cast<std::uint32_t>(a.source_step_w) * static_cast<std::uint32_t>(a.batch), y, x, a.source_step_w,
                 place.y < grid_h && place.n < a.batch};
    FEDPAI_DEVICE_UNROLL
    for (int p = 0; p < P; ++p) {
      FEDPAI_DEVICE_UNROLL
      for (int v = 0; v < V; ++v) own.sum[p].at[v] = first;
    }
  });

  const std::int32_t* const begin_of = a.row_begin + static_cast<std::int64_t>(pass) * (a.rows + 1) + row;
  const std::int32_t end = begin_of[1];
  for (std::int32_t begin = begin_of[0]; begin < end; begin += kWarp) {
    // Stage: each lane one entry.
    warp.lanes([&](int lane) {
      Record record{0.0f, 0, kNowhere, 0};
      if (begin + lane < end) {
        const Entry entry = a.entries[begin + lane];
        record = {a.values[client * a.entry_count + entry.value],
                  element_at(entry.column, entry.dy, entry.dx, a.source_h, a.source_w, a.batch), entry.dy, entry.dx};
      }
      records[lane] = record;
    });
    // Accumulate.
    const int count = end - begin < kWarp ? end - begin : kWarp;
    warp.lanes([&](int lane) {
      Lane& own = state[lane];
      FEDPAI_DEVICE_ROLLED
      for (int e = 0; e < count; e += together) {
        Floats<V> loaded[together][P];
        float weight[together];
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          const Record record = records[e + k];
          weight[k] = record.weight;
          load_strip<V, P>(a.source, own.strip, record, a.source_h, a.source_w, loaded[k]);
        }
        FEDPAI_DEVICE_UNROLL
        for (int k = 0; k < together; ++k) {
          FEDPAI_DEVICE_UNROLL
          for (int p = 0; p < P; ++p) {
            FEDPAI_DEVICE_UNROLL
            for (int v = 0; v < V; ++v) {
              own.sum[p].at[v] = fused_multiply_add(weight[k], loaded[k][p].at[v], own.sum[p].at[v]);
            }
          }
        }
      }
    });
  }

  // Write.
  warp.lanes([&](int lane) {
    const Lane& own = state[lane];
    if (!own.strip.live) return;
    const std::int32_t y = own.place.y * a.dest_step_h + first_y;
    FEDPAI_DEVICE_UNROLL
    for (int p = 0; p < P; ++p) {
      if (own.place.x + p >= grid_w) break;
      const std::int32_t x = (own.place.x + p) * a.dest_step_w + first_x;
      store(a.dest + (element_at(own_row, y, x, a.dest_h, a.dest_w, a.batch) + static_cast<std::uint32_t>(own.place.n)), own.sum[p]);
    }
  });
}

}  // namespace fedpai::cuda
