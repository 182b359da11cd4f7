# SPDX-License-Identifier: Apache-2.0
"""CIFAR in all published forms, with small files written here; damage and hostile pickles."""

import dataclasses
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fedpai import data
from fedpai.data import DataError, cifar, loading

SMALL = {
    "cifar10": dataclasses.replace(cifar.CIFAR10, train_rows=4, test_rows=3),
    "cifar100": dataclasses.replace(cifar.CIFAR100, train_rows=5, test_rows=3),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CIFAR10", SMALL["cifar10"])
    monkeypatch.setattr(loading, "CIFAR100", SMALL["cifar100"])


def write(folder: Path, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Write a small set; returns all training pixels (N, 3072) and labels."""
    layout = SMALL[name]
    form = getattr(layout, kind)
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = [], []
    for file in (*form.train, form.test):
        rows = layout.test_rows if file == form.test else layout.train_rows
        x = rng.integers(0, 256, (rows, cifar.PIXELS), np.uint8)
        y = rng.integers(0, layout.num_classes, rows)
        if kind == "binary":
            coarse = np.full((rows, layout.label_bytes - 1), 99, np.uint8)
            (folder / file).write_bytes(np.hstack([coarse, y[:, None].astype(np.uint8), x]).tobytes())
        else:
            batch = {b"data": x, layout.label_key.encode(): [int(v) for v in y], b"batch_label": b"a batch"}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
        if file != form.test:
            pixels.append(x)
            labels.append(y)
    return np.concatenate(pixels), np.concatenate(labels)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kind", ["python", "binary"])
@pytest.mark.parametrize("where", ["itself", "parent", "archive", "archive_parent"])
def test_round_trip(tmp_path: Path, name: str, kind: str, where: str) -> None:
    form = getattr(SMALL[name], kind)
    folder = tmp_path / "unpacked" / form.folder
    pixels, labels = write(folder, name, kind)
    archive = tmp_path / "packed" / form.archive
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, form.folder)
    roots = {"itself": folder, "parent": folder.parent, "archive": archive, "archive_parent": archive.parent}
    loaded = data.load(name, roots[where])
    assert loaded.image_shape == (3, 32, 32)
    assert np.array_equal(loaded.train_images.flatten(1), pixels)
    assert np.array_equal(loaded.train_labels, labels)
    assert len(loaded.test_images) == 3
    assert data.load(name, str(roots[where]), image_size=40).image_shape == (3, 40, 40)


def test_string_keys_of_python_3(tmp_path: Path) -> None:
    pixels, _ = write(tmp_path, "cifar10", "python")
    for path in tmp_path.iterdir():
        batch = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps({k.decode(): v for k, v in batch.items()}, protocol=2))
    assert np.array_equal(data.load("cifar10", tmp_path).train_images.flatten(1), pixels)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_hostile_pickle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", "cifar10", "python")
    marker = tmp_path / "marker"
    batch = tmp_path / "set" / "data_batch_2"
    batch.write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(DataError, match=r"data_batch_2: .*refused to load posix\.mkdir"):
        data.load("cifar10", tmp_path / "set")
    assert not marker.exists()


def dump(**changes: object) -> bytes:
    batch = {"data": np.zeros((4, cifar.PIXELS), np.uint8), "labels": [0, 1, 2, 3], **changes}
    return pickle.dumps({key: value for key, value in batch.items() if value is not None}, protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dump()[:5000], "not a readable CIFAR pickle .*5000 bytes"),
        (b"", r"not a readable CIFAR pickle \(EOFError"),
        (b"<html>", "not a readable CIFAR pickle"),
        (pickle.dumps([1, 2], protocol=2), "holds a list, expected a dict"),
        (dump(data=None), "'data' is NoneType"),
        (
            dump(data=np.zeros((3, cifar.PIXELS), np.uint8)),
            r"'data' is uint8 \(3, 3072\), expected uint8 \(4, 3072\)",
        ),
        (dump(data=np.zeros((4, cifar.PIXELS), np.float32)), "'data' is float32"),
        (dump(labels=[0, 1]), "'labels' is list of 2, expected a list of 4 integers"),
        (dump(labels=[0, 1, 2, "3"]), "expected a list of 4 integers"),
        (dump(labels=None, fine_labels=[0, 0, 0, 0]), r"keys present: data, fine_labels"),
        (dump(labels=[0, 1, 2, 10]), "labels run from 0 to 10, expected 0 to 9; another data set"),
    ],
)
def test_damaged_pickle(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, "cifar10", "python")
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.load("cifar10", tmp_path)
    assert str(tmp_path / "data_batch_3") in str(caught.value)


def test_truncated_binary(tmp_path: Path) -> None:
    write(tmp_path, "cifar100", "binary")
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[: 2 * 3074])
    with pytest.raises(DataError, match=r"train\.bin: 6148 bytes, expected 5 rows of 3074 = 15370 bytes"):
        data.load("cifar100", tmp_path)


def test_real_sizes_are_demanded() -> None:
    assert (cifar.CIFAR10.train_rows * len(cifar.CIFAR10.binary.train), cifar.CIFAR10.test_rows) == (
        50_000,
        10_000,
    )
    assert (cifar.CIFAR100.train_rows, cifar.CIFAR100.test_rows) == (50_000, 10_000)


def test_missing_batches(tmp_path: Path) -> None:
    write(tmp_path, "cifar10", "binary")
    (tmp_path / "data_batch_4.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_4\.bin, test_batch\.bin, expected all of"):
        data.load("cifar10", tmp_path)


def test_truncated_archive(tmp_path: Path) -> None:
    write(tmp_path / "files", "cifar10", "python")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "files", "cifar-10-batches-py")
    archive.write_bytes(archive.read_bytes()[:20_000])
    for root in (archive, tmp_path):
        with pytest.raises(
            DataError, match=r"cifar-10-python\.tar\.gz: not a complete tar archive .*20000 bytes"
        ):
            data.load("cifar10", root)


@pytest.mark.parametrize("level", [0, 6])
def test_damaged_archive(tmp_path: Path, level: int) -> None:
    """One byte of a pixel: tar itself has no checksum of contents, but gzip has."""
    write(tmp_path / "files", "cifar100", "binary")
    archive = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=level) as tar:
        tar.add(tmp_path / "files", "cifar-100-binary")
    assert len(data.load("cifar100", archive)) == 5
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    archive.write_bytes(damaged)
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz: not a complete tar archive .*fetch it again"):
        data.load("cifar100", archive)


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a data folder"):
        data.load("cifar10")
    with pytest.raises(
        DataError, match=r"none does not exist, expected a folder with cifar-10-binary\.tar\.gz"
    ):
        data.load("cifar10", tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds notes\.txt, expected a folder"):
        data.load("cifar100", tmp_path)
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "notes.txt", "notes.txt")
    with pytest.raises(DataError, match="holds no cifar10 files"):
        data.load("cifar10", tmp_path / "other.tar")
