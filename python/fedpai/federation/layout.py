# SPDX-License-Identifier: Apache-2.0
"""How a model's `state_dict` becomes flat vectors, and which of its weights a mask keeps.

A federation moves and averages vectors, never modules. `Layout` fixes the order once per architecture:

    floats = [ kept weights of every conv and linear layer | other parameters | running statistics ]
    ints   = [ every integer buffer ]                        (batch norm's `num_batches_tracked`)

`MaskSet` says which weights are kept. It stores their positions, not a bitmap, so that everything done
with it costs O(kept weights). Both have a digest: same architecture or same mask, same digest, anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Places = npt.NDArray[np.int32]


class LayoutError(ValueError):
    """A state or a mask that does not belong to the model it is used with."""


@dataclass(frozen=True)
class Slot:
    """One tensor of a state_dict: its key, its shape and where its elements start in their section."""

    key: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.offset + self.size


_Item = tuple[str, tuple[int, ...]]  # key and shape


def _slots(items: list[_Item]) -> tuple[Slot, ...]:
    slots, offset = [], 0
    for key, shape in items:
        slots.append(Slot(key, shape, offset))
        offset += slots[-1].size
    return tuple(slots)


@dataclass(frozen=True)
class Layout:
    """The order of a model's tensors in the vectors that travel.

    Attributes:
        weights: conv and linear weights, the only tensors a mask may thin out.
        others: every other floating tensor: first parameters (biases, of norms), then running statistics.
        ints: every integer buffer.
        statistics_count: elements at the end of `others` that are buffers and no parameters.
        digest: 32 bytes that name the architecture (keys, shapes, sections).
    """

    weights: tuple[Slot, ...]
    others: tuple[Slot, ...]
    ints: tuple[Slot, ...]
    statistics_count: int
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Reads the layout of a dense model.

        Raises:
            LayoutError: a tensor that is neither float32 nor integer, or a model without conv/linear layers.
        """
        maskable = {
            f"{name}.weight" if name else "weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        }
        parameters = dict(model.named_parameters(remove_duplicate=False))
        weights: list[_Item] = []
        trained: list[_Item] = []
        statistics: list[_Item] = []
        ints: list[_Item] = []
        for key, tensor in model.state_dict().items():
            item = (key, tuple(tensor.shape))
            if key in maskable:
                weights.append(item)
            elif tensor.dtype == torch.float32:
                (trained if key in parameters else statistics).append(item)
            elif not tensor.is_floating_point() and not tensor.is_complex():
                ints.append(item)
            else:
                raise LayoutError(
                    f"{key}: a federation carries float32 and integer tensors, got {tensor.dtype}"
                )
        if not weights:
            raise LayoutError(
                "the model has no conv or linear layer, so there is nothing to federate sparsely"
            )
        others = trained + statistics
        text = repr(("fedpai layout 1", weights, others, ints)).encode()
        count = sum(prod(shape) for _, shape in statistics)
        return cls(_slots(weights), _slots(others), _slots(ints), count, hashlib.sha256(text).digest())

    @property
    def weight_count(self) -> int:
        """Weights a mask speaks about."""
        return self.weights[-1].stop

    @property
    def channel_count(self) -> int:
        """Output channels (filters, neurons) of all conv and linear layers."""
        return sum(slot.shape[0] for slot in self.weights)

    @property
    def other_count(self) -> int:
        """Float elements that always travel dense."""
        return self.others[-1].stop if self.others else 0

    @property
    def int_count(self) -> int:
        """Elements of integer buffers."""
        return self.ints[-1].stop if self.ints else 0

    def float_count(self, mask: MaskSet | None) -> int:
        """Length of the float vector under a mask (None: every weight)."""
        return (self.weight_count if mask is None else mask.kept) + self.other_count

    def by_layer(self, vector: Floats) -> dict[str, Tensor]:
        """A vector over the weight section as `{module name: tensor of the weight's shape}` (copies)."""
        if vector.shape != (self.weight_count,):
            raise LayoutError(f"expected {self.weight_count} numbers, one a weight, got shape {vector.shape}")
        return {
            module_of(slot): torch.from_numpy(vector[slot.offset : slot.stop].reshape(slot.shape).copy())
            for slot in self.weights
        }

    def from_layers(self, tensors: Mapping[str, Tensor]) -> Floats:
        """The inverse of `by_layer`, as float32.

        Raises:
            LayoutError: a layer that is missing, unknown, or of another shape.
        """
        names = {module_of(slot): slot for slot in self.weights}
        if set(tensors) != set(names):
            raise LayoutError(f"expected a tensor for each of {sorted(names)}, got {sorted(tensors)}")
        vector = np.empty(self.weight_count, np.float32)
        for name, slot in names.items():
            if tuple(tensors[name].shape) != slot.shape:
                raise LayoutError(f"{name}: expected shape {slot.shape}, got {tuple(tensors[name].shape)}")
            vector[slot.offset : slot.stop] = tensors[name].detach().reshape(-1).numpy()
        return vector

    def gather(self, state: Mapping[str, Tensor]) -> tuple[Floats, Ints]:
        """Dense vectors of a state_dict: float32 (weight_count + other_count), int64 (int_count)."""
        expected = {slot.key for slot in (*self.weights, *self.others, *self.ints)}
        if expected != set(state):
            missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
            raise LayoutError(
                f"state_dict does not fit the layout: missing {missing[:3]}, unexpected {extra[:3]}"
            )
        floats = np.empty(self.weight_count + self.other_count, np.float32)
        ints = np.empty(self.int_count, np.int64)
        for slots, base, vector in (
            (self.weights, 0, floats),
            (self.others, self.weight_count, floats),
            (self.ints, 0, ints),
        ):
            for slot in slots:
                tensor = state[slot.key]
                if tuple(tensor.shape) != slot.shape:
                    raise LayoutError(f"{slot.key}: expected shape {slot.shape}, got {tuple(tensor.shape)}")
                vector[base + slot.offset : base + slot.stop] = tensor.detach().reshape(-1).numpy()
        return floats, ints

    def scatter(self, floats: Floats, ints: Ints) -> dict[str, Tensor]:
        """A dense state_dict from dense vectors; the inverse of `gather`."""
        self.check(floats, ints, None)
        state: dict[str, Tensor] = {}
        for slots, base in ((self.weights, 0), (self.others, self.weight_count)):
            for slot in slots:
                part = floats[base + slot.offset : base + slot.stop]
                state[slot.key] = torch.from_numpy(part.reshape(slot.shape).copy())
        for slot in self.ints:
            state[slot.key] = torch.from_numpy(ints[slot.offset : slot.stop].reshape(slot.shape).copy())
        return state

    def check(self, floats: Floats, ints: Ints, mask: MaskSet | None) -> None:
        """Raises LayoutError unless the vectors have the lengths that this layout and mask give."""
        wanted = self.float_count(mask)
        if floats.shape != (wanted,) or floats.dtype != np.float32:
            raise LayoutError(f"expected {wanted} float32 values, got {floats.shape} {floats.dtype}")
        if ints.shape != (self.int_count,) or ints.dtype != np.int64:
            raise LayoutError(f"expected {self.int_count} int64 values, got {ints.shape} {ints.dtype}")


@dataclass(frozen=True, eq=False)
class MaskSet:
    """The weights that survive, as ascending positions in the layout's weight section.

    Attributes:
        layout: the architecture the positions belong to.
        positions: int64, ascending, unique, within [0, layout.weight_count).
        digest: 32 bytes over the architecture and the bitmap.
    """

    layout: Layout
    positions: Ints
    digest: bytes = field(repr=False)

    @classmethod
    def from_positions(cls, layout: Layout, positions: Ints) -> MaskSet:
        """Builds a mask set from ascending unique positions.

        Raises:
            LayoutError: positions that are out of range, repeated or out of order.
        """
        positions = np.array(positions, np.int64)  # a copy: nobody else may change it
        if positions.ndim != 1:
            raise LayoutError(f"mask positions must be one-dimensional, got {positions.ndim} dimensions")
        if positions.size and (positions[0] < 0 or positions[-1] >= layout.weight_count):
            raise LayoutError(f"mask positions must lie in [0, {layout.weight_count})")
        if np.any(positions[1:] <= positions[:-1]):
            raise LayoutError("mask positions must be ascending and unique")
        positions.setflags(write=False)
        bits = cls._bits(layout, positions)
        return cls(layout, positions, hashlib.sha256(b"fedpai mask 1" + layout.digest + bits).digest())

    @classmethod
    def from_masks(cls, layout: Layout, masks: Mapping[str, Tensor]) -> MaskSet:
        """Builds a mask set from `{module name: bool tensor of the weight's shape}`.

        A conv or linear layer without an entry keeps all its weights.

        Raises:
            LayoutError: a mask for a layer that does not exist, of another shape, or not bool.
        """
        unknown = set(masks) - {module_of(slot) for slot in layout.weights}
        if unknown:
            raise LayoutError(f"masks for layers the model does not have: {sorted(unknown)[:3]}")
        parts = []
        for slot in layout.weights:
            mask = masks.get(module_of(slot))
            if mask is None:
                parts.append(np.arange(slot.offset, slot.stop, dtype=np.int64))
                continue
            if tuple(mask.shape) != slot.shape:
                raise LayoutError(f"{slot.key}: mask has shape {tuple(mask.shape)}, expected {slot.shape}")
            if mask.dtype != torch.bool:
                raise LayoutError(f"{slot.key}: mask must be bool, got {mask.dtype}")
            parts.append(np.flatnonzero(mask.reshape(-1).numpy()) + slot.offset)
        return cls.from_positions(layout, np.concatenate(parts))

    @classmethod
    def from_bits(cls, layout: Layout, bits: bytes | memoryview) -> MaskSet:
        """Builds a mask set from a bitmap (one bit a weight, first weight in the highest bit).

        Raises:
            LayoutError: a bitmap of another length, or set bits after the last weight.
        """
        packed = np.frombuffer(bits, np.uint8)
        if packed.size != (layout.weight_count + 7) // 8:
            wanted = (layout.weight_count + 7) // 8
            raise LayoutError(f"a mask bitmap of this model has {wanted} bytes, got {packed.size}")
        flags = np.unpackbits(packed)
        if flags[layout.weight_count :].any():
            raise LayoutError("the mask bitmap has bits set after its last weight")
        return cls.from_positions(layout, np.flatnonzero(flags[: layout.weight_count]).astype(np.int64))

    @staticmethod
    def _bits(layout: Layout, positions: Ints) -> bytes:
        flags = np.zeros(layout.weight_count, np.bool_)
        flags[positions] = True
        return np.packbits(flags).tobytes()

    def bits(self) -> bytes:
        """The bitmap that travels: one bit a weight."""
        return self._bits(self.layout, self.positions)

    def masks(self) -> dict[str, Tensor]:
        """`{module name: bool tensor}`, the form that `fedpai_kernels.sparsify_` takes."""
        flags = np.zeros(self.layout.weight_count, np.bool_)
        flags[self.positions] = True
        return {
            module_of(slot): torch.from_numpy(flags[slot.offset : slot.stop].reshape(slot.shape).copy())
            for slot in self.layout.weights
        }

    def parts(self) -> list[tuple[Slot, slice]]:
        """For each layer, where its kept values lie in the packed vector."""
        edges = [slot.offset for slot in self.layout.weights] + [self.layout.weight_count]
        cuts = np.searchsorted(self.positions, edges)
        return [(slot, slice(int(cuts[i]), int(cuts[i + 1]))) for i, slot in enumerate(self.layout.weights)]

    @property
    def kept(self) -> int:
        """Number of surviving weights."""
        return int(self.positions.size)

    @property
    def density(self) -> float:
        """Surviving share of the weights."""
        return self.kept / self.layout.weight_count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def module_of(slot: Slot) -> str:
    """The module name that owns a weight slot ("features.0.weight" -> "features.0")."""
    return slot.key.removesuffix("weight").removesuffix(".")


def pack(floats: Floats, mask: MaskSet | None, layout: Layout) -> Floats:
    """Dense vector -> packed vector: kept weights, then the other floats. Without a mask, a copy."""
    if mask is None:
        return floats.copy()
    return np.concatenate((floats[mask.positions], floats[layout.weight_count :]))


def unpack(packed: Floats, mask: MaskSet | None, layout: Layout, fill: float = 0.0) -> Floats:
    """Packed vector -> dense vector with zeros, or another number, at the pruned weights."""
    if mask is None:
        return packed.copy()
    floats = np.full(layout.weight_count + layout.other_count, fill, np.float32)
    floats[mask.positions] = packed[: mask.kept]
    floats[layout.weight_count :] = packed[mask.kept :]
    return floats


def repack(packed: Floats, old: MaskSet | None, new: MaskSet | None, layout: Layout) -> Floats:
    """From one mask's packed vector to another's: what `new` drops is lost, what it brings back is 0."""
    return pack(unpack(packed, old, layout), new, layout)


def union(masks: list[MaskSet]) -> MaskSet:
    """The positions that at least one of the masks keeps."""
    flags = np.zeros(masks[0].layout.weight_count, np.bool_)
    for mask in masks:
        flags[mask.positions] = True
    return MaskSet.from_positions(masks[0].layout, np.flatnonzero(flags).astype(np.int64))


def places(mask: MaskSet, inside: MaskSet) -> Places:
    """Where each kept weight of `mask` lies among the kept weights of `inside`.

    Raises:
        LayoutError: a position of `mask` that `inside` does not keep.
    """
    at = np.searchsorted(inside.positions, mask.positions)
    if mask.kept and (at[-1] >= inside.kept or not np.array_equal(inside.positions[at], mask.positions)):
        raise LayoutError("a mask keeps weights that the enclosing mask does not")
    return at.astype(np.int32)
