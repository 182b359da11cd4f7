# SPDX-License-Identifier: Apache-2.0
"""Many clients' models in one process hold each mask once, and one set of working memory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedpai_kernels as fk
from fedpai_kernels.nn import PackedWeight
from tests.nn.small import Small, masked_model

# Ten clients of one mask: what nine more of them add to the memory of one that has trained. Masks are given anew to
# each, as they come out of nine messages.
PROGRAM = """
import copy, gc, sys, torch
import fedpai_kernels as fk
from fedpai.models import create

def resident():
    gc.collect()
    fk.empty_cache()
    fk._C.trim_heap()
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
dense = create("resnet18", num_classes=10, in_channels=3, seed=0)
generator = torch.Generator().manual_seed(0)
masks = {
    name: torch.rand(module.weight.shape, generator=generator) < 0.02
    for name, module in dense.named_modules()
    if isinstance(module, torch.nn.Conv2d)
}
x = torch.randn(4, 3, 32, 32)

def client():
    model = copy.deepcopy(dense)
    fk.sparsify_(model, {name: mask.clone() for name, mask in masks.items()})
    return model

def train(model):
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)

first = client()
train(first)
train(first)
start = resident()
others = [client() for _ in range(9)]
for model in others:
    train(model)
print(resident() - start, sum(p.numel() * 4 for p in first.parameters()) / 2**20)
"""


def compiled(model: nn.Module) -> list[int]:
    return [id(module.plan.compiled) for module in model.modules() if isinstance(module, PackedWeight)]


@pytest.mark.parametrize("how", ["sparsify_", "deepcopy", "pickle"])
def test_models_of_equal_masks_share_their_plans(how: str) -> None:
    model, masks = masked_model()
    dense = copy.deepcopy(model)
    fk.sparsify_(model, masks)
    make: dict[str, Callable[[], nn.Module]] = {
        "sparsify_": lambda: fk.sparsify(dense, {name: mask.clone() for name, mask in masks.items()}),
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
    }
    other = make[how]()
    assert compiled(other) == compiled(model)
    assert len(compiled(model)) == len(masks)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_layers_of_equal_masks_compute_apart() -> None:
    """What is shared is the mask: values and gradients are each layer's own."""
    model, masks = masked_model()
    other = Small().double()
    expected = copy.deepcopy(other)
    fk.sparsify_(model, masks)
    fk.sparsify_(other, masks)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model(x).sum().backward()
    other(x).sum().backward()
    with torch.no_grad():
        for name, mask in masks.items():
            expected.get_submodule(name).weight.mul_(mask)
    expected(x).sum().backward()
    for name, mask in masks.items():
        gradient: Tensor = expected.get_submodule(name).weight.grad[mask]  # type: ignore[index, assignment]
        torch.testing.assert_close(other.get_submodule(name).values.grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_ten_clients_take_little_more_memory_than_one() -> None:
    """Nine more models add their own parameters and buffers: about 12 MiB. With plans of their own it was 110."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    added, parameters = map(float, done.stdout.split())
    assert added < 9 * parameters + 25, (
        f"nine clients added {added:.1f} MiB, their parameters {9 * parameters:.1f}"
    )
