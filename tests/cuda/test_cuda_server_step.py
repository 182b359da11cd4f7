# SPDX-License-Identifier: Apache-2.0
"""The server's steps from tensors to the CUDA kernels' arguments, with a library whose device is the CPU: the bits of
:func:`fedpai_kernels.aggregate.server_step`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fedpai_kernels as fk
from fedpai_kernels.cuda import aggregate


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("n", [0, 1, 4, 1023, 5000])
@pytest.mark.parametrize("rule", fk.aggregate.RULES)
def test_steps_have_the_bits_of_the_cpu(rule: str, n: int) -> None:
    """Two steps, the second from what the first one left; old and merged with gaps."""
    torch.manual_seed(0)
    old, merged = torch.randn(2 * n)[::2], torch.randn(2 * n)[::2]
    m, v = torch.randn(n), None if rule == "avgm" else torch.rand(n)
    own_m, own_v = m.clone(), None if v is None else v.clone()
    own: Tensor = old
    expected: Tensor = old
    for _ in range(2):
        own = aggregate._launched_step(rule, own, merged, own_m, own_v, (0.3, 0.9, 0.99, 1e-3))
        expected = fk.aggregate.server_step(rule, expected, merged, m, v, lr=0.3, beta1=0.9)
    assert torch.equal(own, expected)
    assert torch.equal(own_m, m)
    if v is not None:
        assert own_v is not None
        assert torch.equal(own_v, v)
