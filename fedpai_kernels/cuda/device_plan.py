# SPDX-License-Identifier: Apache-2.0
"""A plan's index streams on a device: copied there once, for every layer, batch and image size that the mask serves.

They depend on the mask and on stride, padding and dilation; ``csrc/cuda/conv2d/streams.h`` says what they hold. All
plans of one mask share them, and they go with the last of those plans.
"""

from __future__ import annotations

import threading
import weakref
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..ops.geometry import Geometry
from ..plan import Plan
from .library import GroupStream, RowStream

Direction = Literal["forward", "input_grad", "weight_grad"]

_BUILD = {
    "forward": _C.cuda_forward_stream,
    "input_grad": _C.cuda_input_grad_stream,
    "weight_grad": _C.cuda_weight_grad_stream,
}
_ENTRY_BYTES = 16
_GROUP_BYTES = 16


class _Key(NamedTuple):
    device: torch.device
    direction: Direction
    spread: tuple[int, ...]  # stride, padding in front, dilation


class DevicePlan:
    """The streams of one mask, on all devices that asked for them."""

    def __init__(self, compiled: _C.CompiledPlan) -> None:
        self._compiled = compiled
        self._streams: dict[_Key, Tensor] = {}
        self._lock = threading.Lock()

    def _stream(self, device: torch.device, direction: Direction, geometry: Geometry) -> Tensor:
        """The bytes of a stream, on the device."""
        key = _Key(device, direction, (*geometry.stride, *geometry.pad_front, *geometry.dilation))
        with self._lock:
            found = self._streams.get(key)
            if found is None:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "plan: its index streams are not on the device yet, and a CUDA graph that is being captured "
                        "cannot copy them there; run the step once before capturing it"
                    )
                built = _BUILD[direction](self._compiled, key.spread)
                found = torch.frombuffer(bytearray(built), dtype=torch.uint8).to(device)
                self._streams[key] = found
        return found

    def rows(
        self, device: torch.device, direction: Literal["forward", "input_grad"], geometry: Geometry, rows: int
    ) -> RowStream:
        """Addresses for the kernels that gather: `rows` output channels, or input channels of an input gradient.

        Raises:
            RuntimeError: the streams would have to be copied while a CUDA graph is being captured.
            ValueError: stride, padding or dilation beyond what streams hold.
        """
        start = self._stream(device, direction, geometry).data_ptr()
        passes = geometry.stride[0] * geometry.stride[1] if direction == "input_grad" else 1
        row_begin = start + self._compiled.nnz * _ENTRY_BYTES
        return RowStream(start, row_begin, row_begin + 4 * passes * (rows + 1), self._compiled.nnz)

    def groups(self, device: torch.device, geometry: Geometry) -> GroupStream:
        """Addresses for the weight gradient.

        Raises:
            RuntimeError, ValueError: as :meth:`rows`.
        """
        stream = self._stream(device, "weight_grad", geometry)
        entry_bytes = self._compiled.nnz * _ENTRY_BYTES
        groups = (stream.numel() - entry_bytes) // _GROUP_BYTES
        return GroupStream(stream.data_ptr(), stream.data_ptr() + entry_bytes, self._compiled.nnz, groups)


# By what all plans of a mask share.
_device_plans: weakref.WeakKeyDictionary[object, DevicePlan] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def device_plan(plan: Plan) -> DevicePlan:
    """The one of this plan's mask."""
    with _lock:
        found = _device_plans.get(plan._streams)
        if found is None:
            found = _device_plans[plan._streams] = DevicePlan(plan.compiled)
    return found
