# SPDX-License-Identifier: Apache-2.0
"""The command line: `fedpai run`, `fedpai compare`, `fedpai bench`, `fedpai tune`, `fedpai doctor`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import fedpai

ERROR, INTERRUPTED = 2, 130
"""Exit codes: a user's mistake, and Ctrl-C."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        """Prints the complaint and exits."""
        self.exit(ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole parser. Sub-commands import their heavy parts when they run."""
    from fedpai.bench import cli as bench
    from fedpai.cli import compare, doctor, run, tune

    parser: argparse.ArgumentParser = OneLineParser(
        prog="fedpai",
        description="Federated learning with networks pruned before training, faster in wall-clock time.",
    )
    parser.add_argument("--version", action="version", version=f"fedpai-kernels {fedpai.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run.add_parser(commands)
    compare.add_parser(commands)
    bench.add_parser(commands)
    tune.add_parser(commands)
    doctor.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 for success, 2 for a mistake of the user (one line on stderr says which), 130 for Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code: int | None = arguments.run(arguments)
    except KeyboardInterrupt:
        print("fedpai: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


def complain(error: Exception | str) -> int:
    """Prints one line on stderr and returns the exit code of a user's mistake."""
    print(f"fedpai: {' '.join(str(error).split())}", file=sys.stderr)
    return ERROR


def federated(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Carries out a command that trains: what its user can mend is one line, and SIGTERM is like Ctrl-C."""
    from fedpai.data import DataError
    from fedpai.federation.config import ConfigError
    from fedpai.federation.files import WriteError
    from fedpai.federation.folder import FolderError
    from fedpai.methods.base import MethodError

    try:
        with terminated_like_ctrl_c():
            return work(arguments)
    except (ConfigError, DataError, FolderError, MethodError, WriteError) as error:
        return complain(error)


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """While it lasts, SIGTERM stops the process the way Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
