# SPDX-License-Identifier: Apache-2.0
"""What is asked for and cannot be: Triton absent, tensors on the wrong device, arguments that do not fit."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedpai_kernels import Plan
from fedpai_kernels.triton import block_conv2d, block_linear
from tests.triton.checking import INTERPRETED, needs_kernels, needs_triton

ROOT = Path(__file__).resolve().parents[2]


def linear() -> tuple[torch.Tensor, torch.Tensor, Plan]:
    plan = Plan.from_mask(torch.ones(16, 32, dtype=torch.bool))
    return torch.randn(4, 32), torch.randn(plan.nnz), plan


def test_the_package_does_not_import_triton() -> None:
    program = "import sys, fedpai_kernels, fedpai_kernels.triton; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", "import torch, sys; print('triton' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    if done.stdout.strip() == "True":
        pytest.skip("torch itself imports Triton here")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    with pytest.raises(RuntimeError, match=r"not installed; `pip install 'fedpai-kernels\[triton\]'`"):
        block_linear(*linear())


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_on_a_cpu_without_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"expected a CUDA tensor, got one on cpu\..* set TRITON_INTERPRET=1"):
        block_linear(*linear())


@needs_triton
def test_the_meta_device_has_no_kernels() -> None:
    x, values, plan = linear()
    with pytest.raises(ValueError, match=r"got (one|a tensor) on meta"):
        block_linear(x.to("meta"), values.to("meta"), plan)


def test_dtypes_without_kernels() -> None:
    x, values, plan = linear()
    with pytest.raises(TypeError, match=r"expected dtype torch\.float32, torch\.float16 or torch\.bfloat16, got"):
        block_linear(x.double(), values.double(), plan)


@needs_kernels
def test_settings_that_do_not_fit() -> None:
    x, values, plan = (t.cuda() if isinstance(t, torch.Tensor) and not INTERPRETED else t for t in linear())
    with pytest.raises(ValueError, match="precision: expected one of ieee, tf32, tf32x3, got 'high'"):
        block_linear(x, values, plan, precision="high")
    with pytest.raises(ValueError, match="block: expected 16, 32, 64 or 128, got 8"):
        block_linear(x, values, plan, block=8)
    with pytest.raises(ValueError, match="plan: expected one of kind 'conv2d', got kind 'linear'"):
        block_conv2d(x[:, :, None, None], values, plan)
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 32\), got shape \(4, 31\)"):
        block_linear(x[:, 1:], values, plan)
    conv = Plan.from_mask(torch.ones(16, 16, 3, 3, dtype=torch.bool))
    image, weights = torch.zeros(1, 16, 3, 3, device=x.device), torch.zeros(conv.nnz, device=x.device)
    with pytest.raises(ValueError, match=r"exceed the 2\^30 that the kernels count to"):
        block_conv2d(image, weights, conv, padding=2**29, dilation=2**29)
    scattered = torch.ones(16, 32, dtype=torch.bool)
    scattered[3, 4] = False
    with pytest.raises(ValueError, match="not made of whole blocks of 16 output x 16 input channels"):
        block_linear(x, values[:-1], Plan.from_mask(scattered))
