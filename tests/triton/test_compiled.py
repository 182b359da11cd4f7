# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiled ahead of time for sm_80 and sm_90, with no GPU: types, layouts, shared memory, spills."""

from __future__ import annotations

import re

import pytest

from fedpai_kernels.triton import BLOCKS
from tests.triton.checking import INTERPRETED, needs_triton
from tests.triton.compiling import Compiled, compiled, walk, weight_grad

pytestmark = [
    needs_triton,
    pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted cannot be compiled in the same process"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
# Operands, and the precision of their products, by direction. float16 and bfloat16 take the same way through the
# compiler, which takes a second for each kernel: one of them per direction.
FORWARD = (("f32", "ieee"), ("f32", "tf32"), ("bf16", "ieee"))
INPUT_GRAD = (("f32", "tf32"), ("f16", "ieee"))
WEIGHT_GRAD = (("f32", "ieee"), ("f32", "tf32"), ("bf16", "ieee"))


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
def test_the_general_kernels(target: int) -> None:
    """Ragged blocks, 64-bit offsets, residues that are tested, products of three TF32."""
    for input_grad in (False, True):
        made = walk(32, "f32", "tf32x3", target, "batch_last", input_grad, general=True)
        assert made.shared <= SHARED_LIMIT[target]
        assert matrix_instructions(made, target) > 0
    made = weight_grad(32, "f16", "ieee", target, "channels_last", general=True)
    assert made.shared <= SHARED_LIMIT[target]


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


@pytest.mark.parametrize("target", [80, 90])
def test_merging(target: int) -> None:
    from fedpai_kernels.triton.kernels.aggregate import ELEMENTS, masked_mean_kernel, mean_kernel

    pointers = {"values": "*fp32", "weights": "*fp64", "out": "*fp32", "old": "*fp32", "words": "*i32", "ranks": "*i32"}
    odd = ("clients", "size", "row")
    for kernel in (mean_kernel, masked_mean_kernel):
        made = compiled(kernel, target, pointers, {"ELEMENTS": ELEMENTS}, odd=odd, fusion=False)
        assert made.spilled == 0
        assert "fma.rn.f64" not in made.ptx  # the bits of the CPU: products are rounded before they are added
        assert "div.rn.f64" in made.ptx


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("momentum", [False, True])
def test_steps(momentum: bool, target: int) -> None:
    from fedpai_kernels.triton.kernels.step import ELEMENTS, adam_kernel, sgd_kernel

    pointers = dict.fromkeys(("p", "g", "buffer", "m", "v", "factors"), "*fp32")
    constants = {"DECAYS": True, "MOMENTUM": momentum, "FIRST": False, "NESTEROV": momentum, "ELEMENTS": ELEMENTS}
    made = compiled(sgd_kernel, target, pointers, constants, odd=("size",))
    assert made.spilled == 0
    assert "fma.rn.f32" in made.ptx
    constants = {"DECAYS": True, "DECOUPLED": momentum, "ELEMENTS": ELEMENTS}
    made = compiled(adam_kernel, target, pointers, constants, odd=("size",))
    assert made.spilled == 0
    assert "div.rn.f32" in made.ptx
    assert "sqrt.rn.f32" in made.ptx
