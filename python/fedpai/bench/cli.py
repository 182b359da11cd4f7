# SPDX-License-Identifier: Apache-2.0
"""`fedpai bench layers` and `fedpai bench step`, and what all of `fedpai bench` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpai.bench.machine import MachineModel
    from fedpai.bench.rows import Row
    from fedpai.bench.step import Settings
    from fedpai.bench.timing import Effort

_RIVALS = "dense,sparseprop,torch.sparse"
_STEP_RIVALS = "dense,sparseprop"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Registers the sub-command. Nothing heavy is imported before it runs."""
    from fedpai.bench import aggregate_cli  # which needs what is defined here

    bench = subparsers.add_parser(
        "bench",
        help="measure layers, whole training steps or merging against dense torch and other sparse kernels",
        description="Measure layers, whole training steps or the server's merging against dense torch and other "
        "sparse kernels.",
    )
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="layers|step|aggregate")
    _add_layers(kinds)
    _add_step(kinds)
    aggregate_cli.add_parser(kinds)


def _add_layers(kinds: argparse._SubParsersAction[Any]) -> None:
    parser = kinds.add_parser(
        "layers",
        help="every convolution of a network: forward and both gradients",
        description="Time every convolution of a network, forward and both gradients, all contenders in turn.",
    )
    add = parser.add_argument
    _add_common(parser, _RIVALS)
    add(
        "--model",
        type=words,
        default=["resnet18"],
        metavar="NAME,..",
        help="networks, CSV files of layers, or transformer: linear layers of ViT-Base (resnet18)",
    )
    add(
        "--density",
        type=numbers,
        default=[0.1, 0.05, 0.02, 0.01],
        metavar="D,..",
        help="share of the weights that is kept (0.1,0.05,0.02,0.01)",
    )
    add(
        "--layers",
        type=words,
        default=[],
        metavar="PATTERN,..",
        help="only layers whose name or sizes match, such as layer1* or 3x3/2",
    )
    add(
        "--directions",
        type=words,
        default=["forward", "input-grad", "weight-grad", "train"],
        metavar="D,..",
        help="forward, input-grad, weight-grad, backward (both gradients), train; default all but backward",
    )
    add("--kinds", type=words, default=["conv2d"], metavar="K,..", help="conv2d, linear (conv2d)")
    add("--compile", action="store_true", help="also try dense torch compiled")
    add(
        "--roofline",
        action="store_true",
        help="also show which share of the machine's bound each layer reaches, and the median over the layers",
    )
    add("--cold", action="store_true", help="empty the caches before each sample")
    add(
        "--precision",
        choices=["f32", "tf32", "bf16"],
        default="f32",
        help="with --device cuda: all in float32; dense torch in TF32; images and dense weights in bfloat16 (f32)",
    )
    parser.set_defaults(run=guarded(_layers))


def _add_step(kinds: argparse._SubParsersAction[Any]) -> None:
    parser = kinds.add_parser(
        "step",
        help="whole training steps",
        description="Time whole training steps (forward, cross-entropy, backward, SGD), all contenders in turn.",
    )
    add = parser.add_argument
    _add_common(parser, _STEP_RIVALS)
    add("--model", type=words, default=["resnet18"], metavar="NAME,..", help="networks (resnet18)")
    add(
        "--sparsity",
        type=numbers,
        default=[0.98],
        metavar="S,..",
        help="share of the weights removed (0.98)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--profile",
        action="store_true",
        help="no comparison: where the time of our step goes, part by part and layer by layer",
    )
    instead.add_argument(
        "--memory",
        action="store_true",
        help="no times: how much memory training takes at its peak, ours against dense torch eager, each in a "
        "process of its own",
    )
    add("--no-compile", dest="compiled", action="store_false", help="do not try dense torch compiled")
    add(
        "--activation-dtype",
        choices=["bf16"],
        help="also train ours with what the backward pass needs kept in bfloat16 (kept as it is)",
    )
    parser.set_defaults(run=guarded(_step))


def _add_common(parser: argparse.ArgumentParser, rivals: str) -> None:
    add = parser.add_argument
    add_mask(parser)
    add(
        "--structure",
        default="weight",
        metavar="NAME",
        help="which weights masks keep together: weight, 16x1 or any RxC, 16x1-taps, channel, 2:4, fan-in (weight)",
    )
    add("--batch", type=positive, default=64, metavar="N", help="images (64)")
    parser.set_defaults(usual_rivals=rivals.split(","))
    add_device(parser)
    add(
        "--rivals",
        type=words,
        metavar="NAME,..",
        help=f"whom to compare with ({rivals}); none for ours alone",
    )
    add_effort(parser)


def add_mask(parser: argparse.ArgumentParser) -> None:
    """The options that choose a network's masks."""
    add = parser.add_argument
    add(
        "--mask",
        default="uniform",
        metavar="KIND",
        help="uniform, or a criterion: erk, grasp, magnitude, random, snip, synflow; another allocation after @, "
        "as in grasp@time (uniform)",
    )
    add(
        "--mask-data",
        default="fashion-mnist",
        metavar="NAME",
        help="images that grasp and snip score with (fashion-mnist; synthetic needs no files)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that says what to measure on."""
    text = "cuda: the current GPU, timed by events, against dense torch (cpu)"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=text)


def add_effort(parser: argparse.ArgumentParser) -> None:
    """The options that say how long to measure, and where the rows go."""
    add = parser.add_argument
    add("--threads", type=positive, metavar="N", help="of torch and of the kernels (torch's default)")
    add("--samples", type=positive, default=30, metavar="N", help="of each contender (30)")
    add("--min-time", type=float, default=2.0, metavar="MS", help="a sample lasts at least so long (2)")
    add(
        "--budget",
        type=float,
        default=10.0,
        metavar="S",
        help="a contender gets no more samples after so many seconds of one measurement (10)",
    )
    add("--json", type=Path, metavar="FILE", help="append result rows to FILE, one JSON object a line")


def words(text: str) -> list[str]:
    """Words separated by commas, as the type of an argument."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[float]:
    """Numbers above 0 and at most 1 separated by commas, as the type of an argument."""
    try:
        numbers = [float(word) for word in words(text)]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected numbers above 0 and at most 1, separated by commas"
        )
    return numbers


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return number


def guarded(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    """A command whose BenchErrors are one line and exit code 2."""

    def run(arguments: argparse.Namespace) -> int:
        from fedpai import cli
        from fedpai.bench.errors import BenchError

        try:
            _prepare(arguments)
            command(arguments)
        except BenchError as error:
            return cli.complain(error)
        return 0

    return run


def _prepare(arguments: argparse.Namespace) -> None:
    """What both commands do first: threads, the structure by its one name, and whether the results can be written."""
    import torch

    from fedpai.bench.errors import BenchError
    from fedpai.bench.masks import check_structure
    from fedpai.bench.rows import check_writable
    from fedpai.federation.config import MAX_THREADS

    if arguments.threads is not None and arguments.threads > MAX_THREADS:
        raise BenchError(f"--threads must be at most {MAX_THREADS}, got {arguments.threads}")
    if getattr(arguments, "profile", False):
        if arguments.rivals not in (None, ["none"]):
            raise BenchError("--rivals: --profile looks at our step alone and compares with nobody")
        if arguments.activation_dtype is not None:
            raise BenchError("--activation-dtype: --profile looks at the step as it is by default")
        arguments.rivals = ["none"]
    if getattr(arguments, "memory", False):
        if arguments.rivals not in (None, ["dense"], ["none"]):
            raise BenchError("--rivals: --memory compares with dense torch alone (dense or none)")
        arguments.rivals = arguments.rivals or ["dense"]
    if getattr(arguments, "device", "cpu") == "cuda":
        for option in ("roofline", "profile", "memory", "activation_dtype"):
            if getattr(arguments, option, None):
                raise BenchError(f"--{option.replace('_', '-')}: of the CPU's kernels, not with --device cuda")
        arguments.rivals = arguments.rivals or ["dense"]
    elif getattr(arguments, "precision", "f32") != "f32":
        raise BenchError(f"--precision {arguments.precision}: for --device cuda only")
    if arguments.rivals is None:
        arguments.rivals = arguments.usual_rivals
    elif arguments.rivals == ["none"]:
        arguments.rivals = []
    arguments.structure = str(check_structure(arguments.structure))
    if arguments.json is not None:
        check_writable(arguments.json)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def effort(arguments: argparse.Namespace) -> Effort:
    """How long to measure, as it was asked for."""
    from fedpai.bench.timing import Effort

    return Effort(arguments.samples, arguments.min_time / 1e3, arguments.budget)


def _progress(text: str) -> None:
    """On a terminal one line that changes, else nothing."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _layers(arguments: argparse.Namespace) -> None:
    from fedpai.bench import device, layers
    from fedpai.bench import roofline_text as roofline
    from fedpai.bench.layers_text import detail_tables, remarks, summary_table

    settings = layers.Settings(
        models=arguments.model,
        densities=arguments.density,
        mask=arguments.mask,
        structure=arguments.structure,
        batch=arguments.batch,
        directions=arguments.directions,
        rivals=arguments.rivals,
        patterns=arguments.layers,
        kinds=arguments.kinds,
        compiled=arguments.compile,
        cold=arguments.cold,
        effort=effort(arguments),
        mask_data=arguments.mask_data,
        device=device.cuda(arguments.precision) if arguments.device == "cuda" else device.cpu(),
    )
    work = layers.prepare(settings)
    rows = collect(arguments, partial(layers.measure, settings, work))
    for table in detail_tables(rows):
        table.show()
        print()
    summary_table(rows).show()
    print(*remarks(rows), sep="\n")
    if arguments.roofline:
        for table in (*roofline.roofline_tables(rows), roofline.summary_table(rows)):
            print()
            table.show()


def _step(arguments: argparse.Namespace) -> None:
    from fedpai.bench import device, step
    from fedpai.bench.step_text import remarks, step_table

    settings = step.Settings(
        models=arguments.model,
        sparsities=arguments.sparsity,
        mask=arguments.mask,
        structure=arguments.structure,
        batch=arguments.batch,
        rivals=arguments.rivals,
        compiled=arguments.compiled,
        effort=effort(arguments),
        mask_data=arguments.mask_data,
        bf16=arguments.activation_dtype == "bf16",
        device=device.cuda() if arguments.device == "cuda" else device.cpu(),
    )
    step.prepare(settings)
    if arguments.profile:
        _profile(arguments, settings)
        return
    if arguments.memory:
        _memory(arguments, settings)
        return
    rows = collect(arguments, partial(step.measure, settings))
    step_table(rows).show()
    print(*remarks(rows), sep="\n")


def _profile(arguments: argparse.Namespace, settings: Settings) -> None:
    from fedpai.bench import profile
    from fedpai.bench import profile_text as text

    rows = collect(arguments, partial(profile.measure, settings))
    for group in text.groups(rows):
        print(text.title(group))
        text.show_bar(group)
        for table in (text.part_table(group), text.layer_table(group)):
            print()
            table.show()
        print("", *text.remarks(group), "", sep="\n")


def _memory(arguments: argparse.Namespace, settings: Settings) -> None:
    from fedpai.bench import memory
    from fedpai.bench.memory_text import memory_table, remarks

    rows = collect(arguments, partial(memory.measure, settings))
    memory_table(rows).show()
    print(*remarks(rows), sep="\n")


def collect(
    arguments: argparse.Namespace, measure: Callable[[MachineModel, Callable[[str], None]], Iterator[Row]]
) -> list[Row]:
    """Measures; rows are written as they come, so that Ctrl-C loses only what is under way."""
    import torch

    from fedpai.bench.machine import measure_machine
    from fedpai.bench.rows import append
    from fedpai_kernels.tuning import cpu_model

    _progress("measuring the machine")
    machine = measure_machine()
    rows = []
    for row in measure(machine, _progress):
        rows.append(row)
        if arguments.json is not None:
            append(arguments.json, row)
    _progress("")
    where = rows[0]["device"]["name"] if "device" in rows[0] else f"{cpu_model()}, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {rows[0]['isa']}")
    print(f"{machine}\n" if rows[0]["machine_model"] else "")
    return rows
