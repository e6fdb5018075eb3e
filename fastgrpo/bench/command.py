"""What `fastgrpo bench` does: measure the chosen cases, and print, write and draw the rows."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
import time
from pathlib import Path

from fastgrpo._extras import MissingPackage, require
from fastgrpo.bench import choose, figures, origin, summary, turns, verdicts
from fastgrpo.bench.operation import Rows, label
from fastgrpo.commands.errors import UsageError, check_new_file


def run(options: argparse.Namespace) -> None:
    """Run `fastgrpo bench`. Each row is written to the file of `--json` as soon as it is measured.

    Raises:
        UsageError: a mistake in the options, or a file that cannot be read or written.
    """
    for name, value in (("--report", options.report), ("--plot", options.plot)):
        if value:
            require(f"fastgrpo bench {name}", "bench", "matplotlib")
    if options.report:
        from fastgrpo.bench.report import write_report

        try:
            write_report(Path(options.report), Path("README.md"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--report: {error}") from error
        return
    started = time.monotonic()
    chosen = choose.cases(options)
    chosen_ones = choose.implementations(options)
    quick = options.quick or not (options.op or options.model or options.shape or options.growth or options.full)
    for name, file in (("--json", options.json), ("--plot", options.plot)):
        if file:
            check_new_file(name, Path(file))
    if options.plot and Path(options.plot).suffix not in (".svg", ".png"):
        raise UsageError(f"--plot: expected a file that ends in .svg or .png, got {options.plot}")
    source = origin.facts(chosen[0].device)
    every = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.json, "a")) if options.json else None
        for case in chosen:
            print(f"\n{case}", flush=True)
            measured = {}
            for row in turns.measure_case(case, chosen_ones, quick=quick, seconds=options.seconds):
                measured[label(row)] = row = row | source
                if file:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
            print_table(list(measured.values()))
            every += measured.values()
    print("\n" + verdicts.table(every))
    print("\n" + summary.table(every))
    if not options.no_plot:
        print("\n" + _draw(every, options.plot))
    print(f"{time.monotonic() - started:.0f} s in all")


def _draw(rows: Rows, given: str | None) -> str:
    """Draw the rows to the file given, or else to `figures.PLOT`; returns the line that says where, or why not."""
    path = Path(given or figures.PLOT)
    try:
        require("the plot of the times", "bench", "matplotlib")
    except MissingPackage as missing:
        return f"nothing drawn: {missing}"
    try:
        summary.draw(rows, path)
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}"
        if given:
            raise UsageError(f"--plot: {problem}") from error
        return f"nothing drawn: {problem}"
    return f"{path} shows the times"


def print_table(rows: Rows) -> None:
    """The rows of one case, the fastest first; then who was not measured, and why."""
    timed = sorted((row for row in rows if row["ms_p50"] is not None), key=lambda row: row["ms_p50"])
    ours = [row["ms_p50"] for row in timed if row["impl"] == "fastgrpo"]
    if timed:
        names = ("median ms", "20% to 80%", "times", "MiB", "roof", "error")
        print("  {:38} {:>9}  {:18} {:>7} {:>6} {:>6} {:>7}".format("", *names))
    for row in timed:
        times = "" if not ours else figures.multiple(row["ms_p50"] / min(ours))
        share = "" if row["roof_share"] is None else f"{row['roof_share']:.0%}" if row["roof_share"] < 10 else ">999%"
        memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        error = "floor" if row["rel_err"] is None else f"{row['rel_err']:.1e}"
        median = f"{row['ms_p50']:.{3 if row['ms_p50'] < 1e5 else 0}f}"
        spread = " to ".join(map(figures.short, (row["ms_p20"], row["ms_p80"])))
        print(f"  {label(row):38} {median:>9}  {spread:18} {times:>7} {memory:>6} {share:>6} {error:>7}")
    for row in rows:
        if row["ms_p50"] is None:
            line = f"{label(row)}: not measured: {row['reason']}"
            print(textwrap.fill(line, figures.LINE, initial_indent="  ", subsequent_indent="    "))
    sys.stdout.flush()
