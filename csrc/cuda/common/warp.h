// SPDX-License-Identifier: Apache-2.0
// A warp, as kernels see it: 32 lanes that take one step after another together.
//
// Kernels are written as steps, warp.lanes([&](int lane) {...}), with what a lane keeps from one step to the next in a
// PerLane<State>. What a step writes to memory that the warp shares, the next step of every lane sees. On the device a
// thread runs its own lane and waits for the others between steps. HostWarp runs all lanes of a step in a plain loop:
// the same code, lane by lane, for tests. A step must therefore not read what another lane writes in the same step,
// and what is between steps must come out alike in all lanes.
//
// add_up(at) is a step of its own: the number at(lane) of every lane becomes the sum of them all, added by halves (each
// lane's and that of lane ^ 16, then ^ 8, ^ 4, ^ 2, ^ 1), so that all lanes end with the same bits on every run.
#pragma once

#include "cuda/common/device.h"

namespace fedpai::cuda {

constexpr int kWarp = 32;

#ifdef __CUDACC__
struct DeviceWarp {
  template <class State>
  class PerLane {
   public:
    FEDPAI_DEVICE State& operator[](int) { return own_; }

   private:
    State own_;
  };

  template <class Step>
  FEDPAI_DEVICE void lanes(const Step& step) const {
    step(static_cast<int>(threadIdx.x % kWarp));
    __syncwarp();
  }

  template <class At>
  FEDPAI_DEVICE void add_up(const At& at) const {
    auto& own = at(static_cast<int>(threadIdx.x % kWarp));
    FEDPAI_DEVICE_UNROLL
    for (int distance = kWarp / 2; distance > 0; distance /= 2) own += __shfl_xor_sync(0xffffffffu, own, distance);
  }
};
#else
struct HostWarp {
  template <class State>
  class PerLane {
   public:
    State& operator[](int lane) { return all_[lane]; }

   private:
    State all_[kWarp];
  };

  template <class Step>
  void lanes(const Step& step) const {
    for (int lane = 0; lane < kWarp; ++lane) step(lane);
  }

  template <class At>
  void add_up(const At& at) const {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < kWarp; ++lane) {
        if ((lane & distance) == 0) at(lane) = at(lane ^ distance) = at(lane) + at(lane ^ distance);
      }
    }
  }
};
#endif

}  // namespace fedpai::cuda
