# SPDX-License-Identifier: Apache-2.0
"""Block-sparse convolutions on a GPU against cuDNN at the same precision: see README.md."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fedpai.bench.cases import LayerCase, merged, read_csv
from fedpai.bench.masks import uniform_mask
from fedpai_kernels import Plan, to_batch_last
from fedpai_kernels.ops.geometry import flatten, resolve_geometry
from fedpai_kernels.triton.block_conv2d import Setting

LAYERS = Path(__file__).resolve().parents[2] / "benchmarks" / "layers"
ARITHMETIC = {"ieee": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
REPETITIONS = 20  # calls in one graph, so that its own launch does not count
SAMPLES = 30


def time_of(call: Callable[[], object], cold: Tensor | None) -> list[float]:
    """Microseconds of one call. `cold`: memory to write before each call, to empty the second-level cache."""
    if not torch.cuda.is_available():  # the interpreter: says that everything runs, and nothing about time
        start = time.perf_counter()
        call()
        return [(time.perf_counter() - start) * 1e6]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    repetitions = 1 if cold is not None else REPETITIONS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repetitions):
            call()
    times = []
    for _ in range(SAMPLES):
        if cold is not None:
            cold.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / repetitions)
    return times


def contenders(case: LayerCase, args: argparse.Namespace) -> Iterable[tuple[str, str, Callable[[], object]]]:
    """(who, direction, call) of one layer, each with its operands in the storage that its name says."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = ARITHMETIC[args.arithmetic]
    mask = uniform_mask(case.weight_shape, args.density, structure=f"{args.block}x{args.block}", groups=case.groups)
    plan = Plan.from_mask(mask, groups=case.groups)
    geometry = resolve_geometry(case.kernel, case.stride, case.padding, case.dilation)
    precision = args.arithmetic if args.arithmetic in ("ieee", "tf32") else "ieee"
    setting = Setting(plan.handle, args.block, precision, flatten(geometry))
    image = case.image
    x = torch.randn(args.batch, case.in_channels, *image, device=device, dtype=dtype)
    values = torch.randn(plan.nnz, device=device, dtype=dtype)
    weight = plan.unpack(values)
    dy = torch.randn(args.batch, case.out_channels, *geometry.output_size(image, case.kernel), device=device, dtype=dtype)
    ops, dense = torch.ops.fedpai, torch.ops.aten.convolution_backward
    settings = [case.stride, case.padding, case.dilation, False, [0, 0], case.groups]

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    for layout, stored in (("chwn", to_batch_last), ("nhwc", channels_last)):
        sx, sdy = stored(x), stored(dy)
        # The plan is an argument so that it outlives the loop: its handle in the setting is weak.
        yield f"triton {layout}", "fwd", lambda p=plan, x=sx: ops.block_conv2d_forward(x, values, None, *setting)
        yield f"triton {layout}", "dx", lambda p=plan, dy=sdy: ops.block_conv2d_input_grad(dy, values, *image, *setting)
        yield f"triton {layout}", "dw", lambda p=plan, x=sx, dy=sdy: ops.block_conv2d_weight_grad(x, dy, False, *setting)
    for layout, stored in (("nchw", Tensor.contiguous), ("nhwc", channels_last)):
        sx, sdy, w = stored(x), stored(dy), stored(weight)
        yield f"cudnn {layout}", "fwd", lambda x=sx, w=w: torch.nn.functional.conv2d(
            x, w, None, case.stride, case.padding, case.dilation, case.groups
        )
        for direction, wanted in (("dx", [True, False, False]), ("dw", [False, True, False])):
            yield f"cudnn {layout}", direction, lambda x=sx, dy=sdy, w=w, wanted=wanted: dense(
                dy, x, w, None, *settings, wanted
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18,vgg19")
    parser.add_argument("--only", help="names of layers, separated by commas")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--arithmetic", choices=ARITHMETIC, default="bf16")
    parser.add_argument("--cold", action="store_true", help="empty the second-level cache before each call")
    args = parser.parse_args()
    tf32 = args.arithmetic == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    has_gpu = torch.cuda.is_available()
    cold = torch.empty(2**28, dtype=torch.uint8, device="cuda") if args.cold and has_gpu else None
    machine = torch.cuda.get_device_name() if has_gpu else "interpreter"
    layers = merged([case for name in args.model.split(",") for case in read_csv(LAYERS / f"{name}.csv")])
    for case in layers:
        wanted = case.name in args.only.split(",") if args.only else min(case.in_channels, case.out_channels) >= args.block
        if case.kind != "conv2d" or not wanted:
            continue
        for who, direction, call in contenders(case, args):
            times = time_of(call, cold)
            low, high = (statistics.quantiles(times, n=5)[i] for i in (0, 3)) if len(times) > 1 else (times[0],) * 2
            row = vars(args) | {
                "layer": case.label, "count": case.count, "who": who, "direction": direction, "machine": machine,
                "torch": torch.__version__, "us": statistics.median(times), "us_20": low, "us_80": high,
            }  # fmt: skip
            print(json.dumps(row))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
