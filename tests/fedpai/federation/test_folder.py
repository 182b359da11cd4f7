# SPDX-License-Identifier: Apache-2.0
"""Run folders: interrupted runs end as uninterrupted ones, and nothing foreign or damaged is accepted."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedpai.data import Dataset
from fedpai.federation import checkpoint
from fedpai.federation.config import RunConfig
from fedpai.federation.feedback import RESIDUAL
from fedpai.federation.files import WriteError, append_line, write_atomic
from fedpai.federation.folder import FolderError, RunFolder, held
from fedpai.federation.progress import Progress
from fedpai.federation.runner import Run
from fedpai.methods import METHODS

Make = Callable[..., RunConfig]
Read = Callable[[Path], list[dict[str, Any]]]

CASES = {
    "fedavg": {"method": "fedavg"},
    "shared": {"method": "fedpai-u", "baseline": "fedavg", "criterion": "grasp"},
    "personal": {"method": "fedpai-u", "criterion": "snip", "mask_mode": "personal"},
    "random": {"method": "random"},
    "fedprox": {"method": "fedprox"},
    "local": {"method": "local"},
    "fedsparsify-global": {"method": "fedsparsify-global"},
    "fedsparsify-local": {"method": "fedsparsify-local"},
    "half": {"method": "fedpai-u", "criterion": "snip", "mask_mode": "personal", "wire": "bf16", "compress": "deflate"},
    "half-adjusting": {"method": "feddst", "adjust_every": 1, "server_opt": "avgm", "wire": "fp16"},
    "avgm": {"method": "random", "server_opt": "avgm"},
    "yogi": {"method": "fedpai-u", "criterion": "snip", "mask_mode": "personal", "server_opt": "yogi"},
    "channels": {"method": "fedpai-u", "criterion": "snip", "structure": "channel", "budget": "flops"},
    "fedpai-s": {"method": "fedpai-s", "mask_mode": "personal"},
    "feddst": {"method": "feddst", "adjust_every": 1},
    "spafl": {"method": "spafl", "threshold_penalty": 0.5},
    "ssfl": {"method": "ssfl"},
}


def start(path: Path, config: RunConfig, images: Dataset, progress: Progress | None = None) -> Run:
    run = Run(config, None, progress, data=images)
    run.folder = RunFolder.create(path, config)
    return run


def resume(path: Path, images: Dataset) -> Run:
    folder = RunFolder.reopen(path, {})
    return Run(folder.config, folder, data=images)


class StopAt(Progress):
    """Raises KeyboardInterrupt after so many training steps, as Ctrl-C would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, number: int, count: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(
    images: Dataset, tiny: Make, untimed: Read, tmp_path: Path, case: str
) -> None:
    config = tiny(**CASES[case], alpha=0.7, rounds=2)
    whole = tmp_path / "whole"
    start(whole, config, images).finish()
    for steps in (1, 14):
        cut = tmp_path / f"cut-{steps}"
        with pytest.raises(KeyboardInterrupt):
            start(cut, config, images, StopAt(steps)).finish()
        assert len(untimed(cut)) < len(untimed(whole))
        resume(cut, images).finish()
        assert untimed(cut) == untimed(whole)
        for name in config.arms:
            assert (whole / f"model-{name}.safetensors").exists() == METHODS[name].has_global
        names = [file.name for file in whole.glob("*.safetensors")]
        assert len(names) >= len(config.arms)
        for file in names:
            assert (cut / file).read_bytes() == (whole / file).read_bytes(), file


class Copies(Progress):
    """Copies the folder whenever a round is about to start: what an interruption in that round would leave."""

    def __init__(self, folder: Path, to: Path) -> None:
        self.folder, self.to = folder, to

    def round(self, method: str, number: int) -> None:
        shutil.copytree(self.folder, self.to / str(number))


SIXTEEN_BITS = {
    "fedsparsify-global": {"method": "fedsparsify-global"},
    "fedsparsify-local": {"method": "fedsparsify-local", "server_opt": "adam", "server_lr": 0.02},
    "personal": {"method": "fedpai-u", "criterion": "snip", "mask_mode": "personal"},
}


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("case", SIXTEEN_BITS)
def test_sixteen_bits_resumed_after_any_round(
    images: Dataset, tiny: Make, untimed: Read, tmp_path: Path, case: str, wire: str
) -> None:
    """Dense, after the first mask and after a tighter one, with residuals and momentum of clients under older masks."""
    config = tiny(
        **SIXTEEN_BITS[case], wire=wire, compress="deflate", alpha=0.7, clients=3, sample=2, rounds=4, max_images=20
    )
    whole, cuts = tmp_path / "whole", tmp_path / "cuts"
    start(whole, config, images, Copies(whole, cuts)).finish()
    names = sorted(file.name for file in whole.glob("*.safetensors"))
    assert names == [f"{kind}-{config.method}.safetensors" for kind in ("checkpoint", "model")]
    for number in range(config.rounds + 1):
        cut = cuts / str(number)
        assert len(RunFolder.reopen(cut, {}).rows()) == number
        run = resume(cut, images)
        assert run.arms[0].done == number - 1
        run.finish()
        assert untimed(cut) == untimed(whole)
        for name in names:
            assert (cut / name).read_bytes() == (whole / name).read_bytes(), (number, name)
    tensors = load_tensors((whole / names[0]).read_bytes())
    residuals = {key: tensor.size for key, tensor in tensors.items() if key.endswith(RESIDUAL)}
    assert len(residuals) == config.clients + 1
    assert all(tensors[key].any() for key in residuals)
    assert len(set(residuals.values())) > 1  # packed under masks of different sizes


def test_resuming_a_finished_run_changes_nothing(images: Dataset, tiny: Make, tmp_path: Path) -> None:
    config = tiny(rounds=1)
    start(tmp_path, config, images).finish()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    resume(tmp_path, images).finish()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_crash_between_row_and_checkpoint(
    images: Dataset, tiny: Make, untimed: Read, tmp_path: Path
) -> None:
    """The row of round 2 is there, its checkpoint is not, and the last line was cut off."""
    config = tiny(rounds=2)
    start(tmp_path / "whole", config, images).finish()
    run = start(tmp_path / "cut", config, images)
    arm = run.arms[0]
    run._round(arm, 0)
    run._round(arm, 1)
    rows = (tmp_path / "whole" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as stream:
        stream.write(rows[2] + rows[2][:40])
    (tmp_path / "cut" / "checkpoint-fedavg.safetensors.part").write_bytes(b"half")
    resume(tmp_path / "cut", images).finish()
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("*.part"))


def test_final_model_loads_into_the_dense_network(images: Dataset, tiny: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = start(tmp_path, tiny(method="random", rounds=1), images)
    run.finish()
    model = run.pool.plain(*run.arms[0].federation.server.dense())
    model.load_state_dict(load_file(tmp_path / "model-random.safetensors"), strict=True)


def test_an_existing_run_is_not_overwritten(images: Dataset, tiny: Make, tmp_path: Path) -> None:
    start(tmp_path, tiny(), images)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(FolderError, match=r"already holds a run.*--resume"):
        RunFolder.create(tmp_path, tiny(rounds=9))
    assert (tmp_path / "config.json").read_bytes() == before


def test_folders_that_are_none(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="is a file"):
        RunFolder.create(tmp_path / "file", tiny())
    with pytest.raises(FolderError, match="not empty and is no run folder"):
        RunFolder.create(tmp_path, tiny())
    with pytest.raises(FolderError, match=r"no run to resume"):
        RunFolder.reopen(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FolderError, match=r"config.json cannot be used"):
        RunFolder.reopen(tmp_path, {})
    (tmp_path / "config.json").write_text('{"rounds": 3}')
    with pytest.raises(FolderError, match=r"not a run configuration of this version: missing \['adjust_every'"):
        RunFolder.reopen(tmp_path, {})


def test_another_configuration_names_every_difference(images: Dataset, tiny: Make, tmp_path: Path) -> None:
    start(tmp_path, tiny(), images)
    with pytest.raises(FolderError) as error:
        RunFolder.reopen(tmp_path, {"lr": 0.5, "sample": 3, "model": "vgg11"})
    text = str(error.value)
    assert "lr: 0.05 in the folder, 0.5 asked for" in text
    assert "model: 'conv4' in the folder, 'vgg11' asked for" in text
    assert "sample" not in text


def test_the_data_may_have_moved(images: Dataset, tiny: Make, tmp_path: Path) -> None:
    start(tmp_path, tiny(), images)
    assert RunFolder.reopen(tmp_path, {"data_root": "elsewhere"}).config.data_root == "elsewhere"


@pytest.fixture
def finished(images: Dataset, tiny: Make, tmp_path: Path) -> Path:
    start(tmp_path / "run", tiny(method="random", rounds=1), images).finish()
    return tmp_path / "run"


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Changes a checkpoint and gives it a content digest that fits again."""
    file = folder / "checkpoint-random.safetensors"
    about, tensors = checkpoint._open(file.read_bytes())
    change(about, tensors)
    about["content"] = checkpoint._content_digest(tensors)
    file.write_bytes(save_tensors(tensors, metadata={"fedpai": json.dumps(about)}))


def test_damaged_checkpoints(images: Dataset, finished: Path) -> None:
    file = finished / "checkpoint-random.safetensors"
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-10] ^= 1
    for bad in (b"", good[:100], good[:-4], bytes(flipped), b"\xff" * 64, save_tensors({"a": np.zeros(2)})):
        file.write_bytes(bad)
        with pytest.raises(FolderError, match=r"checkpoint-random.safetensors: .*(damaged|not one of)"):
            resume(finished, images)


def test_checkpoint_of_another_model(images: Dataset, tiny: Make, tmp_path: Path, finished: Path) -> None:
    start(tmp_path / "wide", tiny(method="random", rounds=1, width=0.25), images).finish()
    name = "checkpoint-random.safetensors"
    (finished / name).write_bytes((tmp_path / "wide" / name).read_bytes())
    with pytest.raises(FolderError, match="another model: digest"):
        resume(finished, images)


def test_checkpoint_of_another_seed(images: Dataset, tiny: Make, tmp_path: Path, finished: Path) -> None:
    start(tmp_path / "seed", tiny(method="random", rounds=1, seed=8), images).finish()
    name = "checkpoint-random.safetensors"
    (finished / name).write_bytes((tmp_path / "seed" / name).read_bytes())
    with pytest.raises(FolderError, match="another configuration: seed: 8 in the folder, 0 asked for"):
        resume(finished, images)


def test_checkpoint_of_another_method(images: Dataset, finished: Path) -> None:
    rewrite(finished, lambda about, tensors: about.update(method="magnitude"))
    with pytest.raises(FolderError, match="is of method magnitude, expected random"):
        resume(finished, images)


def test_checkpoint_of_another_mask(images: Dataset, finished: Path) -> None:
    def move_one(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        positions = tensors["mask." + about["mask"]]
        free = np.setdiff1d(np.arange(positions[-1]), positions)
        positions[:] = np.sort(np.append(positions[1:], free[0]))

    rewrite(finished, move_one)
    with pytest.raises(FolderError, match="another mask: digest"):
        resume(finished, images)


def test_checkpoint_with_too_few_values(images: Dataset, finished: Path) -> None:
    def shorten(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["server.floats"] = tensors["server.floats"][1:].copy()

    rewrite(finished, shorten)
    with pytest.raises(FolderError, match=r"does not fit: expected \d+ float32 values"):
        resume(finished, images)


def test_checkpoint_holds_packed_values_only(finished: Path, images: Dataset) -> None:
    tensors = load_tensors((finished / "checkpoint-random.safetensors").read_bytes())
    run = resume(finished, images)
    mask = run.arms[0].federation.server.mask
    assert mask is not None
    assert tensors["server.floats"].size == run.layout.float_count(mask) < run.layout.weight_count


def test_metrics_that_are_damaged_or_missing(images: Dataset, finished: Path) -> None:
    file = finished / "metrics.jsonl"
    good = file.read_bytes()
    file.write_bytes(b"{broken\n" + good)
    with pytest.raises(FolderError, match="line 1 is damaged"):
        resume(finished, images)
    file.write_bytes(good.splitlines(keepends=True)[1])
    with pytest.raises(FolderError, match="lacks rounds of random"):
        resume(finished, images)


def test_folder_that_cannot_be_written(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FolderError, match=r"cannot write the run folder .*: Permission denied"):
        RunFolder.create(tmp_path / "new", tiny())


def test_a_full_disk_leaves_the_old_content_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "state"
    write_atomic(file, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=rf"^cannot write {file}: No space left on device$"):
        write_atomic(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert file.read_bytes() == b"old"
    with pytest.raises(WriteError, match=r"^cannot write .*rows: No space left on device$"):
        append_line(tmp_path / "rows", "{}")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    refused = rf"another process is at work in {path}; .*--resume"
    for _ in range(2):  # freed at the end of the block
        with held(path), pytest.raises(FolderError, match=refused), held(path):
            pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match=r"cannot write the folder .*file: "), held(tmp_path / "file"):
        pass
