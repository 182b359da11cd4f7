# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels. Not a public interface: pointers are integers and nothing is checked here."""

from collections.abc import Sequence

__version__: str

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def compiled_isas() -> list[str]: ...

class CompiledPlan:
    def __init__(
        self, mask: int, out_channels: int, in_channels_per_group: int, kernel_h: int, kernel_w: int, groups: int
    ) -> None: ...
    @property
    def nnz(self) -> int: ...
    def flat_indices(self, out: int) -> None: ...

# geometry: batch, in_h, in_w, out_h, out_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w
# strides: batch, channel, row, column, in elements
def conv2d_forward_f32(
    plan: CompiledPlan, geometry: Sequence[int], x: int, x_strides: Sequence[int], values: int, bias: int, y: int,
    y_strides: Sequence[int], threads: int, /
) -> None: ...
def conv2d_input_grad_f32(
    plan: CompiledPlan, geometry: Sequence[int], dy: int, dy_strides: Sequence[int], values: int, dx: int,
    dx_strides: Sequence[int], threads: int, /
) -> None: ...
def conv2d_weight_grad_f32(
    plan: CompiledPlan, geometry: Sequence[int], x: int, x_strides: Sequence[int], dy: int, dy_strides: Sequence[int],
    values_grad: int, bias_grad: int, threads: int, /
) -> None: ...

conv2d_forward_f64 = conv2d_forward_f32
conv2d_input_grad_f64 = conv2d_input_grad_f32
conv2d_weight_grad_f64 = conv2d_weight_grad_f32
