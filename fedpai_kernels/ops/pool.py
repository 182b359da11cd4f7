# SPDX-License-Identifier: Apache-2.0
"""Max, average and adaptive average pooling of batch-last activations, forward and backward.

Results, ties and NaN are those of torch: the first of equal maxima gets the gradient, a NaN in a window wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _C
from ..layout import empty_batch_last, to_batch_last
from .registry import LIBRARY, Operation, called_by_position

__all__ = ["adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"]

_MAX_FWD = {torch.float32: _C.max_pool2d_fwd_f32, torch.float64: _C.max_pool2d_fwd_f64}
_MAX_DX = {torch.float32: _C.max_pool2d_dx_f32, torch.float64: _C.max_pool2d_dx_f64}
_TAP = {torch.float32: torch.int32, torch.float64: torch.int64}
_AVG_FWD = {torch.float32: _C.avg_pool2d_fwd_f32, torch.float64: _C.avg_pool2d_fwd_f64}
_AVG_DX = {torch.float32: _C.avg_pool2d_dx_f32, torch.float64: _C.avg_pool2d_dx_f64}
_ADAPTIVE_FWD = {torch.float32: _C.adaptive_avg_pool2d_fwd_f32, torch.float64: _C.adaptive_avg_pool2d_fwd_f64}
_ADAPTIVE_DX = {torch.float32: _C.adaptive_avg_pool2d_dx_f32, torch.float64: _C.adaptive_avg_pool2d_dx_f64}

# One direction of a pooling: in, out, kernel, stride, padding, dilation.
Window = list[int]

# ---- the ops: batch-last in and out; `rows` and `columns` are Windows
# --------------------------------------------

LIBRARY.define(
    "max_pool2d(Tensor x, SymInt[] rows, SymInt[] columns) -> (Tensor, Tensor)"
)  # y, position of the max in its window
LIBRARY.define("max_pool2d_dx(Tensor dy, Tensor argmax, SymInt[] rows, SymInt[] columns) -> Tensor")
LIBRARY.define(
    "avg_pool2d(Tensor x, SymInt[] rows, SymInt[] columns, bool count_include_pad, int divisor) -> Tensor"
)
LIBRARY.define(
    "avg_pool2d_dx(Tensor dy, SymInt[] rows, SymInt[] columns, bool count_include_pad, int divisor) -> Tensor"
)
LIBRARY.define("adaptive_avg_pool2d(Tensor x, SymInt[] rows, SymInt[] columns) -> Tensor")
LIBRARY.define("adaptive_avg_pool2d_dx(Tensor dy, SymInt[] rows, SymInt[] columns) -> Tensor")


def _empty(like: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = (like.shape[0], like.shape[1], height, width)
    return empty_batch_last(shape, dtype=dtype or like.dtype, device=like.device)


def _max_fwd(x: Tensor, rows: Window, columns: Window) -> tuple[Tensor, Tensor]:
    x = to_batch_last(x)
    y = _empty(x, rows[1], columns[1])
    argmax = _empty(x, rows[1], columns[1], _TAP[x.dtype])
    _MAX_FWD[x.dtype](
        x.shape[1],
        x.shape[0],
        rows,
        columns,
        x.data_ptr(),
        y.data_ptr(),
        argmax.data_ptr(),
        torch.get_num_threads(),
    )
    return y, argmax


def _max_dx(dy: Tensor, argmax: Tensor, rows: Window, columns: Window) -> Tensor:
    dy, argmax = to_batch_last(dy), to_batch_last(argmax)
    dx = _empty(dy, rows[0], columns[0])
    _MAX_DX[dy.dtype](
        dy.shape[1], dy.shape[0], rows, columns, dy.data_ptr(), argmax.data_ptr(), dx.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx


def _avg_fwd(x: Tensor, rows: Window, columns: Window, count_include_pad: bool, divisor: int) -> Tensor:
    x = to_batch_last(x)
    y = _empty(x, rows[1], columns[1])
    _AVG_FWD[x.dtype](
        x.shape[1], x.shape[0], rows, columns, count_include_pad, divisor, x.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _avg_dx(dy: Tensor, rows: Window, columns: Window, count_include_pad: bool, divisor: int) -> Tensor:
    dy = to_batch_last(dy)
    dx = _empty(dy, rows[0], columns[0])
    _AVG_DX[dy.dtype](
        dy.shape[1], dy.shape[0], rows, columns, count_include_pad, divisor, dy.data_ptr(), dx.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx


def _adaptive_fwd(x: Tensor, rows: Window, columns: Window) -> Tensor:
    x = to_batch_last(x)
    y = _empty(x, rows[1], columns[1])
    _ADAPTIVE_FWD[x.dtype](
        x.shape[1], x.shape[0], rows, columns, x.data_ptr(), y.data_ptr(), torch.get_num_threads()
    )
    return y


def _adaptive_dx(dy: Tensor, rows: Window, columns: Window) -> Tensor:
    dy = to_batch_last(dy)
    dx = _empty(dy, rows[0], columns[0])
    _ADAPTIVE_DX[dy.dtype](
        dy.shape[1], dy.shape[0], rows, columns, dy.data_ptr(), dx.data_ptr(), torch.get_num_threads()
    )
    return dx


LIBRARY.impl("max_pool2d", _max_fwd, "CPU")
LIBRARY.impl("max_pool2d_dx", _max_dx, "CPU")
LIBRARY.impl("avg_pool2d", _avg_fwd, "CPU")
LIBRARY.impl("avg_pool2d_dx", _avg_dx, "CPU")
LIBRARY.impl("adaptive_avg_pool2d", _adaptive_fwd, "CPU")
LIBRARY.impl("adaptive_avg_pool2d_dx", _adaptive_dx, "CPU")


_max_pool2d = Operation("max_pool2d", _max_fwd)
_max_pool2d_dx = Operation("max_pool2d_dx", _max_dx)
_AVERAGES: dict[str, Callable[..., Tensor]] = {
    "avg_pool2d": Operation("avg_pool2d", _avg_fwd),
    "avg_pool2d_dx": Operation("avg_pool2d_dx", _avg_dx),
    "adaptive_avg_pool2d": Operation("adaptive_avg_pool2d", _adaptive_fwd),
    "adaptive_avg_pool2d_dx": Operation("adaptive_avg_pool2d_dx", _adaptive_dx),
}


@torch.library.register_fake("fedpai::max_pool2d", lib=LIBRARY)
def _(x: Tensor, rows: Window, columns: Window) -> tuple[Tensor, Tensor]:
    return _empty(x, rows[1], columns[1]), _empty(x, rows[1], columns[1], _TAP[x.dtype])


@torch.library.register_fake("fedpai::max_pool2d_dx", lib=LIBRARY)
def _(dy: Tensor, argmax: Tensor, rows: Window, columns: Window) -> Tensor:
    return _empty(dy, rows[0], columns[0])


@torch.library.register_fake("fedpai::avg_pool2d", lib=LIBRARY)
def _(x: Tensor, rows: Window, columns: Window, count_include_pad: bool, divisor: int) -> Tensor:
    return _empty(x, rows[1], columns[1])


@torch.library.register_fake("fedpai::avg_pool2d_dx", lib=LIBRARY)
def _(dy: Tensor, rows: Window, columns: Window, count_include_pad: bool, divisor: int) -> Tensor:
    return _empty(dy, rows[0], columns[0])


@torch.library.register_fake("fedpai::adaptive_avg_pool2d", lib=LIBRARY)
def _(x: Tensor, rows: Window, columns: Window) -> Tensor:
    return _empty(x, rows[1], columns[1])


@torch.library.register_fake("fedpai::adaptive_avg_pool2d_dx", lib=LIBRARY)
def _(dy: Tensor, rows: Window, columns: Window) -> Tensor:
    return _empty(dy, rows[0], columns[0])


# ---- autograd
# ---------------------------------------------------------------------------------------------------


@called_by_position
class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, rows: Window, columns: Window) -> tuple[Tensor, Tensor]:
        return _max_pool2d(x, rows, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.rows, ctx.columns = inputs
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        (argmax,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return _scatter(dy, argmax, ctx.rows, ctx.columns), None, None
        return _max_pool2d_dx(dy, argmax, ctx.rows, ctx.columns), None, None


def _scatter(dy: Tensor, argmax: Tensor, rows: Window, columns: Window) -> Tensor:
    """The gradient of max pooling in plain torch, differentiable again."""
    row, column = (
        torch.arange(size[1]) * size[3] - size[4] + tap * size[5]
        for size, tap in ((rows, (argmax.long() // columns[2]).mT), (columns, argmax.long() % columns[2]))
    )
    at = (row.mT * columns[0] + column).flatten(2)
    dx = dy.new_zeros(dy.shape[0], dy.shape[1], rows[0] * columns[0])
    return dx.scatter_add(2, at, dy.flatten(2)).view(dy.shape[0], dy.shape[1], rows[0], columns[0])


# An average: the ops' names, and their arguments after the tensor.
Average = tuple[str, str, tuple[Any, ...]]


@called_by_position
class _Average(torch.autograd.Function):
    """Average pooling; linear, so its gradient and that gradient's gradient are the two ops in turn."""

    @staticmethod
    def forward(x: Tensor, average: Average) -> Tensor:
        return _AVERAGES[average[0]](x, *average[2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Average], output: Tensor) -> None:
        ctx.average = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        forward, gradient, arguments = ctx.average
        return _Average.apply(dy, (gradient, forward, arguments)), None


# ---- checks
# -----------------------------------------------------------------------------------------------------


def _check(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected a shape (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in _MAX_FWD:
        raise TypeError(f"x: expected dtype float32 or float64, got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"x: expected a tensor on the CPU, got one on {x.device}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x: expected images of at least one pixel, got shape {tuple(x.shape)}")


def _pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) == 1:
        pair = (pair[0], pair[0])
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name}: expected one int or two, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return pair[0], pair[1]


def _window(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Window:
    """One direction, with torch's rounding: with `ceil_mode` no window starts in the padding behind the
    image.
    """
    reach = dilation * (kernel - 1) + 1
    if 2 * padding > reach:
        raise ValueError(
            f"padding: expected at most half of the window, got {padding} with kernel_size {kernel}, "
            f"dilation {dilation}"
        )
    room = size + 2 * padding - reach
    out = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    if out < 1:
        raise ValueError(
            f"x: an image of size {size} is smaller than a window: kernel_size {kernel}, padding {padding}, "
            f"dilation {dilation}"
        )
    return [size, out, kernel, stride, padding, dilation]


def _windows(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> tuple[Window, Window]:
    _check(x)
    kernel = _pair(kernel_size, "kernel_size", 1)
    steps = kernel if stride is None or stride == () or stride == [] else _pair(stride, "stride", 1)
    pads, dilations = _pair(padding, "padding", 0), _pair(dilation, "dilation", 1)
    rows, columns = (
        _window(x.shape[2 + d], kernel[d], steps[d], pads[d], dilations[d], ceil_mode) for d in range(2)
    )
    return rows, columns


def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """`torch.nn.functional.max_pool2d` of a 4-D tensor, returned batch-last. Differentiable.

    Args:
        x: (N, C, H, W), float32 or float64, on the CPU; batch-last is read as it is, other strides are
        converted.
        kernel_size, stride, padding, dilation, ceil_mode: as in torch.

    Raises:
        TypeError: another dtype.
        ValueError: another device or rank; a window that is too large for the image, or padding for the
        window.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(max_pool2d, (x,), x, kernel_size, stride, padding, dilation, ceil_mode)
    rows, columns = _windows(x, kernel_size, stride, padding, dilation, ceil_mode)
    y: Tensor = _MaxPool.apply(x, rows, columns)[0]
    return y


def avg_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d` of a 4-D tensor, returned batch-last. Differentiable.

    Arguments and errors: as :func:`max_pool2d`, with `count_include_pad` and `divisor_override` as in torch.
    """
    if has_torch_function_unary(x):
        settings = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        return handle_torch_function(avg_pool2d, (x,), x, *settings)
    rows, columns = _windows(x, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override == 0:
        raise ValueError("divisor_override: expected a divisor other than zero, got 0")
    arguments = (rows, columns, count_include_pad, divisor_override or 0)
    return _Average.apply(x, ("avg_pool2d", "avg_pool2d_dx", arguments))


def adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d` of a 4-D tensor, returned batch-last. Differentiable.

    Args:
        x: as in :func:`max_pool2d`.
        output_size: height and width, or one number for both; None keeps the input's.

    Raises:
        TypeError: another dtype.
        ValueError: another device or rank; an output size below 1.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(adaptive_avg_pool2d, (x,), x, output_size)
    _check(x)
    wanted = (
        (output_size, output_size)
        if output_size is None or isinstance(output_size, int)
        else tuple(output_size)
    )
    if len(wanted) != 2:
        raise ValueError(f"output_size: expected one size or two, got {output_size!r}")
    height, width = (x.shape[2 + d] if size is None else size for d, size in enumerate(wanted))
    if height < 1 or width < 1:
        raise ValueError(f"output_size: expected at least 1, got {output_size!r}")
    rows, columns = [x.shape[2], height, 0, 1, 0, 1], [x.shape[3], width, 0, 1, 0, 1]
    return _Average.apply(x, ("adaptive_avg_pool2d", "adaptive_avg_pool2d_dx", (rows, columns)))
