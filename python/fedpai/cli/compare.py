# SPDX-License-Identifier: Apache-2.0
"""`fedpai compare`: a grid of runs, one after the other or side by side, and one report on all of them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpai.cli.options import add_link, add_settings, check_writable, explicit_settings, with_sample
from fedpai.compare.grid import AXES
from fedpai.compare.presets import PRESETS
from fedpai.compare.progress import GridProgress
from fedpai.federation.config import ConfigError, one_of

if TYPE_CHECKING:
    from fedpai.compare.study import Study

TIMES = {"uplink": "uplink", "downlink": "downlink", "device_slowdown": "slowdown", "target_accuracy": "target"}
"""Options that say what times are stated for, and what a grid calls them."""

EPILOG = """examples:
  fedpai compare --preset fashion-smoke --out runs/smoke       minutes
  fedpai compare --preset study --threads 1 --jobs 2 --out runs/study      an hour: FedPaI-U against dense FedAvg
  fedpai compare --method fedavg,fedpai-u --sparsity 0.9,0.98 --alpha iid,0.5 --seed 0,1,2 --out runs/grid
  fedpai compare --resume --out runs/grid                      go on; finished cells are kept
  fedpai compare --resume --out runs/grid --seed 0,1,2,3       the same with another seed

Options marked NAME,.. take lists; every combination that means something to a method is one run. All others are
as for `fedpai run` and hold for all runs."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Registers the sub-command."""
    parser = subparsers.add_parser(
        "compare",
        help="run a grid of methods, sparsities, partitions and seeds, and compare them",
        description="Run a grid of methods, sparsities, partitions and seeds, and compare them in one report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--preset", metavar="NAME", help=f"start from a named grid: {', '.join(PRESETS)}")
    add_settings(parser, frozenset(AXES))
    add_link(parser, "1MB/s", "10MB/s", "a point less than dense FedAvg ends with, on the same data")
    result = parser.add_argument_group("results")
    result.add_argument("--out", type=Path, metavar="DIR", help="folder of the grid and its runs (needed)")
    result.add_argument("--resume", action="store_true", help="go on with the grid in --out")
    result.add_argument("--jobs", type=int, metavar="N", help="runs side by side, of --threads each (1)")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write rows and summary as JSON lines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs or resumes a grid, prints the tables, writes the report. Returns the exit code."""
    from fedpai import cli

    return cli.federated(_run, arguments)


def _run(arguments: argparse.Namespace) -> int:
    from fedpai import cli
    from fedpai.compare.study import Grid, Study
    from fedpai.compare.workers import WorkerError

    given = vars(arguments)
    out: Path | None = given.get("out")
    json_file: Path | None = given.get("json")
    if json_file is not None:
        check_writable(json_file)
    if out is None:
        raise ConfigError("--out DIR is needed, the folder that the grid's runs go to")
    axes, settings = asked(explicit_settings(given), given.get("preset"), bool(given.get("resume")))
    explicit = frozenset(explicit_settings(given))
    grid = Grid(axes, settings, {field: given[key] for key, field in TIMES.items() if key in given})
    study = (Study.reopen if given.get("resume") else Study.create)(out, grid, explicit, given.get("jobs", 1))
    with study.held():
        done = len(study.finished())
        print(f"folder: {out}, {len(study.cells)} runs, {done} finished", file=sys.stderr)
        progress = GridProgress(sys.stderr, len(study.cells), done)
        try:
            study.finish(progress)
        except KeyboardInterrupt:
            return _interrupted(study)
        except WorkerError as error:
            return cli.complain(error)
        finally:
            progress.close()
        return _results(study, json_file)


def asked(
    explicit: dict[str, Any], preset: str | None, resume: bool = False
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Axes and settings: the preset's, overridden by explicit ones.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset is not None:
        one_of("preset", preset, list(PRESETS))
        explicit = {**PRESETS[preset], **explicit}
    axes = {key: value for key, value in explicit.items() if key in AXES}
    settings = {key: value for key, value in explicit.items() if key not in AXES}
    return axes, with_sample(settings, resume)


def _interrupted(study: Study) -> int:
    from fedpai import cli

    print(
        f"\nstopped; {len(study.finished())} of {len(study.cells)} runs are finished and kept, and so are the finished "
        f"rounds of the next.\ngo on with: fedpai compare --resume --out {study.path}",
        file=sys.stderr,
    )
    return cli.INTERRUPTED


def _results(study: Study, json_file: Path | None) -> int:
    from fedpai.compare import results, tables

    rows = study.save()
    found = results.sections(rows)
    if json_file is not None:
        about: results.Row = {"row": "grid", **asdict(study.grid)}
        json_file.write_text(results.to_lines([about, *rows, *results.entry_rows(found)]), encoding="utf-8")
    print(f"times over a link of {study.grid.link}, a round as long as its slowest client's")
    for section in found:
        print()
        tables.table(section).show()
    print(f"\nreport: {study.path / 'report.html'}")
    return 0
