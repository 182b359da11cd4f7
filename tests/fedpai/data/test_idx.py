# SPDX-License-Identifier: Apache-2.0
"""The IDX reader and the MNIST family: round trips with files written here, and every kind of damage."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpai import data
from fedpai.data import DataError, loading
from fedpai.data.idx import read_idx

FILES = {
    "train-images-idx3-ubyte": (7, 28, 28),
    "train-labels-idx1-ubyte": (7,),
    "t10k-images-idx3-ubyte": (3, 28, 28),
    "t10k-labels-idx1-ubyte": (3,),
}


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(folder: Path, compress: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {n: rng.integers(0, 10 if len(s) == 1 else 256, s, np.uint8) for n, s in FILES.items()}
    for name, array in arrays.items():
        content = idx_bytes(array)
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    return arrays


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("sub", ["", "fashion-mnist", "FashionMNIST/raw"])
def test_round_trip(tmp_path: Path, compress: bool, sub: str) -> None:
    arrays = write_set(tmp_path / sub, compress)
    native = data.load("fashion-mnist", tmp_path, image_size=None)
    assert native.name == "fashion-mnist"
    assert native.image_shape == (1, 28, 28)
    assert np.array_equal(native.train_images[:, 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(native.test_labels, arrays["t10k-labels-idx1-ubyte"])
    padded = data.load("fashion-mnist", tmp_path)
    assert padded.image_shape == (1, 32, 32)
    assert torch.equal(padded.test_images[:, :, 2:30, 2:30], native.test_images)
    assert padded.test_images.sum() == native.test_images.sum()
    odd = data.load("fashion-mnist", tmp_path, image_size=31)
    assert torch.equal(odd.test_images[:, :, 1:29, 1:29], native.test_images)
    small = data.load("fashion-mnist-28", tmp_path)
    assert small.name == "fashion-mnist-28"
    assert torch.equal(small.train_images, native.train_images)


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_relatives_and_dotted_names(tmp_path: Path, name: str) -> None:
    write_set(tmp_path, compress=False)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert len(data.load(name, tmp_path)) == 7


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """Damage the stored checksum of a gzip file (its last eight bytes hold checksum and length)."""
    return content[:-8] + bytes((content[-8] ^ 0xFF,)) + content[-7:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"gzip stream stops in the middle \(\d+ bytes on disk\)"),
        (flip, "damaged gzip stream .*CRC"),
        (
            lambda c: c[:20] + b"\xff\xff\xff\xff" + c[24:],
            "damaged gzip stream|stops in the middle|the header",
        ),
        (lambda _: b"", r"starts with bytes \(none\), expected 00 00 08 03"),
        (lambda _: b"<!DOCTYPE html>", "an HTML or XML page, not data"),
        (
            lambda c: truncate(gzip.decompress(c)),
            r"the header promises 7 x 28 x 28 = 5488 bytes, the file holds 2736",
        ),
        (lambda c: gzip.compress(gzip.decompress(c)[:-1]), "5488 bytes, the file holds 5487"),
        (lambda c: gzip.decompress(c) + b"x", "5488 bytes, the file holds more"),
        (lambda c: gzip.decompress(c)[:9], "ends inside its header"),
        (lambda _: idx_bytes(np.zeros(7, np.uint8)), "IDX with 1 dimension: images and labels swapped"),
        (lambda c: b"\x00\x00\x0d\x03" + gzip.decompress(c)[4:], "starts with bytes 00 00 0d 03, expected"),
        (lambda _: b"\x00\x00\x08\x03" + b"\xff" * 12, "the header promises .* the file holds 0"),
    ],
)
def test_damaged_file(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    write_set(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        data.load("fashion-mnist", tmp_path)
    assert str(path) in str(caught.value)


def test_half_downloaded_set(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DataError, match=r"lacks t10k-labels-idx1-ubyte\[\.gz\], expected all of .*apt-get install"
    ):
        data.load("fashion-mnist", tmp_path)


def test_files_of_two_downloads(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.zeros(6, np.uint8)))
    with pytest.raises(DataError, match=r"7 images but .* 6 labels"):
        data.load("fashion-mnist", tmp_path)


def test_label_out_of_range(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.array([1, 26, 3], np.uint8)))
    with pytest.raises(DataError, match="test labels run from 1 to 26, expected 0 to 9"):
        data.load("fashion-mnist", tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere does not exist, expected .*train-images.*dataset-fashion-mnist"
    ):
        data.load("fashion-mnist", tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file is a file, expected a folder"):
        data.load("mnist", tmp_path / "file")
    with pytest.raises(DataError, match=r"holds none of the files \(found file\)"):
        data.load("mnist", tmp_path)


def test_absent_package_is_an_error_and_never_synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_dpkg_list", list)
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*--data-root"):
        data.load("fashion-mnist")


def test_without_dpkg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="none installed"):
        data.load("fashion-mnist")


def test_package_folder_is_found_through_dpkg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_set(tmp_path / "datasets")
    listed = [str(tmp_path), *(str(tmp_path / "datasets" / f"{name}.gz") for name in FILES)]
    monkeypatch.setattr(loading, "_dpkg_list", lambda: listed)
    assert len(data.load("fashion-mnist")) == len(data.load("fashion-mnist-28")) == 7


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fashion"}, "name: unknown data set 'fashion', expected one of .*fashion-mnist"),
        ({"name": "fashion-mnist", "image_size": 0}, "image_size: got 0"),
        ({"name": "mnist"}, "no data folder given"),
        ({"name": "synthetic", "root": "somewhere"}, "root: got 'somewhere', but synthetic is generated"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def test_image_size_below_the_files(tmp_path: Path) -> None:
    write_set(tmp_path)
    with pytest.raises(ValueError, match="image_size: got 20, expected at least 28"):
        data.load("mnist", tmp_path, image_size=20)
