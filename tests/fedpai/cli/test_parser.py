# SPDX-License-Identifier: Apache-2.0
"""The parser alone: all commands there, and nothing heavy imported to show a help text or to examine a broken torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedpai import cli

ROOT = Path(__file__).parents[3]


def test_parsing_imports_no_torch() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from fedpai.cli import build_parser; build_parser(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(ROOT / "python")], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "words", [["--help"], *([command, "--help"] for command in ("run", "compare", "bench", "tune", "doctor"))]
)
def test_help_of_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    assert "usage: fedpai" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("fedpai-kernels 0.")


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "invalid choice: 'train'" in line
