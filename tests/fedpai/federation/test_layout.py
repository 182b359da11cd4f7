# SPDX-License-Identifier: Apache-2.0
"""Vectors and masks: exact round trips, stable digests, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedpai.federation.layout import Layout, LayoutError, MaskSet, pack, places, union, unpack


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5, bias=False)
    )


@pytest.fixture
def layout(model: nn.Module) -> Layout:
    return Layout.of(model)


@pytest.fixture
def mask(layout: Layout) -> MaskSet:
    draw = np.random.default_rng(1)
    return MaskSet.from_positions(layout, np.flatnonzero(draw.random(layout.weight_count) < 0.3))


def test_sections(layout: Layout) -> None:
    assert [slot.key for slot in layout.weights] == ["0.weight", "4.weight"]
    assert [slot.key for slot in layout.ints] == ["1.num_batches_tracked"]
    assert (layout.weight_count, layout.other_count, layout.int_count) == (27 + 60, 3 + 4 * 3, 1)


def test_state_survives_gather_and_scatter(model: nn.Module, layout: Layout) -> None:
    model[1].num_batches_tracked.fill_(41)
    state = layout.scatter(*layout.gather(model.state_dict()))
    model.load_state_dict(state, strict=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])
        assert tensor.dtype == state[key].dtype


def test_gather_reads_logical_order_whatever_the_memory_format(model: nn.Module, layout: Layout) -> None:
    before, _ = layout.gather(model.state_dict())
    wide = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    floats, _ = Layout.of(wide).gather(wide.state_dict())
    np.testing.assert_array_equal(floats[:108], wide[0].weight.detach().contiguous().flatten().numpy())
    assert before.dtype == np.float32


def test_pack_and_unpack(model: nn.Module, layout: Layout, mask: MaskSet) -> None:
    dense, _ = layout.gather(model.state_dict())
    packed = pack(dense, mask, layout)
    assert packed.size == layout.float_count(mask) == mask.kept + layout.other_count
    back = unpack(packed, mask, layout)
    np.testing.assert_array_equal(back[mask.positions], dense[mask.positions])
    np.testing.assert_array_equal(back[layout.weight_count :], dense[layout.weight_count :])
    assert np.count_nonzero(back[: layout.weight_count]) <= mask.kept
    np.testing.assert_array_equal(pack(back, mask, layout), packed)


def test_mask_forms_agree(layout: Layout, mask: MaskSet) -> None:
    assert MaskSet.from_masks(layout, mask.masks()) == mask
    assert MaskSet.from_bits(layout, mask.bits()) == mask
    assert len(mask.bits()) == (layout.weight_count + 7) // 8
    for slot, where in mask.parts():
        flags = mask.masks()[slot.key.removesuffix(".weight")].flatten()
        np.testing.assert_array_equal(mask.positions[where] - slot.offset, flags.nonzero().flatten())


def test_layers_without_an_entry_keep_everything(layout: Layout) -> None:
    mask = MaskSet.from_masks(layout, {"4": torch.zeros(5, 12, dtype=torch.bool)})
    assert mask.kept == 27


def test_digest_depends_on_mask_and_architecture_only(layout: Layout, mask: MaskSet) -> None:
    again = MaskSet.from_positions(layout, mask.positions.copy())
    assert again.digest == mask.digest
    assert MaskSet.from_positions(layout, mask.positions[1:]).digest != mask.digest
    # The same numbers in another shape are another mask.
    other = Layout.of(nn.Sequential(nn.Linear(87, 1, bias=False)))
    assert other.weight_count == layout.weight_count
    assert MaskSet.from_positions(other, mask.positions).digest != mask.digest


def test_digest_is_the_same_on_every_machine() -> None:
    layout = Layout.of(nn.Sequential(nn.Linear(4, 2)))
    mask = MaskSet.from_positions(layout, np.array([0, 3, 7]))
    assert layout.digest.hex()[:16] == "20d0748d0f71929e"
    assert mask.digest.hex()[:16] == "4d5d7da982386cd5"


def test_union_and_places(layout: Layout) -> None:
    one = MaskSet.from_positions(layout, np.array([1, 5, 80]))
    two = MaskSet.from_positions(layout, np.array([0, 5]))
    both = union([one, two])
    assert both.positions.tolist() == [0, 1, 5, 80]
    assert places(one, both).tolist() == [1, 2, 3]
    assert places(two, both).tolist() == [0, 2]
    with pytest.raises(LayoutError, match="does not"):
        places(one, two)


def test_empty_mask_is_a_mask(layout: Layout) -> None:
    empty = MaskSet.from_positions(layout, np.zeros(0, np.int64))
    assert MaskSet.from_bits(layout, empty.bits()) == empty
    assert empty.density == 0


@pytest.mark.parametrize(
    ("positions", "text"),
    [([3, 2], "ascending"), ([2, 2], "ascending"), ([-1, 2], r"lie in"), ([5, 87], r"lie in \[0, 87\)")],
)
def test_bad_positions(layout: Layout, positions: list, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        MaskSet.from_positions(layout, np.array(positions))


def test_bad_masks(layout: Layout) -> None:
    with pytest.raises(LayoutError, match=r"does not have.*nope"):
        MaskSet.from_masks(layout, {"nope": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(LayoutError, match=r"4.weight: mask has shape \(12, 5\), expected \(5, 12\)"):
        MaskSet.from_masks(layout, {"4": torch.ones(12, 5, dtype=torch.bool)})
    with pytest.raises(LayoutError, match="must be bool"):
        MaskSet.from_masks(layout, {"4": torch.ones(5, 12)})


def test_bad_bitmaps(layout: Layout, mask: MaskSet) -> None:
    with pytest.raises(LayoutError, match="has 11 bytes, got 10"):
        MaskSet.from_bits(layout, mask.bits()[:-1])
    with pytest.raises(LayoutError, match="after its last weight"):
        MaskSet.from_bits(layout, mask.bits()[:-1] + b"\xff")


def test_bad_states(model: nn.Module, layout: Layout) -> None:
    state = dict(model.state_dict())
    with pytest.raises(LayoutError, match=r"missing \['4.weight'\]"):
        layout.gather({key: value for key, value in state.items() if key != "4.weight"})
    with pytest.raises(LayoutError, match="expected shape"):
        layout.gather({**state, "4.weight": torch.zeros(5, 11)})
    with pytest.raises(LayoutError, match="float64"):
        Layout.of(nn.Linear(2, 2).double())
    with pytest.raises(LayoutError, match="no conv or linear"):
        Layout.of(nn.BatchNorm2d(3))
    with pytest.raises(LayoutError, match="expected 102 float32 values"):
        layout.check(np.zeros(3, np.float32), np.zeros(1, np.int64), None)
