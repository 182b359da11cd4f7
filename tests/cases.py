# SPDX-License-Identifier: Apache-2.0
"""The one list of cases: geometries, masks and sizes that every kernel must get right.

Tests, and the smoke mode of the benchmarks, read it. A case knows its shapes and its mask; a run of it adds a dtype and
an instruction set, and has the name that docs/naming.md gives to kernels. The property that a case is there for is its
own name.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedpai_kernels import Plan
from fedpai_kernels.ops import reference, sparse_conv2d, sparse_linear
from fedpai_kernels.ops.geometry import resolve_geometry
from tests.masks import make_mask

Pair = tuple[int, int]

DTYPES = {"f32": torch.float32, "f64": torch.float64}


@dataclass(frozen=True)
class Case(ABC):
    """What convolution and linear cases have in common."""

    name: str
    density: float = 0.3
    mask: str = "random"  # as tests/masks.py names it
    bias: bool = True

    op = ""
    layout = ""
    groups = 1

    @property
    @abstractmethod
    def mask_shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of x."""

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """Shape of y."""

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """The compiled mask."""

    @property
    @abstractmethod
    def longest_sum(self) -> int:
        """Terms of the longest sum in any direction."""

    @abstractmethod
    def sparse(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The op under test."""

    @abstractmethod
    def dense(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Its dense-masked twin."""

    def generator(self) -> torch.Generator:
        """The same numbers for a case on every run, whatever ran before."""
        return torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

    def kernel_name(self, direction: str, dtype: str, isa: str) -> str:
        """The kernel that a run exercises, in the grammar of docs/naming.md."""
        return f"{self.op}_{direction}_csr_{self.layout}_{dtype}__{isa}"


@dataclass(frozen=True)
class Conv2dCase(Case):
    batch: int = 10
    in_channels: int = 6
    out_channels: int = 8
    image: Pair = (7, 6)
    kernel: Pair = (3, 3)
    stride: int | Pair = 1
    padding: int | Pair | str = 1
    dilation: int | Pair = 1
    groups: int = 1

    op = "conv2d"
    layout = "chwn"

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.image)

    @property
    def output_shape(self) -> tuple[int, ...]:
        geometry = resolve_geometry(self.kernel, self.stride, self.padding, self.dilation)
        return (self.batch, self.out_channels, *geometry.output_size(self.image, self.kernel))

    @property
    def longest_sum(self) -> int:
        outputs = self.batch * math.prod(self.output_shape[2:])
        per_input = self.out_channels * math.prod(self.kernel)
        return max(math.prod(self.mask_shape[1:]) + 1, per_input, outputs)

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_mask(make_mask(self), groups=self.groups)

    def sparse(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_conv2d(x, values, self.plan, bias, self.stride, self.padding, self.dilation, self.groups)

    def dense(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return reference.conv2d(x, values, self.plan, bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class LinearCase(Case):
    leading: tuple[int, ...] = (10,)
    in_features: int = 12
    out_features: int = 9

    op = "linear"
    layout = "rm"

    @property
    def mask_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (*self.leading, self.in_features)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.leading, self.out_features)

    @property
    def longest_sum(self) -> int:
        return max(self.in_features + 1, self.out_features, math.prod(self.leading))

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_mask(make_mask(self))

    def sparse(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_linear(x, values, self.plan, bias)

    def dense(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return reference.linear(x, values, self.plan, bias)


# ---------------------------------------------------------------------------------------------------------- lists


def _conv(name: str, **settings: object) -> Conv2dCase:
    return Conv2dCase(name, **settings)  # type: ignore[arg-type]


CONV2D: Sequence[Conv2dCase] = (
    _conv("plain"),
    _conv("no_bias", bias=False),
    # ---- sizes
    _conv("n_is_1", batch=1),
    _conv("n_is_1_large_image", batch=1, image=(19, 23), in_channels=3),
    _conv("n_below_vector", batch=3),
    _conv("n_not_multiple", batch=17),
    _conv("n_multiple", batch=64, image=(5, 4)),
    _conv("n_above_patch", batch=129, image=(4, 3)),
    _conv("one_channel_in", in_channels=1),
    _conv("one_channel_out", out_channels=1, density=0.6),
    _conv("channels_prime", in_channels=13, out_channels=17),
    _conv("prime_output_stride", batch=11, image=(7, 13), kernel=(1, 3), padding=(0, 1)),
    _conv("non_square_everything", image=(5, 11), kernel=(2, 4), stride=(2, 3), padding=(1, 3), dilation=(2, 1)),
    _conv("tall_image", image=(33, 2)),
    _conv("wide_image", image=(2, 33)),
    _conv("long_rows", image=(5, 17), batch=33, in_channels=4, density=0.6),
    _conv("long_rows_strided", image=(7, 33), stride=2, batch=33, in_channels=4, density=0.6),
    _conv("channel_blocks", batch=16, in_channels=70, out_channels=40, image=(6, 6), density=0.2),
    # ---- kernel shapes
    _conv("one_by_one", kernel=(1, 1), padding=0),
    _conv("one_by_one_on_2x2", kernel=(1, 1), padding=0, image=(2, 2), batch=33),
    _conv("one_by_one_stride_2", kernel=(1, 1), padding=0, stride=2),
    _conv("one_by_one_padded", kernel=(1, 1), padding=1),
    _conv("row_kernel", kernel=(1, 5), padding=(0, 2)),
    _conv("column_kernel", kernel=(5, 1), padding=(2, 0)),
    _conv("even_kernel", kernel=(2, 4), padding=(1, 2)),
    _conv("stem_7x7_stride_2", kernel=(7, 7), padding=3, stride=2, in_channels=3, image=(15, 14), batch=9),
    _conv("kernel_covers_image", kernel=(7, 6), padding=0),
    _conv("kernel_larger_than_image", kernel=(5, 5), padding=2, image=(3, 2)),
    _conv("3x3_on_2x2", image=(2, 2), batch=40),
    _conv("3x3_on_1x1", image=(1, 1)),
    # ---- strides
    _conv("stride_2_even_size", stride=2, image=(8, 6)),
    _conv("stride_2_odd_size", stride=2, image=(7, 9)),
    _conv("stride_2_width_multiple_of_8", stride=2, image=(8, 16), batch=3),
    _conv("stride_3_2", stride=(3, 2)),
    _conv("stride_above_kernel", stride=4),
    _conv("stride_above_image", stride=9),
    _conv("stride_drops_border", stride=3, padding=0, image=(8, 7)),
    # ---- padding
    _conv("padding_valid", padding="valid"),
    _conv("padding_same", padding="same"),
    _conv("padding_same_even_kernel", padding="same", kernel=(2, 4)),
    _conv("padding_same_dilated", padding="same", kernel=(4, 3), dilation=(3, 2)),
    _conv("padding_larger_than_kernel", padding=5),
    _conv("padding_larger_than_image", padding=(8, 9), batch=3),
    _conv("padding_asymmetric", padding=(0, 3)),
    # ---- dilation
    _conv("dilation_2", dilation=2, padding=2),
    _conv("dilation_2_3", dilation=(2, 3), padding=(2, 3)),
    _conv("dilation_with_stride", dilation=2, stride=2, padding=2),
    _conv("dilation_3_stride_2", dilation=3, stride=2, padding=3),
    _conv("dilation_reaches_over_image", dilation=9, padding=9),
    _conv("dilation_beyond_any_buffer", dilation=10**6, padding=10**6, batch=2),
    # ---- groups
    _conv("groups_2", groups=2),
    _conv("groups_3", groups=3, in_channels=9, out_channels=6),
    _conv("groups_strided_dilated", groups=2, stride=2, dilation=2, padding=2),
    _conv("depthwise", groups=6, out_channels=6, density=0.5),
    _conv("depthwise_multiplier_2", groups=6, out_channels=12, density=0.5),
    _conv("depthwise_stride_2", groups=5, in_channels=5, out_channels=5, stride=2, density=0.6),
    _conv("empty_group", groups=2, mask="empty_group"),
    # ---- masks
    _conv("full_dense", mask="full"),
    _conv("full_dense_strided", mask="full", stride=2),
    _conv("nearly_empty", density=0.002, in_channels=40, out_channels=40),
    _conv("first_weight_only", mask="first_weight"),
    _conv("last_weight_only", mask="last_weight"),
    _conv("one_nonzero_stride_2", mask="last_weight", stride=2),
    _conv("empty_row", mask="empty_row"),
    _conv("empty_column", mask="empty_column"),
    _conv("all_rows_empty_but_one", mask="one_row"),
    _conv("all_columns_empty_but_one", mask="one_column"),
    _conv("one_tap", mask="one_tap"),
    _conv("one_tap_stride_2", mask="one_tap", stride=2),
    _conv("heavy_row", mask="heavy_row", in_channels=31, density=0.02),
    _conv("diagonal", mask="diagonal"),
    # ---- structures: channels that keep the same weights
    _conv("blocks_16x1", mask="16x1", in_channels=7, out_channels=35),
    _conv("blocks_1x16", mask="1x16", in_channels=35, out_channels=7),
    _conv("blocks_2x1", mask="2x1", out_channels=7),
    _conv("blocks_3x5", mask="3x5", in_channels=12, out_channels=11),
    _conv("blocks_7x2", mask="7x2", out_channels=14, bias=False),
    _conv("blocks_4x4", mask="4x4", in_channels=12, out_channels=16),
    _conv("blocks_8x8", mask="8x8", in_channels=17, out_channels=24),
    _conv("blocks_16x16", mask="16x16", in_channels=20, out_channels=18, batch=8, image=(4, 5)),
    _conv("blocks_32x32", mask="32x32", in_channels=34, out_channels=33, batch=5, image=(3, 4), density=0.5),
    _conv("blocks_64x64", mask="64x64", in_channels=13, out_channels=30, batch=6, image=(4, 3)),
    _conv("blocks_8x8_taps", mask="8x8-taps", in_channels=16, out_channels=20),
    _conv("blocks_4x1_taps", mask="4x1-taps"),
    _conv("blocks_n_is_1", mask="8x4", batch=1),
    _conv("blocks_n_multiple", mask="4x2", batch=64, image=(4, 3)),
    _conv("blocks_n_above_patch", mask="3x3", batch=129, image=(4, 3)),
    _conv("blocks_wide_image", mask="4x2", image=(2, 33)),
    _conv("blocks_channel_blocks", mask="8x8-taps", batch=16, in_channels=72, out_channels=40, image=(6, 6),
          density=0.2),
    _conv("blocks_one_by_one", mask="8x8", kernel=(1, 1), padding=0, in_channels=16, out_channels=24),
    _conv("blocks_one_by_one_stride_2", mask="4x4", kernel=(1, 1), padding=0, stride=2, in_channels=8, density=0.5),
    _conv("blocks_stem_7x7_stride_2", mask="16x1", kernel=(7, 7), padding=3, stride=2, in_channels=3, out_channels=16),
    _conv("blocks_stride_2_odd_size", mask="4x4", stride=2, in_channels=8, image=(7, 9)),
    _conv("blocks_stride_above_kernel", mask="8x2", stride=4),
    _conv("blocks_non_square_everything", mask="3x2", image=(5, 11), kernel=(2, 4), stride=(2, 3), padding=(1, 3),
          dilation=(2, 1)),
    _conv("blocks_dilation_3_stride_2", mask="4x3", dilation=3, stride=2, padding=3),
    _conv("blocks_groups_2", mask="4x3", groups=2, in_channels=12, out_channels=18),
    _conv("blocks_depthwise_multiplier_4", mask="4x1", groups=5, in_channels=5, out_channels=20, density=0.5),
    _conv("blocks_one_left", mask="8x4", density=0, in_channels=12, out_channels=24),
    _conv("blocks_empty_borders", mask="4x4 empty_borders", in_channels=16, out_channels=16),
    _conv("blocks_shuffled", mask="8x8 shuffled", in_channels=16, out_channels=32),
    _conv("blocks_lost", mask="8x8 lost", in_channels=16, out_channels=24),
    _conv("blocks_lost_ragged", mask="8x8-taps lost", in_channels=11, out_channels=22, batch=9),
    _conv("blocks_lost_groups_stride_2", mask="6x4 lost", groups=2, in_channels=8, out_channels=12, stride=2),
    _conv("nearly_dense", mask="weight", density=0.9, in_channels=9, out_channels=10),
    _conv("whole_channels", mask="channel", in_channels=11, out_channels=13, density=0.5),
    _conv("two_of_four", mask="2:4", in_channels=10),
    _conv("fan_in", mask="fan-in", out_channels=9),
)

LINEAR: Sequence[LinearCase] = (
    LinearCase("plain"),
    LinearCase("no_bias", bias=False),
    LinearCase("n_is_1", leading=(1,)),
    LinearCase("n_below_vector", leading=(3,)),
    LinearCase("n_not_multiple", leading=(65,)),
    LinearCase("n_multiple", leading=(64,)),
    LinearCase("rank_1", leading=()),
    LinearCase("rank_3", leading=(3, 7)),
    LinearCase("rank_4", leading=(2, 3, 5)),
    LinearCase("features_prime", in_features=31, out_features=13),
    LinearCase("one_feature_in", in_features=1, density=0.8),
    LinearCase("one_feature_out", out_features=1),
    LinearCase("wide", in_features=300, out_features=70, density=0.05, leading=(33,)),
    LinearCase("full_dense", mask="full"),
    LinearCase("first_weight_only", mask="first_weight"),
    LinearCase("last_weight_only", mask="last_weight"),
    LinearCase("empty_row", mask="empty_row"),
    LinearCase("empty_column", mask="empty_column"),
    LinearCase("all_rows_empty_but_one", mask="one_row"),
    LinearCase("heavy_row", mask="heavy_row", in_features=90, density=0.02),
    LinearCase("diagonal", mask="diagonal"),
    LinearCase("blocks_16x1", mask="16x1", out_features=35),
    LinearCase("blocks_1x16", mask="1x16", in_features=35),
    LinearCase("blocks_3x5", mask="3x5", in_features=22, out_features=11),
    LinearCase("blocks_4x4_n_is_1", mask="4x4", leading=(1,), in_features=16, out_features=12),
    LinearCase("blocks_8x8_n_not_multiple", mask="8x8", leading=(65,), in_features=50, out_features=27),
    LinearCase("blocks_32x32_rank_3", mask="32x32", leading=(3, 7), in_features=70, out_features=40, density=0.6),
    LinearCase("blocks_64x64", mask="64x64", in_features=30, out_features=20),
    LinearCase("blocks_shuffled", mask="8x8 shuffled", in_features=40, out_features=32),
    LinearCase("blocks_lost", mask="8x8 lost", leading=(33,), in_features=40, out_features=32),
    LinearCase("nearly_dense", mask="weight", density=0.9, out_features=10),
    LinearCase("whole_channels", mask="channel", density=0.5),
    LinearCase("two_of_four", mask="2:4"),
    LinearCase("fan_in", mask="fan-in"),
)

# Masks of blocks that matrix units take, for the kernels of GPUs: small, because an interpreter runs them too.
BLOCK_CONV2D: Sequence[Conv2dCase] = (
    _conv("plain", mask="16x16", in_channels=32, out_channels=48, batch=16, image=(4, 5)),
    _conv("ragged", mask="16x16", in_channels=20, out_channels=18, batch=3, image=(4, 5), density=0.5),
    _conv("smaller_than_a_block", mask="16x16", in_channels=3, out_channels=7, batch=2, image=(4, 5)),
    _conv("one_left", mask="16x16", in_channels=34, out_channels=48, batch=3, image=(3, 4), density=0),
    _conv("full_dense", mask="full", in_channels=17, out_channels=32, batch=2, image=(3, 4), bias=False),
    _conv("several_tiles", mask="16x16", in_channels=16, out_channels=16, batch=33, image=(4, 3), kernel=(2, 2)),
    _conv("n_is_1", mask="16x16", in_channels=16, out_channels=32, batch=1, image=(9, 8), density=0.5),
    _conv("blocks_32", mask="32x32", in_channels=64, out_channels=32, batch=4, image=(3, 4)),
    _conv("blocks_32_ragged", mask="32x32", in_channels=34, out_channels=33, batch=5, image=(3, 4), density=0.5),
    _conv("blocks_64_ragged", mask="64x64", in_channels=70, out_channels=66, batch=6, image=(4, 3), kernel=(1, 2),
          density=0.6),
    _conv("blocks_128", mask="128x128", in_channels=128, out_channels=256, batch=4, image=(2, 2), kernel=(1, 2),
          density=0.6),
    _conv("blocks_128_ragged", mask="128x128", in_channels=130, out_channels=20, batch=2, image=(2, 2), kernel=(1, 2),
          padding=(0, 1), density=0.6),
    _conv("one_by_one_stride_2", mask="16x16", kernel=(1, 1), padding=0, stride=2, in_channels=16, out_channels=16,
          image=(5, 4), density=1.0),
    _conv("stride_2_even_size", mask="16x16", stride=2, in_channels=16, out_channels=20, image=(6, 4), batch=4),
    _conv("stride_2_odd_size", mask="16x16", stride=2, in_channels=20, out_channels=16, image=(7, 5), batch=4),
    _conv("stride_above_kernel", mask="16x16", stride=4, in_channels=16, out_channels=16, image=(9, 6), batch=3),
    _conv("stride_above_image", mask="16x16", stride=9, in_channels=16, out_channels=16, image=(7, 6), batch=3),
    _conv("non_square_everything", mask="16x16", image=(5, 11), kernel=(2, 4), stride=(2, 3), padding=(1, 3),
          dilation=(2, 1), in_channels=18, out_channels=20, batch=2),
    _conv("dilation_3_stride_2", mask="16x16", dilation=3, stride=2, padding=3, in_channels=16, out_channels=16,
          batch=3, image=(6, 7)),
    _conv("padding_same_even_kernel", mask="16x16", padding="same", kernel=(2, 4), in_channels=16, out_channels=20,
          batch=2, image=(4, 5)),
    _conv("padding_larger_than_image", mask="16x16", padding=(3, 4), in_channels=16, out_channels=16, batch=2,
          image=(2, 3)),
    _conv("groups_2", mask="16x16", groups=2, in_channels=64, out_channels=32, batch=4, image=(3, 4), density=0.5),
    _conv("groups_2_ragged_strided", mask="16x16", groups=2, in_channels=40, out_channels=36, batch=3, image=(5, 4),
          stride=(3, 2), dilation=(2, 1), padding=(2, 1)),
    _conv("depthwise_multiplier_4", mask="4x1", groups=5, in_channels=5, out_channels=20, batch=2, image=(4, 3),
          density=0.5),
)  # fmt: skip

BLOCK_LINEAR: Sequence[LinearCase] = (
    LinearCase("blocks_plain", mask="16x16", leading=(16,), in_features=48, out_features=32),
    LinearCase("blocks_ragged", mask="16x16", in_features=37, out_features=18, density=0.5),
    LinearCase("blocks_n_is_1", mask="16x16", leading=(1,), in_features=32, out_features=20, density=0.5),
    LinearCase("blocks_rank_1", mask="16x16", leading=(), in_features=20, out_features=17, density=0.6),
    LinearCase("blocks_32_rank_3", mask="32x32", leading=(3, 47), in_features=70, out_features=40, density=0.6),
    LinearCase("blocks_64_no_bias", mask="64x64", leading=(130,), in_features=130, out_features=64, bias=False),
    LinearCase("blocks_128", mask="128x128", leading=(9,), in_features=256, out_features=140, density=0.5),
)


def batch_sweep(batch: int) -> Sequence[Case]:
    """The cases that every batch size from 1 to 65 goes through."""
    return (
        _conv(f"batch_{batch}", batch=batch, in_channels=3, out_channels=5, image=(4, 3)),
        _conv(f"batch_{batch}_1x1", batch=batch, in_channels=4, out_channels=3, image=(2, 2), kernel=(1, 1), padding=0),
        _conv(f"batch_{batch}_strided", batch=batch, in_channels=2, out_channels=3, image=(5, 4), stride=2),
        LinearCase(f"batch_{batch}", leading=(batch,), in_features=5, out_features=4),
    )


def conv2d_named(name: str) -> Conv2dCase:
    """The convolution case of this name."""
    return next(case for case in CONV2D if case.name == name)
