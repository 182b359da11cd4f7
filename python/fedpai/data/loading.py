# SPDX-License-Identifier: Apache-2.0
"""Data sets by name, and where their files are looked for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from fedpai.data.cifar import CIFAR10, CIFAR100, read_cifar
from fedpai.data.dataset import DataError, Dataset
from fedpai.data.idx import read_idx
from fedpai.data.synthetic import synthetic

FASHION_PACKAGE = "dataset-fashion-mnist"
# Files of the MNIST family. Both spellings of the names are in use, with and without ".gz".
_IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_IDX_FOLDERS = {
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "fashion"),
    "fashion-mnist-28": ("fashion-mnist", "FashionMNIST/raw", "fashion"),
    "mnist": ("mnist", "MNIST/raw"),
    "kmnist": ("kmnist", "KMNIST/raw"),
}


def names() -> list[str]:
    """The names that :func:`load` knows."""
    return sorted([*_IDX_FOLDERS, "cifar10", "cifar100", "synthetic", "synthetic-gray"])


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = 32,
    seed: int = 0,
) -> Dataset:
    """Read a data set from local files, or generate the synthetic one.

    Args:
        name: one of :func:`names`.
        root: the folder with the files. For CIFAR also the downloaded ``.tar.gz`` itself, or the folder that
            holds it or the unpacked folder. Without it, Fashion-MNIST is looked for where Debian's package
            ``dataset-fashion-mnist`` puts it; the others need it; synthetic images use no files.
        image_size: pad 28x28 images with zeros to this side; ``None`` keeps the files' size, and so does the name
            ``fashion-mnist-28``.
        seed: for the synthetic images only.

    Raises:
        ValueError: an unknown name, or an image size below the files'.
        DataError: a missing folder, a missing, truncated or damaged file, or one of another kind. Synthetic
            images never stand in for missing files.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: got {image_size}, expected at least 1, or None for the files' size")
    if name in _IDX_FOLDERS:
        size = None if name == "fashion-mnist-28" else image_size
        return _load_idx(name, None if root is None else Path(root), size)
    if name in ("cifar10", "cifar100"):
        layout = CIFAR10 if name == "cifar10" else CIFAR100
        if root is None:
            raise DataError(
                f"{name}: needs a data folder (root=..., --data-root on the command line) holding "
                f"{layout.binary.archive} or {layout.python.archive}, packed or unpacked"
            )
        train, test = read_cifar(Path(root), layout)
        return _dataset(name, train, test, layout.num_classes, image_size)
    if name in ("synthetic", "synthetic-gray"):
        if root is not None:
            raise ValueError(f"root: got {os.fspath(root)!r}, but {name} is generated and reads no files")
        return synthetic(
            in_channels=1 if name == "synthetic-gray" else 3, image_size=image_size or 32, seed=seed
        )
    raise ValueError(f"name: unknown data set {name!r}, expected one of {', '.join(names())}")


def _load_idx(name: str, root: Path | None, image_size: int | None) -> Dataset:
    """The four files of one member of the MNIST family."""
    folder = _idx_folder(name, root)
    splits = []
    for image_file, label_file in _IDX_FILES:
        images = read_idx(_idx_file(name, folder, image_file), 3)
        labels = read_idx(_idx_file(name, folder, label_file), 1)
        if len(images) != len(labels):
            raise DataError(
                f"{folder}: {image_file} holds {len(images)} images but {label_file} {len(labels)} labels; "
                "expected files of one download"
            )
        splits.append((images.unsqueeze(1), labels))
    return _dataset(name, splits[0], splits[1], 10, image_size)


def _dataset(
    name: str,
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    num_classes: int,
    image_size: int | None,
) -> Dataset:
    """Pad both splits and build the record."""
    padded = [(_pad(images, image_size), labels) for images, labels in (train, test)]
    return Dataset.from_arrays(name, padded[0], padded[1], num_classes)


def _pad(images: torch.Tensor, image_size: int | None) -> torch.Tensor:
    """Zeros around (N, C, H, W) up to ``image_size``; an odd row or column goes below or right."""
    height, width = images.shape[2:]
    if image_size is None or (height, width) == (image_size, image_size):
        return images
    if image_size < max(height, width):
        raise ValueError(
            f"image_size: got {image_size}, expected at least {max(height, width)}, the files' size"
        )
    top, left = (image_size - height) // 2, (image_size - width) // 2
    return functional.pad(images, (left, image_size - width - left, top, image_size - height - top))


def _idx_folder(name: str, root: Path | None) -> Path:
    """The folder that holds the files: the given one, a usual sub-folder of it, or Debian's."""
    hint = _hint(name)
    if root is None:
        folder = _debian_folder() if name.startswith("fashion-mnist") else None
        if folder is None:
            raise DataError(f"{name}: no data folder given and none installed; {hint}")
        return folder
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{name}: {root} {found}, expected a folder with {_idx_list()}; {hint}")
    for folder in (root, *(root / sub for sub in _IDX_FOLDERS[name])):
        if any(_idx_variants(folder, file) for pair in _IDX_FILES for file in pair):
            return folder
    present = sorted(entry.name for entry in root.iterdir())[:6]
    raise DataError(
        f"{name}: {root} holds none of the files (found {', '.join(present) or 'nothing'}), "
        f"expected {_idx_list()}; {hint}"
    )


def _idx_variants(folder: Path, file: str) -> list[Path]:
    """The spellings of one file that exist in a folder, the unpacked one first."""
    stems = (file, file.replace("-idx", ".idx"))
    candidates = [folder / f"{stem}{suffix}" for suffix in ("", ".gz") for stem in stems]
    return [path for path in candidates if path.is_file()]


def _idx_file(name: str, folder: Path, file: str) -> Path:
    """One file of the four, or an error that says the set is incomplete."""
    found = _idx_variants(folder, file)
    if not found:
        raise DataError(f"{name}: {folder} lacks {file}[.gz], expected all of {_idx_list()}; {_hint(name)}")
    return found[0]


def _idx_list() -> str:
    return ", ".join(f"{file}[.gz]" for pair in _IDX_FILES for file in pair)


def _hint(name: str) -> str:
    """How to get the files."""
    folder = "name the folder with root=... (--data-root on the command line)"
    if name.startswith("fashion-mnist"):
        return f"on Debian or Ubuntu `apt-get install {FASHION_PACKAGE}` provides them, elsewhere {folder}"
    return folder


def _debian_folder(list_files: Callable[[], list[str]] | None = None) -> Path | None:
    """Where Debian's package put the files, as dpkg knows; ``None`` when it is not installed."""
    for line in (list_files or _dpkg_list)():
        path = Path(line)
        if path.name.startswith(_IDX_FILES[0][0]) and path.is_file():
            return path.parent
    return None


def _dpkg_list() -> list[str]:
    """The package's files; empty without the package, or without dpkg."""
    try:
        run = subprocess.run(["dpkg", "-L", FASHION_PACKAGE], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return run.stdout.splitlines() if run.returncode == 0 else []
