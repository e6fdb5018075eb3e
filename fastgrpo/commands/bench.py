"""`fastgrpo bench`: its options."""

from __future__ import annotations

import argparse

from fastgrpo import backends
from fastgrpo.bench import choose
from fastgrpo.bench.figures import PLOT
from fastgrpo.bench.operation import DTYPES
from fastgrpo.bench.registry import OPERATIONS
from fastgrpo.commands.options import number


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    bench = commands.add_parser(
        "bench",
        help="measure fastgrpo beside its peers on this machine; without arguments, in less than two minutes on two "
        "cores",
        usage="fastgrpo bench [OPTION ...]",
        description="Check every implementation against float64, then time it beside the others: medians of turns in "
        "one process. Prints a table for each size, who could not be measured and why, the project's targets and a "
        "table of all sizes, and draws the times.",
    )
    bench.set_defaults(run=run)

    add = bench.add_argument_group("which sizes").add_argument
    add("--quick", action="store_true", help="small ones, in less than two minutes on two cores; so without arguments")
    add("--full", action="store_true", help="those of the README's table")
    add("--growth", action="store_true", help="sweeps of the number of tokens and of the vocabulary")
    add("--model", action="append", choices=choose.MODELS,
        help="that of this one's head; repeatable")  # fmt: skip
    add("--shape", action="append",
        help=f"{choose.shape_text()} or some: completions, tokens, vocabulary, width; repeatable")  # fmt: skip
    add("--dtype", action="append", choices=DTYPES,
        help=f"repeatable (default: {' and '.join(choose.DTYPES)})")  # fmt: skip
    add("--inactive", type=number(least=0), action="append",
        help="share of the completions with advantage 0, from hidden states; repeatable")  # fmt: skip

    add = bench.add_argument_group("what is measured").add_argument
    add("--op", action="append", choices=OPERATIONS,
        help="only this operation: loss is from logits, linear from hidden states; repeatable")  # fmt: skip
    add("--impl", action="append", help="only this implementation, such as fastgrpo, eager, trl, liger; repeatable")
    add("--backend", action="append", choices=backends.NAMES, help="only this backend of fastgrpo; repeatable")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--seconds", type=number(above=0), default=4.0, help="of timing for each implementation")

    add = bench.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="append the rows, one JSON object a line")
    add("--plot", metavar="FILE", help=f"draw the times, or of sweeps time and memory, as SVG or PNG by the file's "
        f"name (default: {PLOT})")  # fmt: skip
    add("--no-plot", action="store_true", help="draw nothing")
    add("--report", nargs="?", const="benchmarks/results", metavar="FOLDER",
        help="measure nothing: write docs/benchmarks.md, the README's table and plots from recorded rows "
        "(%(const)s)")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from fastgrpo.bench.command import run

    run(options)
