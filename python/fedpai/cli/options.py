# SPDX-License-Identifier: Apache-2.0
"""Options that `fedpai run` and `fedpai compare` share: a run's settings, and the link that times are stated for."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedpai.federation.config import (
    ALLOCATIONS,
    COMPRESSIONS,
    DENSE_FORMATS,
    MASK_MODES,
    MERGE_RULES,
    SCORE_FORMATS,
    SERVER_OPTIMISERS,
    WIRE_FORMATS,
    ConfigError,
    RunConfig,
    option,
)
from fedpai.federation.link_speed import LinkSpeed, parse_rate

Parse = Callable[[str], Any]


def add_settings(parser: argparse.ArgumentParser, several: frozenset[str] = frozenset()) -> None:
    """The settings of a run, one option for each field of `RunConfig` but the baseline; absent unless given.

    Args:
        several: fields that take a comma-separated list here.
    """
    group: Any = None

    def add(flag: str, metavar: str, text: str, parse: Parse = str) -> None:
        if flag.removeprefix("--").replace("-", "_") in several:
            parse, metavar = _list_of(parse), f"{metavar},.."
        group.add_argument(flag, type=parse, metavar=metavar, help=text, default=argparse.SUPPRESS)

    group = parser.add_argument_group("what runs")
    add("--method", "NAME", "method to run (default fedpai-u); an unknown one lists all")
    add("--model", "NAME", "network (default resnet18)")
    add("--width", "X", "factor on the network's channel counts (1.0)", float)
    add("--sparsity", "S", "share of conv and linear weights removed (0.98)", float)
    add(
        "--budget",
        "WHAT",
        "what the sparsity is a share of: weights, or flops, the multiply-adds of one image (weights)",
    )
    add(
        "--structure",
        "NAME",
        "what is kept or removed together: weight, a block such as 16x1 or 8x8-taps, channel, 2:4, fan-in (weight)",
    )
    add("--criterion", "NAME", "how weights are scored before training (grasp)")
    add(
        "--allocation",
        "NAME",
        f"how layers share the kept weights: {', '.join(ALLOCATIONS)}, or time:X, at most X times the time of "
        "uniform (the criterion's own)",
    )
    add(
        "--mask-mode",
        "MODE",
        f"{' or '.join(MASK_MODES)}: one mask from averaged scores, or each client its own (shared)",
    )
    group = parser.add_argument_group("data and clients")
    add("--data", "NAME", "data set (fashion-mnist)")
    add("--data-root", "DIR", "folder with the data set's files (default: where it is installed, else ./data)")
    add("--clients", "K", "number of clients (10)", int)
    add("--sample", "M", "clients per round: a number, or a share like 0.1 (all)", _sample)
    add("--alpha", "A", "Dirichlet concentration over classes, or iid (iid)", _alpha)
    add("--max-images", "N", "images a client holds at most (absent: all)", int)
    add("--eval-images", "N", "test images after each round; 0 for all (2000)", int)
    group = parser.add_argument_group("training")
    add("--rounds", "R", "rounds (10)", int)
    add("--local-epochs", "E", "passes over a client's images per round (1)", int)
    add("--batch", "B", "images per step (32)", int)
    add("--lr", "X", "learning rate of SGD (0.05)", float)
    add("--momentum", "X", "momentum of SGD (0.9)", float)
    add("--weight-decay", "X", "weight decay of SGD (0.0005)", float)
    add("--seed", "N", "a run's only source of randomness (0)", int)
    add("--threads", "N", "CPU threads of torch and of the kernels (2)", int)
    add("--dense-format", "F", f"memory format of dense models: {', '.join(DENSE_FORMATS)}")
    group = parser.add_argument_group("particular methods")
    add("--prox-mu", "X", "fedprox: weight of the distance to the global model (0.01)", float)
    add("--prune-every", "R", "fedsparsify: rounds from one pruning to the next (1)", int)
    add(
        "--merge-rule",
        "RULE",
        f"fedsparsify-local: {' or '.join(MERGE_RULES)}, whose values a kept weight is averaged over (all)",
    )
    add("--threshold-penalty", "C", "spafl: weight of the penalty on thresholds (0.002)", float)
    add("--adjust-every", "R", "feddst: rounds between two changes of the masks (5)", int)
    add("--adjust-rate", "X", "feddst: share of the weights that the first one moves (0.3)", float)
    group = parser.add_argument_group("server and wire")
    add(
        "--server-opt",
        "NAME",
        f"the server's step towards the merged model: {', '.join(SERVER_OPTIMISERS)} (none: takes it as it is)",
    )
    add("--server-lr", "X", "learning rate of that step (1.0)", float)
    add("--server-momentum", "X", "its momentum, beta 1 (0.9)", float)
    add("--scores", "F", f"how scores travel before training: {' or '.join(SCORE_FORMATS)} (exact)")
    add("--wire", "F", f"how values travel: {', '.join(WIRE_FORMATS)}, rounded with error feedback (fp32)")
    add("--compress", "NAME", f"entropy coding of values: {', '.join(COMPRESSIONS)}; masks always have it (none)")


def explicit_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings among the parsed options, in the form that RunConfig has them."""
    explicit = {key: given[key] for key in RunConfig.__dataclass_fields__ if key in given}
    if explicit.get("eval_images") == 0:
        explicit["eval_images"] = None
    return explicit


def with_sample(asked: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """Turns a share of the clients into a number, in place. Absent means all of them, or what a resumed run has.

    Raises:
        ConfigError: a share of the clients of a resumed run, without their number.
    """
    share = asked.get("sample")
    if resume and share is None:
        return asked
    if resume and isinstance(share, float) and "clients" not in asked:
        raise ConfigError(f"--sample {share}: to resume, give the number of clients a round, or --clients beside it")
    clients = asked.get("clients", RunConfig.clients)
    if isinstance(share, float):
        asked["sample"] = max(1, round(share * clients))
    elif share is None and "clients" in asked:
        asked["sample"] = clients
    return asked


# ---- the link -------------------------------------------------------------------------------------------------------


def add_link(parser: argparse.ArgumentParser, up: str, down: str, target: str) -> None:
    """The link that times are stated for, and the accuracy that they are counted to; absent unless given.

    Args:
        up, down, target: what holds without the option, for the help text.
    """
    group = parser.add_argument_group("times over a link (reported only: they change nothing in a run)")

    def add(flag: str, metavar: str, text: str, parse: Parse) -> None:
        group.add_argument(flag, type=parse, metavar=metavar, help=text, default=argparse.SUPPRESS)

    add("--uplink", "RATE", f"from a client, such as 500KB/s, 1MB/s or 8Mbit/s ({up})", _rate)
    add("--downlink", "RATE", f"to a client ({down})", _rate)
    add("--device-slowdown", "X", "how many times slower than this machine a client's device is (1)", _positive)
    add("--target-accuracy", "A", f"count the time to this accuracy, a share such as 0.85 ({target})", _accuracy)


def link_of(given: dict[str, Any]) -> LinkSpeed | None:
    """The link among the parsed options of `fedpai run`; None if none was given.

    Raises:
        ConfigError: half of a link, or what means something beside a link only.
    """
    for here, other in (("uplink", "downlink"), ("downlink", "uplink")):
        if here in given and other not in given:
            raise ConfigError(f"{option(here)} needs {option(other)} as well")
    if "uplink" in given:
        return LinkSpeed(given["uplink"], given["downlink"], given.get("device_slowdown", 1.0))
    for key in ("device_slowdown", "target_accuracy"):
        if key in given:
            raise ConfigError(f"{option(key)} means nothing without --uplink and --downlink")
    return None


# ---- files and texts ------------------------------------------------------------------------------------------------


def check_writable(file: Path) -> None:
    """A result file that cannot be written is better known before hours of training.

    Raises:
        ConfigError: a folder, or a place where nothing can be written.
    """
    if file.is_dir():
        raise ConfigError(f"--json {file} is a folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"--json {file}: {file.parent} is no folder that can be written")


def _list_of(parse: Parse) -> Parse:
    """Values separated by commas, each once."""

    def values(text: str) -> list[Any]:
        words = [word.strip() for word in text.split(",")]
        if "" in words:
            raise argparse.ArgumentTypeError(f"got {text!r}, which has an empty place")
        found = [parse(word) for word in words]
        for at, (word, value) in enumerate(zip(words, found, strict=True)):
            if value in found[:at]:
                raise argparse.ArgumentTypeError(f"got {text!r}, which has {word} twice")
        return found

    values.__name__ = parse.__name__
    return values


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


def _alpha(text: str) -> float | None:
    """A concentration; None for iid."""
    try:
        return None if text == "iid" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a positive number or iid, got {text!r}") from None


def _rate(text: str) -> float:
    try:
        return parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _accuracy(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 1] such as 0.85, got {text}")
    return value
