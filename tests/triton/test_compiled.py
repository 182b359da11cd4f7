# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiled ahead of time for sm_80 and sm_90, with no GPU: types, layouts, shared memory, spills.

Pointers and strides are declared divisible by 16, as torch's allocations of whole vectors are.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from typing import Any, NamedTuple

import pytest

from fedpai_kernels.triton import BLOCKS, tiles
from tests.triton.checking import INTERPRETED, TYPES, needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted cannot be compiled in the same process"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
# Operands, and the precision of their products, by direction. float16 and bfloat16 take the same way through the
# compiler, which takes a second for each kernel: one of them per direction.
FORWARD = (("f32", "ieee"), ("f32", "tf32"), ("bf16", "ieee"))
INPUT_GRAD = (("f32", "tf32"), ("f16", "ieee"))
WEIGHT_GRAD = (("f32", "ieee"), ("f32", "tf32"), ("bf16", "ieee"))


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
    scalars: dict[str, str] | None = None,
) -> Compiled:
    """`ones`: integers that are 1; `odd`: integers not known to be divisible by 16; all others are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    constants = constants | dict.fromkeys(ones, 1)
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else {**pointers, **(scalars or {})}.get(name, "i32")
        if name in pointers or (signature[name] == "i32" and name not in odd):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "num_stages": stages}
    )
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
def walk(block: int, dtype: str, precision: str, target: int, layout: str, input_grad: bool) -> Compiled:
    import triton.language as tl

    from fedpai_kernels.triton.kernels.walk import walk_kernel

    tile = tiles.walk_tile(block, TYPES[dtype], 10_000)
    element = f"*{NAMES[dtype]}"
    phases = 2 if input_grad else 1
    constants = {
        "INPUT_GRAD": input_grad, "PHASES_H": phases, "PHASES_W": phases, "HAS_BIAS": not input_grad, "BLOCK": block,
        "PIXELS": tile.pixels, "DEPTH": tile.depth, "WHOLE": True, "PRECISION": precision, "OFFSET": tl.int32,
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
def weight_grad(block: int, dtype: str, precision: str, target: int, layout: str) -> Compiled:
    import triton.language as tl

    from fedpai_kernels.triton.kernels.weight_grad import weight_grad_kernel

    tile = tiles.weight_grad_tile(block, TYPES[dtype])
    element = f"*{NAMES[dtype]}"
    constants = {
        "BLOCK": block, "DEPTH": tile.depth, "WHOLE": True, "PRECISION": precision, "OFFSET": tl.int32, "WIDEN": False,
    }  # fmt: skip
    unit = ("x_n", "dy_n") if layout == "batch_last" else ("x_c", "dy_c")
    odd = ("count", "dy_w", "x_h", "x_w", "kernel_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    pointers = {"x": element, "dy": element, "partials": "*fp32", "entries": "*i32"}
    return compiled(
        weight_grad_kernel, target, pointers, constants, (*unit, "stride_h", "stride_w"), odd, warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


def matrix_instructions(made: Compiled, target: int) -> int:
    return len(re.findall(r"wgmma\.mma_async" if target == 90 else r"mma\.sync", made.ptx))


def copies(made: Compiled) -> list[int]:
    """Bytes of each asynchronous copy to shared memory."""
    return [int(size, 16) for size in re.findall(r"cp\.async\.c[ag][^;]*?, (0x[0-9a-f]+)", made.ptx)]


def every(**arithmetic: tuple[tuple[str, str], ...]) -> pytest.MarkDecorator:
    """Each block size and target with the arithmetic of each direction."""
    return pytest.mark.parametrize(
        ("direction", "block", "dtype", "precision", "target"),
        [
            (direction, block, dtype, precision, target)
            for direction, pairs in arithmetic.items()
            for dtype, precision in pairs
            for block in BLOCKS
            for target in (80, 90)
        ],
    )


@every(fwd=FORWARD, dx=INPUT_GRAD)
def test_walk(direction: str, block: int, dtype: str, precision: str, target: int) -> None:
    made = walk(block, dtype, precision, target, "batch_last", direction == "dx")
    assert made.shared <= SHARED_LIMIT[target]
    assert made.spilled == 0
    on_tensor_cores = (dtype, precision) != ("f32", "ieee")
    assert (matrix_instructions(made, target) > 0) == on_tensor_cores


@every(dw=WEIGHT_GRAD)
def test_weight_grad(direction: str, block: int, dtype: str, precision: str, target: int) -> None:
    made = weight_grad(block, dtype, precision, target, "batch_last")
    assert made.shared <= SHARED_LIMIT[target]
    assert made.spilled == 0
    if (dtype, precision) == ("f32", "ieee"):
        assert matrix_instructions(made, target) == 0
    else:  # Hopper's instruction has 64 rows, and takes no smaller block
        assert len(re.findall(r"wgmma\.mma_async|mma\.sync", made.ptx)) > 0


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("layout", ["batch_last", "channels_last"])
def test_pixels_are_copied_16_bytes_at_a_time(layout: str, target: int) -> None:
    """In both layouts, where no block is ragged: what the hints in the kernels are for."""
    assert copies(walk(64, "bf16", "ieee", target, layout, False)).count(16) >= 8


@pytest.mark.parametrize(("layout", "widest"), [("batch_last", 4), ("channels_last", 16)])
def test_tf32_of_hopper_wants_channels_last(layout: str, widest: int) -> None:
    """Its operands lie channels innermost in shared memory, so batch-last pixels are copied one by one."""
    made = walk(16, "f32", "tf32", 90, layout, False)
    pixels = [size for size in copies(made) if size != 8]  # the weights of a block of 16
    assert max(pixels) == widest


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("block", BLOCKS)
def test_pack_and_join(block: int, target: int) -> None:
    from fedpai_kernels.triton.kernels.pack import ELEMENTS, pack_kernel
    from fedpai_kernels.triton.kernels.weight_grad import join_kernel

    element = "*fp16"
    constants = {"BLOCK": block, "ELEMENTS": min(block * block, ELEMENTS)}
    pointers = {"values": element, "blocks": element, "entries": "*i32"}
    assert compiled(pack_kernel, target, pointers, constants).spilled == 0
    pointers = {"partials": "*fp32", "dvalues": element, "entries": "*i32"}
    assert compiled(join_kernel, target, pointers, constants, odd=("count", "parts")).spilled == 0
