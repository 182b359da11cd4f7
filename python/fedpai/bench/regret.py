# SPDX-License-Identifier: Apache-2.0
"""The choice between kernels against measurement: each layer of a network by the chosen kernel and by the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fedpai.bench import masks as bench_masks
from fedpai.bench.cases import LayerCase, case_of
from fedpai.bench.errors import BenchError
from fedpai.bench.step import INPUT_SHAPE, SEED, network_of
from fedpai.bench.table import Table, digits


@dataclass(frozen=True)
class LayerRegret:
    """One layer, forward and both gradients (of the first layer, without that of its input).

    Attributes:
        name, label: of the layer.
        density: of its mask.
        chosen: "sparse" or "dense".
        reason: of the choice.
        chosen_ms, other_ms: medians.
    """

    name: str
    label: str
    density: float
    chosen: str
    reason: str
    chosen_ms: float
    other_ms: float

    @property
    def lost_ms(self) -> float:
        """What the other kernel would save; 0 where the choice was right."""
        return max(0.0, self.chosen_ms - self.other_ms)


@dataclass(frozen=True)
class Regret:
    """All layers of a network.

    Attributes:
        setting: model, mask, sparsity, batch, threads, and the figures by which was chosen.
        layers: in the order in which they run.
    """

    setting: dict[str, Any]
    layers: list[LayerRegret]

    @property
    def share(self) -> float:
        """Time lost by wrong choices over the time of the best ones."""
        lost = sum(layer.lost_ms for layer in self.layers)
        return lost / (sum(layer.chosen_ms for layer in self.layers) - lost)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        layers = [asdict(layer) | {"lost_ms": layer.lost_ms} for layer in self.layers]
        return {**self.setting, "regret": self.share, "layers": layers}


def measure(
    model: str,
    mask: str,
    sparsity: float,
    batch: int,
    mask_data: str = bench_masks.SCORING_DATA,
    seconds: float = 2.0,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Regret:
    """Times every masked layer of a network by both kernels, in turns, at the figures that now hold.

    Args:
        model: of :mod:`fedpai.models`.
        mask: "uniform" or another kind of :func:`fedpai.bench.masks.network_masks`.
        sparsity: share of the weights that is removed.
        batch: images.
        mask_data: for criteria that score.
        seconds: for each layer, about.
        progress: told the share that is done, and what comes next.

    Raises:
        BenchError: an unknown name, or a value out of range.
        TuningError: FEDPAI_TUNING names a file that cannot be used.
    """
    from fedpai_kernels.nn import LayerInfo, choose_kernel
    from fedpai_kernels.tuning import break_evens
    from fedpai_kernels.tuning.measure import interleaved_medians, steps_of

    if not 0 <= sparsity < 1:
        raise BenchError(f"--sparsity: got {sparsity:g}, expected at least 0 and less than 1")
    bench_masks.check_kind(mask)
    figures = break_evens()
    network = network_of(model, seed=SEED)
    progress(0.0, "masks")
    masks, _ = bench_masks.network_masks(network, mask, sparsity, data=mask_data, seed=SEED)
    shapes = _input_shapes(network)
    names = [name for name in shapes if name in masks]
    found = []
    for number, name in enumerate(names):
        module = network.get_submodule(name)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        case = case_of(name, module, shapes[name])
        progress(number / len(names), f"{name} {case.label}")
        nnz = int(masks[name].sum())
        if nnz == 0:
            continue  # a layer that keeps nothing takes no kernel
        info = LayerInfo(_kind(case), case.weight_shape, nnz, case.groups, case.stride)
        choice = choose_kernel(info, figures)
        x = torch.randn(case.input_shape(batch), requires_grad=number > 0)
        medians = interleaved_medians(
            steps_of(module, masks[name], x, torch.randn(case.output_shape(batch))), seconds
        )
        other = "dense" if choice.kernel == "sparse" else "sparse"
        times = 1e3 * medians[choice.kernel], 1e3 * medians[other]
        found.append(LayerRegret(name, case.label, info.density, choice.kernel, choice.reason, *times))
    progress(1.0, "")
    setting = {
        "model": model,
        "mask": mask,
        "sparsity": sparsity,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "figures": f"{figures.source}: {figures}",
    }
    return Regret(setting, found)


def _kind(case: LayerCase) -> Any:
    return "linear" if case.kind == "linear" else "conv2d"


def _input_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every convolution and linear layer, in the order in which they run."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def note(module: nn.Module, given: tuple[torch.Tensor, ...], name: str = name) -> None:
                shapes.setdefault(name, tuple(given[0].shape))

            handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            network(torch.zeros(2, *INPUT_SHAPE))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def table(found: Regret) -> Table:
    """One line per layer."""
    setting = found.setting
    title = f"{setting['model']}, {setting['mask']} {100 * setting['sparsity']:g} %, batch {setting['batch']}"
    head = ["layer", "sizes", "chosen", "density", "chosen, ms", "other, ms", "lost, ms"]
    rows: list[Sequence[str]] = [
        [
            layer.name,
            layer.label,
            layer.chosen,
            f"{layer.density:.4f}",
            digits(layer.chosen_ms),
            digits(layer.other_ms),
            digits(layer.lost_ms) if layer.lost_ms else "-",
        ]
        for layer in found.layers
    ]
    return Table(head, rows, left=3, title=title)


def remarks(found: Regret) -> list[str]:
    """What all layers lose together, and by which figures was chosen."""
    wrong = [layer for layer in found.layers if layer.lost_ms]
    return [
        f"regret: {100 * found.share:.1f} % of the best choices' time; {len(wrong)} of {len(found.layers)} layers "
        f"would be faster by the other kernel, in this measurement",
        f"break-even densities, {found.setting['figures']}",
    ]
