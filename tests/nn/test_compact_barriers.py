# SPDX-License-Identifier: Apache-2.0
"""Where channels stay because somebody may look at them, masks that are refused, and state dicts that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fedpai_kernels as fk
from tests.nn.compaction import apply, check_same
from tests.nn.small import fingerprint


class Chain(nn.Module):
    """Two convolutions and a head; `between` is what the forward does after the first, `after` in the end."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.head = nn.Linear(6, 5)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.first(x))
        if self.between is not None:
            x = self.between(self, x)
        return self.head(self.inner(x).mean((2, 3)))


def masks_for(model: nn.Module) -> dict[str, Tensor]:
    """Channel 2 of the first convolution and channel 4 of the second are read by nobody."""
    masks = {
        name: torch.rand(model.get_submodule(name).weight.shape) < 0.7
        for name in ("first", "inner.1", "head")
    }
    masks["inner.1"][:, 2] = False
    masks["head"][:, 4] = False
    return masks


def images() -> Tensor:
    return torch.randn(4, 3, 5, 6, dtype=torch.float64)


def outputs(model: Any) -> tuple[int, int]:
    """Channels that both convolutions have left."""
    return model.first.out_channels, model.inner[1].out_channels


def test_without_barriers() -> None:
    model = Chain().double()
    fk.sparsify_(model, masks_for(model), compact=True)
    assert outputs(model) == (5, 5)


BARRIERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "view": lambda m, x: x.view(-1, 6, 5, 6),
    "sizes": lambda m, x: x * x.shape[1],
    "cat": lambda m, x: torch.cat([x, x])[:4],
    "index": lambda m, x: x + x[:, :1],
    "sum over channels": lambda m, x: x + x.mean(1, keepdim=True),
    "softmax": lambda m, x: torch.softmax(x, 1),
    "matmul": lambda m, x: x + (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean(),
    "a parameter by itself": lambda m, x: x + m.inner[1].weight.sum(),
    "twice the same norm": lambda m, x: m.norm(x),
    "a constant of its shape": lambda m, x: x + torch.arange(6.0, dtype=x.dtype).view(6, 1, 1),
}


@pytest.mark.parametrize("between", BARRIERS)
def test_operations_that_may_look_at_all_channels(between: str) -> None:
    model = Chain(BARRIERS[between]).double()
    masks = masks_for(model)
    apply(model, masks)
    compacted = fk.sparsify(model, masks, compact=True)
    # A layer whose weight is used by itself keeps all of it.
    assert outputs(compacted) == (6, 6 if between == "a parameter by itself" else 5)
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


def shared(model: Any) -> None:
    model.twin = nn.Conv2d(3, 6, 3, padding=1)
    model.twin.bias = model.first.bias


def patched(model: Any) -> None:
    model.norm.forward = lambda x: nn.BatchNorm2d.forward(model.norm, x)


def with_norm(model: Any) -> None:
    parametrizations.weight_norm(model.norm)


CHANGES: dict[str, tuple[Callable[[Any], Any], tuple[int, int]]] = {
    "a hook on a layer": (lambda m: m.first.register_forward_hook(lambda *_: None), (6, 5)),
    "a hook on a norm": (lambda m: m.norm.register_forward_pre_hook(lambda *_: None), (6, 5)),
    "a hook on a container": (lambda m: m.inner.register_forward_hook(lambda *_: None), (6, 6)),
    "a hook on the model": (lambda m: m.register_forward_hook(lambda *_: None), (5, 5)),
    "a backward hook": (lambda m: m.norm.register_full_backward_hook(lambda *_: None), (6, 5)),
    "a shared parameter": (shared, (6, 5)),
    "another buffer": (lambda m: m.norm.register_buffer("mine", torch.ones(6)), (6, 5)),
    "another forward": (patched, (6, 5)),
    "a parametrisation": (with_norm, (6, 5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_somebody_watches_or_changed(change: str) -> None:
    act, expected = CHANGES[change]
    model = Chain().double()
    masks = masks_for(model)
    act(model)
    fk.sparsify_(model, masks, compact=True)
    assert outputs(model) == expected
    model(images())


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [("first", (6, 5)), ("norm", (6, 5)), ("inner.0", (6, 5)), ("inner.1", (6, 6)), ("head", (5, 6))],
)
def test_modules_that_the_caller_leaves_out(left_out: str, expected: tuple[int, int]) -> None:
    model = Chain().double()
    fk.sparsify_(model, masks_for(model), filter_fn=lambda module, name: name != left_out, compact=True)
    assert outputs(model) == expected


def test_layers_without_a_mask_lose_what_nobody_reads() -> None:
    model = Chain().double()
    masks = masks_for(model)
    del masks["first"]
    apply(model, masks)
    dense = copy.deepcopy(model)
    report = fk.sparsify_(model, masks, compact=True)
    assert outputs(model) == (5, 5)
    assert report["first"].reason == "no mask"
    assert report["first"].original_shape == (6, 3, 3, 3)
    check_same(dense, model, images(), rtol=1e-9, atol=1e-9)
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    for key, value in model.state_dict().items():
        assert value.shape == state[key].shape
    for key, value in fk.densify_(model).state_dict().items():
        assert key.startswith("norm") or torch.equal(value, state[key])


def test_two_outputs_and_untraceable_models() -> None:
    class Two(Chain):
        def forward(self, x: Tensor) -> Any:
            x = self.norm(self.first(x))
            return {"features": x, "logits": self.head(self.inner(x).mean((2, 3)))}

    class Branching(Chain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x if x.sum() > 0 else -x)

    two = Two().double()
    fk.sparsify_(two, masks_for(two), compact=True)
    assert outputs(two) == (6, 5)
    branching = Branching().double()
    report = fk.sparsify_(branching, masks_for(branching), compact=True)
    assert outputs(branching) == (6, 6)
    assert report.notes[0].startswith("not compacted: torch.fx cannot trace the model (TraceError: ")


def test_a_forward_that_differs_in_evaluation() -> None:
    model = Chain(lambda m, x: x if m.training else x + x.mean(1, keepdim=True)).double()
    masks = masks_for(model)
    apply(model, masks)
    compacted = fk.sparsify(model, masks, compact=True)
    assert outputs(compacted) == (6, 5)
    check_same(model, compacted, images(), rtol=1e-9, atol=1e-9)


def test_masks_that_disconnect_the_network() -> None:
    model = Chain().double()
    masks = masks_for(model)
    masks["first"][:] = False
    masks["first"][2] = True  # the channel that nobody reads
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match=r"^masks: no path of kept weights leads through 'inner.1' to the output"
    ):
        fk.sparsify_(model, masks, compact=True)
    assert fingerprint(model) == before
    fk.sparsify_(model, masks, compact=False)
    compacted = Chain().double()
    masks["first"][:] = True
    fk.sparsify_(compacted, masks, compact=True)
    before = fingerprint(compacted)
    state = copy.deepcopy(compacted.state_dict())
    wrong = copy.deepcopy(masks)
    wrong["head"][:] = False
    wrong["head"][:, 4] = True
    wrong["inner.1"][4] = False
    with pytest.raises(ValueError, match="'head'"):
        fk.sparsify_(compacted, wrong, compact=True)
    with pytest.raises(
        ValueError, match=r"masks\['first'\]: expected the shape of the weight, \(6, 3, 3, 3\)"
    ):
        fk.sparsify_(compacted, {"first": torch.ones(5, 3, 3, 3, dtype=torch.bool)}, compact=True)
    assert fingerprint(compacted) == before
    assert outputs(compacted) == (5, 5)
    for key, value in compacted.state_dict().items():
        assert torch.equal(value, state[key])


def test_state_dicts_that_do_not_fit() -> None:
    model = Chain().double()
    masks = masks_for(model)
    fk.sparsify_(model, masks, compact=True)
    state = copy.deepcopy(model.state_dict())
    outside = copy.deepcopy(state)
    outside["first.weight"][~masks["first"]] = 1
    with pytest.raises(
        RuntimeError, match=r"first.weight: \d+ of its entries outside of the mask are not zero"
    ):
        model.load_state_dict(outside)
    aside = copy.deepcopy(state)
    aside["inner.1.weight"][0, 2] = 1  # a removed column, which the mask does not keep
    with pytest.raises(
        RuntimeError, match=r"inner.1.weight: 9 of its entries outside of the mask are not zero"
    ):
        model.load_state_dict(aside)
    for key in ("first.weight", "first.bias", "norm.weight", "norm.running_var"):
        short = {**state, key: state[key][:5]}
        with pytest.raises(RuntimeError, match=rf"{key}: expected shape \(6,.*\), got \(5,"):
            model.load_state_dict(short)
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
            model.load_state_dict({k: v for k, v in state.items() if k != key})
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_hooks_of_others_on_state_dicts_see_the_original_shapes() -> None:
    model = Chain().double()
    seen: list[torch.Size] = []
    model.norm.register_state_dict_post_hook(
        lambda m, state, prefix, _: seen.append(state[f"{prefix}weight"].shape)
    )
    model.norm.register_load_state_dict_pre_hook(
        lambda m, state, prefix, *_: seen.append(state[f"{prefix}weight"].shape)
    )
    fk.sparsify_(model, masks_for(model), compact=True)
    assert model.norm.weight.shape == (5,)
    model.load_state_dict(model.state_dict())
    assert seen == [(6,), (6,)]
    fk.densify_(model)
    model.load_state_dict(model.state_dict())
    assert seen == [(6,)] * 4


def test_single_layers_of_a_compacted_model() -> None:
    model = Chain().double()
    masks = masks_for(model)
    weight = model.inner[1].weight.detach().clone()
    fk.sparsify_(model, masks, compact=True)
    layer: Any = model.inner[1]
    assert layer.mask.shape == layer.weight.shape == (5, 5, 3, 3)
    dense = layer.to_dense()
    assert torch.equal(dense.weight, weight * masks["inner.1"])
    dense.load_state_dict(layer.state_dict())
    layer.set_weight_(2 * layer.weight)
    kept = dense.weight[[0, 1, 2, 3, 5]][:, [0, 1, 3, 4, 5]]
    assert torch.equal(layer.weight, 2 * kept)
    layer.reset_parameters()
    bound = 1 / (6 * 9) ** 0.5
    assert bound / 2 < layer.values.abs().max() <= bound
    assert model.double().float().state_dict()["inner.1.weight"].dtype == torch.float32


def test_keep_vars_and_gradients_through_the_state() -> None:
    model = Chain().double()
    fk.sparsify_(model, masks_for(model), compact=True)
    state = model.state_dict(keep_vars=True)
    (state["norm.weight"].sum() + state["inner.1.weight"].sum()).backward()
    assert torch.equal(model.norm.weight.grad, torch.ones(5, dtype=torch.float64))
    assert torch.equal(model.inner[1].values.grad, torch.ones_like(model.inner[1].values))
