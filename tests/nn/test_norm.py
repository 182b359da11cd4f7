# SPDX-License-Identifier: Apache-2.0
"""BatchLastBatchNorm2d behaves as BatchNorm2d in every setting, over several steps and in both modes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fedpai_kernels as fk
from fedpai_kernels.nn import BatchLastBatchNorm2d

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum_none": {"momentum": None},
    "momentum_zero": {"momentum": 0.0},
    "momentum_one": {"momentum": 1.0},
    "not_affine": {"affine": False},
    "no_running_statistics": {"track_running_stats": False},
    "large_eps": {"eps": 0.5},
}


def pair(**settings: Any) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    plain = nn.BatchNorm2d(5, **settings).double()
    if plain.affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    ours = BatchLastBatchNorm2d(5, **settings).double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_steps(settings: dict[str, Any]) -> None:
    plain, ours = pair(**settings)
    for step, training in enumerate([True, True, False, True, False]):
        plain.train(training)
        ours.train(training)
        x = torch.randn(6, 5, 4, 3, dtype=torch.float64) * (step + 1) + step
        x1, x2 = x.clone().requires_grad_(), fk.to_batch_last(x).requires_grad_()
        y1, y2 = plain(x1), ours(x2)
        assert fk.is_batch_last(y2)
        dy = torch.randn_like(y1)
        y1.backward(dy)
        y2.backward(dy)
        torch.testing.assert_close(y2, y1)
        torch.testing.assert_close(x2.grad, x1.grad)
    for p1, p2 in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p2.grad, p1.grad)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_statistics_that_are_switched_off_later() -> None:
    plain, ours = pair()
    for module in (plain, ours):
        module.track_running_stats = False  # type: ignore[assignment]
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(fk.to_batch_last(x)), plain(x))
    plain.eval()
    ours.eval()
    torch.testing.assert_close(ours(fk.to_batch_last(x)), plain(x))
    assert torch.equal(ours.state_dict()["running_mean"], torch.zeros(5, dtype=torch.float64))


def test_other_inputs_take_torch_s_path_bit_for_bit() -> None:
    plain, ours = pair()
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    for source in (x, x.contiguous(memory_format=torch.channels_last), x[:0]):
        assert torch.equal(ours(source), plain(source))
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert half(fk.to_batch_last(x).to(torch.bfloat16)).dtype == torch.bfloat16


def test_errors_are_torch_s() -> None:
    _, ours = pair()
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.zeros(2, 5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(torch.zeros(1, 5, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="running_mean: expected shape"):
        ours(fk.to_batch_last(torch.zeros(2, 4, 3, 3, dtype=torch.float64)))


def test_is_a_batch_norm_and_travels() -> None:
    plain, ours = pair()
    assert isinstance(ours, nn.BatchNorm2d)
    x = fk.to_batch_last(torch.randn(6, 5, 4, 3, dtype=torch.float64))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), copy.deepcopy(ours)(x))
    plain.load_state_dict(ours.state_dict())
