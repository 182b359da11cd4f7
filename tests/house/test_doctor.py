# SPDX-License-Identifier: Apache-2.0
"""``fedpai doctor`` on a healthy installation and on broken ones."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedpai.data
from fedpai.cli import doctor
from fedpai_kernels import tuning


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    return parser.parse_args(["doctor", *words])


def test_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "doctor.json"
    parsed = arguments("--json", str(file))
    assert parsed.run(parsed) == 0
    printed = capsys.readouterr().out
    findings = {finding["topic"]: finding for finding in json.loads(file.read_text())}
    assert all(topic in printed for topic in findings)
    assert findings["kernels"]["facts"]["chosen"] in findings["kernels"]["facts"]["available"]
    assert findings["arithmetic"]["facts"] == {"equal": True}
    assert "BROKEN" not in printed


def test_unusable_instruction_set() -> None:
    """What FEDPAI_ISA breaks is said, with the way out, and the exit status tells."""
    program = "import sys; from fedpai.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"FEDPAI_ISA": "avx1024"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "unset FEDPAI_ISA" in done.stdout
    assert "Traceback" not in done.stderr
    assert "arithmetic" not in done.stdout, "what rests on something broken is not worth a line"


def test_memory_cache_of_the_environment() -> None:
    """Off is said; a value that means nothing is said with the way out."""
    program = "import sys; from fedpai.cli import main; sys.exit(main(['doctor']))"
    for value, words in (("0", "memory cache off"), ("off", "unset FEDPAI_MEMORY_CACHE")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"FEDPAI_MEMORY_CACHE": value},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert words in done.stdout, done.stderr


def test_by_which_figures_kernels_are_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPAI_TUNING", "off")
    assert "built in, as FEDPAI_TUNING is off" in doctor._choice().text
    assert (doctor._choice().state, doctor._choice().remedy) == ("ok", "")

    monkeypatch.delenv("FEDPAI_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (doctor._choice().state, doctor._choice().remedy) == ("ok", "fedpai tune measures those of this machine")

    path = tuning.default_path()
    tuning.write(path, tuning.BreakEvens(0.9, 0.7, 0.6, 0.25, 1.0, 0.5, 100, "any"), {})
    assert (doctor._choice().state, doctor._choice().remedy) == ("ok", "")
    assert "measured on this machine: conv2d 0.9, strided 0.7" in doctor._choice().text
    assert doctor._choice().facts["path"] == str(path)

    path.write_text("{")
    assert (doctor._choice().state, doctor._choice().remedy) == ("note", "fedpai tune")
    assert f"{path} is damaged" in doctor._choice().text

    monkeypatch.setenv("FEDPAI_TUNING", str(path))
    assert doctor._choice().state == "broken"
    assert "unset FEDPAI_TUNING" in doctor._choice().remedy


def test_missing_data_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, root: Path | None = None) -> None:
        raise fedpai.data.DataError("no files")

    monkeypatch.setattr(fedpai.data, "load", refuse)
    findings = {finding.topic: finding for finding in doctor.examine()}
    assert (findings["data"].state, findings["data"].remedy) == ("note", "make data")


def test_an_examination_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, str]:
        raise OSError("unreadable")

    monkeypatch.setattr(doctor, "_cpu_caches", fail)
    findings = {finding.topic: finding for finding in doctor.examine()}
    assert findings["system"].state == "broken"
    assert "unreadable" in findings["system"].text
    assert findings["torch"].state == "ok"


def test_unwritable_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = arguments("--json", str(tmp_path / "absent" / "doctor.json"))
    assert parsed.run(parsed) == 2
    assert "doctor.json" in capsys.readouterr().err


def test_counts_openmp_runtimes() -> None:
    maps = "\n".join(
        [
            "7f00-7f01 r-xp 00000000 08:01 11 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
            "7f01-7f02 r--p 00001000 08:01 11 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0",
            "7f02-7f03 r-xp 00000000 08:01 12 /opt/a folder/libgomp-e985bcbb.so.1.0.0",
            "7f03-7f04 r-xp 00000000 08:01 13 /usr/lib/libiomp5.so",
            "7f04-7f05 r-xp 00000000 08:01 14 /usr/lib/x86_64-linux-gnu/libc.so.6",
            "7f05-7f06 rw-p 00000000 00:00 0 ",
        ]
    )
    assert [Path(path).name for path in doctor.openmp_libraries(maps)] == [
        "libgomp-e985bcbb.so.1.0.0",
        "libiomp5.so",
        "libgomp.so.1.0.0",
    ]
