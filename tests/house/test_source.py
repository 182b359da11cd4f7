# SPDX-License-Identifier: Apache-2.0
"""Rules about the source text that no other tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cmake", ".sh", ".toml"}
MAX_LINES = 400


def tracked_files() -> list[Path]:
    """Files under version control, or outside a checkout the whole tree less what is built."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        names = [name for name in listing.stdout.split("\0") if name]
    else:
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if "build" not in p.parts and p.is_file()]
    return [path for name in names if (path := ROOT / name).is_file()]


def source_files() -> list[Path]:
    return [
        path for path in tracked_files() if path.suffix in SOURCE_SUFFIXES or path.name == "CMakeLists.txt"
    ]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_source_file_names_its_licence() -> None:
    line = "SPDX-License-Identifier: Apache-2.0"
    without = [shown(path) for path in source_files() if line not in path.read_text()[:200]]
    assert without == []


def test_no_source_file_is_long() -> None:
    long = {shown(p): n for p in source_files() if (n := p.read_text().count("\n")) > MAX_LINES}
    assert long == {}


def test_no_machine_paths() -> None:
    """No file holds a path that exists on one developer's machine only."""
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|opt/py)[\w-]*/")
    held = {}
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if path != Path(__file__) and (found := pattern.search(text)):
            held[shown(path)] = found[0]
    assert held == {}


def test_nothing_unfinished() -> None:
    marks = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX|NotImplemented" r"Error)\b")
    assert {shown(p) for p in source_files() if marks.search(p.read_text())} == set()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("fedpai_kernels", ("fedpai",)),
        ("fedpai_kernels/ops", ("fedpai", "fedpai_kernels.nn")),
        ("python/fedpai/models", ("fedpai.federation", "fedpai.methods", "fedpai.cli", "fedpai.report")),
        ("python/fedpai/data", ("fedpai_kernels", "fedpai.federation", "fedpai.methods", "fedpai.cli")),
    ],
)
def test_dependencies_point_downwards(package: str, forbidden: tuple[str, ...]) -> None:
    """A package knows what it stands on and nothing that stands on it."""
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            wrong += [
                f"{shown(path)}:{node.lineno} imports {name}"
                for name in names
                if any(name == f or name.startswith(f + ".") for f in forbidden)
            ]
    assert wrong == []


def test_kernels_need_only_torch_and_numpy() -> None:
    """Importing the kernel package must work with its two dependencies alone; its Triton kernels are imported late."""
    allowed = {"torch", "numpy", "fedpai_kernels"}
    late = ROOT / "fedpai_kernels" / "triton"
    stdlib = set(__import__("sys").stdlib_module_names)
    foreign = set()
    for path in (ROOT / "fedpai_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = {str(node.module).split(".")[0]}
            else:
                continue
            here = allowed | {"triton"} if late in path.parents else allowed
            foreign |= {f"{shown(path)}: {module}" for module in modules - here - stdlib}
    assert foreign == set()
