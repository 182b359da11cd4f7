# SPDX-License-Identifier: Apache-2.0
"""The registered ops among torch's compilers: opcheck, torch.compile, export."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from fedpai_kernels import Plan, to_batch_last
from fedpai_kernels.ops import reference, sparse_conv2d, sparse_linear
from tests.cases import Case, Conv2dCase, LinearCase, conv2d_named
from tests.checking import Operands, Results, differentiate, operands

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "batch_last": to_batch_last,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every_other": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
}
GEOMETRY = [2, 1, 1, 0, 1, 1, 1, 2]  # stride, padding in front and behind, dilation: (vertical, horizontal) each


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------- opcheck


@pytest.mark.parametrize(
    ("dtype", "batch", "layout"),
    [
        *((torch.float32, batch, layout) for batch in (1, 9) for layout in sorted(LAYOUTS)),
        (torch.float32, 0, "contiguous"),
        (torch.float64, 9, "batch_last"),
    ],
    ids=str,
)
def test_opcheck(dtype: torch.dtype, batch: int, layout: str) -> None:
    plan = Plan.from_mask(torch.rand(5, 4, 3, 2) < 0.5)
    x = LAYOUTS[layout](torch.randn(batch, 4, 7, 6, dtype=dtype))
    values, bias = torch.randn(plan.nnz, dtype=dtype), torch.randn(5, dtype=dtype)
    ops: Any = torch.ops.fedpai
    dy = LAYOUTS[layout](torch.randn_like(ops.conv2d_forward(x, values, bias, plan.handle, GEOMETRY)))
    for op, arguments in (
        (ops.conv2d_forward.default, (x, values, bias, plan.handle, GEOMETRY)),
        (ops.conv2d_forward.default, (x, values, None, plan.handle, GEOMETRY)),
        (ops.conv2d_input_grad.default, (dy, values, plan.handle, 7, 6, GEOMETRY)),
        (ops.conv2d_weight_grad.default, (x, dy, plan.handle, True, GEOMETRY)),
        (ops.conv2d_weight_grad.default, (x, dy, plan.handle, False, GEOMETRY)),
        (ops.conv2d_backward.default, (x, dy, values, plan.handle, True, GEOMETRY)),
        (ops.conv2d_backward.default, (x, dy, values, plan.handle, False, GEOMETRY)),
    ):
        torch.library.opcheck(op, arguments)


# ------------------------------------------------------------------------------------------------------- compile


def network(case: Case, op: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The op between others that a compiler fuses."""

    def run(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return torch.relu(op(x * 2 - 1, values, bias)) * 3

    return run


CASES: list[Case] = [
    conv2d_named("plain"),
    conv2d_named("non_square_everything"),
    Conv2dCase("grouped_same", groups=2, padding="same", kernel=(3, 2), bias=False),
    LinearCase("rank_3", leading=(3, 4), bias=False),
]
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)  # calls a C++ compiler


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_compiled_forward_and_backward(case: Case, backend: str) -> None:
    numbers = operands(case, "f32", "exact")
    compiled = torch.compile(network(case, case.sparse), fullgraph=True, backend=backend)
    same(differentiate(compiled, numbers), differentiate(network(case, case.dense), numbers))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_other_batches_and_plans_get_their_own_code(backend: str) -> None:
    plans = [Plan.from_mask(torch.rand(5, 4, 3, 3) < density) for density in (0.3, 0.7, 0.5)]

    def run(x: Tensor, values: Tensor, plan: Plan) -> Tensor:
        return torch.relu(sparse_conv2d(x, values, plan, padding=1)) + 1

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for plan in [*plans, plans[0]]:
        for batch, size in ((2, 6), (3, 6), (3, 5), (1, 6)):
            x, values = torch.randint(-4, 5, (batch, 4, size, 6)).float(), torch.randint(-4, 5, (plan.nnz,)).float()
            expected = torch.relu(reference.conv2d(x, values, plan, padding=1)) + 1
            assert torch.equal(compiled(x, values, plan), expected)


def test_dynamic_shapes_trace_once() -> None:
    case = conv2d_named("plain")
    _, values, bias, _ = operands(case, "f32", "exact")
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network(case, case.sparse), fullgraph=True, backend=count, dynamic=True)
    # No two sizes alike in the first call: the compiler would take that for a rule.
    for batch, height, width in ((4, 7, 9), (5, 7, 9), (9, 11, 8), (3, 12, 5)):
        x = torch.randint(-4, 5, (batch, case.in_channels, height, width)).float()
        assert torch.equal(compiled(x, values, bias), network(case, case.dense)(x, values, bias))
    assert len(graphs) == 1


def test_compiled_code_keeps_the_plan_that_it_closes_over() -> None:
    def make() -> tuple[Callable[[Tensor, Tensor], Tensor], int, Tensor]:
        mask = torch.rand(5, 4) < 0.5
        mask[0] = True
        plan = Plan.from_mask(mask)
        compiled = torch.compile(lambda x, v: sparse_linear(x, v, plan), fullgraph=True, backend="aot_eager")
        return compiled, plan.nnz, mask

    compiled, nnz, mask = make()
    gc.collect()
    x, values = torch.randint(-4, 5, (3, 4)).float(), torch.arange(1.0, nnz + 1).requires_grad_()
    for _ in range(2):
        y = compiled(x, values)
        gc.collect()
        y.sum().backward()
        weight = torch.zeros(5, 4).masked_scatter(mask, values.detach())
        assert torch.equal(y, x @ weight.t())


def test_a_refusal_inside_a_compiled_function_is_still_named() -> None:
    case = conv2d_named("plain")
    x, values, bias, _ = operands(case, "f32", "exact")
    compiled = torch.compile(case.sparse, backend="eager")
    with pytest.raises(Exception, match="values: expected shape"):
        compiled(x, values[1:], bias)


def test_make_fx_and_fake_tensors_know_shapes_and_strides() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = conv2d_named("non_square_everything")
    numbers = operands(case, "f32", "exact")
    real = case.sparse(*numbers[:3])
    with FakeTensorMode() as mode:
        fake = case.sparse(*(None if t is None else mode.from_tensor(t) for t in numbers[:3]))  # type: ignore[arg-type]
    assert fake.shape == real.shape
    assert fake.stride() == real.stride()
    assert fake.dtype == real.dtype


def same(got: Results, expected: Results) -> None:
    for direction, result in got._asdict().items():
        wanted = getattr(expected, direction)
        assert (result is None) == (wanted is None), direction
        assert result is None or torch.equal(result, wanted), direction


def test_checkpointing_recomputes_to_the_same_gradients() -> None:
    case = conv2d_named("plain")
    numbers: Operands = operands(case, "f32", "exact")

    def recomputed(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return torch.utils.checkpoint.checkpoint(case.sparse, x, values, bias, use_reentrant=False)

    same(differentiate(recomputed, numbers), differentiate(case.sparse, numbers))
