# SPDX-License-Identifier: Apache-2.0
"""From tensors to kernels' arguments: how the CUDA library is found, and what is said where it is not; and whole ops on
CPU tensors with a library of the same interface whose device is the CPU. What needs a GPU is in test_cuda_gpu.py."""

from __future__ import annotations

import gc
from ctypes import byref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fedpai_kernels as fk
from fedpai_kernels.cuda import conv2d, device_plan, library
from fedpai_kernels.ops.geometry import flatten, resolve_geometry


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 1, 3, 8])
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, (1, 0), 1), (1, "same", 2)])
def test_ops_on_tensors(
    dtype: torch.dtype, batch: int, stride: int, padding: int | tuple[int, int] | str, groups: int
) -> None:
    """All three directions, from the arguments of the registered ops, against dense torch: exact."""
    torch.manual_seed(0)
    mask = torch.rand(6, 4 // groups, 3, 2) < 0.4
    plan = fk.Plan.from_mask(mask, groups=groups)
    values, bias = integers(plan.nnz), integers(6)
    x = integers(batch, 4, 7, 5, dtype=dtype)  # not batch-last: read through a copy
    geometry = flatten(resolve_geometry((3, 2), stride, padding, 1))

    dense_x = x.double().requires_grad_()
    dense = plan.unpack(values).double().requires_grad_()
    expected = functional.conv2d(dense_x, dense, bias.double(), stride, padding, 1, groups)
    dy = integers(*expected.shape, dtype=dtype)
    expected.backward(dy.double())
    assert dense_x.grad is not None
    assert dense.grad is not None

    y = conv2d.forward(x, values, bias, plan.handle, geometry)
    assert fk.is_batch_last(y)
    assert torch.equal(y, expected.to(dtype))
    dx = conv2d.input_grad(dy, values, plan.handle, 7, 5, geometry)
    assert torch.equal(dx, dense_x.grad.to(dtype))
    dvalues, dbias = conv2d.weight_grad(x, dy, plan.handle, True, geometry)
    assert torch.equal(dvalues, plan.pack(dense.grad).float())
    assert torch.equal(dbias, dy.float().sum((0, 2, 3)))
    without, none = conv2d.weight_grad(x, dy, plan.handle, False, geometry)
    assert torch.equal(without, dvalues)
    assert none.shape == (0,)
    assert torch.equal(
        conv2d.forward(x, values, None, plan.handle, geometry),
        functional.conv2d(x.double(), dense, None, stride, padding, 1, groups).to(dtype),
    )


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clients", [0, 1, 2, 5])
@pytest.mark.parametrize(("batch", "stride", "groups"), [(0, 1, 1), (3, 2, 1), (8, 1, 2)])
def test_ops_on_tensors_of_clients(dtype: torch.dtype, clients: int, batch: int, stride: int, groups: int) -> None:
    """Each client's part of one launch is what dense torch computes for it: exact."""
    plan = fk.Plan.from_mask(torch.rand(6, 4 // groups, 3, 2) < 0.4, groups=groups)
    values, bias, x = integers(clients, plan.nnz), integers(clients, 6), integers(clients, batch, 4, 7, 5, dtype=dtype)
    geometry = flatten(resolve_geometry((3, 2), stride, 1, 1))
    y = conv2d.forward(x, values, bias, plan.handle, geometry)
    dy = integers(*y.shape, dtype=dtype)
    dx = conv2d.input_grad(dy, values, plan.handle, 7, 5, geometry)
    dvalues, dbias = conv2d.weight_grad(x, dy, plan.handle, True, geometry)
    without, none = conv2d.weight_grad(x, dy, plan.handle, False, geometry)
    assert fk.is_batch_last(y)
    assert fk.is_batch_last(dx)
    assert dx.shape == x.shape
    assert dvalues.shape == values.shape
    assert torch.equal(without, dvalues)
    assert none.shape == (clients, 0)
    for client in range(clients):
        dense_x = x[client].double().requires_grad_()
        dense = plan.unpack(values[client]).double().requires_grad_()
        expected = functional.conv2d(dense_x, dense, bias[client].double(), stride, 1, 1, groups)
        expected.backward(dy[client].double())
        assert dense_x.grad is not None
        assert dense.grad is not None
        assert torch.equal(y[client], expected.to(dtype))
        assert torch.equal(dx[client], dense_x.grad.to(dtype))
        assert torch.equal(dvalues[client], plan.pack(dense.grad).float())
        assert torch.equal(dbias[client], dy[client].float().sum((0, 2, 3)))


@pytest.mark.usefixtures("on_host")
def test_bits_of_clients() -> None:
    """Output and input gradient are those of calls of their own; sums are split by what all clients need."""
    plan = fk.Plan.from_mask(torch.rand(16, 8, 3, 3) < 0.3)
    geometry = flatten(resolve_geometry((3, 3), 1, 1, 1))
    x, dy, values = torch.randn(3, 32, 8, 9, 9), torch.randn(3, 32, 16, 9, 9), torch.randn(3, plan.nnz)
    y = conv2d.forward(x, values, None, plan.handle, geometry)
    dx = conv2d.input_grad(dy, values, plan.handle, 9, 9, geometry)
    dvalues, _ = conv2d.weight_grad(x, dy, plan.handle, False, geometry)
    for client in range(3):
        own = x[client], values[client], None, plan.handle, geometry
        assert torch.equal(y[client], conv2d.forward(*own))
        assert torch.equal(dx[client], conv2d.input_grad(dy[client], values[client], plan.handle, 9, 9, geometry))
        alone, _ = conv2d.weight_grad(x[client], dy[client], plan.handle, False, geometry)
        torch.testing.assert_close(dvalues[client], alone, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("on_host")
def test_misaligned_images() -> None:
    """A view that begins between vectors of four is copied."""
    plan = fk.Plan.from_mask(torch.ones(2, 1, 1, 1, dtype=torch.bool))
    memory = integers(1 + 9 * 4)
    x = memory[1:].view(1, 3, 3, 4).permute(3, 0, 1, 2)
    assert x.data_ptr() % 16 != 0
    y = conv2d.forward(x, torch.tensor([1.0, 2.0]), None, plan.handle, flatten(resolve_geometry((1, 1), 1, 0, 1)))
    assert torch.equal(y, torch.cat([x, 2 * x], 1))


def test_codes_become_errors(host_library: library.Library) -> None:
    """Sizes are checked before anything is touched."""
    sizes = library.Conv2d(1, 2**40, 1, 1, 1, 1, 1, 1, 1, 1, 0)
    with pytest.raises(RuntimeError, match=r"^conv2d_forward: too large \(code -1\)$"):
        host_library.call("conv2d_forward", byref(sizes), byref(library.RowStream()), 0, 0, None, 0, 0)
    clients = library.Conv2d(2**16, *(1,) * 9, 0)
    with pytest.raises(RuntimeError, match=r"^conv2d_input_grad: too large"):
        host_library.call("conv2d_input_grad", byref(clients), byref(library.RowStream()), 0, 0, 0, 0)


def test_streams_are_copied_once() -> None:
    """Plans of one mask share them; another stride has its own; they go with the last plan."""
    mask = torch.rand(5, 3, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.3
    plans = [fk.Plan.from_mask(mask), fk.Plan.from_mask(mask)]
    own = [device_plan.device_plan(plan) for plan in plans]
    assert own[0] is own[1]
    cpu = torch.device("cpu")
    first, second = (resolve_geometry((3, 3), stride, 1, 1) for stride in (1, 2))
    address = own[0].rows(cpu, "forward", first, 5).entries
    assert own[1].rows(cpu, "forward", first, 5).entries == address
    assert own[1].rows(cpu, "forward", second, 5).entries != address
    assert len(own[0]._streams) == 2
    before = len(device_plan._device_plans)
    del plans, own
    gc.collect()
    assert len(device_plan._device_plans) == before - 1


def test_spreads_beyond_the_streams_are_refused() -> None:
    plan = fk.Plan.from_mask(torch.ones(1, 1, 2, 1, dtype=torch.bool))
    for stride, padding, dilation in ((2**29, 0, 1), (1, 2**29, 1), (1, 0, 2**29), (256, 0, 1)):
        geometry = resolve_geometry((2, 1), stride, padding, dilation)
        with pytest.raises(ValueError, match=r"^stride, padding, dilation: the CUDA kernels take"):
            device_plan.device_plan(plan).rows(torch.device("cpu"), "input_grad", geometry, 1)


def test_absent_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "PATH", tmp_path / "libfedpai_cuda.so")
    with pytest.raises(fk.cuda.CudaUnavailableError, match=r"does not exist.*nvcc.*FEDPAI_CUDA=ON"):
        library.load()
    assert not fk.cuda.is_available()
    (tmp_path / "libfedpai_cuda.so").write_bytes(b"no library")
    with pytest.raises(fk.cuda.CudaUnavailableError, match="cannot be loaded"):
        library.load()


def test_library_of_another_build(host_library: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "INTERFACE", 1000)
    with pytest.raises(fk.cuda.CudaUnavailableError, match=r"has interface 3, this package needs 1000.*build"):
        library.Library(Path(host_library._dll._name))


@pytest.mark.skipif(not library.PATH.is_file(), reason="libfedpai_cuda.so was not built: there is no nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_driver_is_said() -> None:
    """The library that was built loads anywhere; without a driver, that is what is said."""
    built = library.Library(library.PATH)
    assert built.segments(1025) == 2
    assert "2^31" in built.message(-1)
    with pytest.raises(fk.cuda.CudaUnavailableError, match="driver"):
        built.check_driver()
    assert not fk.cuda.is_available()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fk.cuda.weighted_mean(torch.ones(2, 3), [1, 1]), ValueError, r"^vectors: .*CUDA device"),
        (lambda: fk.cuda.weighted_mean([1.0], [1]), TypeError, r"^vectors: got list"),  # type: ignore[arg-type]
        (lambda: fk.cuda.majority(torch.ones(2, 3), 1), TypeError, r"^bitmaps: got torch.float32"),
        (lambda: fk.cuda.Positions([], 3), ValueError, r"^positions: got none"),
        (lambda: fk.cuda.Positions([torch.arange(1)], 3), TypeError, r"^positions\[0\]: got torch.int64"),
        (lambda: fk.cuda.Positions([torch.ones(1, dtype=torch.int32)], 2**31), ValueError, r"^n: got"),
        (lambda: fk.cuda.server_step("sgd", *3 * [torch.ones(1)], lr=1, beta1=0), ValueError, r"^rule: got 'sgd'"),
        (lambda: fk.cuda.server_step("adam", *3 * [torch.ones(1)], lr=1, beta1=0), ValueError, r"^v: got none"),
        (lambda: fk.cuda.server_step("avgm", *3 * [torch.ones(1)], lr=0, beta1=0), ValueError, r"^lr: got 0"),
        (lambda: fk.cuda.server_step("avgm", *3 * [torch.ones(1)], lr=1, beta1=1), ValueError, r"^beta1: got 1"),
        (lambda: fk.cuda.server_step("avgm", *3 * [torch.ones(1)], lr=1, beta1=0), ValueError, r"^old: .*CUDA device"),
        (
            lambda: fk.cuda.arguments.check_apart({"old": torch.ones(3), **dict.fromkeys("mv", torch.ones(3))}, "mv"),
            ValueError,
            r"^m: .* no memory with v",
        ),
        (lambda: fk.cuda.arguments.check_state("m", torch.ones(6)[::2]), ValueError, r"^m: .*contiguous.*\(2,\)"),
        (lambda: fk.cuda.sgd_step([torch.ones(1)], [], [], [], lr=0.1), ValueError, r"^params\[0\]: .*CUDA"),
        (
            lambda: fk.cuda.adam_step(
                [torch.ones(1).double()], [], [], [], step=1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8
            ),
            TypeError,
            r"^params\[0\]: got torch.float64",
        ),
    ],
)
def test_bad_arguments_are_named(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=message):
        call()
