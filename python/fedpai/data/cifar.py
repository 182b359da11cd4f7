# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 as published: python pickles or binary rows, unpacked or in their ``.tar.gz``."""

from __future__ import annotations

import codecs
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpai.data.dataset import DataError

PIXELS = 3 * 32 * 32
# Bytes read at a time from what follows the last file of an archive.
_PIECE = 1 << 20
Images = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """One published form: its archive, the folder inside, and the files with training images before test."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str


@dataclass(frozen=True)
class Layout:
    """What distinguishes the two data sets; the last of a binary row's ``label_bytes`` is the label."""

    name: str
    num_classes: int
    python: Form
    binary: Form
    label_key: str
    label_bytes: int
    train_rows: int
    test_rows: int


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10 = Layout(
    name="cifar10",
    num_classes=10,
    python=Form("cifar-10-python.tar.gz", "cifar-10-batches-py", _BATCHES, "test_batch"),
    binary=Form(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        tuple(f"{batch}.bin" for batch in _BATCHES),
        "test_batch.bin",
    ),
    label_key="labels",
    label_bytes=1,
    train_rows=10_000,
    test_rows=10_000,
)
CIFAR100 = Layout(
    name="cifar100",
    num_classes=100,
    python=Form("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test"),
    binary=Form("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin"),
    label_key="fine_labels",
    label_bytes=2,
    train_rows=50_000,
    test_rows=10_000,
)


def read_cifar(root: Path, layout: Layout) -> tuple[Images, Images]:
    """Training and test split, each uint8 (N, 3, 32, 32) and int64 (N,).

    Args:
        root: an archive, the unpacked folder, or a folder that holds either.
        layout: which data set.

    Raises:
        DataError: nothing of the kind there, files missing, a file of the wrong size or content. Pickles are
            read with an unpickler that knows numpy arrays and nothing else.
    """
    form, place, contents = _locate(root, layout)
    files = (*form.train, form.test)
    missing = [file for file in files if file not in contents]
    if missing:
        raise DataError(
            f"{layout.name}: {place} lacks {', '.join(missing)}, expected all of {', '.join(files)}; "
            "the download or the unpacking stopped early"
        )
    decode = _decode_pickle if form is layout.python else _decode_binary
    parts = []
    for file in files:
        rows = layout.test_rows if file == form.test else layout.train_rows
        try:
            content = contents[file]()
        except OSError as error:
            raise DataError(f"{place}/{file}: cannot be read ({error.strerror or error})") from error
        parts.append(decode(content, f"{place}/{file}", layout, rows))
    train = (torch.cat([images for images, _ in parts[:-1]]), torch.cat([labels for _, labels in parts[:-1]]))
    return train, parts[-1]


Contents = dict[str, Callable[[], bytes]]


def _locate(root: Path, layout: Layout) -> tuple[Form, Path, Contents]:
    """The form found, where, and its files: a reader by file name."""
    forms = (layout.binary, layout.python)
    if root.is_file():
        contents = _read_archive(root, {f for form in forms for f in (*form.train, form.test)})
        form = _form_of(forms, contents)
        if form:
            return form, root, contents
        raise DataError(
            f"{layout.name}: {root} holds no {layout.name} files, expected {forms[0].archive} or alike"
        )
    if not root.is_dir():
        raise DataError(f"{layout.name}: {root} does not exist, expected {_expectation(layout)}")
    for folder in (root, *(root / form.folder for form in forms)):
        files = {p.name: p.read_bytes for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
        form = _form_of(forms, files)
        if form:
            return form, folder, files
    for form in forms:
        if (root / form.archive).is_file():
            return form, root / form.archive, _read_archive(root / form.archive, {*form.train, form.test})
    present = sorted(entry.name for entry in root.iterdir())[:6]
    raise DataError(
        f"{layout.name}: {root} holds {', '.join(present) or 'nothing'}, expected {_expectation(layout)}"
    )


def _form_of(forms: tuple[Form, ...], files: Contents) -> Form | None:
    """The form that a set of files belongs to, complete or not."""
    return next((form for form in forms if any(file in files for file in (*form.train, form.test))), None)


def _expectation(layout: Layout) -> str:
    return (
        f"a folder with {layout.binary.archive}, {layout.python.archive}, {layout.binary.folder}/ or "
        f"{layout.python.folder}/, or one of these itself"
    )


def _read_archive(path: Path, wanted: set[str]) -> Contents:
    """The wanted files of a tar archive, in memory; nothing is unpacked to disk."""
    contents: Contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                stream = archive.extractfile(member) if member.isfile() and name in wanted else None
                if stream is not None:
                    contents[name] = io.BytesIO(stream.read()).getvalue
            # A tar archive ends before its file does; only at the end of that does gzip check its checksum.
            while archive.fileobj is not None and archive.fileobj.read(_PIECE):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{path}: not a complete tar archive ({error}; {path.stat().st_size} bytes); fetch it again"
        ) from error
    return contents


def _decode_binary(content: bytes, path: str, layout: Layout, rows: int) -> Images:
    """Rows of label byte(s) and 3072 pixels, channel by channel."""
    row = layout.label_bytes + PIXELS
    if len(content) != rows * row:
        raise DataError(f"{path}: {len(content)} bytes, expected {rows} rows of {row} = {rows * row} bytes")
    table = np.frombuffer(bytearray(content), np.uint8).reshape(rows, row)
    labels = torch.from_numpy(table[:, layout.label_bytes - 1].astype(np.int64))
    return _checked(table[:, layout.label_bytes :], labels, path, layout)


def _decode_pickle(content: bytes, path: str, layout: Layout, rows: int) -> Images:
    """A dict with ``data``, uint8 (rows, 3072), and a list of labels; Python 2 wrote the keys as bytes."""
    try:
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"{path}: not a readable CIFAR pickle ({type(error).__name__}: {error}; {len(content)} bytes)"
        ) from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: holds a {type(loaded).__name__}, expected a dict")
    batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in loaded.items()}
    data, labels = batch.get("data"), batch.get(layout.label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (rows, PIXELS):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: 'data' is {found}, expected uint8 ({rows}, {PIXELS})")
    if not isinstance(labels, list) or len(labels) != rows or not all(type(v) is int for v in labels):
        found = f"{type(labels).__name__} of {len(labels)}" if isinstance(labels, list) else repr(labels)[:40]
        raise DataError(
            f"{path}: {layout.label_key!r} is {found}, expected a list of {rows} integers "
            f"(keys present: {', '.join(map(str, batch))})"
        )
    return _checked(data, torch.tensor(labels), path, layout)


def _checked(pixels: np.ndarray[Any, Any], labels: torch.Tensor, path: str, layout: Layout) -> Images:
    """Images (N, 3, 32, 32) with labels in range."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= layout.num_classes):
        raise DataError(
            f"{path}: labels run from {int(labels.min())} to {int(labels.max())}, "
            f"expected 0 to {layout.num_classes - 1}; another data set?"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels).reshape(-1, 3, 32, 32)), labels


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 3 pickles of old protocols call to restore bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"a CIFAR pickle has no use for the codec {encoding!r}")
    return codecs.encode(text, "latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and numpy arrays; refuses every other callable."""

    # Taken from an array itself: numpy renamed the module that holds it.
    _RECONSTRUCT = np.empty(0).__reduce__()[0]
    _ALLOWED: dict[tuple[str, str], Any] = {  # noqa: RUF012 - never changed
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None
