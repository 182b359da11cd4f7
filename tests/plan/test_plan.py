# SPDX-License-Identifier: Apache-2.0
"""A Plan: what it says of a mask, and how it behaves as a value."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from fedpai_kernels import Plan
from fedpai_kernels.ops import sparse_conv2d
from fedpai_kernels.plan import plan_of
from fedpai_kernels.structure import describe
from tests.cases import CONV2D, LINEAR, Case
from tests.masks import make_mask

# Every third weight, from the second. Written down: another machine, or a later version, must find the same digests.
KNOWN_MASK = (torch.arange(2 * 3 * 3 * 3) % 3 == 1).reshape(2, 3, 3, 3)
KNOWN_DIGEST = "72dd4d8ae217ca23df85ff595280fe23755f6a94fea569d1a4656dfd3de7e292"
KNOWN_LINEAR_DIGEST = "3c27b9864c9aee18b0f54cb424770d3f7a924ddb1e405357e348323b25e3bade"


def random_mask(*shape: int, density: float = 0.3) -> torch.Tensor:
    mask = torch.rand(shape) < density
    mask.view(-1)[-1] = True
    return mask


# ------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("case", [*CONV2D, *LINEAR], ids=lambda case: f"{case.op}-{case.name}")
def test_indices_and_mask_say_the_same(case: Case) -> None:
    mask, plan = make_mask(case), case.plan
    assert plan.kind == case.op
    assert plan.mask_shape == tuple(mask.shape)
    assert plan.structure == describe(mask, plan.groups)
    assert plan.nnz == int(mask.sum())
    assert plan.numel == mask.numel()
    assert plan.density == plan.nnz / mask.numel()
    assert torch.equal(plan.mask(), mask)
    assert plan.indices.dtype == torch.int64
    assert torch.equal(plan.indices, mask.flatten().nonzero().squeeze(1))


def test_pack_and_unpack_are_inverse_and_differentiable() -> None:
    mask = random_mask(5, 4, 3, 2)
    plan = Plan.from_mask(mask)
    dense = torch.randn(5, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    values = plan.pack(dense)
    assert torch.equal(values, dense[mask])
    assert torch.equal(plan.unpack(values), dense * mask)
    values.backward(torch.arange(1.0, plan.nnz + 1, dtype=torch.float64))
    assert dense.grad is not None
    assert torch.equal(dense.grad[mask], torch.arange(1.0, plan.nnz + 1, dtype=torch.float64))
    assert torch.equal(dense.grad[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    packed = torch.randn(plan.nnz, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    (plan.unpack(packed) * weights).sum().backward()
    assert packed.grad is not None
    assert torch.equal(packed.grad, weights[mask])


def test_pack_reads_any_layout_and_dtype() -> None:
    mask = random_mask(5, 4, 3, 2)
    plan = Plan.from_mask(mask)
    dense = torch.randn(5, 4, 3, 2)
    assert torch.equal(plan.pack(dense.contiguous(memory_format=torch.channels_last)), dense[mask])
    assert torch.equal(plan.pack(dense.bfloat16()), dense.bfloat16()[mask])
    assert plan.unpack(torch.ones(plan.nnz, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_mask_is_copied() -> None:
    mask = random_mask(3, 4)
    plan = Plan.from_mask(mask)
    before = plan.mask()
    mask.logical_not_()
    assert torch.equal(plan.mask(), before)
    plan.mask().zero_()
    assert torch.equal(plan.mask(), before)


@pytest.mark.parametrize("view", ["transposed", "channels_last", "sliced", "expanded", "sparse"])
def test_a_mask_of_any_layout(view: str) -> None:
    mask = random_mask(4, 6, 3, 3)
    given = {
        "transposed": mask.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "channels_last": mask.contiguous(memory_format=torch.channels_last),
        "sliced": torch.cat([mask, mask], 1)[:, 6:],
        "expanded": mask[:1].expand(4, 6, 3, 3),
        "sparse": mask.to_sparse(),
    }[view]
    assert torch.equal(Plan.from_mask(given).mask(), given.to_dense())


# --------------------------------------------------------------------------------------------------------- value


def test_digest_is_the_same_on_every_machine() -> None:
    assert Plan.from_mask(KNOWN_MASK).digest == KNOWN_DIGEST
    assert Plan.from_mask(KNOWN_MASK.reshape(6, 9)).digest == KNOWN_LINEAR_DIGEST


def test_digest_tells_masks_shapes_kinds_and_groups_apart() -> None:
    mask = torch.ones(4, 4, 1, 1, dtype=torch.bool)
    other = mask.clone()
    other[3, 3] = False
    last_bit = torch.ones(3, 3, dtype=torch.bool)  # 9 bits: the last one is alone in its byte
    without_last_bit = last_bit.clone()
    without_last_bit[2, 2] = False
    plans = [
        Plan.from_mask(mask),
        Plan.from_mask(mask, groups=2),
        Plan.from_mask(mask, groups=4),
        Plan.from_mask(other),
        Plan.from_mask(mask.reshape(4, 2, 2, 1)),
        Plan.from_mask(mask.reshape(4, 2, 1, 2)),
        Plan.from_mask(mask.reshape(4, 4)),
        Plan.from_mask(mask.reshape(2, 8)),
        Plan.from_mask(last_bit),
        Plan.from_mask(without_last_bit),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert len(set(plans)) == len(plans)


def test_equality_and_hash_are_by_content() -> None:
    one, same = Plan.from_mask(KNOWN_MASK), Plan.from_mask(KNOWN_MASK.clone())
    assert one == same
    assert hash(one) == hash(same)
    assert {one: "found"}[same] == "found"
    assert one != Plan.from_mask(~KNOWN_MASK)
    assert one != KNOWN_DIGEST
    assert one.handle != same.handle


def test_copies_are_the_same_object() -> None:
    plan = Plan.from_mask(KNOWN_MASK)
    assert copy.copy(plan) is plan
    assert copy.deepcopy({"a": [plan]})["a"][0] is plan


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_the_content(protocol: int) -> None:
    for plan in (Plan.from_mask(random_mask(4, 3, 5, 1), groups=2), Plan.from_mask(random_mask(7, 9))):
        again = pickle.loads(pickle.dumps(plan, protocol))
        assert again == plan
        assert (again.kind, again.groups, again.mask_shape) == (plan.kind, plan.groups, plan.mask_shape)
        assert torch.equal(again.indices, plan.indices)


def test_torch_save_keeps_the_content() -> None:
    plan = Plan.from_mask(KNOWN_MASK)
    file = io.BytesIO()
    torch.save({"plan": plan}, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)["plan"] == plan


def test_a_pickle_is_small() -> None:
    plan = Plan.from_mask(random_mask(64, 64, 3, 3, density=0.5))
    assert len(pickle.dumps(plan)) < plan.numel / 8 + 500


def test_a_damaged_pickle_is_refused() -> None:
    plan = Plan.from_mask(random_mask(16, 16, 3, 3))
    function, (kind, shape, groups, packed, digest) = plan.__reduce__()
    assert callable(function)
    assert isinstance(packed, bytes)
    flipped = bytes([packed[0] ^ 1]) + packed[1:]
    with pytest.raises(ValueError, match="Plan: damaged pickle, digest"):
        function(kind, shape, groups, flipped, digest)
    with pytest.raises(ValueError, match="Plan: damaged pickle, 287 mask bytes"):
        function(kind, shape, groups, packed[:-1], digest)


def test_a_plan_crosses_processes() -> None:
    """A pickle made here works in a fresh process, on its ops too."""
    plan = Plan.from_mask(KNOWN_MASK)
    program = (
        "import pickle, sys, torch\n"
        "from fedpai_kernels.ops import sparse_conv2d\n"
        "plan = pickle.load(sys.stdin.buffer)\n"
        "y = sparse_conv2d(torch.ones(2, 3, 5, 5), torch.ones(plan.nnz), plan)\n"
        "print(plan.digest, int(y.sum()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(plan), capture_output=True, check=True, timeout=120
    )
    here = sparse_conv2d(torch.ones(2, 3, 5, 5), torch.ones(plan.nnz), plan)
    assert done.stdout.decode().split() == [KNOWN_DIGEST, str(int(here.sum()))]


def test_immutable() -> None:
    plan = Plan.from_mask(KNOWN_MASK)
    for name in ("nnz", "groups", "kind", "handle", "structure", "digest", "anything"):
        with pytest.raises(AttributeError):
            setattr(plan, name, 1)
    with pytest.raises(TypeError, match=r"use Plan.from_mask"):
        Plan()


def test_repr_names_what_matters() -> None:
    text = repr(Plan.from_mask(KNOWN_MASK.repeat(1, 1, 1, 1), groups=2))
    for part in ("conv2d", "2x3x3x3", "groups=2", "nnz=18", "density=0.3333"):
        assert part in text


# ------------------------------------------------------------------------------------------------------ lifetime


def test_a_plan_lives_as_long_as_its_graph() -> None:
    plan = Plan.from_mask(KNOWN_MASK)
    handle, watch = plan.handle, weakref.ref(plan)
    values = torch.ones(plan.nnz, requires_grad=True)
    y = sparse_conv2d(torch.ones(1, 3, 4, 4), values, plan)
    del plan
    gc.collect()
    assert watch() is not None
    y.sum().backward()
    assert values.grad is not None
    del y
    gc.collect()
    assert watch() is None
    with pytest.raises(ValueError, match=f"no living plan has the handle {handle}"):
        plan_of(handle)


def test_replaced_plans_do_not_pile_up() -> None:
    alive = []
    for _ in range(30):
        plan = Plan.from_mask(random_mask(6, 6, 3, 3))
        sparse_conv2d(torch.ones(2, 6, 5, 5), torch.ones(plan.nnz), plan)
        alive.append(weakref.ref(plan))
    del plan
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0


def test_more_geometries_than_the_cache_holds() -> None:
    plan = Plan.from_mask(random_mask(3, 2, 3, 3))
    values = torch.ones(plan.nnz)
    images = [torch.randint(-4, 5, (2, 2, h, w)).float() for h in range(3, 10) for w in range(3, 9)]
    first = [sparse_conv2d(x, values, plan) for x in images]
    again = [sparse_conv2d(x, values, plan) for x in images]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_plans_are_made_in_many_threads() -> None:
    masks = [random_mask(5, 5, 3, 3) for _ in range(40)]
    made: dict[int, Plan] = {}

    def work(start: int) -> None:
        for i in range(start, len(masks), 4):
            made[i] = Plan.from_mask(masks[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({plan.handle for plan in made.values()}) == len(masks)
    assert all(torch.equal(made[i].mask(), masks[i]) and plan_of(made[i].handle) is made[i] for i in made)


# ----------------------------------------------------------------------------------------------------- bad input

GOOD = torch.ones(4, 3, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "settings", "error", "message"),
    [
        (GOOD.tolist(), {}, TypeError, r"^mask: expected a torch.Tensor of dtype bool, got list"),
        (GOOD.float(), {}, TypeError, r"^mask: expected dtype torch.bool, got torch.float32"),
        (torch.full((4, 3), float("nan")), {}, TypeError, r"^mask: expected dtype torch.bool"),
        (torch.full((4, 3), float("inf")), {}, TypeError, r"^mask: expected dtype torch.bool"),
        (GOOD.to(torch.uint8), {}, TypeError, r"^mask: expected dtype torch.bool, got torch.uint8"),
        (GOOD[0], {}, ValueError, r"^mask: expected 4 dimensions .* or 2 .*got shape \(3, 3, 3\)"),
        (GOOD[0, 0, 0, 0], {}, ValueError, r"^mask: expected 4 dimensions"),
        (GOOD[:0], {}, ValueError, r"^mask: every dimension must be positive, got shape \(0, 3, 3, 3\)"),
        (~GOOD, {}, ValueError, r"^mask: no weight survives; a layer needs at least one"),
        (GOOD.to("meta"), {}, ValueError, r"^mask: expected a tensor with data, got one on the meta device"),
        (GOOD, {"kind": "linear"}, ValueError, r"^mask: .* is that of a conv2d weight, expected one for 'linear'"),
        (GOOD[:, :, 0, 0], {"kind": "conv2d"}, ValueError, r"^mask: .* is that of a linear weight"),
        (GOOD[:, :, 0, 0], {"groups": 2}, ValueError, r"^groups: a linear layer has 1 group, got 2"),
        (GOOD, {"groups": 3}, ValueError, r"^groups: 3 does not divide the mask's 4 output channels"),
        (GOOD, {"groups": 0}, ValueError, r"^groups: expected an int of at least 1, got 0"),
        (GOOD, {"groups": 1.0}, ValueError, r"^groups: expected an int of at least 1, got 1.0"),
    ],
)
def test_bad_masks_are_named(
    mask: object, settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Plan.from_mask(mask, **settings)  # type: ignore[arg-type]


def test_operands_that_do_not_fit() -> None:
    plan = Plan.from_mask(GOOD)
    with pytest.raises(ValueError, match=r"^dense: expected shape \(4, 3, 3, 3\), got \(4, 3, 9\)"):
        plan.pack(torch.zeros(4, 3, 9))
    with pytest.raises(ValueError, match=r"^values: expected shape \(108,\), got \(107,\)"):
        plan.unpack(torch.zeros(107))


def test_made_while_torch_func_transforms() -> None:
    mask = torch.rand(4, 3, 3, 3) < 0.5
    plans = [Plan.from_mask(mask)]

    def function(x: torch.Tensor) -> torch.Tensor:
        plans.append(Plan.from_mask(mask))
        return x.sin()

    torch.func.grad(function)(torch.tensor(1.0))
    assert plans[0] == plans[1]
