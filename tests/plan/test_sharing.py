# SPDX-License-Identifier: Apache-2.0
"""Plans of equal masks are one compiled mask, with one set of schedules, however they came about."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch

from fedpai_kernels import Plan
from fedpai_kernels.ops import sparse_conv2d


def mask_of(*shape: int, seed: int = 3) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask.view(-1)[0] = True
    return mask


def reloaded(plan: Plan) -> Plan:
    file = io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert isinstance(found, Plan)
    return found


@pytest.mark.parametrize(
    "again",
    [
        lambda plan, mask: Plan.from_mask(mask.clone()),
        lambda plan, mask: Plan.from_mask(mask.contiguous(memory_format=torch.channels_last)),
        lambda plan, mask: Plan.from_mask(mask.to_sparse()),
        lambda plan, mask: Plan.from_mask(plan.mask(), kind="conv2d"),
        lambda plan, mask: pickle.loads(pickle.dumps(plan)),
        lambda plan, mask: reloaded(plan),
        lambda plan, mask: copy.deepcopy(plan),
    ],
    ids=["mask", "channels_last", "sparse mask", "plan's mask", "pickle", "torch.save", "deepcopy"],
)
def test_equal_masks_share(again: object) -> None:
    mask = mask_of(6, 5, 3, 3)
    plan = Plan.from_mask(mask)
    other = again(plan, mask)  # type: ignore[operator]
    assert other == plan
    assert other.compiled is plan.compiled
    assert other.indices is plan.indices


def test_other_masks_do_not() -> None:
    mask = mask_of(4, 4, 1, 1)
    changed = mask.clone()
    changed[1, 2] = ~changed[1, 2]
    plans = [
        Plan.from_mask(mask),
        Plan.from_mask(mask, groups=2),
        Plan.from_mask(mask.reshape(4, 4)),
        Plan.from_mask(mask.reshape(4, 2, 2, 1)),
        Plan.from_mask(changed),
    ]
    assert len({id(plan.compiled) for plan in plans}) == len(plans)
    assert all(plan.nnz == int(plan.mask().sum()) for plan in plans)


def test_a_shared_mask_goes_with_its_last_plan() -> None:
    mask = mask_of(6, 5, 3, 3, seed=11)
    first, second = Plan.from_mask(mask), Plan.from_mask(mask)
    watch = weakref.ref(first.compiled)
    x, values = torch.randn(2, 5, 6, 6), torch.randn(first.nnz)
    expected = sparse_conv2d(x, values, first)
    del first
    gc.collect()
    assert watch() is not None
    assert torch.equal(sparse_conv2d(x, values, second), expected)
    del second
    gc.collect()
    assert watch() is None


def test_a_mask_that_is_refused_leaves_nothing() -> None:
    mask = mask_of(4, 3, 3, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="groups: 3 does not divide"):
            Plan.from_mask(mask, groups=3)
    assert Plan.from_mask(mask).nnz == int(mask.sum())


def test_threads_that_compile_one_mask_at_once() -> None:
    """Whoever is first, all hold the same one in the end."""
    for seed in range(5):
        mask = mask_of(64, 64, 3, 3, seed=seed)
        made: list[Plan] = []
        barrier = threading.Barrier(6)

        def work(
            mask: torch.Tensor = mask, made: list[Plan] = made, barrier: threading.Barrier = barrier
        ) -> None:
            barrier.wait()
            made.append(Plan.from_mask(mask))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 6
        assert len({id(plan.compiled) for plan in made}) == 1
        assert len({plan.handle for plan in made}) == 6
