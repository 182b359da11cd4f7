# SPDX-License-Identifier: Apache-2.0
"""`fedpai run`: one federated run, or one beside a baseline, with a report."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedpai.federation.config import (
    ALLOCATIONS,
    COMPRESSIONS,
    DENSE_FORMATS,
    MASK_MODES,
    MERGE_RULES,
    PRESETS,
    SERVER_OPTIMISERS,
    WIRE_FORMATS,
    ConfigError,
    RunConfig,
    one_of,
    option,
)

if TYPE_CHECKING:
    from fedpai.federation.runner import Run

EPILOG = """examples:
  fedpai run --preset demo --out runs/demo              ResNet18 at 98 % against dense FedAvg, with a report
  fedpai run --method fedpai-u --baseline fedavg --model vgg16 --sparsity 0.95 --alpha 0.5 --rounds 20
  fedpai run --resume --out runs/demo                   go on after an interruption

Three speeds are reported and never merged: seconds of client compute per training step, bytes on the wire,
and (once a link speed is given) time to an accuracy."""


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
    what = parser.add_argument_group("what runs")
    what.add_argument(
        "--method", metavar="NAME", help="method to run (default fedpai-u); an unknown one lists all"
    )
    what.add_argument("--baseline", metavar="NAME", help="second method for the same rounds, for comparison")
    what.add_argument("--model", metavar="NAME", help="network (default resnet18)")
    what.add_argument("--width", type=float, metavar="X", help="factor on the network's channel counts (1.0)")
    what.add_argument(
        "--sparsity", type=float, metavar="S", help="share of conv and linear weights removed (0.98)"
    )
    what.add_argument(
        "--budget",
        metavar="WHAT",
        help="what the sparsity is a share of: weights, or flops, the multiply-adds of one image (weights)",
    )
    what.add_argument(
        "--structure",
        metavar="NAME",
        help="what is kept or removed together: weight, a block such as 16x1 or 8x8-taps, channel, 2:4, fan-in "
        "(weight)",
    )
    what.add_argument("--criterion", metavar="NAME", help="how weights are scored before training (grasp)")
    what.add_argument(
        "--allocation",
        metavar="NAME",
        help=f"how layers share the kept weights: {', '.join(ALLOCATIONS)}, or time:X, at most X times the time of "
        "uniform (the criterion's own)",
    )
    what.add_argument(
        "--mask-mode",
        metavar="MODE",
        help=f"{' or '.join(MASK_MODES)}: one mask from averaged scores, or each client its own (shared)",
    )
    data = parser.add_argument_group("data and clients")
    data.add_argument("--data", metavar="NAME", help="data set (fashion-mnist)")
    data.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder with the data set's files (default: where it is installed, else ./data)",
    )
    data.add_argument("--clients", type=int, metavar="K", help="number of clients (10)")
    data.add_argument(
        "--sample", type=_sample, metavar="M", help="clients per round: a number, or a share like 0.1 (all)"
    )
    data.add_argument(
        "--alpha", type=float, metavar="A", help="Dirichlet concentration over classes (absent: IID)"
    )
    data.add_argument(
        "--max-images", type=int, metavar="N", help="images a client holds at most (absent: all)"
    )
    length = parser.add_argument_group("training")
    length.add_argument("--rounds", type=int, metavar="R", help="rounds (10)")
    length.add_argument(
        "--local-epochs", type=int, metavar="E", help="passes over a client's images per round (1)"
    )
    length.add_argument("--batch", type=int, metavar="B", help="images per step (32)")
    length.add_argument("--lr", type=float, metavar="X", help="learning rate of SGD (0.05)")
    length.add_argument("--momentum", type=float, metavar="X", help="momentum of SGD, fresh each round (0.9)")
    length.add_argument("--weight-decay", type=float, metavar="X", help="weight decay of SGD (0.0005)")
    length.add_argument("--seed", type=int, metavar="N", help="the run's only source of randomness (0)")
    length.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of torch and of the kernels (2)"
    )
    length.add_argument(
        "--dense-format", metavar="F", help=f"memory format of dense models: {', '.join(DENSE_FORMATS)}"
    )
    particular = parser.add_argument_group("particular methods")
    particular.add_argument(
        "--prox-mu", type=float, metavar="X", help="fedprox: weight of the distance to the global model (0.01)"
    )
    particular.add_argument(
        "--prune-every", type=int, metavar="R", help="fedsparsify: rounds from one pruning to the next (1)"
    )
    particular.add_argument(
        "--merge-rule",
        metavar="RULE",
        help=f"fedsparsify-local: {' or '.join(MERGE_RULES)}, whose values a kept weight is averaged over (all)",
    )
    particular.add_argument(
        "--threshold-penalty", type=float, metavar="C", help="spafl: weight of the penalty on thresholds (0.002)"
    )
    particular.add_argument(
        "--adjust-every", type=int, metavar="R", help="feddst: rounds between two changes of the masks (5)"
    )
    particular.add_argument(
        "--adjust-rate", type=float, metavar="X", help="feddst: share of the weights that the first one moves (0.3)"
    )
    server = parser.add_argument_group("server and wire")
    server.add_argument(
        "--server-opt",
        metavar="NAME",
        help=f"the server's step towards the merged model: {', '.join(SERVER_OPTIMISERS)} (none: takes it as it is)",
    )
    server.add_argument("--server-lr", type=float, metavar="X", help="learning rate of that step (1.0)")
    server.add_argument("--server-momentum", type=float, metavar="X", help="its momentum, beta 1 (0.9)")
    server.add_argument(
        "--wire", metavar="F", help=f"how values travel: {', '.join(WIRE_FORMATS)}, rounded with error feedback (fp32)"
    )
    server.add_argument(
        "--compress", metavar="NAME", help=f"entropy coding of messages: {', '.join(COMPRESSIONS)} (none)"
    )
    result = parser.add_argument_group("results")
    result.add_argument(
        "--eval-images", type=int, metavar="N", help="test images after each round; 0 for all (2000)"
    )
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
    from fedpai.data import DataError
    from fedpai.federation.folder import FolderError
    from fedpai.methods.base import MethodError

    earlier = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments)
    except (ConfigError, DataError, FolderError, MethodError) as error:
        return cli.complain(error)
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _run(arguments: argparse.Namespace) -> int:
    given = vars(arguments).copy()
    resume, json_file = given.pop("resume", False), given.pop("json", None)
    profile = not given.pop("no_profile", False)
    out: Path | None = given.pop("out", None)
    explicit = explicit_settings(given)
    asked = settings(explicit, given.get("preset"))
    if json_file is not None:
        _check_writable(json_file)
    if resume and out is None:
        raise ConfigError("--resume needs --out DIR, the folder of the run to go on with")
    base = RunConfig() if resume else configure(asked, explicit)
    folder = out or _next_free(Path("runs"))

    from fedpai.federation.progress import for_stream
    from fedpai.federation.runner import open_run

    run_ = open_run(folder, asked, resume=resume, base=base, progress=for_stream())
    print(f"run folder: {folder}", file=sys.stderr)
    try:
        run_.finish()
    except KeyboardInterrupt:
        return _interrupted(run_, folder)
    return _results(run_, folder, json_file, profile)


def explicit_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings among the parsed options, in the form that RunConfig has them."""
    explicit = {key: given[key] for key in RunConfig.__dataclass_fields__ if key in given}
    if explicit.get("eval_images") == 0:
        explicit["eval_images"] = None
    return explicit


def settings(explicit: dict[str, Any], preset: str | None) -> dict[str, Any]:
    """What was asked for: the preset's settings, overridden by explicit ones.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset is None:
        return _with_sample(dict(explicit))
    one_of("preset", preset, list(PRESETS))
    return _with_sample({**PRESETS[preset], **explicit})


def _with_sample(asked: dict[str, Any]) -> dict[str, Any]:
    """Turns a share of the clients into a number. Absent means all of them."""
    share = asked.get("sample")
    clients = asked.get("clients", RunConfig.clients)
    if isinstance(share, float):
        asked["sample"] = max(1, round(share * clients))
    elif share is None and "clients" in asked:
        asked["sample"] = clients
    return asked


def configure(asked: dict[str, Any], explicit: dict[str, Any]) -> RunConfig:
    """The configuration of a new run.

    Raises:
        ConfigError: a value that cannot be, or an explicit option that none of the methods uses.
    """
    from fedpai import methods

    config = RunConfig(**asked)
    used = frozenset().union(*(methods.create(name, config).uses for name in config.arms))
    particular = frozenset().union(*(methods.METHODS[name].uses for name in methods.names()))
    for key in sorted((particular & explicit.keys()) - used):
        raise ConfigError(f"{option(key)} means nothing to {' and '.join(config.arms)}")
    return config


def _results(run_: Run, folder: Path, json_file: Path | None, profile: bool) -> int:
    from fedpai import report

    layers = None
    if profile:
        print("timing every layer alone, dense and sparse", file=sys.stderr)
        layers = report.layer_profile(run_, folder / "profile.json")
    content = report.collect(run_, layers)
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


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM stops a run the way Ctrl-C does."""
    raise KeyboardInterrupt


def _check_writable(file: Path) -> None:
    """A result file that cannot be written is better known before hours of training."""
    if file.is_dir():
        raise ConfigError(f"--json {file} is a folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"--json {file}: {file.parent} is no folder that can be written")


def _next_free(parent: Path) -> Path:
    number = 1
    while (parent / f"{number:03d}").exists():
        number += 1
    return parent / f"{number:03d}"


def _sample(text: str) -> int | float:
    """ "10" is a number of clients, "0.1" a share of them."""
    try:
        if "." not in text:
            return int(text)
        share = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of clients nor a share") from None
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"a share of clients must lie in (0, 1], got {text}")
    return share
