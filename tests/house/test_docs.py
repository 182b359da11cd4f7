# SPDX-License-Identifier: Apache-2.0
"""The documents speak of what exists, and their examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ENDINGS = r"py|pyi|md|cpp|h|cmake|toml|sh|txt|json|jsonl|csv|html|inc"
# What a run or a build makes, or a reader is to write.
MADE = re.compile(
    r"(runs|build|data|\.venv|dist)/.*|(config|profile|compare|machine)\.json|metrics\.jsonl|report\.html|\w+\.jsonl"
)


def existing_paths() -> list[str]:
    """Every file and folder of the repository, relative to it."""
    tops = ("lab", "csrc", "fedpai_kernels", "python", "benchmarks", "tests", "docs", "cmake", "tools", ".ci")
    inside = [path for top in tops for path in (ROOT / top).rglob("*")]
    return [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*"), ROOT / ".ci", *inside)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_mentions_only_existing_files(document: Path) -> None:
    """Every path in backticks, whole or its end, and every link exists; ``<op>`` stands for anything."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    mentioned = set(re.findall(rf"`([\w./<>*-]+\.(?:{ENDINGS})|[\w.<>*-]+/[\w./<>*-]*)`", text))
    linked = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    present = existing_paths()
    missing = [name for name in linked if name and not (document.parent / name).exists()]
    for name in sorted(mentioned):
        pattern = re.sub(r"<[^>]*>", "*", name).rstrip("/")
        found = any(fnmatch(path, pattern) or fnmatch(path, f"*/{pattern}") for path in present)
        if not found and not MADE.fullmatch(name):
            missing.append(name)
    assert missing == []


def test_map_lists_every_folder() -> None:
    """Each folder with source in it has its line in the map."""
    text = (ROOT / "docs" / "map.md").read_text()
    holders = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("csrc", "fedpai_kernels", "python/fedpai", "benchmarks", "cmake", "tools", "docs")
        for path in (ROOT / top).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cmake", ".sh", ".md", ".csv"}
    }
    assert sorted(folder for folder in holders if f"`{folder}/`" not in text) == []


def test_readme_example_runs() -> None:
    """The README's Python example, as it stands."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
