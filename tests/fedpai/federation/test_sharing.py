# SPDX-License-Identifier: Apache-2.0
"""The clients of a run share what depends on their mask alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fedpai.data import Dataset
from fedpai.federation.bound import ModelPool
from fedpai.federation.config import RunConfig
from fedpai.federation.layout import MaskSet
from fedpai.federation.runner import Run, create_model
from fedpai_kernels.nn import PackedWeight

Make = Callable[..., RunConfig]


def plans(model: nn.Module) -> dict[str, int]:
    return {
        name: id(module.plan.compiled)
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
    }


def test_clients_of_one_mask_train_one_model(images: Dataset, tiny: Make) -> None:
    """Each client keeps the mask as it decoded it; all of them get the same model for it, round after round."""
    run = Run(tiny(method="fedpai-u", criterion="magnitude"), data=images)
    run.finish()
    (arm,) = run.arms
    masks = [memory.mask for memory in arm.federation._link.memories.values() if memory.mask is not None]
    assert len(masks) > 1
    assert len({id(mask) for mask in masks}) == len(masks), "every client has decoded its own"
    models = {id(run.pool.get(mask).model) for mask in masks}
    assert len(models) == 1


def test_pools_of_several_runs_share_the_masks_they_have_in_common(images: Dataset, tiny: Make) -> None:
    run = Run(tiny(), data=images)
    generator = torch.Generator().manual_seed(1)
    weights = {
        slot.key.removesuffix(".weight"): torch.rand(slot.shape, generator=generator) < 0.3
        for slot in run.layout.weights
    }
    mask = MaskSet.from_masks(run.layout, weights)
    same = MaskSet.from_bits(run.layout, mask.bits())

    def pool() -> ModelPool:
        return ModelPool(lambda: create_model(run.config, run.data), run.layout, torch.contiguous_format)

    one, other = pool().get(mask).model, pool().get(same).model
    assert one is not other
    assert plans(one) == plans(other)
    assert len(plans(one)) == len(run.layout.weights)
