# SPDX-License-Identifier: Apache-2.0
"""Choosing: by time, once, remembered in a file; forced; refused while a graph is captured; and gradients through a
choice that differs from direction to direction. The device is the CPU, and the timer says what it is told."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedpai_kernels as fk
from fedpai_kernels.cuda import CudaUnavailableError
from fedpai_kernels.dispatch.candidates import DENSE, Candidate
from fedpai_kernels.dispatch.file import device_facts
from fedpai_kernels.ops import reference
from tests.cases import CONV2D, LINEAR, Case
from tests.checking import differentiate, operands
from tests.dispatch import stand_ins
from tests.dispatch.stand_ins import ALL_SPARSE, MIXED, SPARSE, ToldTimer, calls, chooser, install


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for files of timings."""
    monkeypatch.delenv("FEDPAI_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedpai"


def step(
    plan: fk.Plan, batch: int = 4, dtype: torch.dtype = torch.float32, clients: tuple[int, ...] = ()
) -> tuple[torch.Tensor, ...]:
    x, values = torch.ones(*clients, batch, 4, 6, 6, dtype=dtype), torch.ones(*clients, plan.nnz, dtype=dtype)
    x.requires_grad_(), values.requires_grad_()
    y = fk.ops.sparse_conv2d(x, values, plan, None, 1, 1)
    return (y, *torch.autograd.grad(y.sum(), (x, values)))


def plan_of(seed: int = 0, out: int = 6) -> fk.Plan:
    return fk.Plan.from_mask(torch.rand(out, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.4)


def test_every_direction_has_its_own_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = ToldTimer(MIXED)
    made = install(monkeypatch, chooser(timer))
    plan = plan_of()
    step(plan)
    assert calls(made, plan) == {"forward": "sparse", "input_grad": "dense", "weight_grad": "dense"}
    assert timer.asked == 3
    [forward, *_] = made.choices(plan).values()
    assert forward.reason == "10 us against dense 20.5 us measured; no blocks: there are no blocks here; install them"
    step(plan)
    step(plan_of())
    assert timer.asked == 3, "another plan of the same mask, and another step, measure nothing"
    step(plan, batch=5)
    step(plan, dtype=torch.float64)
    assert timer.asked == 9, "another batch and another dtype are other calls"


def test_another_number_of_clients_is_another_call(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process and in the file; one client is a call like any other."""
    made = install(monkeypatch, chooser(timer := ToldTimer(MIXED)))
    plan = plan_of()
    step(plan)
    assert timer.asked == 3
    for clients, asked in ((1, 3), (2, 6), (5, 9), (2, 9)):
        step(plan, clients=(clients,))
        assert timer.asked == asked, clients
    assert sorted({call.clients for call in made.choices(plan)}) == [1, 2, 5]
    assert any(str(call).startswith("forward of 5 x 4 images of 6x6 in float32") for call in made.choices(plan))
    layers = {layer for file in cache.iterdir() for layer in json.loads(file.read_text())["layers"]}
    assert {word for layer in layers for word in layer.split(", ") if "clients" in word} == {"clients 2", "clients 5"}


def test_choices_go_with_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = install(monkeypatch, chooser(ToldTimer(MIXED)))
    plan = plan_of()
    step(plan)
    assert len(made._choices) == 1
    del plan
    gc.collect()
    assert len(made._choices) == 0


@pytest.mark.parametrize("case", [*CONV2D[::3], *LINEAR], ids=lambda case: f"{case.op}-{case.name}")
def test_gradients_through_a_mixed_choice(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward by the sparse kernel, both gradients dense, the weight's gathered: the float64 reference, exactly."""
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    given = operands(case, "f64", "exact")
    expected, got = differentiate(case.dense, given), differentiate(case.sparse, given)
    for name, value, truth in zip(got._fields, got, expected, strict=True):
        assert value is truth is None or torch.equal(value, truth), name


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    x, values = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(plan.nnz, dtype=torch.float64)
    x.requires_grad_(), values.requires_grad_()

    def penalty(op: Any) -> tuple[torch.Tensor, ...]:
        y = op(x, values, plan, None, 1, 1)
        [dx] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, values))

    expected = penalty(reference.conv2d)
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    # The registered ops, which gradients of gradients are made of, stay those of the CPU.
    for got, truth in zip(penalty(fk.ops.sparse_conv2d), expected, strict=True):
        torch.testing.assert_close(got, truth)


# ---------------------------------------------------------------------------------------------------------- file


def test_another_process_measures_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    step(plan_of())
    [path] = cache.iterdir()
    content = json.loads(path.read_text())
    assert (content["format"], content["machine"]) == (1, stand_ins.MACHINE)
    assert list(content["layers"].values()) == list(MIXED.values())
    timer = ToldTimer({})
    made = install(monkeypatch, chooser(timer))
    plan = plan_of()
    step(plan)
    assert timer.asked == 0
    assert calls(made, plan) == {"forward": "sparse", "input_grad": "dense", "weight_grad": "dense"}
    assert all("measured before" in choice.reason for choice in made.choices(plan).values())


def test_masks_of_one_size_and_structure_share_timings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients' masks differ, and are equal in what a time depends on."""
    mask = torch.zeros(6, 4, 3, 3, dtype=torch.bool)
    mask.view(6, -1)[:, :13] = torch.rand(13) < 2
    timer = ToldTimer(MIXED)
    install(monkeypatch, chooser(timer))
    orders = [torch.randperm(mask.numel()) for _ in range(2)]
    plans = [fk.Plan.from_mask(mask.flatten()[order].view_as(mask)) for order in orders]
    assert plans[0] != plans[1]
    for plan in plans:
        step(plan)
    assert timer.asked == 3
    step(plan_of(out=7))
    assert timer.asked == 6


def test_two_processes_write_one_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = chooser(ToldTimer(MIXED)), chooser(ToldTimer(MIXED))
    for made, out in ((first, 6), (second, 7), (first, 8)):
        install(monkeypatch, made)
        step(plan_of(out=out))
    [path] = cache.iterdir()
    assert len(json.loads(path.read_text())["layers"]) == 9


def test_other_devices_and_versions_have_other_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for facts in (stand_ins.MACHINE, stand_ins.MACHINE | {"device": "Other"}, stand_ins.MACHINE | {"torch": "2"}):
        timer = ToldTimer(MIXED)
        install(monkeypatch, chooser(timer, facts))
        step(plan_of())
        assert timer.asked == 3
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        ("{", "is damaged"),
        ("[]", "has format 'list', expected 1"),
        ('{"format": 7}', "has format 7, expected 1"),
        ('{"format": 1, "machine": {}}', "was measured elsewhere (device None, here 'Stand-in'"),
        ('{"format": 1, "machine": MACHINE}', "is damaged (layers: expected an object, got None)"),
        ('{"format": 1, "machine": MACHINE, "layers": {"a": {"dense": -1}}}', "is damaged (a: expected microseconds"),
        ('{"format": 1, "machine": MACHINE, "layers": {"a": {"dense": NaN}}}', "is damaged (a: expected microseconds"),
        ('{"format": 1, "machine": MACHINE, "layers": {"a": {}}}', "is damaged (a: expected microseconds"),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_written_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str, problem: str
) -> None:
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    step(plan_of())
    [path] = cache.iterdir()
    whole = json.loads(path.read_text())["layers"]
    path.write_text(spoilt.replace("MACHINE", json.dumps(stand_ins.MACHINE)))
    timer = ToldTimer(MIXED)
    install(monkeypatch, chooser(timer))
    with pytest.warns(UserWarning, match="layers are measured again, because") as caught:
        step(plan_of())
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert problem in str(caught[0].message)
    assert timer.asked == 3
    assert json.loads(path.read_text())["layers"] == whole


def test_timings_of_other_candidates_are_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a time before a library was there say nothing about it."""
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    step(plan_of())
    [path] = cache.iterdir()
    path.write_text(path.read_text().replace('"sparse"', '"old"'))
    timer = ToldTimer(ALL_SPARSE)
    made = install(monkeypatch, chooser(timer))
    plan = plan_of()
    step(plan)
    assert timer.asked == 3
    assert set(calls(made, plan).values()) == {"sparse"}


def test_no_file_where_none_is_wanted_or_can_be(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPAI_TUNING", "off")
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    step(plan_of())
    assert not cache.exists()
    monkeypatch.delenv("FEDPAI_TUNING")
    cache.write_text("a file where the folder would be")
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    with pytest.warns(UserWarning, match=r"timings serve this process only|layers are measured again"):
        step(plan_of())


# ----------------------------------------------------------------------------------------------- forced and refused


def test_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, used = ToldTimer(ALL_SPARSE), []

    def noted(name: str, direction: str) -> Any:
        op = getattr(SPARSE if name == "sparse" else DENSE, direction)
        return lambda *arguments: (used.append((name, direction)), op(*arguments))[1]

    own = [Candidate(name, SPARSE.check, *(noted(name, d) for d in ALL_SPARSE)) for name in ("sparse", "dense")]
    install(monkeypatch, chooser(timer, own=(*own, stand_ins.ABSENT)))
    plan = plan_of()
    with fk.dispatch.backend("dense"):
        with fk.dispatch.backend("sparse"):
            step(plan)
        assert used == [("sparse", direction) for direction in ("forward", "input_grad", "weight_grad")]
        used.clear()
        step(plan)
    assert used == [("dense", direction) for direction in ("forward", "input_grad", "weight_grad")]
    assert timer.asked == 0
    with fk.dispatch.backend("blocks"), pytest.raises(RuntimeError, match=r"^there are no blocks here; install them"):
        step(plan)
    with pytest.raises(ValueError, match=r"^name: expected one of sparse, blocks, dense, got 'cudnn'"):
        fk.dispatch.backend("cudnn")


@pytest.mark.skipif(fk.cuda.is_available(), reason="there are CUDA kernels")
def test_forced_but_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fk.dispatch.layers.CHOOSER)
    with fk.dispatch.backend("sparse"), pytest.raises(CudaUnavailableError, match=r"FEDPAI_CUDA=ON|driver"):
        step(plan_of())


@pytest.mark.skipif(fk.cuda.is_available(), reason="there are CUDA kernels")
def test_dense_for_want_of_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real candidates: only torch's can run here. A warning says so, and the report."""
    made = install(monkeypatch, chooser(ToldTimer({}), own=fk.dispatch.candidates.ALL))
    plan = plan_of()
    with pytest.warns(UserWarning, match="masked layers are computed without the CUDA kernels"):
        step(plan)
    for choice in made.choices(plan).values():
        assert choice.candidate == "dense"
        assert set(choice.unavailable) == {"sparse", "blocks"}
        assert choice.reason.startswith("nothing to compare it with; no sparse: ")


def test_nothing_is_measured_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, timer = [True], ToldTimer(MIXED)
    install(monkeypatch, chooser(timer, is_capturing=lambda: capturing[0]))
    plan = plan_of()
    with pytest.raises(RuntimeError, match=r"not been measured yet \(forward of 4 images of 6x6 .*run one step"):
        step(plan)
    capturing[0] = False
    step(plan)
    capturing[0] = True
    step(plan)
    with fk.dispatch.backend("dense"):
        step(plan, batch=9)
    assert timer.asked == 3


def test_out_of_memory_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("full")

    greedy = Candidate("greedy", SPARSE.check, full, full, full)
    made = install(monkeypatch, chooser(ToldTimer(ALL_SPARSE), own=(greedy, SPARSE)))
    plan = plan_of()
    step(plan)
    assert {choice.unavailable["greedy"] for choice in made.choices(plan).values()} == {"not enough memory"}
    install(monkeypatch, chooser(ToldTimer({}), own=(greedy, Candidate("other", SPARSE.check, full, full, full))))
    with pytest.raises(torch.OutOfMemoryError, match="no memory for a layer of shape"):
        step(plan_of(seed=1))


def test_empty_batches_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = ToldTimer({})
    install(monkeypatch, chooser(timer))
    step(plan_of(), batch=0)
    assert timer.asked == 0


# --------------------------------------------------------------------------------------------------------- report


def test_the_report_says_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, chooser(ToldTimer(MIXED)))
    convs = nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(64, 5))
    masks = {"0": torch.rand(4, 4, 3, 3) < 0.3, "2": torch.rand(4, 4, 3, 3) < 0.3, "4": torch.rand(5, 64) < 0.3}
    assert all(row.directions == () for row in fk.sparsify_(model, masks, fuse=False))
    model(torch.randn(3, 4, 6, 6)).sum().backward()
    report = fk.report(model)
    assert [d.kernel for d in report["4"].directions] == ["sparse", "dense", "dense"]
    assert [d.direction for d in report["0"].directions] == ["forward", "weight_grad"], "nobody asks for dx"
    assert report["2"].directions[0].call == "forward of 3 images of 6x6 in float32 on cpu"
    line = "2: input_grad of 3 images of 6x6 in float32 on cpu: dense, 20 us against sparse 30 us measured; no blocks"
    assert line in str(report)
    assert json.loads(report.to_json())["rows"][0]["directions"][0]["kernel"] == "sparse"


def test_facts_name_what_a_time_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor = "Some GPU", 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    facts = device_facts(torch.device("cuda", 0))
    assert (facts["device"], facts["capability"], facts["torch"]) == ("Some GPU", "9.0", torch.__version__)
    assert set(facts) == {"device", "capability", "torch", "cudnn", "triton", "kernels", "interface"}
