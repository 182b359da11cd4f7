# SPDX-License-Identifier: Apache-2.0
"""The script that records the CUDA kernels' registers reads what ptxas prints, spills above all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

PRINTED = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_90'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers, 8192 bytes smem
ptxas info    : Compile time = 405.914 ms
ptxas info    : Compiling entry function '_Z3badv' for 'sm_80'
ptxas info    : Function properties for _Z3badv
    32 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 32 bytes cumulative stack size, 400 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def registers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_registers", ROOT / "tools" / "cuda_registers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reads_what_ptxas_prints(registers: ModuleType) -> None:
    assert registers.parse(PRINTED) == [
        ("_Z4goodv", "90", 56, 8192, 0, 0),
        ("_Z3badv", "80", 64, 0, 32, 52),
    ]
    with pytest.raises(ValueError, match="_Z3badv"):
        registers.parse(PRINTED.replace("Used 64", "used 64"))


def test_spills_fail(
    registers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = [kernel._replace(name=name, architecture=a) for kernel in registers.parse(PRINTED)
               for name in [kernel.name] for a in ("80", "90")]  # fmt: skip
    monkeypatch.setattr(registers.shutil, "which", lambda name: name)
    monkeypatch.setattr(registers, "version_of", lambda nvcc: "0.0")
    document = tmp_path / "gpu.md"
    document.write_text(f"before\n{registers.BEGIN}\nold\n{registers.END}\nafter\n")

    monkeypatch.setattr(registers, "compile_all", lambda nvcc: kernels)
    assert registers.main(["--write", str(document)]) == 1
    assert "_Z3badv for sm_80: 52 bytes spilled, 32 bytes of stack" in capsys.readouterr().err
    written = document.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "| `_Z4goodv` | 56 | 56 | 8192 | 0 |" in written
    assert "old" not in written

    monkeypatch.setattr(registers, "compile_all", lambda nvcc: kernels[:2])
    assert registers.main([]) == 0
    monkeypatch.setattr(registers, "compile_all", lambda nvcc: [])
    assert registers.main([]) == 1


def test_names_stand_as_in_the_sources(registers: ModuleType) -> None:
    """Without namespaces, and without the types of what is counted."""
    if registers.shutil.which("c++filt") is None:
        pytest.skip("there is no c++filt")
    step = "_ZN6fedpai4cuda12_GLOBAL__N_114aggregate_stepILNS_10ServerStepE2ELi4EEEvNS0_14ServerStepArgsE"
    assert registers.readable([step]) == {step: "aggregate_step<2, 4>"}
