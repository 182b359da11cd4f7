# SPDX-License-Identifier: Apache-2.0
"""A batch norm or group norm that waits for the ReLU after it, which no sparse convolution reads: computed together as
long as the forward does what it did when it was traced, and right whatever somebody does to the modules later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn import DeferrableBatchNorm2d, DeferrableGroupNorm
from fedpai_kernels.nn.deferred import PendingNorm
from tests.nn.chains import check_equal, check_same, converted, images, outcome

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(6),
    "group": lambda: nn.GroupNorm(3, 6),
    "group_not_affine": lambda: nn.GroupNorm(2, 6, affine=False),
}


class Pooled(nn.Sequential):
    """conv, norm, ReLU, pooling, conv; the ReLU may be left out later."""

    def __init__(self, norm: nn.Module) -> None:
        conv, last = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 5, 2)
        super().__init__(conv, norm, nn.ReLU(inplace=True), nn.MaxPool2d(2), last)
        self.activates = True

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            if self.activates or not isinstance(module, nn.ReLU):
                x = module(x)
        return x


@pytest.fixture(params=NORMS)
def models(request: pytest.FixtureRequest) -> tuple[Pooled, Pooled]:
    """The same model, fused and not."""
    torch.manual_seed(1)
    plain = Pooled(NORMS[request.param]()).double()
    for p in plain[1].parameters():
        nn.init.normal_(p)
    fused = copy.deepcopy(plain)
    report = converted(fused)
    converted(plain, fuse=False)
    kind = "batch" if request.param == "batch" else "group"
    assert f"fused: 1 {kind} norms with the ReLU after them" in report.notes
    assert type(fused[1]) in (DeferrableBatchNorm2d, DeferrableGroupNorm)
    return fused, plain


def test_they_are_computed_together(models: tuple[Pooled, Pooled], computed: list[PendingNorm]) -> None:
    check_same(*models)
    assert not computed


@pytest.mark.parametrize("where", [1, 2], ids=["norm", "relu"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_the_separate_steps(models: tuple[Pooled, Pooled], kind: str, where: int) -> None:
    seen: list[list[Tensor]] = []
    for model in models:
        model[2].inplace = False  # which backward hooks refuse
        found: list[Tensor] = []
        seen.append(found)

        def hook(module: nn.Module, *tensors: Any, found: list[Tensor] = found) -> None:
            parts = [t for part in tensors for t in (part if isinstance(part, tuple) else (part,))]
            found += [t.detach().clone() for t in parts]

        getattr(model[where], f"register_{kind}_hook")(hook)
        outcome(model, images())
    assert seen[0]
    check_equal(*(dict(enumerate(found)) for found in seen))


def replace_relu(model: Pooled) -> None:
    model[2] = nn.Tanh()


def replace_norm(model: Pooled) -> None:
    model[1] = nn.Identity()


def replace_norm_by_torch_s(model: Pooled) -> None:
    model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1])
    model.eval()


def leave_out_relu(model: Pooled) -> None:
    model.activates = False


@pytest.mark.parametrize("change", [replace_relu, replace_norm, replace_norm_by_torch_s, leave_out_relu])
def test_a_model_that_is_changed_later(models: tuple[Pooled, Pooled], change: Callable[[Pooled], None]) -> None:
    for model in models:
        change(model)
    check_equal(*(outcome(model, images()) for model in models))


ONES = torch.ones(6, 6, 1, 1, dtype=torch.bool)
OURS: tuple[nn.Module, ...] = (
    fk.nn.BatchLastMaxPool2d(2),
    fk.nn.BatchLastAvgPool2d(2),
    fk.nn.BatchLastAdaptiveAvgPool2d(2),
    fk.nn.BatchLastBatchNorm2d(6).double(),
    fk.nn.BatchLastGroupNorm(2, 6).double(),
    fk.nn.BatchLastInstanceNorm2d(6).double(),
    fk.nn.BatchLastConv2d(6, 6, 1).double(),
    fk.nn.MaskedConv2d(6, 6, 1, mask=ONES).double(),
    fk.nn.SparseConv2d(6, 6, 1, mask=ONES).double(),
)


@pytest.mark.parametrize("reader", OURS, ids=lambda module: type(module).__name__)
def test_another_module_of_ours_reads_it(models: tuple[Pooled, Pooled], reader: nn.Module) -> None:
    for model in models:
        model[2], model[3] = copy.deepcopy(reader), nn.Identity()
    torch.testing.assert_close(*(outcome(model, images()) for model in models))


def test_a_part_of_the_model(models: tuple[Pooled, Pooled]) -> None:
    found = [outcome(nn.Sequential(*list(model)[:2]), images()) for model in models]
    assert bool((found[1]["z"] < 0).any())
    check_equal(*found)


def test_an_input_that_changed_is_an_error() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6)
            self.change = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            y = self.norm(h)
            if self.change:
                h.data.add_(1)
                torch.autograd.graph.increment_version(h)
            return torch.relu(y)

    model = Changing().double()
    converted(model)
    model(images())
    model.change = True
    with pytest.raises(RuntimeError, match="what a norm reads, or what is added to it, was changed in place"):
        model(images())


def test_densify_undoes_it(models: tuple[Pooled, Pooled]) -> None:
    fused, plain = (fk.densify_(model) for model in models)
    assert [type(m) for m in fused] == [type(m) for m in plain]
    assert not fused._forward_hooks
    assert not fused._forward_pre_hooks
    check_same(fused, plain)
