# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled ahead of time, as a layer of channels and a batch divisible by 16 launches them. Needs no GPU.

Pointers and strides are declared divisible by 16, no block is ragged, and offsets have 32 bits.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from typing import Any, NamedTuple

from fedpai_kernels.triton import tiles
from tests.triton.checking import TYPES

NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}


class Compiled(NamedTuple):
    ptx: str
    shared: int  # bytes
    registers: int
    spilled: int  # bytes stored and loaded


def compiled(
    kernel: Any,
    target: int,
    pointers: dict[str, str],
    constants: dict[str, Any],
    ones: tuple[str, ...] = (),
    odd: tuple[str, ...] = (),
    *,
    warps: int = 4,
    stages: int = 3,
    fusion: bool = True,
) -> Compiled:
    """`pointers`: types by name, of which a kernel may lack some; `ones`: integers that are 1; `odd`: integers that may
    be no multiples of 16, as all others are; `fusion`: of a product and a sum."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    constants = constants | dict.fromkeys(ones, 1)
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name in pointers or (signature[name] == "i32" and name not in odd):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert made.asm["cubin"][:4] == b"\x7fELF"
    registers, spilled = _resources(made.asm["ptx"], target)
    return Compiled(made.asm["ptx"], made.metadata.shared, registers, spilled)


def _resources(ptx: str, target: int) -> tuple[int, int]:
    """Registers and spilled bytes, as the assembler that comes with Triton reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    name = "sm_90a" if target == 90 else f"sm_{target}"
    command = [get_ptxas(target).path, "-v", f"--gpu-name={name}", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert registers
    assert spills
    return int(registers[1]), int(spills[1]) + int(spills[2])


@cache
def walk(
    block: int, dtype: str, precision: str, target: int, layout: str, input_grad: bool, general: bool = False
) -> Compiled:
    """`general`: ragged blocks, 64-bit offsets and, in the input gradient, residues that the kernel tests itself."""
    import triton.language as tl

    from fedpai_kernels.triton.kernels.walk import walk_kernel

    tile = tiles.walk_tile(block, TYPES[dtype], 10_000)
    element = f"*{NAMES[dtype]}"
    phases = 2 if input_grad and not general else 1
    offset = tl.int64 if general else tl.int32
    constants = {
        "INPUT_GRAD": input_grad, "PHASES_H": phases, "PHASES_W": phases, "HAS_BIAS": not input_grad, "BLOCK": block,
        "PIXELS": tile.pixels, "DEPTH": tile.depth, "WHOLE": not general, "PRECISION": precision, "OFFSET": offset,
        "WIDEN": False,
    }  # fmt: skip
    unit = ("source_n", "dest_n") if layout == "batch_last" else ("source_c", "dest_c")
    odd = (
        "rows", "tiles", "dest_h", "dest_w", "source_h", "source_w", "kernel_w", "pad_h", "pad_w", "dilation_h",
        "dilation_w", "stride_h", "stride_w",
    )  # fmt: skip
    pointers = dict.fromkeys(("source", "blocks", "bias", "destination"), element)
    pointers |= dict.fromkeys(("begin", "dest", "entries"), "*i32")
    strides = () if input_grad else ("stride_h", "stride_w")
    return compiled(
        walk_kernel, target, pointers, constants, unit + strides, odd, warps=tile.warps, stages=tile.stages
    )


@cache
def weight_grad(
    block: int, dtype: str, precision: str, target: int, layout: str, general: bool = False
) -> Compiled:
    """`general`: ragged blocks and 64-bit offsets."""
    import triton.language as tl

    from fedpai_kernels.triton.kernels.weight_grad import weight_grad_kernel

    tile = tiles.weight_grad_tile(block, TYPES[dtype])
    element = f"*{NAMES[dtype]}"
    constants = {
        "BLOCK": block, "DEPTH": tile.depth, "WHOLE": not general, "PRECISION": precision,
        "OFFSET": tl.int64 if general else tl.int32, "WIDEN": False,
    }  # fmt: skip
    unit = ("x_n", "dy_n") if layout == "batch_last" else ("x_c", "dy_c")
    odd = ("count", "dy_w", "x_h", "x_w", "kernel_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    pointers = {"x": element, "dy": element, "partials": "*fp32", "entries": "*i32"}
    return compiled(
        weight_grad_kernel, target, pointers, constants, (*unit, "stride_h", "stride_w"), odd, warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip
