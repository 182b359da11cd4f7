# SPDX-License-Identifier: Apache-2.0
"""The cache of freed memory: what it serves, what it keeps, and that it outlives everything."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import fedpai_kernels
from fedpai_kernels import _C, empty_cache, memory, memory_stats

CPU = torch.device("cpu")
LARGE = (1024, 1024)  # 4 MiB of float32

pytestmark = pytest.mark.skipif(not memory.ENABLED, reason=f"{memory.VARIABLE}=0")


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    gc.collect()
    empty_cache()
    yield
    empty_cache()


def contiguous(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    strides = torch.empty(shape, device="meta").stride()
    return memory.empty_strided(shape, strides, dtype=dtype, device=CPU)


def served() -> int:
    stats = memory_stats()
    return stats.hits + stats.misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_is_the_tensor_that_was_asked_for(dtype: torch.dtype) -> None:
    before = served()
    x = memory.empty_strided((64, 1, 32, 33), (1, 1, 33 * 64, 64), dtype=dtype, device=CPU)
    assert (x.shape, x.stride(), x.dtype, x.device) == ((64, 1, 32, 33), (1, 1, 33 * 64, 64), dtype, CPU)
    assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert (x.is_leaf, x.requires_grad, x.storage_offset(), x.data_ptr() % 4096) == (True, False, 0, 0)
    numbers = torch.arange(x.numel(), dtype=dtype).view(x.shape)
    x.copy_(numbers)
    assert torch.equal(x, numbers)
    assert served() == before + 1


def test_freed_memory_is_used_again() -> None:
    before = memory_stats()
    x = contiguous(LARGE)
    address = x.data_ptr()
    assert address % 2**21 == 0
    assert memory_stats().live_bytes == before.live_bytes + 2**22
    view = x[3]
    del x
    assert memory_stats().cached_bytes == 0, "a view keeps the memory"
    del view
    assert memory_stats().cached_bytes == 2**22
    y = contiguous((1000, 1024))
    assert y.data_ptr() == address
    after = memory_stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
    assert after.peak_live_bytes >= after.live_bytes


def test_numpy_keeps_the_memory() -> None:
    x = contiguous(LARGE).fill_(3)
    array = x.numpy()
    address = x.data_ptr()
    del x
    assert contiguous(LARGE).data_ptr() != address
    assert (array == 3).all()


def test_empty_cache_gives_back_what_is_not_in_use() -> None:
    kept = contiguous(LARGE).fill_(1)
    del_me = contiguous(LARGE)
    del del_me
    assert memory_stats().cached_bytes > 0
    empty_cache()
    assert memory_stats().cached_bytes == 0
    assert kept.sum() == kept.numel()


@pytest.mark.parametrize(
    ("shape", "dtype", "device"),
    [
        ((255, 256), torch.float32, "cpu"),
        ((0, 1024), torch.float32, "cpu"),
        (LARGE, torch.float16, "cpu"),
        (LARGE, torch.bool, "cpu"),
        (LARGE, torch.float32, "meta"),
    ],
    ids=["small", "empty", "float16", "bool", "meta"],
)
def test_everything_else_is_torchs(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    before = served()
    x = memory.empty_strided(shape, (shape[1], 1), dtype=dtype, device=device)
    assert (x.shape, x.dtype, x.device.type) == (shape, dtype, device)
    assert served() == before


def test_sizes_that_never_come_again_do_not_pile_up() -> None:
    peak = memory_stats().peak_live_bytes
    for rows in range(64, 1024, 30):
        contiguous((rows, 4096))
    stats = memory_stats()
    assert stats.cached_bytes <= 1.25 * max(peak, 1024 * 4096 * 4)


def test_threads_free_one_anothers_tensors() -> None:
    rounds, width = 200, 4
    tensors: list[torch.Tensor | None] = [None] * width
    barrier = threading.Barrier(width)
    wrong: list[int] = []

    def work(me: int) -> None:
        for _ in range(rounds):
            mine = contiguous((256 + 64 * me, 256))
            mine[0, 0] = me
            tensors[me] = mine
            del mine
            barrier.wait()
            neighbour = (me + 1) % width
            held = tensors[neighbour]
            tensors[neighbour] = None
            barrier.wait()
            if held is None or held[0, 0] != neighbour:
                wrong.append(me)
            del held

    live = memory_stats().live_bytes
    threads = [threading.Thread(target=work, args=(me,)) for me in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert memory_stats().live_bytes == live


def test_capsule_that_nobody_takes() -> None:
    live = memory_stats().live_bytes
    capsule = _C.empty_strided(LARGE, (1024, 1), 2, 32)
    assert memory_stats().live_bytes > live
    del capsule
    assert memory_stats().live_bytes == live
    assert memory_stats().cached_bytes == 2**22


def test_no_memory() -> None:
    live = memory_stats().live_bytes
    with pytest.raises(MemoryError, match=f"a tensor of {2**58} bytes"):
        contiguous((2**56,))
    assert memory_stats().live_bytes == live
    assert contiguous(LARGE).fill_(1).sum() == 2**20


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        (LARGE, (1024,), "strides: one per dimension"),
        (LARGE, (-1024, 1), r"size 1024 with stride -1024"),
        ((-1024, -1024), (1024, 1), r"size -1024 with stride 1024"),
        ((2**40, 2**22), (2**22, 1), "more bytes than an address can count"),
        ((2**40, 2**20), (2**62, 1), "more bytes than an address can count"),
    ],
)
def test_errors(shape: tuple[int, ...], strides: tuple[int, ...], message: str) -> None:
    before = memory_stats()
    with pytest.raises(ValueError, match=message):
        memory.empty_strided(shape, strides, dtype=torch.float32, device=CPU)
    assert memory_stats() == before


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_tensors_that_outlive_the_interpreter() -> None:
    """Freed at exit, after the modules are gone, by whoever holds them."""
    program = """
import atexit, sys, threading, torch, fedpai_kernels
new = lambda: fedpai_kernels.empty_batch_last((64, 64, 8, 8), dtype=torch.float32, device="cpu").fill_(1)
held = new()
sys.modules["held"] = new()
cycle = [new()]; cycle.append(cycle)
torch.held = new().requires_grad_().square()
atexit.register(lambda x=new(): x.sum())
capsule = fedpai_kernels._C.empty_strided((1024, 1024), (1024, 1), 2, 32)
threading.Thread(target=lambda x=new(): threading.Event().wait(), daemon=True).start()
print(fedpai_kernels.memory_stats().misses)
"""
    done = python(program, FEDPAI_MEMORY_CACHE="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 6


def test_environment_turns_it_off() -> None:
    program = """
import torch, fedpai_kernels
x = fedpai_kernels.empty_batch_last((64, 64, 8, 8), dtype=torch.float32, device="cpu")
print(x.untyped_storage().resizable(), sum(fedpai_kernels.memory_stats()))
"""
    done = python(program, FEDPAI_MEMORY_CACHE="0")
    assert (done.returncode, done.stdout.split()) == (0, ["True", "0"]), done.stderr


def test_environment_is_checked() -> None:
    done = python("import fedpai_kernels", FEDPAI_MEMORY_CACHE="off")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError: FEDPAI_MEMORY_CACHE: expected 0")


def test_public_names() -> None:
    assert fedpai_kernels.empty_cache is empty_cache
    assert isinstance(memory_stats(), fedpai_kernels.MemoryStats)


def test_less_slack_holds_less() -> None:
    """Three blocks at a time, each larger than what was freed before: without a limit a quarter more is held."""
    program = (
        "import torch, fedpai_kernels as fk\n"
        "from fedpai_kernels.memory import empty_strided\n"
        "last = now = None\n"
        "for mib in (2, 4, 6, 10, 16, 26):\n"
        "    last, now = now, empty_strided((mib << 18,), (1,), dtype=torch.float32, device='cpu')\n"
        "stats = fk.memory_stats()\n"
        "print((stats.live_bytes + stats.cached_bytes) / stats.peak_live_bytes)\n"
    )
    held = {slack: float(python(program, FEDPAI_MEMORY_SLACK=slack).stdout) for slack in ("1", "1.15", "3")}
    assert held["1"] <= 1 < held["1.15"] <= 1.15 < held["3"] <= 3


def test_memory_of_one_size_serves_others() -> None:
    """Freed blocks are split, and neighbours joined."""
    del_me = contiguous((8, *LARGE))
    address, misses = del_me.data_ptr(), memory_stats().misses
    del del_me
    parts = [
        contiguous((3, *LARGE)),
        contiguous((256, 1024)),
        contiguous((2, *LARGE)),
        contiguous((300, 300)),
    ]
    assert {address <= x.data_ptr() < address + 2**25 for x in parts} == {True}
    parts.clear()
    assert contiguous((8, *LARGE)).data_ptr() == address
    assert memory_stats().misses == misses


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_goes_back_to_the_system() -> None:
    program = """
import os, torch, fedpai_kernels as fk
from fedpai_kernels.memory import empty_strided
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
new = lambda mib: empty_strided((mib << 18,), (1,), dtype=torch.float32, device="cpu").fill_(1)
wall = new(1)
start = resident()
x = new(100); y = new(1); full = resident(); del x
cached = resident(); fk.empty_cache()
print(full - start, cached - start, resident() - start, float(wall.sum() + y.sum()) == 2 << 18)
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    full, cached, emptied = map(int, done.stdout.split()[:3])
    assert 100 <= cached <= full
    assert emptied <= 10
    assert done.stdout.split()[3] == "True"


@pytest.mark.parametrize("value", ["0.5", "much", "inf", "nan"])
def test_a_slack_that_makes_no_sense_is_refused(value: str) -> None:
    done = python("import fedpai_kernels", FEDPAI_MEMORY_SLACK=value)
    assert done.returncode == 1
    assert "FEDPAI_MEMORY_SLACK: expected a number of at least 1" in done.stderr.strip().splitlines()[-1]
