# SPDX-License-Identifier: Apache-2.0
"""What conversion refuses: one clear message each, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fedpai_kernels as fk
from tests.nn.small import Small, fingerprint, masked_model


def nan_mask(mask: Tensor) -> Tensor:
    return torch.where(mask, 1.0, float("nan"))


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], type[Exception], str]] = {
    "missing_layer": (
        lambda m: {"convv": m["conv"]},
        ValueError,
        r"no module 'convv'; the nearest name is 'conv'",
    ),
    "parameter_name": (
        lambda m: {"conv.weight": m["conv"]},
        ValueError,
        r"no module 'conv\.weight'; .* 'conv'",
    ),
    "shape": (
        lambda m: {"conv": m["stem"]},
        ValueError,
        r"masks\['conv'\]: expected the shape of the weight",
    ),
    "nan": (
        lambda m: {"conv": nan_mask(m["conv"])},
        ValueError,
        r"masks\['conv'\]: .* exactly 0 and 1, got nan",
    ),
    "infinity": (
        lambda m: {"conv": m["conv"] * torch.inf},
        ValueError,
        r"masks\['conv'\]: .* exactly 0 and 1",
    ),
    "halves": (lambda m: {"conv": m["conv"] * 0.5}, ValueError, "got 0.5 among its entries"),
    "empty": (lambda m: {"conv": m["conv"] & False}, ValueError, r"masks\['conv'\]: it keeps no weight"),
    "complex": (lambda m: {"conv": m["conv"].to(torch.complex64)}, TypeError, "complex64"),
    "no_tensor": (lambda m: {"conv": m["conv"].numpy()}, TypeError, "expected a bool tensor, got ndarray"),
    "batch_norm": (
        lambda m: {"norm1": m["conv"]},
        TypeError,
        r"masks\['norm1'\]: .* the module is BatchNorm2d",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_mask_touches_nothing(
    change: Callable[[dict[str, Tensor]], dict[str, Any]], error: type[Exception], message: str
) -> None:
    model, masks = masked_model()
    prune.identity(model.stem, "weight")
    before = fingerprint(model)
    good = {name: masks[name] for name in ("stem", "hidden")}
    with pytest.raises(error, match=message):
        fk.sparsify_(model, {**good, **change(masks)})
    assert fingerprint(model) == before


def test_layers_that_take_no_mask() -> None:
    class Own(nn.Conv2d):
        pass

    normed = parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    model = nn.ModuleDict({"transposed": nn.ConvTranspose2d(2, 2, 3), "own": Own(2, 2, 3), "normed": normed})
    mask = torch.ones(2, 2, 3, 3, dtype=torch.bool)
    for name, kind in (("transposed", "ConvTranspose2d"), ("own", "Own"), ("normed", "ParametrizedConv2d")):
        with pytest.raises(TypeError, match=rf"masks\['{name}'\]: only nn.Conv2d and nn.Linear .* {kind}"):
            fk.sparsify_(model, {name: mask})


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_computed_weight() -> None:
    model = nn.ModuleDict({"conv": nn.utils.weight_norm(nn.Conv2d(2, 2, 3))})
    with pytest.raises(TypeError, match="computes its weight"):
        fk.sparsify_(model, {"conv": torch.ones(2, 2, 3, 3, dtype=torch.bool)})


def test_no_masks_at_all() -> None:
    with pytest.raises(ValueError, match="masks: none given, and no layer carries one"):
        fk.sparsify_(Small())


def test_two_masks_for_one_module() -> None:
    layer = nn.Linear(4, 4)
    mask = torch.eye(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="'0' and '1' are one module, but their masks differ"):
        fk.sparsify_(nn.Sequential(layer, layer), {"0": mask, "1": ~mask})


@pytest.mark.parametrize(("layer", "parameter"), [("0", "bias"), ("1", "weight"), ("4", "bias")])
def test_parametrised_layers_are_not_made_dense(layer: str, parameter: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).double()
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(model.get_submodule(n).weight.shape, generator=generator) < 0.02 for n in ("0", "4")}
    fk.sparsify_(model, masks)
    parametrize.register_parametrization(model.get_submodule(layer), parameter, nn.Tanh())
    types = [type(module) for module in model]
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(TypeError, match=f"^{layer}: Parametrized.* has parametrised {parameter}, .*remove_parametriz"):
        fk.densify_(model)
    assert [type(module) for module in model] == types
    torch.testing.assert_close(model(x), expected)

    parametrize.remove_parametrizations(model.get_submodule(layer), parameter)
    fk.densify_(model)
    assert {type(module).__module__.split(".")[0] for module in model} == {"torch"}
    torch.testing.assert_close(model(x), expected)
