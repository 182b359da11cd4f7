# SPDX-License-Identifier: Apache-2.0
"""The tables of a comparison, for the terminal and for the page."""

from __future__ import annotations

from fedpai.bench.table import Table, digits, ratio
from fedpai.compare.grid import partition
from fedpai.compare.results import Entry, Section, Spread


def title(section: Section) -> str:
    """Network and partition."""
    alpha = "IID" if section.alpha is None else f"Dirichlet {section.alpha:g}"
    return f"{section.model}, {alpha}"


def anchor(section: Section) -> str:
    """The same as one word."""
    return f"{section.model}-{partition(section.alpha)}"


def target(section: Section) -> str:
    """The accuracy that times are counted to."""
    return "target" if section.target is None else f"{100 * section.target:.2f} %"


def table(section: Section) -> Table:
    """One line an entry: accuracies, and the three speeds beside each other."""
    personal = section.personal
    head = ["method", "kept, %", "accuracy, %", "over fedavg"]
    head += ["personalised, %"] if personal else []
    head += ["up, MB", "of fedavg", "down, MB", "step, ms", "faster", f"to {target(section)}, s", "sooner"]
    head += ["personalised, s"] if personal else []
    seeds = f"mean ± standard deviation over {section.seeds} seeds" if section.seeds > 1 else "one seed"
    return Table(head, [_line(entry, personal) for entry in section.entries], title=f"{title(section)}: {seeds}")


def _line(entry: Entry, personal: bool) -> list[str]:
    cells = [entry.label, _kept(entry.density), percent(entry.accuracy)]
    cells.append("-" if entry.accuracy_gap is None else f"{entry.accuracy_gap:+.2f}")
    cells += [percent(entry.personal_accuracy)] if personal else []
    cells += [_mean(entry.uplink, 1e-6), "-" if entry.uplink_share is None else f"{100 * entry.uplink_share:.2f} %"]
    cells += [_mean(entry.downlink, 1e-6), _measured(entry.step_ms), ratio(entry.step_speed)]
    cells += [_reached(entry.target_seconds), ratio(entry.sooner)]
    return cells + ([_reached(entry.personal_target_seconds)] if personal else [])


def percent(spread: Spread | None) -> str:
    """A share with its deviation, two digits after the point."""
    if spread is None:
        return "-"
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.2f}"
    return f"{100 * spread.mean:.2f}{deviation}"


def _kept(spread: Spread | None) -> str:
    return "-" if spread is None else f"{100 * spread.mean:.4g}"


def _mean(spread: Spread | None, factor: float) -> str:
    return "-" if spread is None else digits(factor * spread.mean)


def _measured(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return digits(spread.mean) + ("" if spread.deviation is None else f" ± {digits(spread.deviation, 2)}")


def _reached(spread: Spread | None) -> str:
    """A time; with the number of seeds that never got there."""
    missing = spread.missing if spread else 0
    return _measured(spread) + (f" ({missing} not)" if missing else "")
