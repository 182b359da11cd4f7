# SPDX-License-Identifier: Apache-2.0
"""IDX files, the format of MNIST and its relatives, plain or gzipped.

Layout: two zero bytes, one byte for the element type (8 = unsigned byte), one for the number of dimensions,
each dimension as a big-endian 32-bit integer, then the elements, last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from fedpai.data.dataset import DataError

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 8


def read_idx(path: Path, dimensions: int) -> torch.Tensor:
    """Read a whole file of unsigned bytes.

    Args:
        path: the file; gzip is recognised by its first bytes, not by its name.
        dimensions: how many the file must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of the header's shape.

    Raises:
        DataError: no IDX file of that kind, a size that disagrees with the header, a damaged gzip stream; the
            message names the path, what was found and what was expected.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                return _parse(raw, path, dimensions)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse(cast(BinaryIO, stream), path, dimensions)
    except EOFError as error:
        raise DataError(
            f"{path}: the gzip stream stops in the middle ({path.stat().st_size} bytes on disk); "
            "expected a complete file, fetch it again"
        ) from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip stream ({error}); expected an intact file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parse(stream: BinaryIO, path: Path, dimensions: int) -> torch.Tensor:
    """Header, size check, elements."""
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    found = stream.read(4)
    if found != magic:
        raise DataError(
            f"{path}: starts with bytes {found.hex(' ') or '(none)'}{_guess(found)}, "
            f"expected {magic.hex(' ')} (IDX of unsigned bytes with {_count(dimensions)})"
        )
    header = stream.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{path}: ends inside its header, expected {4 * dimensions} bytes of dimensions")
    shape = struct.unpack(f">{dimensions}I", header)
    expected = math.prod(shape)
    # One byte more than needed: shows a file that is too long, and makes gzip check its checksum.
    content = _read_up_to(stream, expected + 1)
    if len(content) != expected:
        size = "more" if len(content) > expected else str(len(content))
        promised = " x ".join(map(str, shape))
        raise DataError(f"{path}: the header promises {promised} = {expected} bytes, the file holds {size}")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape))


def _read_up_to(stream: BinaryIO, size: int) -> bytearray:
    """At most ``size`` bytes, piece by piece: a damaged header must not decide the memory asked for."""
    content = bytearray()
    while len(content) < size:
        piece = stream.read(min(size - len(content), 1 << 20))
        if not piece:
            break
        content += piece
    return content


def _guess(found: bytes) -> str:
    """What a wrong beginning most likely is."""
    if found[:3] == bytes((0, 0, UNSIGNED_BYTE)) and len(found) == 4:
        return f" (IDX with {_count(found[3])}: images and labels swapped?)"
    if found[:1] == b"<":
        return " (an HTML or XML page, not data)"
    return ""


def _count(dimensions: int) -> str:
    return f"{dimensions} dimension{'' if dimensions == 1 else 's'}"
