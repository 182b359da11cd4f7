# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' shared library, loaded when something first asks for it.

``libfedpai_cuda.so`` lies beside the compiled module, where it was built (docs/gpu.md). It has a C interface of its
own, ``csrc/cuda/fedpai_cuda.h``, which the structures here mirror field by field; all fields are eight bytes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Final

import torch

INTERFACE: Final = 3
"""FEDPAI_CUDA_INTERFACE of the header that this file mirrors."""

PATH: Final = Path(__file__).resolve().parents[1] / "libfedpai_cuda.so"

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
"""What images may be made of, and its code."""


class CudaUnavailableError(RuntimeError):
    """The CUDA kernels cannot be used here; the message says why, and what to do."""


class Conv2d(Structure):
    """Sizes of a convolution, for how many clients, and the code of its images' dtype."""

    _fields_ = tuple(
        (name, c_int64)
        for name in (
            "clients", "batch", "in_channels", "in_h", "in_w", "out_channels", "out_h", "out_w", "stride_h", "stride_w",
            "dtype",
        )
    )  # fmt: skip


class RowStream(Structure):
    """Addresses of a plan's entries by row, on a device, and how many entries there are."""

    _fields_ = (("entries", c_void_p), ("row_begin", c_void_p), ("row_order", c_void_p), ("entry_count", c_int64))


class GroupStream(Structure):
    """Addresses of a plan's entries by group, on a device, and how many of each there are."""

    _fields_ = (("entries", c_void_p), ("groups", c_void_p), ("entry_count", c_int64), ("group_count", c_int64))


class Norm(Structure):
    """Sizes of a batch norm, the code of its activations' dtype, and what follows it."""

    _fields_ = (*((name, c_int64) for name in ("channels", "row", "dtype", "activation")), ("slope", c_double))


class ServerStep(Structure):
    """Factors of a step of the server, and the number of its rule."""

    _fields_ = (*((name, c_double) for name in ("lr", "beta1", "beta2", "tau")), ("rule", c_int64))


class SgdChunk(Structure):
    """One parameter of a step: addresses, elements, and whether the buffer is yet to be filled."""

    _fields_ = (("p", c_void_p), ("g", c_void_p), ("buffer", c_void_p), ("count", c_int64), ("first", c_int64))


class SgdOptions(Structure):
    """Factors and flags of a step of SGD."""

    _fields_ = (
        *((name, c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        ("nesterov", c_int64),
        ("maximize", c_int64),
    )


class AdamChunk(Structure):
    """One parameter of a step: addresses, and elements."""

    _fields_ = (*((name, c_void_p) for name in ("p", "g", "m", "v", "v_max", "device_step")), ("count", c_int64))


class AdamOptions(Structure):
    """Factors and flags of a step of Adam."""

    _fields_ = (
        *((name, c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "step")),
        ("decoupled", c_int64),
        ("maximize", c_int64),
    )


_SIGNATURES: Final[dict[str, tuple[type, ...]]] = {
    "conv2d_forward": (POINTER(Conv2d), POINTER(RowStream), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "conv2d_input_grad": (POINTER(Conv2d), POINTER(RowStream), c_void_p, c_void_p, c_void_p, c_void_p),
    "conv2d_weight_grad": (
        POINTER(Conv2d), POINTER(GroupStream), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p,
    ),
    "conv2d_weight_grad_workspace": (POINTER(Conv2d), POINTER(GroupStream), POINTER(c_int64)),
    "norm_workspace": (POINTER(Norm), POINTER(c_int64)),
    "norm_train": (
        POINTER(Norm), c_void_p, c_void_p, c_void_p, c_void_p, c_double, c_void_p, c_void_p, c_double, c_void_p,
        c_void_p, c_void_p, c_int64, c_void_p,
    ),
    "norm_eval": (
        POINTER(Norm), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_double, c_void_p, c_void_p,
        c_void_p,
    ),
    "norm_apply": (POINTER(Norm), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "norm_backward": (
        POINTER(Norm), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_void_p,
        c_void_p, c_void_p, c_int64, c_void_p,
    ),
    "weighted_mean": (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_void_p, c_void_p),
    "find_segments": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
    "masked_mean": (
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int, c_void_p, c_void_p,
    ),
    "majority": (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    "server_step": (
        POINTER(ServerStep), c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p,
    ),
    "sgd_step": (POINTER(SgdChunk), c_int64, POINTER(SgdOptions), c_void_p),
    "adam_step": (POINTER(AdamChunk), c_int64, POINTER(AdamOptions), c_void_p),
}  # fmt: skip


class Library:
    """The functions of one shared library. ``call`` runs one by its name without the prefix.

    Raises:
        CudaUnavailableError: the file cannot be loaded, or its interface is not the one that this package was made for.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise CudaUnavailableError(f"{path} cannot be loaded: {error}") from error
        found = int(self._dll.fedpai_cuda_interface())
        if found != INTERFACE:
            raise CudaUnavailableError(
                f"{path} has interface {found}, this package needs {INTERFACE}: they come of two builds; "
                "build the package again"
            )
        for name, types in _SIGNATURES.items():
            function = getattr(self._dll, f"fedpai_cuda_{name}")
            function.argtypes, function.restype = types, c_int
        self._dll.fedpai_cuda_message.argtypes, self._dll.fedpai_cuda_message.restype = (c_int,), c_char_p
        self._dll.fedpai_cuda_segments.argtypes, self._dll.fedpai_cuda_segments.restype = (c_int64,), c_int64

    def call(self, name: str, *arguments: object) -> None:
        """Calls ``fedpai_cuda_<name>``; its stream, if it has one, is the last argument.

        Raises:
            RuntimeError: it returned a code that is not 0; the message says which, in words.
        """
        code = int(getattr(self._dll, f"fedpai_cuda_{name}")(*arguments))
        if code != 0:
            raise RuntimeError(f"{name}: {self.message(code)} (code {code})")

    def message(self, code: int) -> str:
        """What a code means."""
        return str(self._dll.fedpai_cuda_message(code).decode())

    def segments(self, n: int) -> int:
        """How many segments n elements have."""
        return int(self._dll.fedpai_cuda_segments(n))

    def check_driver(self) -> None:
        """Raises CudaUnavailableError where there is no driver or no device."""
        count = c_int(0)
        code = int(self._dll.fedpai_cuda_device_count(byref(count)))
        if code != 0:
            raise CudaUnavailableError(
                f"the CUDA driver cannot be used: {self.message(code)} (code {code}); install the driver of your GPU, "
                "or leave tensors on the CPU"
            )
        if count.value == 0:
            raise CudaUnavailableError("the CUDA driver finds no device; leave tensors on the CPU")


_loaded: Library | None = None
_loading = threading.Lock()


def load() -> Library:
    """The library, loaded once for the process.

    Raises:
        CudaUnavailableError: it was not built, cannot be loaded, or there is no driver.
    """
    global _loaded
    if _loaded is None:
        with _loading:
            if not PATH.is_file():
                raise CudaUnavailableError(
                    f"there are no CUDA kernels in this installation ({PATH} does not exist); they are built where "
                    "nvcc is: install the CUDA toolkit and build the package with FEDPAI_CMAKE_ARGS=-DFEDPAI_CUDA=ON, "
                    "or leave tensors on the CPU (docs/gpu.md)"
                )
            library = Library(PATH)
            library.check_driver()
            _loaded = library
    return _loaded


@contextmanager
def on(device: torch.device) -> Iterator[tuple[Library, int]]:
    """The library with `device` as the current one, and torch's current stream there.

    Raises:
        CudaUnavailableError: as :func:`load`.
    """
    library = load()
    with torch.cuda.device(device):
        yield library, int(torch.cuda.current_stream(device).cuda_stream)
