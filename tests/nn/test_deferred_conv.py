# SPDX-License-Identifier: Apache-2.0
"""A batch norm that is computed while the convolution after it loads its input gives the numbers of one that is not,
whatever is done with it.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fedpai_kernels as fk
from fedpai_kernels.nn import (
    BatchLastBatchNormReLU2d,
    DeferrableBatchNorm2d,
    MaskedConv2d,
    SparseConv2d,
    deferred,
)
from fedpai_kernels.nn.deferred import PendingNorm


class Chain(nn.Module):
    """conv, norm, ReLU, conv; the forward may do something else in between that was not there when it was traced."""

    def __init__(self, relu: str = "module", bias: bool = True, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6, **settings)
        self.relu = nn.ReLU(inplace=relu == "module_in_place")
        self.last = nn.Conv2d(6, 5, 3, padding=1, bias=bias)
        self.kind = relu
        self.after_norm: Callable[[Any, Tensor], Any] = nothing
        self.after_relu: Callable[[Any, Tensor], Any] = nothing
        self.after_last: Callable[[Any, Tensor], Any] = nothing
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.norm(h)
        self.seen = [h]
        self.seen.append(self.after_norm(self, y))
        if self.kind.startswith("module"):
            y = self.relu(y)
        elif self.kind != "none":
            y = RELUS[self.kind](y)
        self.seen.append(self.after_relu(self, y))
        z = self.last(y)
        other = self.after_last(self, y)
        return z if other is None else z + other


def nothing(chain: Chain, y: Tensor) -> None:
    pass


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": torch.relu,
    "functional": F.relu,
    "functional_in_place": lambda y: F.relu(y, inplace=True),
    "method": lambda y: y.relu(),
    "method_in_place": lambda y: y.relu_(),
}
EVERY_RELU = pytest.mark.parametrize("relu", ["module", "module_in_place", "none", *RELUS])
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum_none": {"momentum": None},
    "not_affine": {"affine": False},
    "no_running_statistics": {"track_running_stats": False},
    "none_of_them": {"affine": False, "track_running_stats": False},
}


def mask_of(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4


def converted(model: nn.Module, fuse: bool = True, **options: Any) -> fk.nn.Report:
    """Converts every convolution of `model`."""
    masks = {name: mask_of(m.weight.shape) for name, m in model.named_modules() if type(m) is nn.Conv2d}
    return fk.sparsify_(model, masks, fuse=fuse, **options)


def both(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """The same model, fused and not."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(1)
        model = make().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        converted(model, fuse)
        models.append(model)
    assert any(type(m) is DeferrableBatchNorm2d for m in models[0].modules())
    assert not any(type(m) is DeferrableBatchNorm2d for m in models[1].modules())
    return models[0], models[1]


def chains(relu: str = "module", **settings: Any) -> tuple[Chain, Chain]:
    return both(lambda: Chain(relu, **settings))


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return fk.to_batch_last(torch.randn(7, 4, 5, 6, dtype=dtype, generator=draw))


def outcome(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients, and the state after a step."""
    leaf = x.clone().requires_grad_()
    z = (run or model)(leaf)
    assert type(z) is Tensor
    if z.requires_grad:
        z.backward(torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape))
    gradients = {f"d{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own = {} if leaf.grad is None else {"dx": leaf.grad}
    return {"z": z.detach(), **own, **gradients, **copy.deepcopy(model.state_dict())}


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def check_same(fused: nn.Module, plain: nn.Module, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    for training in (True, True, False):
        check_equal(*(outcome(model.train(training), x) for model in (fused, plain)))


def check_close(fused: nn.Module, plain: nn.Module) -> None:
    """Where torch may sum the gradients in another order."""
    for training in (True, True, False):
        ours, theirs = (outcome(model.train(training), images()) for model in (fused, plain))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that a norm and a convolution were computed in one."""
    calls: list[bool] = []
    original = deferred.norm_conv2d

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(deferred, "norm_conv2d", count)
    return calls


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Any:
    yield
    assert not deferred._PERMITS.given
    assert not deferred._PERMITS.uncounted


# ---- the same bits
# ----------------------------------------------------------------------------------------------------------------


@EVERY_RELU
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_fused_is_unfused_bit_by_bit(
    settings: dict[str, Any], relu: str, together: list[bool], computed: list[PendingNorm]
) -> None:
    check_same(*chains(relu, **settings))
    assert len(together) == 3
    assert not computed


def test_in_single_precision(together: list[bool]) -> None:
    check_same(*both(Chain, torch.float32), images(torch.float32))
    assert together


FROZEN = ["norm", "last", "first norm", "last.values", "last.bias norm.weight", "norm last first"]


@pytest.mark.parametrize("frozen", FROZEN)
def test_parameters_without_a_gradient(frozen: str, together: list[bool]) -> None:
    fused, plain = chains()
    for model in (fused, plain):
        for name, p in model.named_parameters():
            p.requires_grad_(not any(name.startswith(part) for part in frozen.split()))
    check_same(fused, plain)
    assert len(together) == 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_without_gradients(context: Callable[[], Any], together: list[bool], computed: list[PendingNorm]) -> None:
    fused, plain = chains("module_in_place")
    for training in (True, False):
        with context():
            z = fused.train(training)(images())
            assert torch.equal(z, plain.train(training)(images()))
        assert not z.requires_grad
    check_equal(fused.state_dict(), plain.state_dict())
    assert len(together) == 2
    assert not computed


def test_gradients_of_gradients() -> None:
    fused, plain = chains()
    for training in (True, False):
        found = []
        for model in (fused.train(training), plain.train(training)):
            leaf = images().requires_grad_()
            (dx,) = torch.autograd.grad(model(leaf).pow(2).sum(), leaf, create_graph=True)
            model.zero_grad()
            (dx.pow(2).sum() + model(leaf).sum()).backward()
            found.append([dx, leaf.grad, *(p.grad.clone() for p in model.parameters())])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_bias_of_the_convolution_may_change_before_the_backward_pass(create_graph: bool) -> None:
    found = []
    for model in chains():
        z = model(images())
        with torch.no_grad():
            model.last.bias.add_(1)
        found.append(torch.autograd.grad(z.pow(2).sum(), list(model.parameters()), create_graph=create_graph))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast(together: list[bool]) -> None:
    fused, plain = both(Chain, torch.float32)
    for given in (images(torch.float32), images(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            check_same(fused, plain, given)
    assert together


# ---- a forward that does something else
# ----------------------------------------------------------------------------------------------------------------


def past_autograd(look: Callable[[Chain, Tensor], Any]) -> Callable[[Chain, Tensor], Any]:
    return lambda m, y: look(m, y.data)


LOOKS: dict[str, Callable[[Chain, Tensor], Any]] = {
    "print": lambda m, y: f"{y}".split("grad_fn")[0],
    "numpy": lambda m, y: y.detach().numpy().tolist(),
    "arithmetic": lambda m, y: (y * 2 - 1).sum().item(),
    "a_sum_of_its_own": lambda m, y: (y + y).sum().item(),
    "in_place": lambda m, y: y.mul_(2).sum().item(),
    "in_place_sum": lambda m, y: y.add_(m.seen[0].detach()).sum().item(),
    "indices": lambda m, y: y[:, 1:3].sum().item(),
    "assigned": lambda m, y: y.__setitem__((slice(None), 0), 1.5),
    "without_gradient": lambda m, y: (y.detach() + 1).sum().item(),
    "another_relu": lambda m, y: torch.relu(y).sum().item(),
    "a_copy": lambda m, y: copy.deepcopy(y.detach()).sum().item(),
    "its_layout": lambda m, y: (y.stride(), y.is_contiguous(), fk.layout.is_batch_last(y)),
    "its_shape": lambda m, y: (y.shape, y.dim(), y.dtype, len(y), isinstance(y, Tensor)),
    "a_dense_convolution": lambda m, y: nn.Conv2d(6, 1, 1).double()(y).shape,
    "a_hook": lambda m, y: y.register_hook(lambda dy: dy * 2) and None,
}


@pytest.mark.parametrize("relu", ["module", "module_in_place", "none"])
@pytest.mark.parametrize("where", ["after_norm", "after_relu"])
@pytest.mark.parametrize("what", LOOKS)
def test_whatever_else_is_done_in_between(what: str, where: str, relu: str) -> None:
    look = LOOKS[what]
    # Torch's ReLU keeps its result and takes its gradient from it.
    changes_it = what in ("in_place", "in_place_sum", "assigned") and where == "after_relu" and relu != "none"
    if changes_it:
        look = past_autograd(look)
    fused, plain = chains(relu)
    outcomes = []
    for model in (fused, plain):
        setattr(model, where, look)
        outcomes.append(outcome(model, images()))
    for name, value in outcomes[0].items():
        if not (changes_it and name.startswith("d")):
            torch.testing.assert_close(value, outcomes[1][name], msg=lambda m, name=name: f"{name}: {m}")
    ours, theirs = fused.seen[1:], plain.seen[1:]
    assert ours == pytest.approx(theirs) if all(isinstance(v, float) for v in ours) else str(ours) == str(theirs)


SECOND_READERS: dict[str, Callable[[Chain, Tensor], Any]] = {
    "a_function": lambda m, y: torch.tanh(y).mean(),
    "in_place": lambda m, y: y.mul_(2).mean() if not y.requires_grad else y.mul(2).mean(),
    "the_convolution_again": lambda m, y: m.last(y),
    "its_relu": lambda m, y: torch.relu(y - 0.5).mean(),
    "a_norm": lambda m, y: nn.BatchNorm2d(6).double()(y).abs().mean(),
    "without_gradient": lambda m, y: y.detach().mean(),
}


@pytest.mark.parametrize("relu", ["module", "module_in_place", "function", "none"])
@pytest.mark.parametrize("read", SECOND_READERS.values(), ids=SECOND_READERS.keys())
def test_a_second_reader_that_only_appears_when_it_runs(
    read: Callable[[Chain, Tensor], Any], relu: str, together: list[bool]
) -> None:
    fused, plain = chains(relu)
    fused.after_last = plain.after_last = read
    check_close(fused, plain)
    assert together


def test_it_is_stored_and_read_later(together: list[bool]) -> None:
    """By something outside of the forward, after the convolution has read it."""
    fused, plain = chains()
    found = []
    for model in (fused, plain):
        model.after_relu = lambda m, y: y
        leaf = images().requires_grad_()
        z = model(leaf)
        (z.sum() + model.seen[2].pow(2).sum()).backward()
        model.zero_grad(set_to_none=False)
        found.append([z, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(together) == 1


class Double(torch.autograd.Function):
    """Is not asked by torch what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 2


ASTRAY: dict[str, Callable[[Chain, Tensor], Tensor]] = {
    "a_function_of_autograd": lambda m, y: Double.apply(y).mean(),
    "a_norm_of_ours": lambda m, y: fk.nn.BatchLastBatchNorm2d(6).double()(y).abs().mean(),
}


@pytest.mark.parametrize("leaf", ["input", "parameter", "everything"])
@pytest.mark.parametrize("read", ASTRAY.values(), ids=ASTRAY.keys())
def test_what_torch_cannot_ask_for_is_an_error_and_no_wrong_gradient(
    read: Callable[[Chain, Tensor], Tensor], leaf: str
) -> None:
    """Whatever is differentiated with respect to."""
    fused, plain = chains()
    fused.after_last = plain.after_last = read
    x = images().requires_grad_()
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    z = fused(x).sum()
    if leaf == "everything":
        with pytest.raises(RuntimeError, match="fuse=False"):
            z.backward()
    else:
        with pytest.raises(RuntimeError, match="fuse=False"):
            torch.autograd.grad(z, x if leaf == "input" else fused.norm.bias)


class Leaving(nn.Module):
    """A forward that may leave before the convolution, which the trace does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.leave: Callable[[Tensor, Tensor], Any] | None = None

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        y = self.norm(h)
        if self.leave is not None:
            return self.leave(h, y)
        return self.last(torch.relu(y))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_result_that_nobody_reads_still_counts(momentum: float | None) -> None:
    fused, plain = both(Leaving)
    for model in (fused, plain):
        model.norm.momentum = momentum
        model.leave = lambda h, y: h * 1
    check_same(fused, plain)
    assert fused.norm.running_mean.abs().sum() > 0


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_returned_is_computed(relu: bool) -> None:
    fused, plain = both(Leaving)
    for model in (fused, plain):
        model.leave = lambda h, y: torch.relu(y) if relu else y
    check_same(fused, plain)
    for model in (fused, plain):
        model.leave = lambda h, y: {"a": [y, (h, torch.relu(y))]}
    ours, theirs = fused(images())["a"], plain(images())["a"]
    for a, b in ((ours[0], theirs[0]), (ours[1][1], theirs[1][1])):
        assert type(a) is Tensor
        assert torch.equal(a, b)


def test_an_error_in_between_leaves_the_statistics_of_the_separate_steps() -> None:
    def stop(m: Chain, y: Tensor) -> None:
        raise ValueError("stop")

    fused, plain = chains()
    for model in (fused, plain):
        model.after_norm = stop
        with pytest.raises(ValueError, match="stop"):
            model(images())
    check_equal(fused.state_dict(), plain.state_dict())
    assert type(fused.norm(images().repeat(1, 2, 1, 1)[:, :6])) is Tensor


@pytest.mark.parametrize("what", ["input", "weight", "running_mean"])
def test_what_it_reads_changed_is_an_error(what: str) -> None:
    fused, _ = chains()
    if what == "running_mean":
        fused.eval()

    @torch.no_grad()
    def change(m: Chain, y: Tensor) -> None:
        changed = m.norm_input if what == "input" else getattr(m.norm, what)
        changed.add_(1)

    fused.first.register_forward_hook(lambda m, args, y: setattr(fused, "norm_input", y))
    fused.after_norm = change
    with pytest.raises(RuntimeError, match=r"changed in place before.*fuse=False"):
        fused(images())


@pytest.mark.parametrize("before", ["relu", "last"])
def test_a_summand_that_changes_is_an_error(before: str) -> None:
    """The sum is one that the trace does not know."""

    class Adds(Leaving):
        summand: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            if self.summand is not None:
                y = y + self.summand
                if before == "relu":
                    self.summand.mul_(3)
            y = torch.relu(y)
            if self.summand is not None and before == "last":
                self.summand.mul_(3)
            return self.last(y)

    fused, plain = both(Adds)
    for model in (fused, plain):
        model.summand = fk.to_batch_last(torch.ones(7, 4, 5, 6).double())
    plain(images())
    with pytest.raises(RuntimeError, match=r"changed in place before.*fuse=False"):
        fused(images())


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


# ---- inputs
# ----------------------------------------------------------------------------------------------------------------


def test_one_value_per_channel_is_the_error_of_torch() -> None:
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    errors = []
    models = chains()
    for model in models:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
            model(x)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    check_equal(*(m.state_dict() for m in models))
    check_equal(*(outcome(m.eval(), x) for m in models))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_another_layout_takes_torch_s_path(kind: str, together: list[bool]) -> None:
    fused, plain = both(lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)))
    x = images().contiguous()
    check_same(fused, plain, x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x)
    assert not together
    check_same(fused, plain)
    assert len(together) == 3


def test_no_images(together: list[bool]) -> None:
    fused, plain = chains()
    check_same(fused, plain, images()[:0])
    assert not together


# ---- where in a model
# ----------------------------------------------------------------------------------------------------------------


class PreActivated(nn.Module):
    """norm, ReLU, convolution, twice; the input is the shortcut too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y), inplace=True))


class Body(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*modules), nn.Conv2d(6, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


# The model, and how many of its norms are computed by the convolutions after them.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "sequential": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), nn.Conv2d(6, 5, 3)), 1),
    "pre_activated": (PreActivated, 2),
    "two_pre_activated": (lambda: nn.Sequential(PreActivated(), PreActivated()), 4),
    "body": (lambda: Body(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), 1),
    "body_without_relu": (lambda: Body(nn.Conv2d(4, 6, 3), nn.Sequential(nn.BatchNorm2d(6))), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_where_it_is_found(name: str, together: list[bool], computed: list[PendingNorm]) -> None:
    make, norms = MODELS[name]
    check_same(*both(make))
    assert len(together) == 3 * norms
    assert not computed


def test_one_relu_and_one_convolution_for_two_norms(together: list[bool]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.relu(self.norm2(self.conv(self.relu(self.norm1(x))))))

    check_same(*both(Shared))
    assert len(together) == 6


def test_a_convolution_in_another_module_reads_the_tensor(together: list[bool]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Sequential(nn.Conv2d(6, 5, 3)))
    report = converted(model)
    assert "not fused: 1 (followed by Conv2d in another module)" in report.notes
    model.double()(images())
    assert not together


def test_the_report() -> None:
    assert "fused: 1 batch norms with the ReLU and the convolution after them" in converted(Chain()).notes
    assert "fused: 1 batch norms with the convolution after them" in converted(Chain("none")).notes
    assert not any("fused" in note for note in converted(Chain(), fuse=False).notes)


@pytest.mark.parametrize("left_out", ["norm", "relu", "last"])
def test_filter_fn_keeps_steps_apart(left_out: str, together: list[bool]) -> None:
    model = Chain().double()
    report = converted(model, filter_fn=lambda module, name: name != left_out)
    if left_out == "last":  # which stays dense
        assert "fused: 1 batch norms with the ReLU after them" in report.notes
        assert type(model.norm) is BatchLastBatchNormReLU2d
    else:
        assert "not fused: norm (left out by filter_fn)" in report.notes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model(images())
    assert not together


def test_a_dense_convolution_is_no_reader() -> None:
    model = Chain()
    report = fk.sparsify_(model, {"first": mask_of((6, 4, 3, 3))})
    assert "fused: 1 batch norms with the ReLU after them" in report.notes


# ---- memory
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", ["module", "module_in_place", "function", "none"])
def test_the_normalised_activation_is_not_kept(relu: str) -> None:
    kept = []
    for model in chains(relu):
        saved: dict[int, Tensor] = {}

        def pack(t: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            if t.shape == (7, 6, 5, 6):
                saved[t.data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            z = model(images())
        kept.append(len(saved))
        z.sum().backward()
    assert kept == [1, 2]


LARGE = 64 * 6 * 32 * 32 * 8  # bytes of the normalised activation


def test_live_memory() -> None:
    """Less while the graph exists, and none is left when it is gone, without the garbage collector."""
    x = fk.to_batch_last(torch.randn(64, 4, 32, 32, dtype=torch.float64))
    grown = []
    gc.collect()
    gc.disable()
    try:
        for model in chains("none"):  # torch's ReLU takes its memory elsewhere
            model(x[:2])  # makes the schedules
            model(x)
            model.seen = []
            before = fk.memory.memory_stats().live_bytes
            z = model(x)
            model.seen = []
            grown.append(fk.memory.memory_stats().live_bytes - before)
            del z
            assert fk.memory.memory_stats().live_bytes == before
            model.after_norm = lambda m, y: (y * 1).shape  # computed by itself
            model.after_last = lambda m, y: y.mean()
            z = model(x)
            z.sum().backward()
            model.seen = []
            del z
            assert fk.memory.memory_stats().live_bytes == before
    finally:
        gc.enable()
    assert grown[1] - grown[0] == LARGE
