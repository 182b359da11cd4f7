# SPDX-License-Identifier: Apache-2.0
"""Gathers what the report shows, as plain data; the page, the text table and the JSON rows all read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpai.bench.machine import identity
from fedpai.federation.files import write_atomic
from fedpai.federation.link_speed import LinkSpeed, LinkTimes, link_times
from fedpai.federation.runner import Run
from fedpai.federation.server import Server
from fedpai.report.profile import profile_layers
from fedpai.report.summary import MethodSummary, Ratios, compare, summarise

Row = dict[str, Any]
MARGIN = 0.01
"""How much less than dense FedAvg's final accuracy is good enough, unless a target is given: one point."""


@dataclass(frozen=True)
class Content:
    """All that a report says.

    Attributes:
        config, machine: settings and where it ran.
        rows: metrics, one a round and method.
        methods: totals, the method first, then the baseline.
        ratios: the method against the baseline, if there is one.
        link, times: the link that times are stated for, and each method's under it; None and nothing without one.
        notes: what `sparsify_` said about the modules around the layers.
        layers: one row per conv and linear layer of the sparse network: density, structure, kernel, why, and, where
            they were timed, milliseconds dense and sparse.
    """

    config: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row]
    methods: list[MethodSummary]
    ratios: Ratios | None
    link: LinkSpeed | None
    times: list[LinkTimes]
    layers: list[dict[str, Any]]
    notes: list[str]


def collect(
    run: Run,
    layers: list[dict[str, Any]] | None = None,
    link: LinkSpeed | None = None,
    target: float | None = None,
) -> Content:
    """Summarises a finished run.

    Args:
        layers: what `layer_profile` returned; without it the layer table has no times.
        link: what times are stated for; without it there are none.
        target: the accuracy that they are counted to; by default a point less than the baseline ends with.
    """
    methods = [summarise(arm.name, run.rows) for arm in run.arms]
    ratios = compare(methods[0], methods[1]) if len(methods) == 2 else None
    if target is None and len(methods) == 2 and methods[1].accuracy is not None:
        target = methods[1].accuracy - MARGIN
    of_method = [[row for row in run.rows if row["method"] == m.method] for m in methods]
    times = [] if link is None else [link_times(rows, link, target) for rows in of_method]
    config = run.config.to_json()
    server = _sparse_server(run)
    notes = [] if server is None else list(run.pool.get(_typical_mask(server)).report.notes)
    layers = layers or _layer_rows(run)
    return Content(config, identity(), run.rows, methods, ratios, link, times, layers, notes)


def layer_profile(run: Run, file: Path) -> list[dict[str, Any]]:
    """Times every layer of the run's sparse network against the dense one and keeps the result in a file.

    A run without a sparse method gives no rows. A file that is there already is read, not measured again.
    """
    if file.exists():
        stored: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return stored
    rows = _layer_rows(run)
    server = _sparse_server(run)
    if server is None:
        return rows
    floats, ints = server.dense()
    dense, sparse = run.pool.get(None), run.pool.get(_typical_mask(server))
    dense.load(floats, ints)
    x, _ = run.data.batch(run.partition[0][: run.config.batch])
    times = {time.name: time for time in profile_layers(dense.model, sparse.model, run.pool.images(dense, x))}
    for row in rows:
        time = times.get(row["name"])
        if time is not None:
            row.update(dense_ms=time.dense_ms, sparse_ms=time.sparse_ms, input=list(time.input))
    write_atomic(file, (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def _layer_rows(run: Run) -> list[dict[str, Any]]:
    """Density, structure, kernel and reason of each layer, as `sparsify_` reported them."""
    server = _sparse_server(run)
    if server is None:
        return []
    report = run.pool.get(_typical_mask(server)).report
    return [
        {
            "name": row.name,
            "kind": row.kind,
            "shape": list(row.shape),
            "nnz": row.nnz,
            "density": row.density,
            "structure": row.structure,
            "kernel": row.kernel,
            "reason": row.reason,
        }
        for row in report
    ]


def _sparse_server(run: Run) -> Server | None:
    servers = [arm.federation.server for arm in run.arms]
    return next((server for server in servers if server.mask is not None), None)


def _typical_mask(server: Server) -> Any:
    """The mask that clients train under; with personal ones, the first client's."""
    return server.client_masks[min(server.client_masks)] if server.client_masks else server.mask


def json_rows(content: Content) -> list[Row]:
    """Everything machine-readable; the field `row` says what each is: run, round, layer, method, time or ratios."""
    rows: list[Row] = [{"row": "run", "config": content.config, "machine": content.machine}]
    rows += [{"row": "round", **row} for row in content.rows]
    rows += [{"row": "layer", **layer} for layer in content.layers]
    rows += [{"row": "method", **method.to_json()} for method in content.methods]
    if content.link is not None:
        rows += [
            {"row": "time", "method": method.method, "link": content.link.to_json(), **times.to_json()}
            for method, times in zip(content.methods, content.times, strict=True)
        ]
    if content.ratios is not None:
        method, baseline = content.methods
        rows.append(
            {
                "row": "ratios",
                "method": method.method,
                "baseline": baseline.method,
                **content.ratios.to_json(),
            }
        )
    return rows


def text(content: Content) -> str:
    """The result as a plain table."""
    lines = [
        f"{'method':<18} {'accuracy':>9} {'personal':>9} {'density':>8} {'up/client':>11} {'down/client':>12}"
        f" {'step':>9} {'compute':>9}"
    ]
    for m in content.methods:
        accuracy, personal = (
            "-" if value is None else f"{100 * value:.2f} %" for value in (m.accuracy, m.personal_accuracy)
        )
        step = "-" if m.step_ms is None else f"{m.step_ms:.1f} ms"
        lines.append(
            f"{m.method:<18} {accuracy:>9} {personal:>9} {100 * m.density:>6.2f} %"
            f" {m.uplink / 1e6:>8.3f} MB {m.downlink / 1e6:>9.3f} MB {step:>9} {m.compute_seconds:>7.1f} s"
        )
    lines += [
        f"{m.method}: {100 * m.held_accuracy:.2f} % over all clients, each by the model it holds"
        for m in content.methods
        if m.held_accuracy is not None
    ]
    if content.ratios is not None:
        lines += ["", *_ratio_lines(content.methods[0], content.methods[1], content.ratios)]
    if content.link is not None:
        lines += ["", f"over a link of {content.link}, a round as long as its slowest client's:"]
        lines += [_time_line(m.method, t) for m, t in zip(content.methods, content.times, strict=True)]
    return "\n".join(lines)


def _time_line(method: str, times: LinkTimes) -> str:
    line = f"  {method:<18} {times.seconds:.1f} s in all"
    if times.target is None:
        return line
    for whose, seconds, round in (
        ("", times.target_seconds, times.target_round),
        (" personalised", times.personal_target_seconds, times.personal_target_round),
    ):
        if seconds is not None:
            line += f"; {100 * times.target:.2f} %{whose} after {seconds:.1f} s, in round {round}"
        elif not whose:
            line += f"; {100 * times.target:.2f} % not reached"
    return line


def _ratio_lines(method: MethodSummary, baseline: MethodSummary, ratios: Ratios) -> list[str]:
    lines = [f"{method.method} against {baseline.method}, {method.rounds} rounds each:"]
    if ratios.accuracy_gap is not None:
        lines.append(f"  accuracy                    {ratios.accuracy_gap:+.2f} points")
    if ratios.compute_per_step is not None:
        lines.append(
            f"  compute per training step   {ratios.compute_per_step:.2f} x faster (median of full batches)"
        )
    if ratios.uplink is not None and ratios.uplink_with_setup is not None:
        lines.append(
            f"  bytes up, per round         {100 * ratios.uplink:.2f} %"
            f" ({100 * ratios.uplink_with_setup:.2f} % of this run's total with choosing the mask counted in)"
        )
    if ratios.downlink is not None and ratios.downlink_with_setup is not None:
        lines.append(
            f"  bytes down, per round       {100 * ratios.downlink:.2f} %"
            f" ({100 * ratios.downlink_with_setup:.2f} % with it)"
        )
    return lines
