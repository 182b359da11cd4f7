# SPDX-License-Identifier: Apache-2.0
"""Tables: plain text, Markdown, and in colour where `rich` is installed and somebody looks."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """Text in rows and columns.

    Attributes:
        head: column titles.
        rows: cells; as many as titles.
        left: how many columns, from the left, are aligned to the left.
        title: above the table.
    """

    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    left: int = 1
    title: str = ""

    def to_text(self) -> str:
        """Columns set apart by spaces."""
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.head, *self.rows)
        ]
        return "\n".join([self.title, *lines] if self.title else lines)

    def to_markdown(self) -> str:
        """A pipe table; the title is left to the document."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.head))]
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.head, rule, *self.rows))

    def show(self) -> None:
        """Prints it."""
        if not sys.stdout.isatty() or not importlib.util.find_spec("rich"):
            print(self.to_text())
            return
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title or None, title_justify="left", header_style="bold")
        for i, name in enumerate(self.head):
            table.add_column(name, justify="left" if i < self.left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        if (
            console.measure(table).minimum > console.width
        ):  # rich would cut cells; a terminal only wraps lines
            print(self.to_text())
        else:
            console.print(table)


def bar(share: float, width: int) -> str:
    """A bar of a share of the width; what is above the whole ends in a plus."""
    filled = round(max(0.0, share) * width)
    return "█" * width + "+" if filled > width else ("█" * filled).ljust(width, "·")


def milliseconds(value: float | None) -> str:
    """Three significant digits; a dash for None."""
    return "-" if value is None else digits(value)


def ratio(value: float | None) -> str:
    """A speed-up, e.g. ``3.4x``."""
    return "-" if value is None else f"{digits(value, 2)}x"


def digits(value: float, significant: int = 3) -> str:
    """A number with so many significant digits and no exponent; whole numbers keep all theirs."""
    if value <= 0:
        return f"{value:g}"
    return f"{value:.{max(0, significant - 1 - math.floor(math.log10(value)))}f}"
