// SPDX-License-Identifier: Apache-2.0
#include "cpu/pool/pool.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"

namespace fedpai {
namespace {

// Input elements that one more thread must have to walk before waking it pays.
constexpr std::int64_t kElementsPerThread = 16384;

// Owns the tables that a PoolAxis points into.
class Axis {
 public:
  static Axis windows(const PoolSpec& spec, bool count_include_pad) {
    Axis axis(spec.in, spec.out, spec.kernel, spec.dilation);
    for (std::int64_t o = 0; o < spec.out; ++o) {
      const std::int64_t start = o * spec.stride - spec.padding;
      const std::int64_t first = start < 0 ? (-start + spec.dilation - 1) / spec.dilation : 0;
      const std::int64_t begin = start + first * spec.dilation;
      const std::int64_t inside = begin < spec.in ? (spec.in - 1 - begin) / spec.dilation + 1 : 0;
      const std::int64_t taps = std::clamp<std::int64_t>(spec.kernel - first, 0, inside);
      const std::int64_t padded = std::min(start + spec.kernel, spec.in + spec.padding) - start;
      axis.add(begin, taps, first, count_include_pad ? padded : taps);
    }
    return axis.close();
  }

  static Axis adaptive(const PoolSpec& spec) {
    Axis axis(spec.in, spec.out, spec.in, 1);
    for (std::int64_t o = 0; o < spec.out; ++o) {
      const std::int64_t begin = o * spec.in / spec.out;
      const std::int64_t end = ((o + 1) * spec.in + spec.out - 1) / spec.out;
      axis.add(begin, end - begin, 0, end - begin);
    }
    return axis.close();
  }

  void fix_divisor(std::int64_t divisor) { std::fill(extent_.begin(), extent_.end(), static_cast<int>(divisor)); }

  PoolAxis view() const {
    return {in_,           out_,           kernel_,        step_,         begin_.data(), taps_.data(),
            first_.data(), extent_.data(), entries_.data(), window_.data(), tap_.data()};
  }

 private:
  using Table = std::vector<std::int32_t>;

  Axis(std::int64_t in, std::int64_t out, std::int64_t kernel, std::int64_t step)
      : in_(in), out_(out), kernel_(kernel), step_(step) {}

  void add(std::int64_t begin, std::int64_t taps, std::int64_t first, std::int64_t extent) {
    begin_.push_back(static_cast<std::int32_t>(taps > 0 ? begin : 0));
    taps_.push_back(static_cast<std::int32_t>(taps));
    first_.push_back(static_cast<std::int32_t>(taps > 0 ? first : 0));
    extent_.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(extent, 1)));
  }

  // Turns the windows' lists of inputs into the inputs' lists of windows.
  Axis&& close() {
    entries_.assign(static_cast<std::size_t>(in_) + 1, 0);
    for_each_tap([&](std::size_t in, std::int32_t, std::int32_t) { ++entries_[in + 1]; });
    for (std::size_t i = 0; i < static_cast<std::size_t>(in_); ++i) entries_[i + 1] += entries_[i];
    window_.resize(static_cast<std::size_t>(entries_.back()));
    tap_.resize(window_.size());
    Table next(entries_.begin(), entries_.end() - 1);
    for_each_tap([&](std::size_t in, std::int32_t window, std::int32_t tap) {
      const auto e = static_cast<std::size_t>(next[in]++);
      window_[e] = window;
      tap_[e] = tap;
    });
    return std::move(*this);
  }

  template <class F>
  void for_each_tap(const F& f) const {
    for (std::size_t o = 0; o < begin_.size(); ++o) {
      for (std::int32_t t = 0; t < taps_[o]; ++t) {
        f(static_cast<std::size_t>(begin_[o] + t * step_), static_cast<std::int32_t>(o), first_[o] + t);
      }
    }
  }

  std::int64_t in_, out_, kernel_, step_;
  Table begin_, taps_, first_, extent_, entries_, window_, tap_;
};

struct Axes {
  Axis rows, columns;

  static Axes windows(const PoolShape& shape, PoolDivisor divisor) {
    Axes axes{Axis::windows(shape.rows, divisor.count_include_pad),
              Axis::windows(shape.columns, divisor.count_include_pad)};
    if (divisor.fixed != 0) {
      axes.rows.fix_divisor(divisor.fixed);
      axes.columns.fix_divisor(1);
    }
    return axes;
  }
  static Axes adaptive(const PoolShape& shape) {
    return {Axis::adaptive(shape.rows), Axis::adaptive(shape.columns)};
  }
};

// Elements of a plane of inputs, of a plane of outputs, and of one row of each.
struct Sizes {
  explicit Sizes(const PoolShape& s)
      : in_row(s.columns.in * s.batch), out_row(s.columns.out * s.batch), in(s.rows.in * in_row), out(s.rows.out * out_row) {}
  std::int64_t in_row, out_row, in, out;
};

// Runs body(channel, row) over `rows` rows of every channel.
template <class F>
void for_rows(const PoolShape& shape, std::int64_t rows, int threads, const F& body) {
  const std::int64_t elements = shape.channels * Sizes(shape).in;
  const int used =
      static_cast<int>(std::clamp<std::int64_t>(elements / kElementsPerThread, 1, std::max(threads, 1)));
#pragma omp parallel for num_threads(used) schedule(static)
  for (std::int64_t i = 0; i < shape.channels * rows; ++i) body(i / rows, i % rows);
}

template <class T>
void avg_fwd(const PoolShape& shape, const Axes& axes, const T* x, T* y, int threads) {
  const auto kernel = pool_kernels<T>().avg_fwd;
  const PoolAxis rows = axes.rows.view(), columns = axes.columns.view();
  const Sizes size(shape);
  for_rows(shape, shape.rows.out, threads, [&](std::int64_t c, std::int64_t r) {
    kernel(x + c * size.in, y + c * size.out + r * size.out_row, rows, columns, shape.batch, r);
  });
}

template <class T>
void avg_dx(const PoolShape& shape, const Axes& axes, const T* dy, T* dx, int threads) {
  const auto kernel = pool_kernels<T>().avg_dx;
  const PoolAxis rows = axes.rows.view(), columns = axes.columns.view();
  const Sizes size(shape);
  for_rows(shape, shape.rows.in, threads, [&](std::int64_t c, std::int64_t r) {
    kernel(dy + c * size.out, dx + c * size.in + r * size.in_row, rows, columns, shape.batch, r);
  });
}

}  // namespace

template <class T>
void max_pool2d_fwd(const PoolShape& shape, const T* x, T* y, typename PoolTap<T>::type* argmax, int threads) {
  const auto kernel = pool_kernels<T>().max_fwd;
  const Axes axes = Axes::windows(shape, {false, 0});
  const PoolAxis rows = axes.rows.view(), columns = axes.columns.view();
  const Sizes size(shape);
  for_rows(shape, shape.rows.out, threads, [&](std::int64_t c, std::int64_t r) {
    const std::int64_t at = c * size.out + r * size.out_row;
    kernel(x + c * size.in, y + at, argmax + at, rows, columns, shape.batch, r);
  });
}

template <class T>
void max_pool2d_dx(const PoolShape& shape, const T* dy, const typename PoolTap<T>::type* argmax, T* dx, int threads) {
  const auto kernel = pool_kernels<T>().max_dx;
  const Axes axes = Axes::windows(shape, {false, 0});
  const PoolAxis rows = axes.rows.view(), columns = axes.columns.view();
  const Sizes size(shape);
  for_rows(shape, shape.rows.in, threads, [&](std::int64_t c, std::int64_t r) {
    kernel(dy + c * size.out, argmax + c * size.out, dx + c * size.in + r * size.in_row, rows, columns, shape.batch,
           r);
  });
}

template <class T>
void avg_pool2d_fwd(const PoolShape& shape, PoolDivisor divisor, const T* x, T* y, int threads) {
  avg_fwd(shape, Axes::windows(shape, divisor), x, y, threads);
}

template <class T>
void avg_pool2d_dx(const PoolShape& shape, PoolDivisor divisor, const T* dy, T* dx, int threads) {
  avg_dx(shape, Axes::windows(shape, divisor), dy, dx, threads);
}

template <class T>
void adaptive_avg_pool2d_fwd(const PoolShape& shape, const T* x, T* y, int threads) {
  avg_fwd(shape, Axes::adaptive(shape), x, y, threads);
}

template <class T>
void adaptive_avg_pool2d_dx(const PoolShape& shape, const T* dy, T* dx, int threads) {
  avg_dx(shape, Axes::adaptive(shape), dy, dx, threads);
}

#define FEDPAI_INSTANTIATE(T)                                                                       \
  template void max_pool2d_fwd<T>(const PoolShape&, const T*, T*, PoolTap<T>::type*, int);          \
  template void max_pool2d_dx<T>(const PoolShape&, const T*, const PoolTap<T>::type*, T*, int);     \
  template void avg_pool2d_fwd<T>(const PoolShape&, PoolDivisor, const T*, T*, int);                \
  template void avg_pool2d_dx<T>(const PoolShape&, PoolDivisor, const T*, T*, int);                 \
  template void adaptive_avg_pool2d_fwd<T>(const PoolShape&, const T*, T*, int);                    \
  template void adaptive_avg_pool2d_dx<T>(const PoolShape&, const T*, T*, int);
FEDPAI_INSTANTIATE(float)
FEDPAI_INSTANTIATE(double)
#undef FEDPAI_INSTANTIATE

}  // namespace fedpai
