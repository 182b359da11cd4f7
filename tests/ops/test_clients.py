# SPDX-License-Identifier: Apache-2.0
"""Several clients in one call: each against the reference, and with the bits of a call of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.ops import sparse_conv2d, sparse_linear
from fedpai_kernels.ops.norm import batch_norm
from fedpai_kernels.ops.norm_conv2d import norm_conv2d
from tests.cases import CONV2D, LINEAR, Case, Conv2dCase, LinearCase, conv2d_named
from tests.checking import Operands, Results, differentiate, operands, runs, stacked

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CLIENTS = 3
PLAIN = conv2d_named("plain")
VARIED = [
    conv2d_named(name) for name in ("plain", "n_is_1", "n_not_multiple", "stride_2_odd_size", "groups_2", "blocks_3x5")
]


def of_clients(case: Case, dtype: str, regime: str, count: int = CLIENTS) -> list[Operands]:
    return [operands(case, dtype, regime, client) for client in range(count)]


def check_equal(got: Results, each: Sequence[Results]) -> None:
    """That a client's part of each result is that client's result, to the bit."""
    for direction, result in got._asdict().items():
        for client, own in enumerate(each):
            wanted = getattr(own, direction)
            assert (result is None) == (wanted is None), direction
            if result is not None:
                assert result.dtype == wanted.dtype
                assert torch.equal(result[client], wanted), f"{direction} of client {client}"


# ------------------------------------------------------------------------------------------------------ every case


@runs((*CONV2D, *LINEAR))
def test_exact(case: Case, dtype: str, isa: str) -> None:
    clients = of_clients(case, dtype, "exact")
    got = differentiate(case.sparse, stacked(clients))
    assert case.op == "linear" or fk.is_batch_last(got.fwd)
    expected = [differentiate(case.dense, own.to(torch.float64)) for own in clients]
    check_equal(got, [Results(*(None if t is None else t.to(got.fwd.dtype) for t in own)) for own in expected])  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", [*VARIED, *LINEAR[:10]], ids=lambda case: f"{case.op}-{case.name}")
def test_the_bits_of_calls_of_their_own(case: Case, threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    clients = of_clients(case, "f32", "rounded")
    check_equal(differentiate(case.sparse, stacked(clients)), [differentiate(case.sparse, own) for own in clients])


# -------------------------------------------------------------------------------------------------------- storage

STORAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "batch_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "clients_inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "clients_innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every_other_client": lambda t: t.repeat_interleave(2, 0)[::2],
    "every_other_column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", [*VARIED, LINEAR[0]], ids=lambda case: f"{case.op}-{case.name}")
def test_any_storage(case: Case, storage: str) -> None:
    clients = of_clients(case, "f32", "exact")
    moved = Operands(*(None if t is None else STORAGES[storage](t) for t in stacked(clients)))  # type: ignore[arg-type]
    check_equal(differentiate(case.sparse, moved), [differentiate(case.dense, own) for own in clients])


@pytest.mark.parametrize("case", [*VARIED, LINEAR[0]], ids=lambda case: f"{case.op}-{case.name}")
def test_expanded_gradients(case: Case) -> None:
    """One element for everything, as sum() sends it back; one for each client; one client's for all."""
    clients = of_clients(case, "f32", "exact")
    given = stacked(clients)
    shape = given.dy.shape
    per_client = torch.arange(1.0, CLIENTS + 1).view(-1, *(1 for _ in shape[1:]))
    for dy in (torch.tensor(3.0).expand(shape), per_client.expand(shape), given.dy[:1].expand(shape)):
        got = differentiate(case.sparse, given, dy)
        check_equal(got, [differentiate(case.dense, own, dy[k]) for k, own in enumerate(clients)])


def test_one_client_is_several_too() -> None:
    [own] = clients = of_clients(PLAIN, "f32", "rounded", 1)
    check_equal(differentiate(PLAIN.sparse, stacked(clients)), [differentiate(PLAIN.sparse, own)])


@pytest.mark.parametrize("case", [PLAIN, LINEAR[0]], ids=lambda case: case.op)
def test_no_clients_and_no_images(case: Case) -> None:
    given = stacked(of_clients(case, "f32", "exact"))
    nobody = differentiate(case.sparse, Operands(*(None if t is None else t[:0] for t in given)))  # type: ignore[arg-type]
    assert nobody.db is not None
    assert nobody.fwd.shape == (0, *case.output_shape)
    assert nobody.dx.shape == (0, *case.input_shape)
    assert nobody.dw.shape == (0, case.plan.nnz)
    assert nobody.db.shape == (0, case.mask_shape[0])
    nothing = differentiate(case.sparse, given._replace(x=given.x[:, :0], dy=given.dy[:, :0]))
    assert nothing.db is not None
    assert nothing.fwd.shape == (CLIENTS, 0, *case.output_shape[1:])
    assert nothing.dx.shape == (CLIENTS, 0, *case.input_shape[1:])
    assert torch.equal(nothing.dw, torch.zeros(CLIENTS, case.plan.nnz))
    assert torch.equal(nothing.db, torch.zeros(CLIENTS, case.mask_shape[0]))


# -------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize(
    "case",
    [
        Conv2dCase("small", batch=2, in_channels=2, out_channels=3, image=(4, 3), density=0.4),
        Conv2dCase("small_strided", batch=1, in_channels=2, out_channels=2, image=(4, 3), stride=2, bias=False),
        LinearCase("small", leading=(2,), in_features=3, out_features=2, density=0.6),
    ],
    ids=lambda case: f"{case.op}-{case.name}",
)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    numbers = stacked(of_clients(case, "f64", "rounded", 2))
    inputs = tuple(t.requires_grad_() for t in numbers[:3] if t is not None)

    def op(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return case.sparse(x, values, bias)

    assert gradcheck(op, inputs)
    assert gradgradcheck(op, inputs, (numbers.dy.requires_grad_(),))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[int, ...]) -> None:
    clients = of_clients(PLAIN, "f32", "exact")
    given = stacked(clients)
    inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(given[:3]) if t is not None]
    PLAIN.sparse(*inputs).backward(given.dy)
    for client, own in enumerate(clients):
        expected = differentiate(PLAIN.dense, own)
        for i, gradient in enumerate((expected.dx, expected.dw, expected.db)):
            grad = inputs[i].grad
            assert (grad is None) == (i not in wanted)
            assert grad is None or torch.equal(grad[client], gradient)


@pytest.mark.parametrize("case", [PLAIN, LINEAR[0]], ids=lambda case: case.op)
def test_activations_in_bfloat16(case: Case) -> None:
    clients = of_clients(case, "f32", "rounded")

    def rounded(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(case, LinearCase):
            return sparse_linear(x, values, case.plan, bias, activation_dtype=torch.bfloat16)
        return sparse_conv2d(x, values, case.plan, bias, padding=1, activation_dtype=torch.bfloat16)

    got = differentiate(rounded, stacked(clients))
    check_equal(got, [differentiate(rounded, own) for own in clients])
    assert not torch.equal(got.dw, differentiate(case.sparse, stacked(clients)).dw)


@pytest.mark.parametrize("case", [PLAIN, LinearCase("rank_3", leading=(3, 4), bias=False)], ids=lambda case: case.op)
def test_compiled(case: Case) -> None:
    given = stacked(of_clients(case, "f32", "exact"))
    compiled = torch.compile(case.sparse, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(differentiate(compiled, given), differentiate(case.sparse, given), strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or torch.equal(got, wanted)


def test_vmap_is_refused_in_words() -> None:
    x, values, bias, _ = stacked(of_clients(PLAIN, "f32", "exact"))
    with pytest.raises(RuntimeError, match=r"^sparse_conv2d, sparse_linear: torch.func.vmap .*\(K, N, C, H, W\)"):
        torch.func.vmap(PLAIN.sparse)(x, values, bias)


def test_registered_ops() -> None:
    """Schemas, fake versions and strides."""
    x, values, bias, dy = stacked(of_clients(PLAIN, "f32", "exact"))
    handle, geometry = PLAIN.plan.handle, [1] * 8
    for op, arguments in {
        "conv2d_forward": (x, values, bias, handle, geometry),
        "conv2d_input_grad": (dy, values, handle, *PLAIN.image, geometry),
        "conv2d_weight_grad": (x, dy, handle, True, geometry),
        "conv2d_backward": (x, dy, values, handle, True, geometry),
    }.items():
        torch.library.opcheck(getattr(torch.ops.fedpai, op), arguments)


# -------------------------------------------------------------------------------------------------------- training


def test_the_documented_training_has_the_bits_of_each_client_alone() -> None:
    """docs/clients.md: its code, as it stands; then the same model for one client."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # the document's own

    for client in range(names["K"]):
        parameters = [nn.Parameter(t.clone()) for t in names["server"]]
        values, weight, bias, fc_values, fc_bias = parameters
        optimizer = fk.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for images, labels in names["batches"]:
            y = sparse_conv2d(fk.to_batch_last(images[client]), values, names["conv"], stride=2, padding=1)
            y = batch_norm(y, None, None, weight, bias, training=True, relu=True)
            loss = F.cross_entropy(sparse_linear(y.flatten(1), fc_values, names["fc"], fc_bias), labels[client])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for own, every, start in zip(parameters, names["parameters"], names["server"], strict=True):
            assert torch.equal(own, every[client])
            assert not torch.equal(own, start)
    for every, merged in zip(names["parameters"], names["merged"], strict=True):
        torch.testing.assert_close(merged, every.detach().mean(0))


# ------------------------------------------------------------------------------------------------------- bad input

CONV, FC = fk.Plan.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool)), fk.Plan.from_mask(torch.ones(4, 3) > 0)
X, VALUES, BIAS = torch.zeros(2, 5, 3, 6, 6), torch.zeros(2, CONV.nnz), torch.zeros(2, 4)
ROWS, FC_VALUES = torch.zeros(2, 5, 3), torch.zeros(2, FC.nnz)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparse_conv2d(X, VALUES[:, 1:], CONV), r"^values: expected shape \(108,\).*\(K, 108\).*\(2, 107\)"),
        (lambda: sparse_conv2d(X, VALUES[None], CONV), r"^values: expected shape \(108,\).*got \(1, 2, 108\)"),
        (lambda: sparse_conv2d(X, VALUES[:1], CONV), r"^x: expected a first dimension of 1.*\(2, 5, 3, 6, 6\)"),
        (lambda: sparse_conv2d(X[:, 0], VALUES, CONV), r"^x: expected \(K, N, C, H, W\).*got shape \(2, 3, 6, 6\)"),
        (lambda: sparse_conv2d(X, VALUES[0], CONV), r"^x: expected \(N, C, H, W\).*got shape \(2, 5, 3, 6, 6\)"),
        (lambda: sparse_conv2d(X[:, :, :2], VALUES, CONV), r"^x: expected 3 channels, got shape \(2, 5, 2, 6, 6\)"),
        (lambda: sparse_conv2d(X[..., :0], VALUES, CONV), r"^x: an image needs at least one pixel"),
        (lambda: sparse_conv2d(X[..., :2], VALUES, CONV), r"^x: an image of 6 x 2 is too small"),
        (lambda: sparse_conv2d(X, VALUES, CONV, BIAS[0]), r"^bias: expected shape \(2, 4\).*2 clients, got \(4,\)"),
        (lambda: sparse_conv2d(X, VALUES, CONV, BIAS[:1]), r"^bias: expected shape \(2, 4\).*got \(1, 4\)"),
        (lambda: sparse_conv2d(X[0], VALUES[0], CONV, BIAS), r"^bias: expected shape \(4,\), got \(2, 4\)"),
        (lambda: sparse_linear(ROWS, FC_VALUES[:1], FC), r"^x: expected a first dimension of 1"),
        (lambda: sparse_linear(ROWS[0, 0], FC_VALUES[:, :0], FC), r"^values: expected shape \(12,\)"),
        (lambda: sparse_linear(torch.zeros(2), FC_VALUES, FC), r"^x: expected \(K, \.\.\., 3\), got shape \(2,\)"),
        (lambda: sparse_linear(ROWS[..., :2], FC_VALUES, FC), r"^x: expected \(K, \.\.\., 3\), got shape \(2, 5, 2\)"),
        (
            lambda: norm_conv2d(X, None, None, None, None, True, 0.1, 1e-5, VALUES, CONV),
            r"^x: expected a shape \(N, C, H, W\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
