# SPDX-License-Identifier: Apache-2.0
"""The two calls: scores of a model, and masks of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeGuard, cast

import torch
from torch import nn
from torch.nn import functional

from fedpai.pruning import criteria as criterion_scores
from fedpai.pruning.allocation import Allocation
from fedpai.pruning.choose import chooser
from fedpai.pruning.criteria import Batch, Layers, Loss, normalised
from fedpai.pruning.layers import Exclude, Shape, Tensors, input_shape_of, prunable_layers, scoring_copy
from fedpai.pruning.masks import check_finite
from fedpai.pruning.synflow import ITERATIONS, SynFlow, synflow_masks

Data = Batch | Iterable[Batch]
_NEEDS_DATA = ("grasp", "snip")
_SCORED = ("grasp", "magnitude", "random", "snip", "synflow")
# Random weights under an allocation, known by the allocation's name.
_RANDOM_UNDER = ("erk", "uniform")


def criteria() -> list[str]:
    """The names that :func:`prune` knows."""
    return sorted([*_SCORED, *_RANDOM_UNDER])


def scores(
    model: nn.Module,
    criterion: str,
    *,
    data: Data | None = None,
    seed: int = 0,
    exclude: Exclude | None = None,
    input_shape: Shape | None = None,
    loss: Loss = functional.cross_entropy,
) -> Tensors:
    """One score a weight; higher = keep.

    SNIP, GraSP and SynFlow scores are divided by the sum of their absolute values, so that clients' scores
    can be averaged. SynFlow gives its first iteration; its masks need :func:`prune`, which iterates.

    Args:
        model: scored on a copy; left as it is.
        criterion: ``"random"``, ``"magnitude"``, ``"snip"``, ``"grasp"`` or ``"synflow"``.
        data: for SNIP and GraSP: (images, labels), or an iterable of such batches. Any classes may be
            missing.
        seed: for the random scores, and for modules that draw random numbers while a batch passes.
        exclude: layers to leave out: names, or a function of (name, module).
        input_shape: for SynFlow: one input's shape; by default that of the data, else of
            ``model.input_shape``.
        loss: of (outputs, labels); a mean over images.

    Returns:
        ``{module name: tensor of the weight's shape}`` in module order.

    Raises:
        ValueError: an unknown criterion, missing or malformed data, no prunable layer, scores that are not
            finite (naming the layer) or all zero.
    """
    if criterion not in _SCORED:
        raise ValueError(f"criterion: got {criterion!r}, expected one of {', '.join(_SCORED)}")
    batches = _batches(data, criterion)
    layers = prunable_layers(model, exclude)
    if criterion == "random":
        return criterion_scores.random(layers, seed)
    if criterion == "magnitude":
        return _finite(criterion_scores.magnitude(layers), batches)
    if criterion == "synflow":
        shape = _checked_input_shape(model, layers, input_shape, batches)
        with _gradients_on():
            return SynFlow(*scoring_copy(model, exclude), shape).scores()
    compute = criterion_scores.snip if criterion == "snip" else criterion_scores.grasp
    # Modules in train mode may draw from the global generator: from our seed, and without a trace.
    with _gradients_on(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = compute(*scoring_copy(model, exclude), batches, loss)
    return normalised(_finite(found, batches), criterion)


def prune(
    model: nn.Module,
    sparsity: float,
    criterion: str = "grasp",
    *,
    scope: str | None = None,
    allocation: Allocation | None = None,
    data: Data | None = None,
    seed: int = 0,
    exclude: Exclude | None = None,
    keep_layers_alive: bool = True,
    input_shape: Shape | None = None,
    iterations: int | None = None,
    loss: Loss = functional.cross_entropy,
    structure: str = "weight",
    budget: str = "weights",
) -> Tensors:
    """Masks that keep exactly ``round((1 - sparsity) * weights)`` weights; of other structures, see below.

    With a structure, the blocks or channels with the highest mean score are kept, and the masks keep at most the
    budget: the ranking is gone down once, and what still fits is kept. With blocks of one size in all layers that is
    ``budget // size`` of them.

    Args:
        model: scored on a copy; left as it is.
        sparsity: share of the prunable weights (of their multiply-adds, with budget ``"flops"``) that goes, in
            [0, 1).
        criterion: ``"random"``, ``"magnitude"``, ``"snip"``, ``"grasp"``, ``"synflow"``; ``"erk"`` and
            ``"uniform"`` are random weights under that allocation.
        scope: ``"global"`` (default) or ``"layer"``; see :func:`masks_from_scores`.
        allocation: ``"global"``, ``"uniform"``, ``"erk"``, ``"flops"``, ``"time"``, ``"time:X"`` or ``{layer name:
            count}``; see :func:`allocate`.
        data: for SNIP and GraSP: (images, labels), or an iterable of such batches.
        seed: of everything random.
        exclude: layers to leave dense: names, or a function of (name, module); they get no mask.
        keep_layers_alive: every layer keeps at least its best weight or block.
        input_shape: for SynFlow, budget ``"flops"`` and allocations ``"flops"`` and ``"time"``; see :func:`scores`.
        iterations: of SynFlow, 100 by default; the other criteria have no such choice.
        loss: of (outputs, labels); a mean over images.
        structure: what is kept or dropped together, a name of :mod:`fedpai_kernels.structure`. Blocks are cut off at
            the edges of a layer. ``"channel"`` removes channels from all layers that write or read them, under
            allocation ``"global"`` or ``"uniform"``. Of N:M masks the sparsity must be 1 - N / M.
        budget: ``"weights"``, or ``"flops"`` for the multiply-adds of the forward pass of one image.

    Returns:
        ``{module name: bool tensor of the weight's shape}`` in module order; true = kept.

    Raises:
        ValueError: as :func:`scores`, :func:`masks_from_scores` and :func:`chooser`.
    """
    named = "global" if scope == "global" and allocation is None else allocation
    criterion, allocation = split_alias(criterion, named)
    if iterations is not None and (criterion != "synflow" or iterations < 1):
        raise ValueError(f"iterations: got {iterations}, expected at least 1 and criterion 'synflow' only")
    batches = _batches(data, criterion)
    if input_shape is None and batches:
        input_shape = tuple(batches[0][0].shape[1:])
    # Impossible requests fail here, before the long part.
    choice = chooser(
        model,
        sparsity,
        scope=scope,
        allocation=allocation,
        structure=structure,
        budget=budget,
        exclude=exclude,
        keep_layers_alive=keep_layers_alive,
        input_shape=input_shape,
    )
    if criterion == "random":
        return choice.random(seed)
    if criterion == "synflow":
        shape = _checked_input_shape(model, prunable_layers(model, exclude), input_shape, [])
        with _gradients_on():
            return synflow_masks(*scoring_copy(model, exclude), shape, choice, iterations or ITERATIONS)
    return choice.masks(scores(model, criterion, data=batches or None, seed=seed, exclude=exclude, loss=loss))


def split_alias(criterion: str, allocation: Allocation | None) -> tuple[str, Allocation | None]:
    """Criterion and allocation; ``"erk"`` and ``"uniform"`` as criteria are random weights under that allocation.

    Raises:
        ValueError: such a criterion and another allocation.
    """
    if criterion not in _RANDOM_UNDER:
        return criterion, allocation
    if allocation not in (None, criterion):
        raise ValueError(f"allocation: criterion {criterion!r} is an allocation itself, expected none besides")
    return "random", criterion


@contextlib.contextmanager
def _gradients_on() -> Iterator[None]:
    """Gradients, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _batches(data: Data | None, criterion: str) -> list[Batch]:
    """The data as a checked list of batches; empty only for a criterion that needs none."""
    if data is None:
        if criterion in _NEEDS_DATA:
            raise ValueError(f"data: criterion {criterion!r} needs (images, labels), got None")
        return []
    batches: list[Batch] = [data] if _is_batch(data) else list(cast(Iterable[Batch], data))
    for position, batch in enumerate(batches):
        if not _is_batch(batch):
            raise ValueError(f"data: batch {position} is a {type(batch).__name__}, expected (images, labels)")
        x, y = batch
        if x.dim() < 2 or len(x) == 0 or y.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"data: batch {position} has images {tuple(x.shape)} and labels {tuple(y.shape)}, expected "
                "as many labels as images, at least one"
            )
    if not batches:
        raise ValueError("data: got no batches")
    return batches


def _is_batch(data: object) -> TypeGuard[Batch]:
    """A pair of tensors."""
    return (
        isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, torch.Tensor) for t in data)
    )


def _checked_input_shape(
    model: nn.Module, layers: Layers, given: Shape | None, batches: list[Batch]
) -> Shape:
    """One SynFlow input's shape, given, the data's or the model's, once the weights are known to be
    finite."""
    _finite(criterion_scores.magnitude(layers), [])
    return input_shape_of(model, tuple(batches[0][0].shape[1:]) if given is None and batches else given)


def _finite(scores: Tensors, batches: list[Batch]) -> Tensors:
    """The scores, or an error that names the layer, and the batch if that is to blame."""
    try:
        for name, score in scores.items():
            check_finite(name, score)
    except ValueError as error:
        for position, (x, _) in enumerate(batches):
            if not torch.isfinite(x).all():
                raise ValueError(f"{error}; images of batch {position} hold NaN or infinity") from error
        raise
    return scores
