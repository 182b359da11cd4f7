# SPDX-License-Identifier: Apache-2.0
"""Every moment of a step is counted once, for the part that it belongs to: made-up traces."""

from __future__ import annotations

import pytest

from fedpai.bench.trace import (
    ALLOCATION,
    PARTS,
    STEP,
    Event,
    Key,
    Layer,
    Step,
    own_spans,
    parents,
    take_apart,
)

ENGINE = "autograd::engine::evaluate_function: "


def own_times(events: list[Event]) -> list[float]:
    own = [0.0] * len(events)
    for index, start, end in own_spans(events):
        own[index] += end - start
    return own


def spent(step: Step) -> dict[str, float]:
    """Nanoseconds by part, layers together."""
    found: dict[str, float] = {}
    for key, value in step.spent.items():
        found[key.part] = found.get(key.part, 0.0) + value.nanoseconds
    return {part: time for part, time in found.items() if time}


# ---- own time -------------------------------------------------------------------------------------------


def test_what_is_nested_is_taken_out() -> None:
    events = [Event("outer", 0, 100), Event("inner", 10, 60), Event("innermost", 20, 30), Event("next", 60, 90)]
    assert own_times(events) == [10 + 10, 40, 10, 30]
    assert parents(events) == [-1, 0, 1, 0]


def test_order_of_the_events_does_not_matter() -> None:
    events = [Event("innermost", 0, 10), Event("outer", 0, 100), Event("inner", 0, 60), Event("empty", 5, 5)]
    assert own_times(events) == [10, 40, 50, 0]
    assert parents(events)[:3] == [2, -1, 1]


def test_threads_are_not_counted_twice() -> None:
    """One waits in `outer` while another works; two that work at once share the clock, not double it."""
    events = [
        Event("outer", 0, 100), Event("backward", 20, 70, thread=2), Event("inside", 30, 40, thread=2),
        Event("third", 60, 80, thread=3),
    ]  # fmt: skip
    own = own_times(events)
    assert own == [20 + 20, 30, 10, 20]
    assert sum(own) == 100
    assert parents(events) == [-1, -1, 1, -1]


def test_gaps_belong_to_nobody() -> None:
    assert list(own_spans([Event("a", 0, 10), Event("b", 20, 30)])) == [(0, 0, 10), (1, 20, 30)]


# ---- parts ----------------------------------------------------------------------------------------------


def a_step(thread: int = 1) -> list[Event]:
    """A step of two convolutions, the backward pass on a thread of the caller's choice."""
    image, values = (8, 4, 6, 6), (17,)
    forward = [
        Event(STEP, 0, 1000),
        Event("Optimizer.zero_grad#SGD.zero_grad", 10, 30),
        Event("aten::zero_", 15, 20),
        Event("_Forward", 50, 150, sequence=7),
        Event("fedpai::conv2d_forward", 60, 140, shapes=(image, values)),
        Event("_ToBatchLast", 65, 85, sequence=8),
        Event("aten::copy_", 70, 80),
        Event(ALLOCATION, 90, 95),
        Event("aten::add_", 150, 155, shapes=((), (), ())),
        Event("_BatchNorm", 160, 200, sequence=9),
        Event("fedpai::batch_norm_train", 165, 190, shapes=(image, (), (4,), (4,))),
        Event("aten::lerp_", 192, 195),
        Event("_Forward", 210, 300, sequence=10),
        Event("fedpai::conv2d_forward", 220, 290, shapes=(image, values)),
        Event("aten::relu", 300, 320),
        Event("aten::cross_entropy_loss", 330, 350),
        Event("aten::log_softmax", 335, 345),
    ]
    backward = [
        Event(ENGINE + "NllLossBackward0", 360, 380),
        Event("NllLossBackward0", 362, 378),
        Event("aten::nll_loss_backward", 365, 375),
        Event(ENGINE + "_ForwardBackward", 400, 600, sequence=10),
        Event("_ForwardBackward", 410, 590, sequence=10),
        Event("fedpai::conv2d_input_grad", 420, 480, shapes=(image, values)),
        Event("fedpai::conv2d_weight_grad", 490, 580, shapes=(image, image)),
        Event(ENGINE + "_BatchNormBackward", 600, 700, sequence=9),
        Event("fedpai::batch_norm_backward", 610, 680, shapes=(image, image, image)),
        Event("aten::add_", 685, 695, shapes=(image, image, ())),
        Event(ENGINE + "_ForwardBackward", 700, 800, sequence=7),
        Event("fedpai::conv2d_weight_grad", 710, 790, shapes=(image, image)),
    ]
    rest = [Event("Optimizer.step#SGD.step", 850, 950), Event("aten::_fused_sgd_", 860, 940)]
    moved = [Event(e.name, e.start, e.end, thread, e.sequence, e.shapes) for e in backward]
    return [*forward, *moved, *rest]


LAYERS = [Layer("first", "conv2d"), Layer("second", "linear")]


def test_both_gradients_of_one_operation() -> None:
    apart = {"fedpai::conv2d_input_grad", "fedpai::conv2d_weight_grad"}
    events = [e for e in a_step(1) if e.name not in apart]
    events += [Event("fedpai::conv2d_backward", 420, 580), Event("fedpai::norm_conv2d_backward", 710, 790)]
    time = {key: value.nanoseconds for key, value in take_apart(events, LAYERS).spent.items()}
    assert time[Key("linear backward", "second")] == 160
    assert time[Key("conv backward", "first")] == 80


@pytest.mark.parametrize("thread", [1, 2])
def test_parts_of_a_step(thread: int) -> None:
    step = take_apart(a_step(thread), LAYERS)
    time = {key: value.nanoseconds for key, value in step.spent.items()}
    assert time[Key("conv forward", "first")] == 80 - 20 - 5
    assert time[Key("linear forward", "second")] == 70
    assert time[Key("linear input-grad", "second")] == 60
    assert time[Key("linear weight-grad", "second")] == 90
    assert time[Key("conv weight-grad", "first")] == 80
    parts = spent(step)
    assert parts["layout"] == 10  # the copy; what is around it is Python
    assert parts["memory"] == 5
    assert parts["norm forward"] == 5 + 25 + 3
    assert parts["norm backward"] == 70
    assert parts["residual add"] == 10
    assert parts["activation"] == 20
    assert parts["loss"] == 20 + 10
    assert (parts["zero_grad"], parts["optimiser"]) == (20, 100)
    assert parts["Python and autograd, backward"] == 440 - (10 + 60 + 90 + 70 + 10 + 80)
    assert parts["Python, around them"] == 10 + 50 + 50
    assert "other operations" not in parts
    assert sum(parts.values()) == step.nanoseconds == 1000
    assert parts.keys() <= PARTS.keys()


def test_parts_of_a_transformer() -> None:
    events = [
        Event(STEP, 0, 100),
        Event("aten::layer_norm", 0, 10), Event("aten::native_layer_norm", 2, 8),
        Event("aten::scaled_dot_product_attention", 10, 30),
        Event("aten::_scaled_dot_product_flash_attention_for_cpu", 12, 28),
        Event("aten::gelu", 30, 35),
        Event(ENGINE + "GeluBackward0", 50, 60), Event("aten::gelu_backward", 51, 59),
        Event(ENGINE + "ScaledDotProductFlashAttentionForCpuBackward0", 60, 80),
        Event("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 61, 79),
        Event(ENGINE + "NativeLayerNormBackward0", 80, 90), Event("aten::native_layer_norm_backward", 81, 89),
    ]  # fmt: skip
    parts = spent(take_apart(events, []))
    assert parts["norm forward"] == 10
    assert parts["attention forward"] == 20
    assert parts["activation"] == 5 + 8
    assert parts["attention backward"] == 18
    assert parts["norm backward"] == 8
    assert "other operations" not in parts


def test_traffic_counts_what_is_read_and_written() -> None:
    step, image = take_apart(a_step(), LAYERS), 4 * 8 * 4 * 6 * 6
    found = {part: step.spent[Key(part)] for part in ("norm forward", "norm backward", "residual add")}
    assert {part: (s.bytes / image, s.written / image) for part, s in found.items()} == {
        "norm forward": (2, 1),  # x; y
        "norm backward": (5, 2),  # dy, x, z; dx, dresidual
        "residual add": (2, 1),
    }


def test_unknown_layers_go_by_their_shapes() -> None:
    step = take_apart(a_step(), LAYERS[:1])
    assert {key.layer for key in step.spent if key.part == "conv input-grad"} == {"_Forward"}
    assert spent(step)["conv weight-grad"] == 90 + 80


def test_unknown_operations_are_named() -> None:
    step = take_apart([Event(STEP, 0, 100), Event("aten::roll", 10, 30)], [])
    assert step.spent[Key("other operations", "aten::roll")].nanoseconds == 20
    assert sum(spent(step).values()) == 100


def test_what_lies_outside_of_the_step_is_cut_off() -> None:
    events = [Event(STEP, 100, 200), Event("aten::roll", 50, 120), Event("aten::roll", 250, 300)]
    step = take_apart(events, [])
    assert spent(step) == {"other operations": 20, "Python and autograd, forward": 80}


def test_a_trace_is_of_one_step() -> None:
    for events in ([], [Event(STEP, 0, 1), Event(STEP, 2, 3)]):
        with pytest.raises(ValueError, match="once, got"):
            take_apart(events, [])
