"""What `fastgrpo bench` does: check each implementation against float64, time it, and print and write the rows."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from fastgrpo._extras import MissingPackage, require
from fastgrpo.bench import (
    cases,
    figures,
    measure,
    summary,
    targets,
    trainer_step,  # noqa: F401 (registers its own)
)
from fastgrpo.bench.cases import Case
from fastgrpo.bench.implementations import REGISTRY, Implementation, label
from fastgrpo.commands.bench import PLOT
from fastgrpo.commands.errors import UsageError, check_new_file

QUICK = [
    Case("advantages", 65_536, 1, 1, dtype="fp32"),
    Case("logps", 8, 16, 151_936),
    *(Case("loss", 8, 16, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
    *(Case("linear", 8, 16, 32_768, dtype=dtype) for dtype in ("bf16", "fp32")),
    Case("linear", 8, 16, 32_768, inactive=0.5),
    Case("step", 8, 16, 32_768),
]
FULL = [
    Case("advantages", 65_536, 1, 1, dtype="fp32"),
    *(Case(op, 8, 64, 151_936, dtype=dtype) for op in ("logps", "forward", "loss") for dtype in ("bf16", "fp32")),
    *(Case("linear", 8, 64, 151_936, dtype=d, inactive=i) for d in ("bf16", "fp32") for i in (0.0, 0.5)),
    *(Case("step", 8, 128, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
]
GROWTH = [  # H is small, so that the vocabulary is most of the work; from hidden states, the first N is one chunk
    *(Case("loss", 4, 128, V) for V in (16_384, 65_536, 131_072, 262_144)),
    *(Case("loss", N // 128, 128, 32_768) for N in (512, 1024, 2048, 4096, 8192)),
    *(Case("linear", 8, 128, V, 128, "fp32") for V in (16_384, 32_768, 65_536, 262_144)),
    *(Case("linear", N // 128, 128, 131_072, 128, "fp32") for N in (1024, 2048, 4096, 8192, 16_384)),
]
TURNS = 2  # of each side
_SLOW_TO_COMPILE = "left out of a quick run: compiling takes longer than all the rest"


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
    chosen = _chosen_cases(options)
    chosen_ones = _chosen_implementations(options)
    quick = options.quick or not (options.op or options.model or options.shape or options.growth or options.full)
    for name, file in (("--json", options.json), ("--plot", options.plot)):
        if file:
            check_new_file(name, Path(file))
    if options.plot and Path(options.plot).suffix not in (".svg", ".png"):
        raise UsageError(f"--plot: expected a file that ends in .svg or .png, got {options.plot}")
    origin = facts(chosen[0].device)
    rows = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.json, "a")) if options.json else None
        for case in chosen:
            print(f"\n{case}", flush=True)
            measured = {}
            for row in measure_case(case, chosen_ones, quick=quick, seconds=options.seconds):
                measured[label(row)] = row = row | origin
                if file:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
            print_table(list(measured.values()))
            rows += measured.values()
    print("\n" + targets.table(rows))
    print("\n" + summary.table(rows))
    if not options.no_plot:
        print("\n" + _draw(rows, options.plot))
    print(f"{time.monotonic() - started:.0f} s in all")


def _draw(rows: list[dict], given: str | None) -> str:
    """Draw the rows to the file given, or else to `PLOT`; returns the line that says where, or why not."""
    path = Path(given or PLOT)
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


def _chosen_implementations(options: argparse.Namespace) -> list[Implementation]:
    """The implementations that --impl and --backend choose, and all floors."""
    names, known = set(options.impl or ()), {each.name for each in REGISTRY}
    if unknown := names - known:
        raise UsageError(f"--impl: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    return [
        each
        for each in REGISTRY
        if each.is_floor
        or (not names or each.name in names)
        and (not options.backend or each.name != "fastgrpo" or each.backend in (*options.backend, "auto"))
    ]


def _chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases to measure: a named list or all combinations of the sizes given; --op and --dtype choose of them."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda is not available here")
    if options.plot and options.no_plot:
        raise UsageError("expected one of --plot and --no-plot")
    if sum(map(bool, (options.quick, options.full, options.growth, options.model or options.shape))) > 1:
        raise UsageError("expected one of --quick, --full, --growth, and --model with --shape")
    if options.model or options.shape:
        named = [
            Case(op, dtype=dtype, softcap=softcap if op == "linear" else None, model=model, **sizes)
            for model, softcap, sizes in _sizes(options)
            for op in cases.OPS
            if not (softcap and op == "step")  # its model has none
            for dtype in (["fp32"] if op == "advantages" else options.dtype or ["bf16", "fp32"])
        ]
    else:
        named = GROWTH if options.growth else FULL if options.full else QUICK
    chosen = []
    for case in named:
        if options.op and case.op not in options.op:
            continue
        if options.dtype and case.dtype not in options.dtype and case.op != "advantages":
            continue
        for inactive in options.inactive or [case.inactive]:
            if not 0 <= inactive < 1:
                raise UsageError(f"--inactive: expected a share from 0 to below 1, got {inactive}")
            # only from hidden states is there something to leave out
            each = dataclasses.replace(case, device=device, inactive=inactive if case.op == "linear" else 0.0)
            chosen += [each] * (each not in chosen)
    if options.dtype and not options.op and all(case.op == "advantages" for case in chosen):
        chosen = []  # which have no dtype
    if not chosen:
        raise UsageError("no case fits --op and --dtype together; --shape or --model makes its own")
    return chosen


def _sizes(options: argparse.Namespace) -> Iterator[tuple[str | None, float | None, dict[str, int]]]:
    """(model, softcap, sizes) of every model and shape given."""
    for shape in options.shape or [""]:
        try:
            given = cases.parse_shape(shape)
        except ValueError as error:
            raise UsageError(f"--shape: {error}") from error
        for model in options.model or [None]:
            width, vocabulary, softcap = cases.MODELS[model or "qwen2.5-0.5b"]
            yield model, softcap, dict(B=8, T=64) | dict(H=width, V=vocabulary) | given


def measure_case(
    case: Case, among: list[Implementation], *, quick: bool = False, seconds: float = 2.0
) -> Iterator[dict]:
    """Rows of these implementations of a case's operation, as they are measured.

    Floors come first, then fastgrpo, then its peers, last those that compile. A side computes the case once, right
    before its first turn, and is compared with the truth; one that is wrong, fails, or cannot run here has that in
    its row in place of a time. A side with a time gets a row after each of its turns, and the last one counts.
    """
    torch.compiler.reset()  # or what was compiled for other sizes would be timed
    inputs, clock, no_inputs = None, None, None
    try:
        inputs = cases.make_inputs(case)
        clock = measure.Stopwatch(inputs, seconds / 4 if quick else seconds, TURNS)
    except Exception as problem:  # noqa: BLE001 (of memory, or of the backend that makes the old log-probabilities)
        no_inputs = f"no inputs: {reason(problem)}"
    found = sorted((each for each in among if each.op == case.op), key=_order)
    with_peak = not quick or (case.op, case.dtype, case.inactive) == ("linear", "bf16", 0.0)
    rows, times, roof = {}, {}, None
    for turn in range(TURNS):
        for each in found:
            name = str(each)
            if turn == 0:
                rows[name] = _checked(case, each, inputs, no_inputs, quick)
            elif rows[name]["reason"] is not None:
                continue
            row = rows[name]
            if row["reason"] is None:
                try:
                    clock.turn(each.prepare, each.step, times.setdefault(name, []))
                    row["ms_p20"], row["ms_p50"], row["ms_p80"] = measure.quantiles(times[name])
                    row["calls"] = len(times[name])
                except Exception as problem:  # noqa: BLE001 (the others are still to be measured)
                    row |= dict.fromkeys(("ms_p20", "ms_p50", "ms_p80", "calls", "peak_mb"))
                    row["ok"], row["reason"] = False, reason(problem)
            if row["ms_p50"] is not None:
                if each.is_floor:
                    roof = _roof_rate(case, row)
                if roof:
                    row["roof_share"] = (case.flops or case.bytes) / roof / (row["ms_p50"] / 1e3)
                if turn == 0 and with_peak:
                    with contextlib.suppress(torch.OutOfMemoryError):
                        row["peak_mb"] = peak(case, each, inputs)
            yield dict(row)
        if case.device == "cuda":
            _truths.clear()  # its memory is the implementations'
            torch.cuda.empty_cache()


def _checked(case: Case, each: Implementation, inputs: SimpleNamespace | None, why: str | None, quick: bool) -> dict:
    """A row that says whether its side is right, or why it is not to be timed; `why` holds for all sides."""
    row = new_row(case, each)
    cannot = each.why_not(case)
    row["ruled_out"] = cannot is not None
    why = cannot or why or (_SLOW_TO_COMPILE if quick and each.compiles else check(each, inputs, row))
    row["ok"], row["reason"] = None if each.is_floor and why is None else why is None, why
    return row


def _order(each: Implementation) -> tuple:
    """A run that is stopped keeps what it measured: our own kernels before anything that takes long to compile."""
    return not each.is_floor, each.compiles, each.name != "fastgrpo"


def reason(problem: Exception) -> str:
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"


_truths: dict[Case, dict] = {}  # of the last case, in any dtype: {function: results}


def check(each: Implementation, inputs, row: dict) -> str | None:
    """Compare a result with float64 and put its error into the row; returns None, or why it must not be timed."""
    case = inputs.case
    try:
        each.prepare(inputs)
        results = each.step(inputs)
        if each.is_floor:
            return None
        make_truth, key = each.truth or cases.truth, dataclasses.replace(case, dtype="fp32")
        if key not in _truths:
            _truths.clear()
        truths = _truths.setdefault(key, {})
        if make_truth not in truths:
            truths[make_truth] = make_truth(inputs)
        want = truths[make_truth]
        if not results or results.keys() - want.keys():
            return f"wrong: results {', '.join(results) or 'none'}, expected some of {', '.join(want)}"
        row["rel_err"] = cases.error(results, want, getattr(inputs, "advantages", None))
    except Exception as problem:  # noqa: BLE001 (a peer may fail in any way, and the others are still to be measured)
        return reason(problem)
    finally:
        if case.device == "cuda":
            torch.cuda.empty_cache()
    worst, limit = row["rel_err"], cases.TOLERANCE[case.dtype]
    if not math.isfinite(worst):
        row["rel_err"] = None  # which JSON has no number for
    return None if worst <= limit else f"wrong: relative error {worst:.2g}, allowed {limit:.2g}"


def new_row(case: Case, each: Implementation) -> dict:
    """What a row says before anything is measured."""
    return dict(
        op=case.op, impl=each.name, backend=each.backend, mode=each.mode, shape=case.shape, dtype=case.dtype,
        inactive=case.inactive, softcap=case.softcap, model=case.model, calls=None, ms_p50=None, ms_p20=None,
        ms_p80=None, peak_mb=None, rel_err=None, ok=None, reason=None, ruled_out=False, bytes=case.bytes,
        flops=case.flops, roof_share=None, on=case.device, case=str(case),
    )  # fmt: skip


def _roof_rate(case: Case, row: dict) -> float:
    """The bytes or FLOPs per second that a floor reached; the GEMMs alone compute those of inactive tokens, too."""
    work = 2 * case.B * case.T * case.V * cases.DTYPES[case.dtype].itemsize if row["impl"] == "copy" else 0
    return (work or 6 * case.B * case.T * case.H * case.V) / (row["ms_p50"] / 1e3)


# ---- memory

_fresh: list[measure.FreshProcesses] = []


def peak(case: Case, each: Implementation, inputs: SimpleNamespace) -> float | None:
    """MiB above the inputs at an implementation's peak; it has run on these before."""
    if case.device == "cuda":
        each.prepare(inputs)
        return round(measure.gpu_peak(each.step, inputs), 1)
    if not _fresh:
        _fresh.append(measure.FreshProcesses(["fastgrpo.bench.preloaded"]))
    found = _fresh[0].peak(cpu_peak, case, each.op, str(each))
    return None if found is None else round(found, 1)


def cpu_peak(case: Case, op: str, name: str) -> float:
    """The peak of the registered implementation `name` in this process, in MiB above its inputs."""
    each = next(i for i in REGISTRY if i.op == op and str(i) == name)
    small = cases.make_inputs(dataclasses.replace(case, B=8, T=2, V=128, H=64))
    each.prepare(small)
    each.step(small)  # what loads or compiles once is not the step's
    del small
    inputs = cases.make_inputs(case)
    each.prepare(inputs)
    if each.is_floor or each.compiles or case.op == "step":
        each.step(inputs)  # its buffers and the trainers count as inputs, and compiling is not the step's
        each.prepare(inputs)
    return measure.cpu_peak(each.step, inputs)


# ---- what is printed


def print_table(rows: list[dict]) -> None:
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


# ---- where rows come from


def facts(on: str, program: str = "fastgrpo") -> dict:
    """What every row says about where it comes from."""
    packages = ("fastgrpo", "torch", "triton", "transformers", "trl", "liger_kernel")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = torch.cuda.get_device_name() if on == "cuda" else cpu_name()
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]  # nobody's folders
    return dict(
        device=device, threads=torch.get_num_threads(), python=platform.python_version(), versions=versions,
        commit=_commit(), date=datetime.date.today().isoformat(), command=plain(" ".join([program, *words])),
    )  # fmt: skip


def plain(command: str) -> str:
    """A command without the files and folders that it writes to, which are of one machine."""
    return re.sub(r" --(json|out|scratch)[ =]\S+", "", command)


def cpu_name() -> str:
    """The processor's name and this process's threads."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """Of the checkout that this package is run from, or the command is run in; or what FASTGRPO_COMMIT says, where
    the sources came without their history."""
    if given := os.environ.get("FASTGRPO_COMMIT"):
        return given
    for folder in (Path(__file__).parents[2], Path.cwd(), *Path.cwd().parents):
        if (folder / "csrc" / "objective.h").is_file() and (folder / ".git").exists():
            asked = [
                ["git", "-C", str(folder), *words]
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
            ]
            try:
                commit, changed = (subprocess.run(a, capture_output=True, text=True, check=True).stdout for a in asked)
            except (OSError, subprocess.CalledProcessError):
                return None
            return commit.strip() + ("+changes" if changed.strip() else "")
    return None
