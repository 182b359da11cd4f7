# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels. Not a public interface: pointers are integers and nothing is checked here."""

from collections.abc import Sequence

from torch import Tensor

__version__: str

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def compiled_isas() -> list[str]: ...

# A DLPack capsule; code and bits are DLPack's names for the type of the elements.
def empty_strided(shape: Sequence[int], strides: Sequence[int], code: int, bits: int) -> object: ...
def set_memory_slack(slack: float) -> None: ...
def trim_heap() -> None: ...
def empty_cache() -> None: ...

# Bytes live, cached, at most live; hits, misses.
def memory_stats() -> tuple[int, int, int, int, int]: ...

# Dense vectors of float32, positions of int32, bitmaps of bytes. masked_mean returns -1, or the number of a vector
# whose positions are not ascending within [0, n).
def weighted_mean(
    vectors: Sequence[int], weights: Sequence[float], n: int, compensated: bool, out: int, threads: int
) -> None: ...
def masked_mean(
    vectors: Sequence[int], positions: Sequence[int], counts: Sequence[int], weights: Sequence[float], old: int,
    n: int, compensated: bool, out: int, threads: int,
) -> int: ...
def majority(bitmaps: Sequence[int], threshold: int, bytes: int, out: int, threads: int) -> None: ...

# rule: 0 FedAvgM (v is 0), 1 FedAdam, 2 FedYogi.
def server_step(
    rule: int, old: int, merged: int, m: int, v: int, n: int, lr: float, beta1: float, beta2: float, tau: float,
    out: int, threads: int,
) -> None: ...

# n elements, dense.
def round_to_bf16(x: int, y: int, n: int, threads: int) -> None: ...
def widen_bf16(x: int, y: int, n: int, threads: int) -> None: ...

# Rates of the machine, see csrc/cpu/machine/machine.h. bytes: of a buffer per thread (0: registers); of all together.
def fma_rate(bytes: int, threads: int, seconds: float) -> float: ...
def stream_rate(bytes: int, threads: int, seconds: float) -> float: ...

# Forward and input gradient; weight gradient.
def loads_per_fma() -> tuple[float, float]: ...

# How convolutions walk their entries: "choose" (by the cost models), "tiled" or "streamed"; for the whole process.
def walk() -> str: ...
def force_walk(name: str) -> None: ...

class CompiledPlan:
    def __init__(
        self, mask: int, out_channels: int, in_channels_per_group: int, kernel_h: int, kernel_w: int, groups: int
    ) -> None: ...
    @property
    def nnz(self) -> int: ...
    # Weights of output channels, and of input channels, that keep the same weights as another.
    @property
    def shared_weights(self) -> tuple[int, int]: ...
    def flat_indices(self, out: int) -> None: ...

# geometry: batch, in_h, in_w, out_h, out_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w
# strides: batch, channel, row, column, in elements
def conv2d_forward_f32(
    plan: CompiledPlan, geometry: Sequence[int], x: int, x_strides: Sequence[int], norm: Sequence[int], values: int,
    bias: int, y: int, y_strides: Sequence[int], threads: int, /
) -> None: ...
def conv2d_input_grad_f32(
    plan: CompiledPlan, geometry: Sequence[int], dy: int, dy_strides: Sequence[int], values: int, dx: int,
    dx_strides: Sequence[int], threads: int, /
) -> None: ...
def conv2d_weight_grad_f32(
    plan: CompiledPlan, geometry: Sequence[int], x: int, x_strides: Sequence[int], norm: Sequence[int], dy: int,
    dy_strides: Sequence[int], values_grad: int, bias_grad: int, threads: int, /
) -> None: ...
def conv2d_backward_f32(
    plan: CompiledPlan, geometry: Sequence[int], x: int, x_strides: Sequence[int], norm: Sequence[int], dy: int,
    dy_strides: Sequence[int], values: int, dx: int, dx_strides: Sequence[int], values_grad: int, bias_grad: int,
    threads: int, /
) -> None: ...

conv2d_forward_f64 = conv2d_forward_f32
conv2d_input_grad_f64 = conv2d_input_grad_f32
conv2d_weight_grad_f64 = conv2d_weight_grad_f32
conv2d_backward_f64 = conv2d_backward_f32

# Index streams of a plan for the CUDA kernels (csrc/cuda/conv2d/streams.h), as they lie on a device. spread: stride,
# padding in front and dilation, vertical and horizontal each. Entries, row_begin, row_order; or entries, groups.
def cuda_forward_stream(plan: CompiledPlan, spread: Sequence[int]) -> bytes: ...
def cuda_input_grad_stream(plan: CompiledPlan, spread: Sequence[int]) -> bytes: ...
def cuda_weight_grad_stream(plan: CompiledPlan, spread: Sequence[int]) -> bytes: ...

# A matrix without gaps: source, rows, columns, dest, threads.
def transpose_f32(source: int, rows: int, columns: int, dest: int, threads: int, /) -> None: ...

transpose_f64 = transpose_f32

# Batch-last activations; a tensor that is absent is 0. mean, invstd, var, weight, bias: one value per channel.
def batch_norm_train_f32(
    channels: int, row: int, x: int, residual: int, weight: int, bias: int, eps: float, activation: int,
    slope: float, y: int, mean: int, invstd: int, var: int, threads: int,
) -> None: ...
def batch_norm_eval_f32(
    channels: int, row: int, x: int, residual: int, weight: int, bias: int, mean: int, var: int, eps: float,
    activation: int, slope: float, y: int, invstd: int, threads: int,
) -> None: ...
# rounded: x and z are bfloat16.
def batch_norm_backward_f32(
    channels: int, row: int, dy: int, x: int, z: int, rounded: bool, weight: int, bias: int, mean: int, invstd: int,
    through_statistics: bool, activation: int, slope: float, dx: int, dresidual: int, dweight: int, dbias: int,
    threads: int,
) -> None: ...

# y: bfloat16. mean is 0, as are weight, bias and invstd then, where x is the result of the activation.
def round_for_backward(
    channels: int, row: int, x: int, weight: int, bias: int, mean: int, invstd: int, activation: int, slope: float,
    y: int, threads: int,
) -> None: ...

batch_norm_train_f64 = batch_norm_train_f32
batch_norm_eval_f64 = batch_norm_eval_f32
batch_norm_backward_f64 = batch_norm_backward_f32

# batch, running: addresses of so many statistics of the batch, and of running ones, which take these in.
def update_running_f32(channels: int, momentum: float, batch: int, running: int) -> None: ...

update_running_f64 = update_running_f32

# As above; mean, invstd: one value per group and image.
def group_norm_forward_f32(
    images: int, channels: int, pixels: int, groups: int, x: int, weight: int, bias: int, eps: float, relu: bool,
    y: int, mean: int, invstd: int, threads: int,
) -> None: ...
def group_norm_backward_f32(
    images: int, channels: int, pixels: int, groups: int, dy: int, x: int, weight: int, bias: int, mean: int,
    invstd: int, relu: bool, dx: int, dweight: int, dbias: int, threads: int,
) -> None: ...

group_norm_forward_f64 = group_norm_forward_f32
group_norm_backward_f64 = group_norm_backward_f32

# rows, columns: in, out, kernel, stride, padding, dilation
def max_pool2d_fwd_f32(
    channels: int, batch: int, rows: Sequence[int], columns: Sequence[int], x: int, y: int, argmax: int, threads: int
) -> None: ...
def max_pool2d_dx_f32(
    channels: int, batch: int, rows: Sequence[int], columns: Sequence[int], dy: int, argmax: int, dx: int, threads: int
) -> None: ...
def avg_pool2d_fwd_f32(
    channels: int, batch: int, rows: Sequence[int], columns: Sequence[int], count_include_pad: bool, divisor: int,
    x: int, y: int, threads: int,
) -> None: ...
def avg_pool2d_dx_f32(
    channels: int, batch: int, rows: Sequence[int], columns: Sequence[int], count_include_pad: bool, divisor: int,
    dy: int, dx: int, threads: int,
) -> None: ...
def adaptive_avg_pool2d_fwd_f32(
    channels: int, batch: int, rows: Sequence[int], columns: Sequence[int], x: int, y: int, threads: int
) -> None: ...
def adaptive_avg_pool2d_dx_f32(
    channels: int, batch: int, rows: Sequence[int], columns: Sequence[int], dy: int, dx: int, threads: int
) -> None: ...

max_pool2d_fwd_f64 = max_pool2d_fwd_f32
max_pool2d_dx_f64 = max_pool2d_dx_f32
avg_pool2d_fwd_f64 = avg_pool2d_fwd_f32
avg_pool2d_dx_f64 = avg_pool2d_dx_f32
adaptive_avg_pool2d_fwd_f64 = adaptive_avg_pool2d_fwd_f32
adaptive_avg_pool2d_dx_f64 = adaptive_avg_pool2d_dx_f32

# Describes torch's tensors of exactly `types`; `exchange` is what they have as __dlpack_c_exchange_api__.
class TensorReader:
    def __init__(self, exchange: object, types: tuple[type, ...]) -> None: ...

# Unlike the rest, these look at what they are given: lists of one length, except where an option leaves one unused.
# They return the numbers of the parameters that were not taken, of which nothing was touched. `first`: the buffer is
# yet to be filled. `steps` count in place.
def sgd_step(
    reader: TensorReader, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], first: list[bool],
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, maximize: bool, threads: int,
) -> list[int]: ...
def adam_step(
    reader: TensorReader, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], steps: list[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, amsgrad: bool, maximize: bool, threads: int,
) -> list[int]: ...
