# SPDX-License-Identifier: Apache-2.0
"""Channels that masks leave without use, through the whole network: found, so that they can be removed.

A channel can go where no kept weight reads it: whatever is computed for it reaches nobody. It can also go where all
that writes it is masked, without a bias or a norm that would make something of nothing: it is zero, and so is the
gradient of every weight that reads it. What goes is a row of the layers that write the channel, a column of those that
read it, and an entry of the norms in between; then more channels may be left without use.

The function, its gradients and the training of what stays are those of the masked network. Weights that a mask keeps
beside such a channel have no effect and no gradient there; they are set aside (:mod:`fedpai_kernels.nn.removed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod

from .channels import Channels, Reading, Value, plain_type, read_channels
from .deferred import has_foreign_hooks
from .masks import is_pruned
from .removed import Cut
from .trace import Traces

__all__ = ["Cuts", "find_cuts", "may_cut"]

Masks = Mapping[nn.Module, Tensor]
Filter = Callable[[nn.Module, str], bool]


@dataclass
class Cuts:
    """What can be removed.

    Attributes:
        of: what stays of each module that loses channels.
        notes: for the report.
    """

    of: dict[nn.Module, Cut] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def may_cut(masks: Masks) -> bool:
    """Whether any mask has an empty row or column; without one, nothing can be removed or cut off."""
    return any(not m.any(d).all() for m in map(_connections, masks.values()) for d in (0, 1))


def find_cuts(model: nn.Module, masks: Masks, wanted: Filter, traces: Traces) -> Cuts:
    """The channels that can be removed from `model`.

    Args:
        model: unchanged.
        masks: of its layers, of the weights' shapes; other layers keep all their weights.
        wanted: modules for which it is False keep all their channels.
        traces: of the model.

    Raises:
        ValueError: the masks leave no path from the input to the output; names the last layer where it breaks off.
    """
    if traces.failure:
        return Cuts(notes=[f"not compacted: {traces.failure}"])
    modules = dict(model.named_modules(remove_duplicate=False))
    hooked = [name for name, module in modules.items() if name and _is_watched(module)]
    reading = read_channels(traces, modules, _left_alone(model, wanted), hooked)
    connections = {m: _by_channel(m, masks.get(m), reading) for m in modules.values() if _is_layer(m)}
    for graph, values in reading.traces:
        _check_connected(graph, values, reading, modules, connections)
    return _cuts(model, reading, _kept(reading, connections))


def _is_layer(module: nn.Module) -> bool:
    return plain_type(module) in (nn.Conv2d, nn.Linear)


def _is_watched(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks
    if is_pruned(module) and all(isinstance(hook, BasePruningMethod) for hook in hooks.values()):
        return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
    return has_foreign_hooks(module)


# What a layer or norm may hold beside other modules.
_TENSORS = {"weight", "bias", "values", "weight_orig", "weight_mask"}
_TENSORS |= {"running_mean", "running_var", "num_batches_tracked"}


def _left_alone(model: nn.Module, wanted: Filter) -> set[nn.Module]:
    """Modules whose shapes must stay: left out by the caller, watched or changed by somebody, of shared parameters."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            holders[id(p)] = holders.get(id(p), 0) + (p is not None)
    return {
        module
        for name, module in model.named_modules()
        if (not module._modules and not wanted(module, name))
        or _is_watched(module)
        or "forward" in vars(module)
        or not {*module._parameters, *module._buffers} <= _TENSORS
        or any(holders[id(p)] > 1 for p in module._parameters.values())
    }


# ---- what is connected with what
# ---------------------------------------------------------------------------------------------


def _connections(mask: Tensor) -> Tensor:
    """(out, in) bool: whether any weight between these is kept."""
    mask = mask.detach().cpu()
    return mask.flatten(2).any(2) if mask.dim() > 2 else mask


def _by_channel(module: Any, mask: Tensor | None, reading: Reading) -> Tensor:
    """(outputs, channels) bool: the connections of a layer with the channels that it reads, else with its inputs."""
    if mask is not None:
        connected = _connections(mask)
    elif plain_type(module) is nn.Linear:
        connected = torch.ones(1, 1, dtype=torch.bool).expand(module.out_features, module.in_features)
    else:
        inputs = module.in_channels // module.groups
        connected = torch.ones(1, 1, dtype=torch.bool).expand(module.out_channels, inputs)
    channels = reading.read.get(module)
    return connected if channels is None else connected.reshape(len(connected), channels.size, -1).any(2)


def _check_connected(
    graph: fx.Graph,
    values: Mapping[fx.Node, Value],
    reading: Reading,
    modules: Mapping[str, nn.Module],
    connections: Mapping[nn.Module, Tensor],
) -> None:
    """Raises what :func:`find_cuts` raises."""
    reached: dict[fx.Node, Tensor] = {}  # for each channel; one element where the channels are not known
    broken = ""
    for node in graph.nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        given = [reached[n].any().reshape(1) for n in node.all_input_nodes]
        out = torch.stack(given).any(0) if given else torch.tensor([node.op == "placeholder"])
        if node in values and values[node].form != "shape":
            carried = [reached[n] for n in node.all_input_nodes if n in values]
            if module is not None and module in reading.written:
                known = carried and len(carried[0]) == connections[module].shape[1]
                out = (connections[module] & (carried[0] if known else out)).any(1)
            elif carried:
                out = torch.stack(carried).any(0)
                if module is not None and module in connections:  # depthwise
                    out = out & connections[module].any(1)
        if module is not None and not out.any() and any(g.any() for g in given):
            broken = str(node.target)
        if node.op == "output" and broken and not out.any():
            raise ValueError(
                f"masks: no path of kept weights leads through {broken!r} to the output: what it keeps reads only "
                "channels that nothing before it writes from the input"
            )
        reached[node] = out


# ---- what stays
# ---------------------------------------------------------------------------------------------


def _kept(reading: Reading, connections: Mapping[nn.Module, Tensor]) -> dict[Channels, Tensor]:
    """The channels that stay: bool, for each. Where nothing of a layer would be left, its channels are left as they are
    (and fixed)."""
    while True:
        kept = _settled(reading, connections)
        empty = [channels for channels, stay in kept.items() if not stay.any()]
        for module, written in reading.written.items():
            if not _rows(module, reading, connections, kept)[kept[written]].any():
                empty += [written, *filter(None, [reading.read.get(module)])]
        for channels in reading.channels:
            depthwise = [connections[m].any(1) for m in channels.carriers if m in connections]
            if not all(rows[kept[channels]].any() for rows in depthwise):
                empty.append(channels)
        if not empty:
            return kept
        for channels in empty:
            channels.fixed = True


def _settled(reading: Reading, connections: Mapping[nn.Module, Tensor]) -> dict[Channels, Tensor]:
    kept = {channels: torch.ones(channels.size, dtype=torch.bool) for channels in reading.channels}
    changed = True
    while changed:
        changed = False
        for channels in reading.channels:
            if channels.fixed:
                continue
            used = torch.zeros(channels.size, dtype=torch.bool)
            for module in channels.readers:
                used |= connections[module][kept[reading.written[module]]].any(0)
            if channels.keeps_zeros and all(m.bias is None for m in channels.writers):
                rows = [_rows(module, reading, connections, kept) for module in channels.writers]
                used &= torch.stack(rows).any(0)
            stay = kept[channels] & used
            changed |= not torch.equal(stay, kept[channels])
            kept[channels] = stay
    return kept


def _rows(
    module: nn.Module,
    reading: Reading,
    connections: Mapping[nn.Module, Tensor],
    kept: Mapping[Channels, Tensor],
) -> Tensor:
    """Which outputs of a layer are connected with inputs that stay."""
    read = reading.read.get(module)
    return (connections[module] if read is None else connections[module][:, kept[read]]).any(1)


def _cuts(model: nn.Module, reading: Reading, kept: Mapping[Channels, Tensor]) -> Cuts:
    outputs: dict[nn.Module, Tensor] = {}
    inputs: dict[nn.Module, Tensor] = {}
    for channels, stay in kept.items():
        if stay.all():
            continue
        for module in (*channels.writers, *channels.carriers):
            outputs[module] = _indexes(stay, _count(module, "num_features", channels.size))
        for module in channels.readers:
            inputs[module] = _indexes(stay, _count(module, "in_features", channels.size))
    cut = {m: Cut(outputs.get(m), inputs.get(m)) for m in model.modules() if m in outputs or m in inputs}
    layers = {name: m for name, m in model.named_modules() if _is_layer(m)}
    cut_layers = {name: m for name, m in layers.items() if m in outputs}
    if not cut:
        return Cuts()
    total = sum(_outputs(m) for m in layers.values())
    removed = sum(_outputs(m) - len(outputs[m]) for m in cut_layers.values())
    where = ", ".join(map(repr, cut_layers)) if len(cut_layers) <= 3 else f"{len(cut_layers)} of {len(layers)} layers"
    return Cuts(cut, [f"compacted: {removed} of {total} channels removed in {where}"])


def _outputs(module: Any) -> int:
    return int(module.out_features if plain_type(module) is nn.Linear else module.out_channels)


def _count(module: nn.Module, name: str, default: int) -> int:
    count: Any = getattr(module, name, default)
    return int(count)


def _indexes(stay: Tensor, count: int) -> Tensor:
    """Of the `count` features that the channels are, pixel by pixel: those that stay."""
    return stay.repeat_interleave(count // len(stay)).nonzero().squeeze(1)
