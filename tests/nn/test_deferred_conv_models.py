# SPDX-License-Identifier: Apache-2.0
"""A norm that waits for a convolution: odd inputs, places in a model, and the memory that it saves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedpai_kernels as fk
from fedpai_kernels.nn import DeferrableBatchNorm2d
from fedpai_kernels.nn.deferred import PendingNorm
from tests.nn.chains import Chain, both, chains, check_equal, check_same, converted, images, mask_of, outcome

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
        assert type(model.norm) is DeferrableBatchNorm2d
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
