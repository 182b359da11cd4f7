# SPDX-License-Identifier: Apache-2.0
"""Runs under masks that remove channels: what travels and is merged is what it would be without compaction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedpai import pruning
from fedpai.data import Dataset
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.runner import Run, create_model
from fedpai_kernels import sparsify_
from fedpai_kernels.nn import PackedWeight, parts_of
from tests.fedpai.methods.restatement import GENTLE, ROUNDING, STRONG, by_parameter, restated

Make = Callable[..., RunConfig]


def channel_masks(run: Run) -> dict[str, torch.Tensor]:
    """Keeps every other output channel of each layer but the last, and what reads those."""
    masks = {}
    stride = 1
    for slot in run.layout.weights:
        mask = torch.zeros(slot.shape, dtype=torch.bool)
        name = slot.key.removesuffix(".weight")
        channels = 16 if name == "fc1" else slot.shape[1]
        rows = slice(None) if name == "classifier" else slice(0, None, 2)
        mask.view(slot.shape[0], channels, -1)[rows, ::stride] = True
        masks[name], stride = mask, 2
    return masks


@pytest.mark.parametrize("model", ["conv4", "conv4-nonorm"])
def test_a_run_under_channel_masks(
    images: Dataset, tiny: Make, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    config = tiny(method="magnitude", model=model, lr=GENTLE, weight_decay=STRONG, alpha=0.5, sample=4)
    run = Run(config, data=images)
    masks = channel_masks(run)
    monkeypatch.setattr(pruning, "prune", lambda *args, **kwargs: masks)
    before = {key: tensor.clone() for key, tensor in create_model(config, images).state_dict().items()}
    rows = run.finish()
    server = run.arms[0].federation.server
    bound = run.pool.get(server.mask)
    for name, mask in masks.items():
        layer = bound.model.get_submodule(name)
        assert isinstance(layer, PackedWeight)
        assert layer.plan.density == 1
        assert layer.plan.nnz == int(mask.sum())
    keys = by_parameter(masks)
    expected = restated(run, dict.fromkeys(range(4), keys), [row["sampled"] for row in rows[1:]]).state
    actual = run.layout.scatter(*server.dense())
    for key, tensor in expected.items():
        path, _, name = key.rpartition(".")
        (held, _), *asides = parts_of(bound.model.get_submodule(path), name)
        ours, theirs = actual[key].reshape(-1), tensor.to(actual[key].dtype).reshape(-1)
        torch.testing.assert_close(ours[held], theirs[held], rtol=1e-3, atol=ROUNDING, msg=key)
        for positions, _ in asides:  # what was removed is sent, merged and kept as it was
            torch.testing.assert_close(ours[positions], before[key].reshape(-1)[positions])


def test_values_pass_through_a_compacted_model(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(), data=images)
    mask = MaskSet.from_masks(run.layout, channel_masks(run))
    bound = run.pool.get(mask)
    generator = torch.Generator().manual_seed(1)
    floats = torch.rand(run.layout.float_count(mask), generator=generator).numpy()
    ints = torch.arange(run.layout.int_count).numpy()
    bound.load(floats, ints)
    again, counts = bound.read()
    assert (again == floats).all()
    assert (counts == ints).all()
    state = bound.model.state_dict()
    gathered = run.layout.gather(state)[0]
    assert (gathered[mask.positions] == floats[: mask.kept]).all()
    assert (gathered[run.layout.weight_count :] == floats[mask.kept :]).all()


def test_kept_weights_without_effect_stay_in_the_model(images: Dataset, tiny: Make) -> None:
    """They decay like any other, in every client."""
    run = Run(tiny(), data=images)
    masks = channel_masks(run)
    masks["features.0"][:] = True  # rows that nobody reads
    bound = run.pool.get(MaskSet.from_masks(run.layout, masks))
    assert bound.model.get_submodule("features.0").mask.all()  # type: ignore[operator,union-attr]
    assert all(row.original_shape is None for row in bound.report)


def test_a_mask_that_disconnects_the_network(images: Dataset, tiny: Make) -> None:
    """Scores may choose one; what is left trains as it is, biases and norms."""
    run = Run(tiny(), data=images)
    masks = channel_masks(run)
    masks["fc2"][:] = False
    masks["fc2"][0, 1] = True  # fc1 keeps no weight of this unit
    bound = run.pool.get(MaskSet.from_masks(run.layout, masks))
    assert all(row.original_shape is None for row in bound.report)
    with pytest.raises(ValueError, match="no path of kept weights leads through 'fc2'"):
        sparsify_(create_model(run.config, run.data), masks, compact=True)
