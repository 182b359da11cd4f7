# SPDX-License-Identifier: Apache-2.0
"""``fedpai tune``: measure on this machine which kernel is faster where; ``--check``: hold the choice against it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpai.bench.cli import positive


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the sub-command. Nothing heavy is imported before it runs.

    Args:
        subparsers: what ``ArgumentParser.add_subparsers`` returned.
    """
    parser = subparsers.add_parser(
        "tune",
        help="measure up to which density the sparse kernels win on this machine; conversions then choose by that",
        description="Measure, in less than a minute, up to which density the sparse kernels win on this machine, and "
        "keep it for all conversions with as many threads. --check measures a network's layers instead and lists what "
        "the choice costs.",
    )
    add = parser.add_argument
    add("--threads", type=positive, metavar="N", help="of torch and of the kernels (torch's default)")
    add("--seconds", type=float, metavar="S", help="measure for about so long (40; --check: 2 a layer)")
    add("--out", type=Path, metavar="FILE", help="write here, for FEDPAI_TUNING (a file in the user's cache)")
    add(
        "--check",
        action="store_true",
        help="time each layer's chosen kernel and the other one; writes no figures",
    )
    add("--model", default="resnet18", metavar="NAME", help="--check: network (resnet18)")
    add("--mask", default="grasp", metavar="KIND", help="--check: a criterion, as for fedpai bench (grasp)")
    add(
        "--mask-data",
        default="fashion-mnist",
        metavar="NAME",
        help="--check: images to score with (fashion-mnist)",
    )
    add(
        "--sparsity",
        type=float,
        default=0.98,
        metavar="S",
        help="--check: share of the weights removed (0.98)",
    )
    add("--batch", type=positive, default=64, metavar="N", help="--check: images (64)")
    add("--json", type=Path, metavar="FILE", help="also write what was measured to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print. 2: a mistake of the user, or a file that cannot be written."""
    import torch

    from fedpai import cli

    if args.seconds is not None and not args.seconds > 0:
        return cli.complain(f"--seconds: expected more than 0, got {args.seconds:g}")
    if args.check and args.out is not None:
        return cli.complain("--out: --check writes no figures")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        found = _check(args) if args.check else _tune(args)
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        return cli.complain(f"cannot write {error.filename} ({error.strerror})")
    except ValueError as error:  # TuningError and BenchError among them
        return cli.complain(error)
    return 0


def _tune(args: argparse.Namespace) -> dict[str, Any]:
    import fedpai_kernels
    from fedpai_kernels import tuning
    from fedpai_kernels.tuning.measure import SECONDS

    with Bar() as show:
        figures = fedpai_kernels.tune(args.out, seconds=args.seconds or SECONDS, progress=show)
    for name, density in figures.densities().items():
        print(
            f"{name:<12} sparse up to a density of {density:.2f} (built in: {tuning.BUILT_IN.densities()[name]:.2f})"
        )
    print(
        f"{'no mask':<12} sparse up to {figures.full_fan_in} weights per output "
        f"(built in: {tuning.BUILT_IN.full_fan_in})"
    )
    path = args.out if args.out is not None else tuning.state().path
    print(f"written to {path}; holds for {', '.join(f'{k} {v}' for k, v in tuning.facts().items())}")
    return {"break_even": figures.densities(), "full_fan_in": figures.full_fan_in, "machine": tuning.facts()}


def _check(args: argparse.Namespace) -> dict[str, Any]:
    from fedpai.bench import regret

    with Bar() as show:
        found = regret.measure(
            args.model, args.mask, args.sparsity, args.batch, args.mask_data, args.seconds or 2.0, show
        )
    regret.table(found).show()
    print(*regret.remarks(found), sep="\n")
    return found.to_json()


class Bar:
    """A progress bar on a terminal, nothing elsewhere. Entering it gives what to call with (share, text)."""

    def __enter__(self) -> Callable[[float, str], None]:
        """Starts it."""
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=100, file=sys.stderr, dynamic_ncols=True, leave=False, bar_format=_BAR)
        return self._move

    def _move(self, share: float, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text, refresh=False)
            self._bar.n = round(100 * share)
            self._bar.refresh()

    def __exit__(self, *error: object) -> None:
        """Removes it."""
        if self._bar is not None:
            self._bar.close()


_BAR = "{percentage:3.0f}% |{bar}| {elapsed} {desc}"
