# SPDX-License-Identifier: Apache-2.0
"""A Plan: one mask, compiled once.

The mask of a layer never changes while the layer trains, so all that depends on it (index streams in both walking
orders, schedules per image size and batch) is built once and shared by every copy of the layer. Values live apart from
it, packed: ``values = weight[mask]``, in row-major order of the mask.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import _C
from .structure import Structure, check, describe, parse

Kind = Literal["conv2d", "linear"]

_DIGEST_FORMAT = "fedpai-plan-1"

# An op's schema holds tensors and numbers only, so a plan travels as an integer, its handle. Weak: a plan lives as long
# as a module or an autograd node holds it, and masks that are replaced between rounds do not pile up.
_next_handle = itertools.count(1)
_living: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


class _Streams:
    """What the plans of one mask have in common, however often that mask is compiled: the memory and the work."""

    __slots__ = ("__weakref__", "compiled", "digest", "indices", "indices_on", "structure")

    def __init__(self, compiled: _C.CompiledPlan, indices: Tensor) -> None:
        self.compiled = compiled
        self.indices = indices
        self.indices_on: dict[torch.device, Tensor] = {}
        self.digest: str | None = None
        self.structure: str | None = None


# Kind, shape, groups, and the number and sum of the indices.
_Likeness = tuple[Kind, tuple[int, ...], int, int, int]

# Weak as well: the streams go with the last plan of their mask. Not by digest, which takes as long to compute as half
# of a new mask's compilation; of two masks that are alike but not equal, one is not shared.
_streams: weakref.WeakValueDictionary[_Likeness, _Streams] = weakref.WeakValueDictionary()
_streams_lock = threading.Lock()


class Plan:
    """The compiled form of a mask. Immutable; equal and hashable by content; made with :meth:`from_mask`.

    All plans of one mask in a process share its index streams and its schedules, whether they are copies, were
    unpickled, or were made from equal masks one by one: so the clients of a federation hold them once. Pickling keeps
    the mask as packed bits. Copies (``copy``, ``deepcopy``) are the same object. Safe to use from several threads.

    Attributes:
        kind: ``"conv2d"`` or ``"linear"``.
        mask_shape: shape of the weight: (out, in / groups, kernel_h, kernel_w) or (out, in).
        groups: convolution groups.
        nnz: number of surviving weights.
        density: ``nnz / numel``.
        structure: how the survivors are arranged, as :func:`fedpai_kernels.structure.describe` names it: ``"16x1"``,
            ``"weight"`` and so on.
        handle: the integer that names this plan in the ops of this process.
        digest: SHA-256 (hex) of kind, shape, groups and mask; the same mask has the same digest on every machine.
    """

    __slots__ = (
        "__weakref__", "_streams", "groups", "handle", "kind", "mask_shape", "nnz",
    )  # fmt: skip

    kind: Kind
    mask_shape: tuple[int, ...]
    groups: int
    nnz: int
    handle: int
    _streams: _Streams

    def __init__(self) -> None:
        raise TypeError("Plan: use Plan.from_mask(mask)")

    @classmethod
    def from_mask(
        cls, mask: Tensor, *, kind: Kind | None = None, groups: int = 1, structure: str | Structure = "auto"
    ) -> Plan:
        """Compiles a mask.

        Whatever it is declared to be, output or input channels that keep the same weights are found, and computed
        together: blocks, whole channels and dense masks are faster than scattered weights (docs/structure.md).

        Args:
            mask: bool tensor of the weight's shape, (out, in / groups, kernel_h, kernel_w) for a convolution or
                (out, in) for a linear layer; True where a weight survives. Any device and layout; it is copied.
            kind: checked against the mask's number of dimensions when given.
            groups: groups of the convolution.
            structure: ``"auto"``, or what the mask must be: a name such as ``"16x1"`` or a structure of
                :mod:`fedpai_kernels.structure`.

        Raises:
            TypeError: ``mask`` is not a bool tensor.
            ValueError: wrong number of dimensions, an empty dimension, no data, no surviving weight, groups that do not
                divide the output channels, an unknown structure, or a mask that is not of the declared one (the
                message names the first offending block).
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a torch.Tensor of dtype bool, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected dtype torch.bool, got {mask.dtype}; `mask != 0` makes one")
        found: Kind | None = {4: "conv2d", 2: "linear"}.get(mask.dim())  # type: ignore[assignment]
        if found is None:
            raise ValueError(
                "mask: expected 4 dimensions (out, in / groups, kernel_h, kernel_w) or 2 (out, in), "
                f"got shape {tuple(mask.shape)}"
            )
        if kind is not None and kind != found:
            raise ValueError(f"mask: shape {tuple(mask.shape)} is that of a {found} weight, expected one for {kind!r}")
        if found == "linear" and groups != 1:
            raise ValueError(f"groups: a linear layer has 1 group, got {groups}")
        if 0 in mask.shape:
            raise ValueError(f"mask: every dimension must be positive, got shape {tuple(mask.shape)}")
        if not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups: expected an int of at least 1, got {groups!r}")
        if mask.is_meta:
            raise ValueError("mask: expected a tensor with data, got one on the meta device")
        # What is made inside a function that torch.func transforms is wrapped, and has no memory to read.
        with torch._C._DisableFuncTorch():
            dense = mask.detach().to("cpu").to_dense().contiguous()
            if structure != "auto":
                check(dense, parse(structure) if isinstance(structure, str) else structure, groups)
            plan = cls.__new__(cls)
            plan._build(found, tuple(mask.shape), groups, dense)
        return plan

    def _build(self, kind: Kind, shape: tuple[int, ...], groups: int, dense: Tensor) -> None:
        streams = _shared_streams(kind, shape, groups, dense)
        set_attribute = object.__setattr__
        set_attribute(self, "kind", kind)
        set_attribute(self, "mask_shape", shape)
        set_attribute(self, "groups", groups)
        set_attribute(self, "nnz", streams.compiled.nnz)
        set_attribute(self, "_streams", streams)
        set_attribute(self, "handle", next(_next_handle))
        _living[self.handle] = self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Plan is immutable; cannot set {name!r}")

    @property
    def numel(self) -> int:
        """Number of weights of the dense layer."""
        return int(np.prod(self.mask_shape))

    @property
    def density(self) -> float:
        """Share of the weights that survive, in (0, 1]."""
        return self.nnz / self.numel

    @property
    def structure(self) -> str:
        """The name of the coarsest structure that the mask has."""
        streams = self._streams
        if streams.structure is None:  # on first use, as the digest
            streams.structure = describe(self.mask(), self.groups)
        return streams.structure

    @property
    def shared(self) -> float:
        """Share of the work on this mask that output or input channels with the same weights do together, in [0, 1].

        1 for blocks of several rows and columns, dense masks and whole channels, 2/3 for blocks of one input channel,
        1/3 for those of one output channel: output channels count for the forward pass and the weight gradient, input
        channels for the input gradient.
        """
        outputs, inputs = self.compiled.shared_weights
        return (2 * outputs + inputs) / (3 * self.nnz)

    @property
    def digest(self) -> str:
        """SHA-256 of kind, shape, groups and mask bits, as hex."""
        streams = self._streams
        if streams.digest is None:  # on first use: masks that change between rounds may never need it
            header = f"{_DIGEST_FORMAT}|{self.kind}|{'x'.join(map(str, self.mask_shape))}|{self.groups}|".encode()
            streams.digest = hashlib.sha256(header + self._packed_mask()).hexdigest()
        return streams.digest

    @property
    def compiled(self) -> _C.CompiledPlan:
        """The compiled object, for the ops; one for all plans of this mask."""
        return self._streams.compiled

    @property
    def indices(self) -> Tensor:
        """int64 tensor (nnz,): row-major positions of the surviving weights, ascending. Do not write to it."""
        return self._streams.indices

    def indices_on(self, device: torch.device) -> Tensor:
        """:attr:`indices` on a device: copied there the first time, the same tensor ever after.

        Raises:
            RuntimeError: the first time falls into the capture of a CUDA graph, which cannot hold a copy from the host.
        """
        if device.type == "cpu":
            return self.indices
        if torch.compiler.is_compiling():
            return self.indices.to(device)
        found = self._streams.indices_on.get(device)
        if found is None:
            if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "plan: the positions of its weights are not on the device yet, and a CUDA graph that is being "
                    "captured cannot copy them there; run the step once before capturing it"
                )
            found = self.indices.to(device)
            if type(found) is Tensor:  # else a tensor that only stands for one
                found = self._streams.indices_on.setdefault(device, found)
        return found

    def mask(self) -> Tensor:
        """A fresh bool tensor of ``mask_shape``, True where a weight survives."""
        mask = torch.zeros(self.numel, dtype=torch.bool)
        mask[self.indices] = True
        return mask.reshape(self.mask_shape)

    def _packed_mask(self) -> bytes:
        """One bit per weight, row-major, the first in the highest bit of its byte."""
        return np.packbits(self.mask().numpy().reshape(-1)).tobytes()

    def pack(self, dense: Tensor) -> Tensor:
        """The surviving weights of a dense weight: (nnz,), differentiable.

        Raises:
            ValueError: ``dense`` has another shape than the mask.
        """
        if tuple(dense.shape) != self.mask_shape:
            raise ValueError(f"dense: expected shape {self.mask_shape}, got {tuple(dense.shape)}")
        return dense.reshape(-1)[self.indices_on(dense.device)]

    def unpack(self, values: Tensor) -> Tensor:
        """The dense weight that packed values stand for: ``mask_shape``, zero outside the mask, differentiable.

        Raises:
            ValueError: ``values`` is not of shape (nnz,).
        """
        if tuple(values.shape) != (self.nnz,):
            raise ValueError(f"values: expected shape ({self.nnz},), got {tuple(values.shape)}")
        dense = torch.zeros(self.numel, dtype=values.dtype, device=values.device)
        return dense.index_copy(0, self.indices_on(values.device), values).reshape(self.mask_shape)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Plan:
        return self

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _restore, (self.kind, self.mask_shape, self.groups, self._packed_mask(), self.digest)

    def __repr__(self) -> str:
        groups = f", groups={self.groups}" if self.groups != 1 else ""
        return (
            f"Plan({self.kind}, {'x'.join(map(str, self.mask_shape))}{groups}, nnz={self.nnz}, "
            f"density={self.density:.4g}, digest={self.digest[:12]})"
        )


def _shared_streams(kind: Kind, shape: tuple[int, ...], groups: int, dense: Tensor) -> _Streams:
    """The streams of this mask: those that there are, else new ones."""
    kernel_h, kernel_w = shape[2:] if kind == "conv2d" else (1, 1)
    compiled = _C.CompiledPlan(dense.data_ptr(), shape[0], shape[1], kernel_h, kernel_w, groups)
    indices = torch.empty(compiled.nnz, dtype=torch.int64)
    compiled.flat_indices(indices.data_ptr())
    made = _Streams(compiled, indices)
    likeness = kind, shape, groups, compiled.nnz, int(indices.sum())
    with _streams_lock:  # not held while compiling: masks of several layers may be compiled at once
        found = _streams.setdefault(likeness, made)
    return found if torch.equal(found.indices, indices) else made


def plan_of(handle: int) -> Plan:
    """The plan that ``handle`` names.

    Raises:
        ValueError: no living plan has this handle.
    """
    plan = _living.get(handle)
    if plan is None:
        raise ValueError(f"plan: no living plan has the handle {handle}; keep the Plan alive while its ops run")
    return plan


def _restore(kind: Kind, shape: tuple[int, ...], groups: int, packed: bytes, digest: str) -> Plan:
    numel = int(np.prod(shape))
    if len(packed) != (numel + 7) // 8:
        expected = (numel + 7) // 8
        raise ValueError(f"Plan: damaged pickle, {len(packed)} mask bytes for shape {shape}, expected {expected}")
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=numel)
    plan = Plan.from_mask(torch.from_numpy(bits.astype(np.bool_)).reshape(shape), kind=kind, groups=groups)
    if plan.digest != digest:
        raise ValueError(f"Plan: damaged pickle, digest {plan.digest[:12]}..., expected {digest[:12]}...")
    return plan
