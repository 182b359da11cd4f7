# SPDX-License-Identifier: Apache-2.0
"""A norm that waits for a convolution: under hooks, checkpoints, torch's transforms, in threads, replaced, copied."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fedpai_kernels as fk
from fedpai_kernels.nn import (
    MaskedConv2d,
    SparseConv2d,
)
from fedpai_kernels.nn.deferred import PendingNorm
from tests.nn.chains import (
    Chain,
    Leaving,
    both,
    chains,
    check_close,
    check_equal,
    check_same,
    converted,
    images,
    mask_of,
    outcome,
)

# ---- hooks
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["norm", "relu", "last"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_the_separate_steps(kind: str, where: str, together: list[bool], computed: list[PendingNorm]) -> None:
    seen: list[list[Tensor]] = []
    for model in chains():
        found: list[Tensor] = []
        seen.append(found)

        def hook(module: nn.Module, *tensors: Any, found: list[Tensor] = found) -> None:
            parts = [t for part in tensors for t in (part if isinstance(part, tuple) else (part,))]
            assert all(type(t) is Tensor for t in parts)
            found += [t.detach().clone() for t in parts]

        handle = getattr(model.get_submodule(where), f"register_{kind}_hook")(hook)
        outcome(model, images())
        handle.remove()
    assert seen[0]
    check_equal(*(dict(enumerate(found)) for found in seen))
    assert not together
    assert not computed
    check_same(*chains())
    assert together


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_every_module_see_the_separate_steps(kind: str, together: list[bool]) -> None:
    fused, plain = chains()
    names: list[str] = []

    def hook(module: nn.Module, *tensors: Any) -> None:
        parts = [t for part in tensors for t in (part if isinstance(part, tuple) else (part,))]
        names.append(f"{type(module).__name__} {' '.join(type(t).__name__ for t in parts)}")

    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(hook)
    try:
        ours = outcome(fused, images())
    finally:
        handle.remove()
    check_equal(ours, outcome(plain, images()))
    assert len(names) == 5
    assert not any("Pending" in name for name in names)
    assert not together


def test_hooks_on_the_owner_see_tensors() -> None:
    seen = []
    for model in both(Leaving):
        model.leave = lambda h, y: y
        found: list[Tensor] = []
        model.register_forward_hook(lambda m, args, z, found=found: found.append(z))
        model.register_full_backward_hook(lambda m, dx, dz, found=found: found.extend((*dx, *dz)))
        outcome(model, images())
        assert all(type(t) is Tensor for t in found)
        seen.append(found)
    check_equal(*(dict(enumerate(found)) for found in seen))


def test_hooks_on_a_container_around_the_norm(together: list[bool]) -> None:
    fused, plain = both(
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1)
        )
    )
    check_same(fused, plain)
    assert len(together) == 3
    types: list[type] = []
    fused[0].register_forward_hook(lambda m, args, y: types.append(type(y)))
    check_same(fused, plain)
    assert types == [Tensor] * 3
    assert len(together) == 3


# ---- another convolution
# ----------------------------------------------------------------------------------------------------------------


def circular() -> nn.Module:
    return SparseConv2d(6, 5, 3, padding=1, padding_mode="circular", mask=mask_of((5, 6, 3, 3)), dtype=torch.float64)


REPLACEMENTS: dict[str, Callable[[], nn.Module]] = {
    "torch_s": lambda: nn.Conv2d(6, 5, 3).double(),
    "masked": lambda: MaskedConv2d(6, 5, 3, mask=mask_of((5, 6, 3, 3)), dtype=torch.float64),
    "identity": nn.Identity,
    "transposed": lambda: nn.ConvTranspose2d(6, 5, 3).double(),
    "circular": circular,
    "another_size": lambda: SparseConv2d(6, 3, 5, 2, "valid", mask=mask_of((3, 6, 5, 5)), dtype=torch.float64),
    "grouped": lambda: SparseConv2d(6, 6, 3, groups=2, mask=mask_of((6, 3, 3, 3)), dtype=torch.float64),
}


@pytest.mark.parametrize("make", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_the_convolution_is_replaced(make: Callable[[], nn.Module], together: list[bool]) -> None:
    fused, plain = chains()
    for model in (fused, plain):
        torch.manual_seed(5)
        model.last = make()
    check_same(fused, plain)
    reads_zeros = type(fused.last) is SparseConv2d and fused.last.padding_mode == "zeros"
    assert len(together) == 3 * reads_zeros


@pytest.mark.parametrize("change", ["dtype", "channels", "image"])
def test_what_a_convolution_refuses(change: str) -> None:
    """With the same words, and the statistics of the norm before it."""
    found = []
    for model in chains():
        if change == "dtype":
            model.last.float()
        elif change == "channels":
            model.last = SparseConv2d(7, 5, 3, mask=mask_of((5, 7, 3, 3)), dtype=torch.float64)
        else:
            model.last.padding, model.last.dilation = (0, 0), (9, 9)
        with pytest.raises((TypeError, ValueError)) as caught:
            model(images())
        found.append(f"{caught.type}: {caught.value}")
    assert found[0] == found[1]


def test_the_convolution_is_gone() -> None:
    fused, plain = chains()
    for model in (fused, plain):
        del model._modules["last"]
        object.__setattr__(model, "last", torch.tanh)
    check_same(fused, plain)


def test_a_forward_that_is_patched_sees_a_tensor(together: list[bool]) -> None:
    fused, plain = chains()
    types: list[type] = []
    for model in (fused, plain):
        inner = model.last.forward
        model.last.forward = lambda y, inner=inner: types.append(type(y)) or inner(y)  # type: ignore[func-returns-value]
    check_same(fused, plain)
    assert set(types) == {Tensor}
    assert not together


# ---- checkpoints
# ----------------------------------------------------------------------------------------------------------------


class Checkpointed(Chain):
    """The part behind the norm is checkpointed by itself."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return checkpoint(lambda y: self.last(torch.relu(y)), y, use_reentrant=self.reentrant)


def checkpointed(model: Chain, part: str, reentrant: bool) -> Callable[[Tensor], Tensor]:
    """What runs the model."""
    if part == "block":
        return lambda x: checkpoint(model, x, use_reentrant=reentrant)
    if part != "relu_and_conv":
        module = model.get_submodule(part)
        inner = module.forward
        module.forward = lambda y: checkpoint(inner, y, use_reentrant=reentrant)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["block", "norm", "relu", "last", "relu_and_conv"])
def test_checkpointing(part: str, reentrant: bool) -> None:
    """Of the whole block, and of a part that runs again without the rest."""
    found = []
    for fuse in (True, False):
        torch.manual_seed(1)
        model = Checkpointed() if part == "relu_and_conv" else Chain()
        model.reentrant = reentrant
        converted(model.double(), fuse)
        run = checkpointed(model, part, reentrant)
        found.append([outcome(model.train(training), images(), run) for training in (True, True, False)])
    for ours, theirs in zip(*found, strict=True):
        check_equal(ours, theirs)


def test_a_checkpoint_that_the_trace_did_not_have() -> None:
    """What was put off before it is computed as if it had not been, and once."""

    class Later(Chain):
        switched = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            if not self.switched:
                return self.last(torch.relu(y))
            return checkpoint(lambda y: self.last(torch.relu(y)) + y.mean(), y, use_reentrant=False)

    fused, plain = both(Later)
    fused.switched = plain.switched = True
    check_close(fused, plain)


def test_hooks_on_saved_tensors(together: list[bool]) -> None:
    fused, plain = chains()
    with torch.autograd.graph.save_on_cpu():
        check_same(fused, plain)
    assert len(together) == 3


@pytest.mark.parametrize("between", [1, 2], ids=["conv", "another_step"])
@pytest.mark.parametrize("module", [False, True])
def test_a_relu_without_gradients_keeps_them_out(module: bool, between: int) -> None:
    class Cut(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            with torch.no_grad():
                y = self.relu(y) if module else torch.relu(y)
            return self.last(y if between == 1 else y * between)

    found = []
    for fuse in (True, False):
        torch.manual_seed(1)
        model = Cut().double()
        converted(model, fuse)
        found.append(outcome(model, images()))
    check_equal(*found)
    assert "dx" not in found[0]


# ---- torch's transforms
# ----------------------------------------------------------------------------------------------------------------


def test_compiles() -> None:
    torch.compiler.reset()
    fused, plain = chains()
    z = torch.compile(fused, backend="aot_eager", fullgraph=True)(images())
    torch.testing.assert_close(z, plain(images()))
    torch.compiler.reset()


def test_functional_call() -> None:
    fused, plain = chains()
    found = []
    for model in (fused, plain):
        parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}
        for p in parameters.values():
            p.requires_grad_()
        z = torch.func.functional_call(model, parameters, (images(),))
        found.append([z, *torch.autograd.grad(z.pow(2).sum(), list(parameters.values()))])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(lambda x: m(x).pow(2).sum())(x),
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](torch.ones(7, 5, 5, 6).double())[0],
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda m, x: torch.func.vmap(m)(x.unsqueeze(0).expand(2, *x.shape)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_do_what_they_do_to_the_separate_steps(
    transform: Callable[[nn.Module, Tensor], Any], together: list[bool]
) -> None:
    found: list[Any] = []
    for model in chains():
        try:
            found.append(transform(model.eval(), images()))
        except Exception as error:
            found.append(type(error))
    if isinstance(found[1], Tensor):
        assert torch.equal(found[0], found[1])
    else:
        assert found[0] is found[1]
    assert not together


# ---- copies and changes of the model
# ----------------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_stay_fused(together: list[bool]) -> None:
    fused, plain = both(lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)))
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        check_same(twin, copy.deepcopy(plain))
    assert len(together) == 6


def test_state_dicts_are_dense_and_densify_undoes_it() -> None:
    dense = Chain().double()
    fused, plain = chains()
    dense.load_state_dict(fused.state_dict())
    fused.load_state_dict(dense.state_dict())
    check_same(fused, plain)
    dense.load_state_dict(fused.state_dict())
    fused.seen = []
    again = fk.densify_(copy.deepcopy(fused))
    assert [type(m) for m in again.modules()] == [type(m) for m in dense.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())
    check_equal(outcome(again.train(), images()), outcome(dense, images()))


def test_converting_twice_changes_nothing(together: list[bool]) -> None:
    fused, plain = chains()
    fk.sparsify_(fused, {"last": fused.last.mask})
    assert len(fused._forward_hooks) == len(fused._forward_pre_hooks) == 1
    check_same(fused, plain)
    assert len(together) == 3


# ---- threads
# ----------------------------------------------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts it; the result is what the returned function waits for."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def wait() -> Any:
        thread.join(60)
        return results[0]

    return wait


def steps(model: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        outcome(model, fk.to_batch_last(torch.randn(9, 4, 8, 8, generator=draw, dtype=torch.float64)))
        for _ in range(12)
    ]


def test_copies_train_in_threads() -> None:
    fused, _ = chains()
    expected = [in_thread(lambda seed=seed: steps(copy.deepcopy(fused), seed))() for seed in range(4)]
    copies = [copy.deepcopy(fused) for _ in range(4)]
    waits = [in_thread(lambda m=m, seed=seed: steps(m, seed)) for seed, m in enumerate(copies)]
    for wait, theirs in zip(waits, expected, strict=True):
        for a, b in zip(wait(), theirs, strict=True):
            check_equal(a, b)


def test_one_model_is_evaluated_in_threads(together: list[bool]) -> None:
    fused, _ = chains()
    fused.eval()

    def run(seed: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return [fused(fk.to_batch_last(torch.randn(9, 4, 8, 8, generator=draw).double())) for _ in range(20)]

    expected = [in_thread(lambda seed=seed: run(seed))() for seed in range(4)]
    waits = [in_thread(lambda seed=seed: run(seed)) for seed in range(4)]
    for wait, theirs in zip(waits, expected, strict=True):
        for a, b in zip(wait(), theirs, strict=True):
            assert torch.equal(a, b)
    assert len(together) == 160
