# SPDX-License-Identifier: Apache-2.0
"""`fedpai run`: one federated run, or one beside a baseline, with a report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpai.cli.options import (
    add_link,
    add_settings,
    check_writable,
    explicit_settings,
    link_of,
    with_sample,
)
from fedpai.federation.config import PRESETS, ConfigError, RunConfig, one_of
from fedpai.federation.link_speed import LinkSpeed

if TYPE_CHECKING:
    from fedpai.federation.runner import Run

EPILOG = """examples:
  fedpai run --preset demo --out runs/demo              ResNet18 at 98 % against dense FedAvg, with a report
  fedpai run --method fedpai-u --baseline fedavg --model vgg16 --sparsity 0.95 --alpha 0.5 --rounds 20
  fedpai run --resume --out runs/demo                   go on after an interruption
  fedpai run --resume --out runs/demo --uplink 1MB/s --downlink 10MB/s    report a finished run again, with times

Three speeds are reported and never merged: seconds of client compute per training step, bytes on the wire,
and (once a link speed is given) time to an accuracy. `fedpai compare` runs whole grids."""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Registers the sub-command."""
    parser = subparsers.add_parser(
        "run",
        help="train federatedly, sparse and dense, and write a report",
        description="Train a network federatedly; write a run folder with metrics, checkpoints and a report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--preset", metavar="NAME", help=f"start from a named bundle of settings: {', '.join(PRESETS)}")
    add("--baseline", metavar="NAME", help="second method for the same rounds, for comparison")
    add_settings(parser)
    add_link(parser, "absent: no times", "absent: no times", "a point less than the baseline ends with")
    result = parser.add_argument_group("results")
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: the next free runs/NNN)"
    )
    result.add_argument("--resume", action="store_true", help="go on with the run in --out")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write rows and summary as JSON lines")
    result.add_argument(
        "--no-profile", action="store_true", help="skip the timing of single layers in the report"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs or resumes, prints the comparison, writes the report. Returns the exit code."""
    from fedpai import cli

    return cli.federated(_run, arguments)


def _run(arguments: argparse.Namespace) -> int:
    given = vars(arguments).copy()
    resume, json_file = given.pop("resume", False), given.pop("json", None)
    profile = not given.pop("no_profile", False)
    out: Path | None = given.pop("out", None)
    link = link_of(given)
    explicit = explicit_settings(given)
    asked = settings(explicit, given.get("preset"), resume)
    if json_file is not None:
        check_writable(json_file)
    if resume and out is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to go on with")
    base = RunConfig() if resume else configure(asked, explicit)
    folder = out or _next_free(Path("runs"))

    from fedpai.federation.progress import for_stream
    from fedpai.federation.runner import open_run

    with open_run(folder, asked, resume=resume, base=base, progress=for_stream()) as run_:
        print(f"run folder: {folder}", file=sys.stderr)
        try:
            run_.finish()
        except KeyboardInterrupt:
            return _interrupted(run_, folder)
        return _results(run_, folder, json_file, profile, link, given.get("target_accuracy"))


def settings(explicit: dict[str, Any], preset: str | None, resume: bool = False) -> dict[str, Any]:
    """What was asked for: the preset's settings, overridden by explicit ones.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset is None:
        return with_sample(dict(explicit), resume)
    one_of("preset", preset, list(PRESETS))
    return with_sample({**PRESETS[preset], **explicit}, resume)


def configure(asked: dict[str, Any], explicit: dict[str, Any]) -> RunConfig:
    """The configuration of a new run.

    Raises:
        ConfigError: a value that cannot be, or an explicit option that none of the methods uses.
    """
    from fedpai import methods

    config = RunConfig(**asked)
    for name in config.arms:
        methods.create(name, config)
    methods.refuse_unused(explicit, config.arms, config.server_opt)
    return config


def _results(
    run_: Run, folder: Path, json_file: Path | None, profile: bool, link: LinkSpeed | None, target: float | None
) -> int:
    from fedpai import report

    layers = None
    if profile:
        print("timing every layer alone, dense and sparse", file=sys.stderr)
        layers = report.layer_profile(run_, folder / "profile.json")
    content = report.collect(run_, layers, link, target)
    page = report.write(content, folder / "report.html")
    if json_file is not None:
        lines = [json.dumps(row) + "\n" for row in report.json_rows(content)]
        json_file.write_text("".join(lines), encoding="utf-8")
    print(report.text(content))
    print(f"report: {page}")
    return 0


def _interrupted(run_: Run, folder: Path) -> int:
    from fedpai import cli

    saved = ", ".join(f"{arm.name} {max(0, arm.done)}" for arm in run_.arms)
    print(
        f"\nstopped; finished rounds are saved ({saved} of {run_.config.rounds}).\n"
        f"go on with: fedpai run --resume --out {folder}",
        file=sys.stderr,
    )
    return cli.INTERRUPTED


def _next_free(parent: Path) -> Path:
    number = 1
    while (parent / f"{number:03d}").exists():
        number += 1
    return parent / f"{number:03d}"
