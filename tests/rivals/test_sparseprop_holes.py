# SPDX-License-Identifier: Apache-2.0
"""What SparseProp computes wrongly, loses, or refuses to notice: each one right here.

SparseProp is the CPU library of sparse-weight training that this package is measured against. Its C++ side takes
pointers without looking at strides, its conversion without looking at the layer. None of that may come back here, so
every hole that was found in it is a test, named after what happens there.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedpai_kernels import Plan, sparsify, sparsify_, to_batch_last
from fedpai_kernels.nn import SparseConv2d, SparseLinear
from fedpai_kernels.ops import reference, sparse_conv2d, sparse_linear
from tests.cases import Conv2dCase
from tests.checking import LAYOUTS, check_op, differentiate, operands

BASE = Conv2dCase("base", batch=6, in_channels=5, out_channels=7, image=(9, 8))


def integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def random_mask(*shape: int, density: float = 0.4) -> Tensor:
    mask = torch.rand(shape) < density
    mask.view(-1)[0] = True
    return mask


def masked(layer: nn.Module, mask: Tensor) -> None:
    """Small whole weights, zero outside of the mask, so that all sums are exact."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape))
        assert isinstance(layer.weight, Tensor)
        layer.weight.mul_(mask)


def same_training(sparse: nn.Module, dense: nn.Module, mask: Tensor, x: Tensor, upstream: Tensor | None) -> None:
    """One forward and backward pass of a module and its dense twin."""
    results = []
    for module in (sparse, dense):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(leaf)
        y.sum().backward() if upstream is None else y.backward(upstream)
        results.append((y.detach(), leaf.grad))
    for got, expected in zip(*results, strict=True):
        assert got is not None
        assert torch.equal(got, expected)
    assert torch.equal(sparse.values.grad, dense.weight.grad[mask])  # type: ignore[union-attr]
    if dense.bias is not None:
        assert torch.equal(sparse.bias.grad, dense.bias.grad)  # type: ignore[union-attr]


# ------------------------------------------------------------------- operands whose strides it does not look at


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_input_that_is_not_contiguous(layout: str, isa: str) -> None:
    """There, a channels-last input is read as if it were contiguous: other numbers, no error."""
    check_op(BASE, "f32", isa, x_layouts=(layout,))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_output_gradient_that_is_not_contiguous(layout: str, isa: str) -> None:
    check_op(BASE, "f32", isa, dy_layouts=(layout,), expanded=False)


@pytest.mark.parametrize("reduce", ["sum", "mean", "sum of one channel", "sum over images"])
def test_gradient_of_a_plain_reduction(reduce: str, isa: str) -> None:
    """There, the stride-0 gradient of y.sum() is one number, read as a whole tensor: past the end of its memory."""
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": Tensor.sum,
        "mean": Tensor.mean,
        "sum of one channel": lambda y: y[:, 2].sum(),
        "sum over images": lambda y: (y.sum(0) * torch.arange(8.0)).sum(),
    }
    # 2^12 outputs, so that the mean's gradient is exact.
    case = Conv2dCase("reduced", batch=8, in_channels=5, out_channels=8, image=(8, 8))
    x, values, bias, _ = operands(case, "f32", "exact")
    gradients = []
    for op in (case.sparse, case.dense):
        leaves = [t.clone().requires_grad_() for t in (x, values, bias) if t is not None]
        reductions[reduce](op(*leaves)).backward()
        gradients.append([t.grad for t in leaves])
    for got, expected in zip(*gradients, strict=True):
        assert got is not None
        assert expected is not None
        assert torch.equal(got, expected)


def test_linear_with_a_transposed_input_and_an_expanded_gradient(isa: str) -> None:
    plan = Plan.from_mask(random_mask(7, 12))
    values, x = integers(plan.nnz), integers(12, 9).t()
    results = []
    for op in (sparse_linear, reference.linear):
        leaves = [x.detach().requires_grad_(), values.clone().requires_grad_()]
        op(*leaves, plan).sum().backward()
        results.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --------------------------------------------------------------------------------- the strided backward pass


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [8, 16, 24])
def test_strided_backward_with_output_rows_of_full_vectors(
    width: int, threads: int, isa: str, set_threads: Callable[[int], None]
) -> None:
    """There, with stride 2 and an output width of a multiple of 8, one element past the row is rewritten: it is the
    neighbouring channel's, which another thread may be working on, or past the buffer.
    """
    set_threads(threads)
    for image_width in (2 * width - 1, 2 * width):
        case = Conv2dCase("rows", batch=3, in_channels=4, out_channels=6, image=(6, image_width), stride=2)
        assert case.output_shape[3] == width
        check_op(case, "f32", isa, dy_layouts=("contiguous", "gaps", "batch_last_gaps"))


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (3, 1), 5], ids=str)
def test_every_stride(stride: int | tuple[int, int], isa: str) -> None:
    """There, strides 1 and 2 only, equal in both directions; the width-vectorised kernel has no stride 2 forward."""
    check_op(Conv2dCase("strided", batch=5, image=(11, 9), stride=stride), "f32", isa, dy_layouts=("contiguous",))


# -------------------------------------------------------------------------------- settings silently ignored

LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
    "groups": lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "dilation": lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2),
    "dilation differs by axis": lambda: nn.Conv2d(6, 4, 3, dilation=(1, 2)),
    "stride differs by axis": lambda: nn.Conv2d(6, 4, 3, stride=(1, 2)),
    "padding differs by axis": lambda: nn.Conv2d(6, 4, 3, padding=(0, 2)),
    "padding same": lambda: nn.Conv2d(6, 4, (3, 5), padding="same"),
    "padding reflect": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "padding circular": lambda: nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="circular"),
    "padding replicate": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate", stride=2),
    "kernel not square": lambda: nn.Conv2d(6, 4, (1, 5), padding=(0, 2)),
    "no bias": lambda: nn.Conv2d(6, 4, 3, bias=False),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_settings_of_the_layer_are_kept(name: str) -> None:
    """There, from_dense reads element 0 of stride and padding and nothing else: the layer computes something else."""
    dense = LAYERS[name]()
    mask = random_mask(*dense.weight.shape)
    masked(dense, mask)
    sparse = SparseConv2d.from_dense(dense, mask)
    x = integers(5, 6, 9, 8)
    same_training(sparse, dense, mask, x, integers(*dense(x).shape))
    dense.zero_grad()
    again = SparseConv2d.from_dense(dense, mask)
    same_training(again, dense, mask, x.contiguous(memory_format=torch.channels_last), None)


# ----------------------------------------------------------------------------- indices lost from checkpoints


def two_layers() -> tuple[nn.Sequential, dict[str, Tensor]]:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 4, 7))
    masks = {"0": random_mask(6, 3, 3, 3, density=0.3), "3": random_mask(7, 120, density=0.1)}
    for name, mask in masks.items():
        masked(model.get_submodule(name), mask)
    return model, masks


@pytest.mark.parametrize("road", ["state_dict", "file", "dense state_dict", "deepcopy", "pickle"])
def test_the_mask_survives(road: str) -> None:
    """There, the indices are plain attributes: a state_dict holds values that nothing says the places of."""
    dense, masks = two_layers()
    trained = sparsify(dense, masks)
    x = integers(4, 3, 5, 4)
    expected = trained(x)
    assert isinstance(trained[0], SparseConv2d)
    assert isinstance(trained[3], SparseLinear)

    if road == "deepcopy":
        restored = copy.deepcopy(trained)
    elif road == "pickle":
        restored = pickle.loads(pickle.dumps(trained))
    else:
        state = trained.state_dict()
        if road == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        restored = two_layers()[0]  # other weights
        restored.load_state_dict(state, strict=True)
        if road != "dense state_dict":
            sparsify_(restored)  # the places are where the weights are not zero
    assert torch.equal(restored(x), expected)


def test_a_checkpoint_of_another_mask_is_refused() -> None:
    dense, masks = two_layers()
    trained = sparsify(dense, masks)
    other, other_masks = two_layers()
    other_masks["0"] = ~masks["0"]
    masked(other.get_submodule("0"), other_masks["0"])
    receiver = sparsify(other, other_masks)
    before = {name: tensor.clone() for name, tensor in receiver[0].state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0\.weight: .* another mask"):
        receiver.load_state_dict(trained.state_dict())
    assert torch.equal(receiver[0].weight, before["weight"])


# ------------------------------------------------------------------------------- sizes that overflow its types


def test_more_weights_in_a_channel_than_16_bits_count(isa: str) -> None:
    """There, non-zeros are counted per output channel in int16."""
    case = Conv2dCase("heavy", batch=3, in_channels=4000, out_channels=2, image=(3, 2), mask="full", bias=False)
    assert case.plan.nnz // 2 > 2**15
    check_op(case, "f32", isa, expanded=False)
    case = Conv2dCase("heavy", batch=3, in_channels=2, out_channels=4000, image=(3, 2), mask="full", bias=False)
    check_op(case, "f32", isa, expanded=False)


def test_more_taps_than_8_bits_count(isa: str) -> None:
    """There, a kernel coordinate is a uint8."""
    case = Conv2dCase("long", batch=2, in_channels=1, out_channels=2, image=(1, 600), kernel=(1, 301), padding=(0, 150))
    check_op(case, "f32", isa, dy_layouts=("contiguous",))


def test_many_weights_on_a_small_stack(set_threads: Callable[[int], None]) -> None:
    """There, every thread keeps a private copy of all weight gradients on its stack."""
    set_threads(1)
    plan = Plan.from_mask(torch.ones(1500, 1500, dtype=torch.bool))  # 9 MB of gradients
    values, x = integers(plan.nnz).requires_grad_(), integers(2, 1500)
    failures: list[BaseException] = []

    def step() -> None:
        try:
            sparse_linear(x, values, plan).backward(torch.ones(2, 1500))
        except BaseException as error:
            failures.append(error)

    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert failures == []
    assert values.grad is not None
    assert torch.equal(values.grad.view(1500, 1500), x.sum(0).expand(1500, 1500))


# --------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("threads", [2, 3])
def test_weight_gradients_are_the_same_bits_on_every_run(
    threads: int, isa: str, set_threads: Callable[[int], None]
) -> None:
    """There, threads add to one gradient in the order in which they come."""
    set_threads(threads)
    for case in (
        Conv2dCase("wide", batch=3, in_channels=8, out_channels=8, image=(16, 32)),
        Conv2dCase("many", batch=40, in_channels=64, out_channels=64, image=(2, 2), density=0.8),
    ):
        numbers = operands(case, "f32", "rounded")
        first = differentiate(case.sparse, numbers).dw
        assert all(torch.equal(differentiate(case.sparse, numbers).dw, first) for _ in range(5))


@pytest.mark.parametrize("threads", [2, 3])
def test_fewer_channels_than_threads(threads: int, isa: str, set_threads: Callable[[int], None]) -> None:
    """There, threads share the output channels: one channel is one thread's work. Here it must at least be right."""
    set_threads(threads)
    for batch in (1, 2, 40):
        check_op(Conv2dCase("one", batch=batch, in_channels=9, out_channels=1, density=0.7), "f32", isa)


def test_layers_hand_on_what_the_next_one_reads() -> None:
    """There, every call permutes its input and its gradient. Here the layout stays between layers, and stays right."""
    plan = Plan.from_mask(random_mask(5, 5, 3, 3))
    values, x = integers(plan.nnz), integers(6, 5, 7, 7)
    y = z = x
    for _ in range(2):
        y = sparse_conv2d(y, values, plan, padding=1).clamp(-4, 4)
        z = reference.conv2d(z, values, plan, padding=1).clamp(-4, 4)
    assert to_batch_last(y) is y
    assert torch.equal(y, z)
