# SPDX-License-Identifier: Apache-2.0
"""Models that flat vectors are poured into and read back from.

A `ModelPool` builds one model per mask and keeps it, so that plans are compiled once however many clients
and rounds use the mask. A client's values live in vectors between its turns, never in a model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpai.federation.layout import Floats, Ints, Layout, MaskSet, Slot
from fedpai_kernels import sparsify_
from fedpai_kernels.nn import parts_of

POOL_LIMIT = 16
"""Models kept at a time; with more personal masks than this the least recently used one is rebuilt."""


class BoundModel:
    """A model, dense or sparse, whose tensors are tied to the places of a packed vector.

    Attributes:
        model: the torch module that trains.
        mask: what it keeps (None: dense).
        report: what `sparsify_` said about each layer (None: dense).
    """

    def __init__(self, model: nn.Module, layout: Layout, mask: MaskSet | None, report: Any = None) -> None:
        self.model = model
        self.layout = layout
        self.mask = mask
        self.report = report
        self._floats: list[tuple[slice | Tensor, Tensor]] = []
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        if mask is None:
            for slot in layout.weights:
                self._floats.append((slice(slot.offset, slot.stop), tensors[slot.key]))
        else:
            # Every masked layer, whatever kernel it got, trains the packed values in the mask's order.
            for slot, where in mask.parts():
                self._tie(slot, where, mask.positions[where] - slot.offset)
        start = layout.weight_count if mask is None else mask.kept
        for slot in layout.others:
            self._tie(slot, slice(start + slot.offset, start + slot.stop), np.arange(slot.size))
        self._ints = [(slice(slot.offset, slot.stop), tensors[slot.key]) for slot in layout.ints]

    def _tie(self, slot: Slot, where: slice, positions: Ints) -> None:
        """Ties the elements of a slot at `positions`, which lie at `where` in the packed vector, to what holds them.

        One tensor, in this order, holds all; or, where channels were removed, two that share them.
        """
        path, _, name = slot.key.rpartition(".")
        parts = parts_of(self.model.get_submodule(path), name)
        for held, tensor in parts:
            at = where.start + np.searchsorted(positions, held.numpy())
            self._floats.append((where if len(parts) == 1 else torch.from_numpy(at), tensor))

    @torch.no_grad()
    def load(self, floats: Floats, ints: Ints) -> None:
        """Overwrites every tensor of the model from packed vectors.

        Raises:
            LayoutError: vectors of another length or dtype; the model is untouched.
        """
        self.layout.check(floats, ints, self.mask)
        # torch warns about read-only memory, which decoded messages are; it is only read here.
        source = torch.from_numpy(floats if floats.flags.writeable else floats.copy())
        for where, tensor in self._floats:
            tensor.copy_(source[where].view(tensor.shape))
        for where, tensor in self._ints:
            tensor.copy_(torch.from_numpy(ints[where].copy()).view(tensor.shape))

    @torch.no_grad()
    def read(self) -> tuple[Floats, Ints]:
        """The model's tensors as packed vectors (fresh memory)."""
        floats = np.empty(self.layout.float_count(self.mask), np.float32)
        target = torch.from_numpy(floats)
        for where, tensor in self._floats:
            target[where] = tensor.detach().reshape(-1)
        ints = np.empty(self.layout.int_count, np.int64)
        for where, tensor in self._ints:
            ints[where] = tensor.reshape(-1).numpy()
        return floats, ints

    def load_momentum(self, optimiser: torch.optim.Optimizer, momentum: Floats) -> None:
        """Gives every parameter its momentum buffer back, from a vector that `read_momentum` made under this mask.

        Raises:
            LayoutError: a vector of another length or dtype.
        """
        self.layout.check(momentum, np.zeros(self.layout.int_count, np.int64), self.mask)
        source = torch.from_numpy(momentum)
        for where, tensor in self._floats:
            if isinstance(tensor, nn.Parameter):
                buffer = torch.empty_like(tensor, requires_grad=False)  # stored as the parameter is
                optimiser.state[tensor]["momentum_buffer"] = buffer.copy_(source[where].view(tensor.shape))

    def read_momentum(self, optimiser: torch.optim.Optimizer) -> Floats:
        """SGD's momentum in the order of the packed floats; zeros for what no gradient steps (running statistics)."""
        momentum = np.zeros(self.layout.float_count(self.mask), np.float32)
        target = torch.from_numpy(momentum)
        for where, tensor in self._floats:
            buffer = optimiser.state.get(tensor, {}).get("momentum_buffer")
            if buffer is not None:
                target[where] = buffer.reshape(-1)
        return momentum


class ModelPool:
    """Hands out bound models by mask.

    Args:
        create: builds a fresh dense model; its weights are overwritten.
        memory_format: of dense models and of the images they get.
    """

    def __init__(
        self, create: Callable[[], nn.Module], layout: Layout, memory_format: torch.memory_format
    ) -> None:
        self._create = create
        self.layout = layout
        self._memory_format = memory_format
        self._kept: OrderedDict[bytes | None, BoundModel] = OrderedDict()

    def get(self, mask: MaskSet | None) -> BoundModel:
        """The model for a mask (None: dense). Its values are whatever the last user left there.

        Channels that the mask leaves without any weight are removed from it, and keep the values that were loaded.
        """
        key = None if mask is None else mask.digest
        bound = self._kept.get(key)
        if bound is None:
            bound = self._kept[key] = self._build(mask)
            if len(self._kept) > POOL_LIMIT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return bound

    def drop(self, mask: MaskSet | None) -> None:
        """Lets go of the model for a mask that nobody will train under again."""
        self._kept.pop(None if mask is None else mask.digest, None)

    def plain(self, floats: Floats, ints: Ints) -> nn.Module:
        """A separate dense torch model with the given dense values, for scoring."""
        model = self._create()
        model.load_state_dict(self.layout.scatter(floats, ints))
        return model

    def initial(self) -> tuple[Floats, Ints]:
        """The values that every run of these settings starts from, dense: they follow from its seed."""
        return self.layout.gather(self._create().state_dict())

    def images(self, bound: BoundModel, x: Tensor) -> Tensor:
        """The batch in the memory format that the model likes best."""
        if bound.mask is None and x.dim() == 4:
            return x.contiguous(memory_format=self._memory_format)
        return x

    def _build(self, mask: MaskSet | None) -> BoundModel:
        model = self._create()
        if mask is None:
            model.to(memory_format=self._memory_format)  # type: ignore[call-overload]
            return BoundModel(model, self.layout, None)
        masks = mask.masks()
        try:
            report = sparsify_(model, masks)
        except ValueError:  # no path through the network, as scores may have it; anything else is raised again
            return BoundModel(model, self.layout, mask, sparsify_(model, masks, compact=False))
        asides = (parts_of(model.get_submodule(name), "weight")[1:] for name in masks)
        if any(len(positions) for aside in asides for positions, _ in aside):
            # Kept weights without effect under this mask: they are sent and merged, so they must decay as others do.
            report = sparsify_(model, masks, compact=False)
        return BoundModel(model, self.layout, mask, report)
