# SPDX-License-Identifier: Apache-2.0
"""`fedpai run` as a user meets it: results, mistakes, interruptions."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpai import cli, methods
from fedpai.cli import run as run_command
from fedpai.federation.config import PRESETS, ConfigError, RunConfig
from fedpai.federation.folder import held

ROOT = Path(__file__).parents[3]
Read = Callable[[Path], list[dict[str, Any]]]

TINY = [
    *("--model", "conv4", "--width", "0.125", "--data", "synthetic-gray", "--clients", "3", "--rounds", "2"),
    *("--batch", "16", "--max-images", "32", "--eval-images", "40", "--threads", "1", "--no-profile"),
]


def test_method_against_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows_file = tmp_path / "run", tmp_path / "rows.jsonl"
    arguments = ["run", "--method", "fedpai-u", "--baseline", "fedavg", "--sparsity", "0.9", *TINY]
    arguments.remove("--no-profile")
    assert cli.main([*arguments, "--out", str(out), "--json", str(rows_file)]) == 0
    printed, progress = capsys.readouterr()
    assert "fedpai-u against fedavg, 2 rounds each:" in printed
    for words in ("accuracy", "compute per training step", "bytes up, per round", "report.html"):
        assert words in printed
    assert progress.count("round   2") == 2
    names = {file.name for file in out.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "profile.json", "report.html"),
        *(
            f"{kind}-{name}.safetensors"
            for kind in ("model", "checkpoint")
            for name in ("fedpai-u", "fedavg")
        ),
    }
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rounds = [line for line in lines if line["row"] == "round"]
    assert [(row["method"], row["round"]) for row in rounds] == [
        (name, number) for number in range(3) for name in ("fedpai-u", "fedavg")
    ]
    (ratios,) = [line for line in lines if line["row"] == "ratios"]
    sent = {
        name: sum(row["bytes_up"] for row in rounds[2:] if row["method"] == name)
        for name in ("fedpai-u", "fedavg")
    }
    assert ratios["uplink"] == pytest.approx(sent["fedpai-u"] / sent["fedavg"])
    assert ratios["compute_per_step"] > 0
    layers = [line for line in lines if line["row"] == "layer"]
    assert len(layers) == 7
    assert all(layer["dense_ms"] > 0 and layer["sparse_ms"] > 0 and layer["reason"] for layer in layers)


def test_structure_and_budget_are_recorded(tmp_path: Path) -> None:
    words = ["--method", "magnitude", "--structure", "4x1", "--budget", "flops", "--sparsity", "0.9"]
    assert cli.main(["run", *words, *TINY, "--rounds", "1", "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["structure"], config["budget"]) == ("4x1", "flops")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "fedbest"],
            f"unknown --method 'fedbest', expected one of: {', '.join(methods.names())}",
        ),
        (["--baseline", "nope"], "unknown --method 'nope', expected one of: fedavg"),
        (["--model", "resnet19"], "--model resnet19: unknown model 'resnet19', expected one of conv4"),
        (
            ["--data", "imagenet"],
            "unknown --data 'imagenet', expected one of: cifar10, cifar100, fashion-mnist",
        ),
        (
            ["--criterion", "synflow", "--model", "vit-tiny"],
            "--criterion synflow: --model vit-tiny has a LayerNorm (blocks.0.norm1), whose outputs are no",
        ),
        (["--model", "mlp", "--width", "1e9"], "--width 1000000000.0: a mlp of so many times its channels does not"),
        (["--criterion", "best"], "unknown --criterion 'best', expected one of: erk, grasp"),
        (["--mask-mode", "both"], "unknown --mask-mode 'both', expected one of: shared, personal"),
        (["--preset", "huge"], "unknown --preset 'huge', expected one of: demo, smoke"),
        (
            ["--dense-format", "nchw"],
            "unknown --dense-format 'nchw', expected one of: channels_last, contiguous",
        ),
        (["--method", "fedavg", "--criterion", "snip"], "--criterion means nothing to fedavg"),
        (["--allocation", "layer"], "--allocation: got 'layer', expected one of global, uniform, erk, flops, time"),
        (["--method", "fedavg", "--allocation", "time"], "--allocation means nothing to fedavg"),
        (["--method", "random", "--mask-mode", "personal"], "--mask-mode means nothing to random"),
        (["--method", "fedpai-s", "--structure", "16x1"], "--structure means nothing to fedpai-s"),
        (["--method", "ssfl", "--criterion", "snip"], "--criterion means nothing to ssfl"),
        (["--method", "spafl", "--sparsity", "0.9"], "--sparsity means nothing to spafl"),
        (["--threshold-penalty", "1"], "--threshold-penalty means nothing to fedpai-u"),
        (
            ["--method", "spafl", "--threshold-penalty", "-1"],
            "--threshold-penalty must lie in [0.0, inf), got -1.0",
        ),
        (["--method", "feddst", "--adjust-rate", "1"], "--adjust-rate must lie in [0.0, 1.0), got 1.0"),
        (
            ["--method", "feddst", "--adjust-every", "0"],
            "--adjust-every must be a whole number of at least 1, got 0",
        ),
        (
            ["--structure", "0x4"],
            "--structure: got '0x4', expected 'weight', a block such as '16x1' or '8x8-taps'",
        ),
        (
            ["--structure", "512x1"],
            "--structure 512x1: structure: a block of 512x1 is larger than every layer",
        ),
        (["--structure", "2:4"], "--sparsity 0.98: sparsity: got 0.98, but structure 2:4 removes 0.5"),
        (
            ["--structure", "channel", "--sparsity", "0.9999"],
            "--sparsity 0.9999: sparsity: 0.9999 keeps 4 of 38216, less than the 111 of one",
        ),
        (["--budget", "time"], "unknown --budget 'time', expected one of: weights, flops"),
        (["--method", "fedavg", "--structure", "16x1"], "--structure means nothing to fedavg"),
        (["--baseline", "fedpai-u"], "--baseline fedpai-u is the method itself"),
        (["--sparsity", "1.0"], "--sparsity must lie in [0.0, 1.0), got 1.0"),
        (["--sparsity", "nan"], "--sparsity must lie in [0.0, 1.0), got nan"),
        (["--lr", "-1"], "--lr must be a positive number, got -1.0"),
        (["--lr", "inf"], "--lr must be a positive number, got inf"),
        (["--threads", "100000"], "--threads must be at most 1024, got 100000"),
        (["--rounds", "0"], "--rounds must be a whole number of at least 1, got 0"),
        (["--batch", "1"], "--batch must be a whole number of at least 2, got 1"),
        (["--sample", "4"], "--sample 4 is more than the 3 clients there are"),
        (["--clients", "100000"], "--clients 100000: num_partitions"),
        (["--alpha", "0"], "--alpha must be a positive number, got 0.0"),
        (["--data", "cifar10"], "cifar10: needs a data folder"),
        (["--data", "cifar10", "--data-root", "/nowhere"], "cifar10: /nowhere"),
        (["--data-root", "/nowhere"], "--data synthetic-gray: root"),
        (["--resume"], "--resume needs --out DIR"),
        (["--resume", "--out", "/nowhere/run"], "/nowhere/run holds no run to resume"),
        (
            ["--json", "/nowhere/rows.jsonl"],
            "--json /nowhere/rows.jsonl: /nowhere is no folder that can be written",
        ),
        (["--uplink", "1MB/s"], "--uplink needs --downlink as well"),
        (["--downlink", "1MB/s"], "--downlink needs --uplink as well"),
        (["--device-slowdown", "2"], "--device-slowdown means nothing without --uplink and --downlink"),
        (["--target-accuracy", "0.5"], "--target-accuracy means nothing without --uplink and --downlink"),
        (["--uplink", "1", "--downlink", "1MB/s"], "argument --uplink: got '1', expected a positive rate"),
        (["--sample", "1.5"], "a share of clients must lie in (0, 1], got 1.5"),
        (["--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["run", *TINY, *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fedpai")
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == [], "a mistake leaves no run folder"


def test_existing_folder_without_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--method", "fedavg", *TINY, "--rounds", "1", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert cli.main([*arguments, "--rounds", "2"]) == 2
    assert "already holds a run; go on with it by --resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "--lr", "0.1", "--seed", "3"]) == 2
    error = capsys.readouterr().err
    assert "lr: 0.05 in the folder, 0.1 asked for" in error
    assert "seed: 0 in the folder, 3 asked for" in error
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_resume_of_a_finished_run_reports_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--method", "fedavg", *TINY, "--rounds", "1", "--out", str(tmp_path)]) == 0
    (tmp_path / "report.html").unlink()
    assert cli.main(["run", "--resume", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
    assert "fedavg" in capsys.readouterr().out


def test_a_disk_that_fills_up(
    tmp_path: Path, untimed: Read, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Says which file, and goes on from the last round when there is room again."""
    settings = ["run", "--method", "fedavg", *TINY, "--rounds", "2"]
    cut, whole, flush = tmp_path / "cut", tmp_path / "whole", os.fsync

    def full(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith("checkpoint-fedavg.safetensors.part") and len(untimed(cut)) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main([*settings, "--out", str(cut)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"fedpai: cannot write {cut / 'checkpoint-fedavg.safetensors'}: No space left on device"
    monkeypatch.undo()
    assert cli.main(["run", "--resume", "--no-profile", "--out", str(cut)]) == 0
    assert cli.main([*settings, "--out", str(whole)]) == 0
    assert untimed(cut) == untimed(whole)


def test_a_run_that_another_process_is_at_work_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two would mix their rows, and the folder could not be resumed."""
    new = ["run", "--method", "fedavg", *TINY, "--rounds", "1", "--out", str(tmp_path)]
    with held(tmp_path):
        assert cli.main(new) == 2
    assert f"another process is at work in {tmp_path}" in capsys.readouterr().err
    assert cli.main(new) == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with held(tmp_path):
        assert cli.main(["run", "--resume", "--out", str(tmp_path)]) == 2
    assert f"another process is at work in {tmp_path}" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_link_given_afterwards_changes_the_report_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--method", "fedavg", *TINY, "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert "over a link" not in capsys.readouterr().out
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.name != "report.html"}
    link = ["--uplink", "1KB/s", "--downlink", "80Kbit/s", "--device-slowdown", "3", "--target-accuracy", "0.9999"]
    assert cli.main(["run", "--resume", "--out", str(tmp_path), *link]) == 0
    printed = capsys.readouterr().out
    assert "over a link of 1 KB/s up, 10 KB/s down, devices 3 x slower than this machine" in printed
    assert "s in all; 99.99 % not reached" in printed
    assert {file: file.read_bytes() for file in before} == before


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from fedpai.cli import main; sys.exit(main())",
            "run",
            *arguments,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job has SIGINT ignored, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupted(settings: list[str], out: Path, number: signal.Signals) -> None:
    """Starts a run, sends it a signal once a round is done, and checks how it stops."""
    process = start([*settings, "--out", str(out)])
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"go on with: fedpai run --resume --out {out}" in errors


@pytest.mark.alone
def test_ctrl_c_in_the_middle_of_a_round(tmp_path: Path, untimed: Read) -> None:
    """Stops cleanly, says how to go on, and then ends bit for bit as an uninterrupted run."""
    settings = ["--method", "fedpai-u", "--sparsity", "0.9", *TINY, "--max-images", "128", "--rounds", "4"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    interrupted(settings, cut, signal.SIGINT)
    assert 2 <= len(untimed(cut)) < 5
    assert cli.main(["run", "--resume", "--out", str(cut), "--no-profile"]) == 0
    assert cli.main(["run", *settings, "--out", str(whole)]) == 0
    assert untimed(cut) == untimed(whole)
    for file in ("model-fedpai-u.safetensors", "checkpoint-fedpai-u.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_being_terminated_is_like_ctrl_c(tmp_path: Path) -> None:
    interrupted(["--method", "fedavg", *TINY, "--rounds", "500"], tmp_path / "run", signal.SIGTERM)


def test_sample_as_a_share_and_by_default() -> None:
    parse = cli.build_parser().parse_args
    for words, expected in (
        ([], 7),
        (["--sample", "3"], 3),
        (["--sample", "0.3"], 2),
        (["--sample", "1.0"], 7),
    ):
        given = vars(parse(["run", "--clients", "7", *words]))
        asked = run_command.settings(run_command.explicit_settings(given), None)
        assert RunConfig(**asked).sample == expected


def test_a_resumed_run_keeps_its_sample() -> None:
    parse = cli.build_parser().parse_args
    for words, expected in (
        (["--clients", "7"], {"clients": 7}),
        (["--sample", "3"], {"sample": 3}),
        (["--clients", "7", "--sample", "0.3"], {"clients": 7, "sample": 2}),
    ):
        explicit = run_command.explicit_settings(vars(parse(["run", "--resume", *words])))
        assert run_command.settings(explicit, None, resume=True) == expected
    with pytest.raises(ConfigError, match=r"--sample 0\.3: to resume, give the number of clients"):
        run_command.settings({"sample": 0.3}, None, resume=True)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_can_be_overridden(name: str) -> None:
    given = vars(
        cli.build_parser().parse_args(["run", "--preset", name, "--rounds", "99", "--eval-images", "0"])
    )
    explicit = run_command.explicit_settings(given)
    config = run_command.configure(run_command.settings(explicit, name), explicit)
    assert (config.rounds, config.eval_images) == (99, None)
    assert (config.method, config.baseline) == ("fedpai-u", "fedavg")


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    assert run_command._next_free(tmp_path) == tmp_path / "001"
    (tmp_path / "001").mkdir()
    assert run_command._next_free(tmp_path) == tmp_path / "002"
