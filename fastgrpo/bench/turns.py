"""The rows of a case: each implementation checked against float64, then timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from fastgrpo.bench import measure
from fastgrpo.bench.operation import Case, Implementation, Inputs, Results
from fastgrpo.bench.registry import REGISTRY
from fastgrpo.bench.truth import TOLERANCE, error

_SLOW_TO_COMPILE = "left out of a quick run: compiling takes longer than all the rest"


def measure_case(case: Case, among: list[Implementation], *, seconds: float, quick: bool = False) -> Iterator[dict]:
    """Rows of these implementations of a case's operation, as they are measured.

    Floors come first, then fastgrpo, then its peers, last those that compile. A side computes the case once, right
    before its first turn, and is compared with the truth; one that is wrong, fails, or cannot run here has that in
    its row in place of a time. A side with a time gets a row after each of its turns, and the last one counts.
    """
    torch.compiler.reset()  # or what was compiled for other sizes would be timed
    inputs, clock, no_inputs = None, None, None
    try:
        inputs = case.operation.inputs(case)
        clock = measure.Stopwatch(inputs, seconds / 4 if quick else seconds)
    except Exception as problem:  # noqa: BLE001 (of memory, or of the backend that makes the old log-probabilities)
        no_inputs = f"no inputs: {reason(problem)}"
    found = sorted((each for each in among if each.op == case.op), key=_order)
    with_peak = not quick or (case.dtype, case.inactive) in case.operation.quick_peaks
    rows, times, roof = {}, {}, None
    for turn in range(measure.TURNS):
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
                if each.work is not None:
                    roof = each.work(case) / (row["ms_p50"] / 1e3)
                if roof:
                    row["roof_share"] = (case.flops or case.bytes) / roof / (row["ms_p50"] / 1e3)
                if turn == 0 and with_peak:
                    with contextlib.suppress(torch.OutOfMemoryError):
                        row["peak_mb"] = peak(case, each, inputs)
            yield dict(row)
        if case.device == "cuda":
            _truths.clear()  # its memory is the implementations'
            torch.cuda.empty_cache()


def _checked(case: Case, each: Implementation, inputs: Inputs | None, why: str | None, quick: bool) -> dict:
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


_truths: dict[Case, dict[Callable, Results]] = {}  # of the last case, in any dtype: {function: results}


def check(each: Implementation, inputs: Inputs, row: dict) -> str | None:
    """Compare a result with float64 and put its error into the row; returns None, or why it must not be timed."""
    case = inputs.case
    try:
        each.prepare(inputs)
        results = each.step(inputs)
        if each.is_floor:
            return None
        make_truth, key = each.truth or case.operation.truth, dataclasses.replace(case, dtype="fp32")
        if key not in _truths:
            _truths.clear()
        truths = _truths.setdefault(key, {})
        if make_truth not in truths:
            truths[make_truth] = make_truth(inputs)
        want = truths[make_truth]
        if not results or results.keys() - want.keys():
            return f"wrong: results {', '.join(results) or 'none'}, expected some of {', '.join(want)}"
        row["rel_err"] = error(results, want, getattr(inputs, "advantages", None))
    except Exception as problem:  # noqa: BLE001 (a peer may fail in any way, and the others are still to be measured)
        return reason(problem)
    finally:
        if case.device == "cuda":
            torch.cuda.empty_cache()
    worst, limit = row["rel_err"], TOLERANCE[case.dtype]
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


# ---- memory

_fresh: list[measure.FreshProcesses] = []


def peak(case: Case, each: Implementation, inputs: Inputs) -> float | None:
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
    small = case.operation.inputs(dataclasses.replace(case, B=8, T=2, V=128, H=64))
    each.prepare(small)
    each.step(small)  # what loads or compiles once is not the step's
    del small
    inputs = case.operation.inputs(case)
    each.prepare(inputs)
    if each.is_floor or each.keeps or each.compiles:
        each.step(inputs)  # its buffers and what it keeps count as inputs, and compiling is not the step's
        each.prepare(inputs)
    return measure.cpu_peak(each.step, inputs)
