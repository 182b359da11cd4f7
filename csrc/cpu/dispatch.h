// SPDX-License-Identifier: Apache-2.0
// One table of kernels per instruction set; the best one that this CPU and operating system can run is chosen once.
#pragma once

#include <string>
#include <vector>

#include "cpu/aggregate/kernels.h"
#include "cpu/bf16/kernels.h"
#include "cpu/conv2d/kernels.h"
#include "cpu/layout/kernels.h"
#include "cpu/machine/kernels.h"
#include "cpu/norm/group_kernels.h"
#include "cpu/norm/kernels.h"
#include "cpu/optim/kernels.h"
#include "cpu/pool/kernels.h"

namespace fedpai {

struct KernelTable {
  const char* isa;
  AggregateKernels aggregate;
  Bf16Kernels bf16;
  Conv2dKernels<float> conv2d_f32;
  Conv2dKernels<double> conv2d_f64;
  LayoutKernels<float> layout_f32;
  LayoutKernels<double> layout_f64;
  NormKernels<float> norm_f32;
  NormKernels<double> norm_f64;
  GroupNormKernels<float> group_norm_f32;
  GroupNormKernels<double> group_norm_f64;
  OptimKernels<float> optim_f32;
  OptimKernels<double> optim_f64;
  PoolKernels<float> pool_f32;
  PoolKernels<double> pool_f64;
  MachineKernels<float> machine_f32;
};

// Instruction sets compiled into this library, best last, whether or not this CPU has them.
std::vector<std::string> compiled_isas();

// Those of them that this machine can run, best last.
std::vector<std::string> available_isas();

// The table in use. The first call honours FEDPAI_ISA; throws std::invalid_argument when that names a set that is
// unknown, not compiled in, or not present.
const KernelTable& kernels();

// Switches the whole process to one set (tests run every case on each). Throws std::invalid_argument as above.
void select_isa(const std::string& name);

template <class T>
const Conv2dKernels<T>& conv2d_kernels();
template <>
inline const Conv2dKernels<float>& conv2d_kernels<float>() {
  return kernels().conv2d_f32;
}
template <>
inline const Conv2dKernels<double>& conv2d_kernels<double>() {
  return kernels().conv2d_f64;
}

template <class T>
const LayoutKernels<T>& layout_kernels();
template <>
inline const LayoutKernels<float>& layout_kernels<float>() {
  return kernels().layout_f32;
}
template <>
inline const LayoutKernels<double>& layout_kernels<double>() {
  return kernels().layout_f64;
}

template <class T>
const NormKernels<T>& norm_kernels();
template <>
inline const NormKernels<float>& norm_kernels<float>() {
  return kernels().norm_f32;
}
template <>
inline const NormKernels<double>& norm_kernels<double>() {
  return kernels().norm_f64;
}

template <class T>
const GroupNormKernels<T>& group_norm_kernels();
template <>
inline const GroupNormKernels<float>& group_norm_kernels<float>() {
  return kernels().group_norm_f32;
}
template <>
inline const GroupNormKernels<double>& group_norm_kernels<double>() {
  return kernels().group_norm_f64;
}

template <class T>
const OptimKernels<T>& optim_kernels();
template <>
inline const OptimKernels<float>& optim_kernels<float>() {
  return kernels().optim_f32;
}
template <>
inline const OptimKernels<double>& optim_kernels<double>() {
  return kernels().optim_f64;
}

template <class T>
const PoolKernels<T>& pool_kernels();
template <>
inline const PoolKernels<float>& pool_kernels<float>() {
  return kernels().pool_f32;
}
template <>
inline const PoolKernels<double>& pool_kernels<double>() {
  return kernels().pool_f64;
}

}  // namespace fedpai
