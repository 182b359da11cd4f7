# SPDX-License-Identifier: Apache-2.0
"""The documents speak of what exists, and their examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENDINGS = r"py|pyi|md|cpp|h|cmake|toml|sh|txt|json|jsonl|csv|html|inc"
# Files that a run or a build makes, or that a reader is to write.
MADE = {"config.json", "metrics.jsonl", "report.html"}


def ids(document: Path) -> str:
    return document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_mentions_only_existing_files(document: Path) -> None:
    """Every path in backticks and every relative link exists; ``<op>`` and ``*`` stand for anything."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    mentioned = set(re.findall(rf"`([\w./<>*-]+\.(?:{ENDINGS})|[\w.<>*-]+/[\w./<>*-]*)`", text))
    linked = {
        target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target
    } - {""}
    missing = []
    for name in sorted(mentioned - MADE):
        pattern = re.sub(r"<[^>]*>", "*", name).rstrip("/")
        bases = (ROOT, ROOT / "fedpai_kernels", ROOT / "python", ROOT / "csrc", document.parent)
        if name.startswith(("runs", "build", "data", ".venv")) or any(
            any(base.glob(pattern)) for base in bases
        ):
            continue
        missing.append(name)
    missing += [name for name in sorted(linked) if not (document.parent / name).exists()]
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
