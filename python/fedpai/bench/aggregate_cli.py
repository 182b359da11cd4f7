# SPDX-License-Identifier: Apache-2.0
"""The command line of `fedpai bench aggregate`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from fedpai.bench import cli


def add_parser(kinds: argparse._SubParsersAction[Any]) -> None:
    """Registers the sub-command."""
    parser = kinds.add_parser(
        "aggregate",
        help="merging what clients send, against a loop over dense state_dicts",
        description="Time the server's merge of what clients send, against a loop over dense state_dicts and a copy.",
    )
    add = parser.add_argument
    add("--model", type=cli.words, default=["resnet18"], metavar="NAME,..", help="networks (resnet18)")
    add(
        "--sparsity", type=cli.numbers, default=[0.98], metavar="S,..", help="share of the weights removed (0.98)"
    )
    cli.add_mask(parser)
    add(
        "--form",
        type=cli.words,
        default=["shared", "personal"],
        metavar="F,..",
        help="one mask for all clients, or each its own (shared,personal)",
    )
    add("--clients", type=cli.positive, default=100, metavar="K", help="clients that are merged (100)")
    add(
        "--distinct",
        type=cli.positive,
        default=10,
        metavar="N",
        help="dense state_dicts that are in memory, to take turns as those of all clients (10)",
    )
    cli.add_device(parser)
    add("--cold", action="store_true", help="empty the caches before each sample")
    cli.add_effort(parser)
    # What the preparation of the other commands looks at.
    parser.set_defaults(run=cli.guarded(_aggregate), rivals=[], structure="weight")


def _aggregate(arguments: argparse.Namespace) -> None:
    from fedpai.bench import aggregate, device
    from fedpai.bench.aggregate_text import aggregate_table, remarks

    settings = aggregate.Settings(
        models=arguments.model,
        sparsities=arguments.sparsity,
        mask=arguments.mask,
        mask_data=arguments.mask_data,
        forms=arguments.form,
        clients=arguments.clients,
        distinct=arguments.distinct,
        cold=arguments.cold,
        effort=cli.effort(arguments),
        device=device.cuda() if arguments.device == "cuda" else device.cpu(),
    )
    aggregate.prepare(settings)
    rows = cli.collect(arguments, partial(aggregate.measure, settings))
    aggregate_table(rows).show()
    print(*remarks(rows), sep="\n")
