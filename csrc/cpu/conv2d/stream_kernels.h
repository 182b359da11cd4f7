// SPDX-License-Identifier: Apache-2.0
// What one instruction set provides for the streamed walk: rows of the source, read where they lie and not packed.
// The loops over channels, zones and threads are in run_stream.cpp and know no SIMD.
//
// The arguments describe a rectangle of dest positions, rows x pixels x `run` adjacent elements (images, or whole pixels
// of images where both sides step from one to the next), and the entries that all of its positions read in full.
#pragma once

#include <cstdint>

namespace fedpai {

struct StreamShape {
  std::int64_t rows, source_row, dest_row;
  std::int64_t pixels, source_pixel, dest_pixel;
  std::int64_t run;
};

template <class T>
struct StreamArgs {
  StreamShape shape;
  const T* source;              // of the first position, unshifted, in source channel 0
  const std::int32_t* offset;   // per entry, elements from `source`
  const T* value;               // per entry
  std::int64_t entries;
  T* dest;
  T start;          // the bias
  bool accumulate;  // add to what dest holds instead of to `start`
  bool past_caches = false;  // store past the caches where rows allow it; no other call adds to them
};

template <class T>
struct StreamGradArgs {
  StreamShape shape;
  const T* source;
  const std::int32_t* offset;
  const std::int32_t* entry;  // where each entry's sum lies, in vectors from `sums`; null: one after the other
  std::int64_t entries;
  const T* dest;
  T* sums;      // [vector][lane], added to
  T* bias_sum;  // [lane], added to; or null
};

// Both gradients at once: the source is dy, the dest dx, and x lies as dx does.
template <class T>
struct StreamBackwardArgs {
  StreamShape shape;
  const T* source;
  const std::int32_t* offset;
  const T* value;
  const std::int32_t* entry;  // as above
  std::int64_t entries;
  const T* x;
  T* dest;
  T* sums;
  bool accumulate;
  bool past_caches;
};

template <class T>
struct StreamKernels {
  void (*accumulate)(const StreamArgs<T>&);
  void (*weight_grad)(const StreamGradArgs<T>&);
  void (*backward)(const StreamBackwardArgs<T>&);
};

}  // namespace fedpai
