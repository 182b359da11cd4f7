// SPDX-License-Identifier: Apache-2.0
// The kernel table of the target whose vec_<isa>.h was included before this file.
#pragma once

#include "cpu/aggregate/kernels-inl.h"
#include "cpu/bf16/kernels-inl.h"
#include "cpu/conv2d/kernels-inl.h"
#include "cpu/dispatch.h"
#include "cpu/layout/kernels-inl.h"
#include "cpu/machine/kernels-inl.h"
#include "cpu/norm/group_kernels-inl.h"
#include "cpu/norm/kernels-inl.h"
#include "cpu/optim/kernels-inl.h"
#include "cpu/pool/kernels-inl.h"

#define FEDPAI_NAME_(x) #x
#define FEDPAI_NAME(x) FEDPAI_NAME_(x)

namespace fedpai::FEDPAI_TARGET {

extern const KernelTable kTable;
const KernelTable kTable = {
    FEDPAI_NAME(FEDPAI_TARGET),
    make_aggregate_kernels(),
    make_bf16_kernels(),
    make_conv2d_kernels<float>(),
    make_conv2d_kernels<double>(),
    make_layout_kernels<float>(),
    make_layout_kernels<double>(),
    make_norm_kernels<float>(),
    make_norm_kernels<double>(),
    make_group_norm_kernels<float>(),
    make_group_norm_kernels<double>(),
    make_optim_kernels<float>(),
    make_optim_kernels<double>(),
    make_pool_kernels<float>(),
    make_pool_kernels<double>(),
    make_machine_kernels<float>(),
};

}  // namespace fedpai::FEDPAI_TARGET
