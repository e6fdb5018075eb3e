"""What the project holds itself to, as ratios of rows of one run: met, missed, or not measured here."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from fastgrpo.bench.cases import DTYPES
from fastgrpo.bench.figures import LINE

Rows = list[dict]


@dataclass(frozen=True)
class Target:
    """A number that rows of one case give, and its bound.

    Args:
        value: the rows of one case to the number, or None where they do not hold it.
        bound: the least that the number may be, or with `at_most` the most.
        of_device: (part of a device's name, the bound in place of `bound` there).
    """

    what: str
    op: str
    dtype: str
    value: Callable[[Rows], float | None]
    bound: float
    at_most: bool = False
    inactive: bool = False
    on: str = "cpu"
    of_device: tuple[tuple[str, float], ...] = ()

    def bound_on(self, device: str) -> float:
        return next((bound for name, bound in self.of_device if name in device), self.bound)

    def is_met(self, value: float, device: str) -> bool:
        bound = self.bound_on(device)
        return value <= bound if self.at_most else value >= bound


def _ms(rows: Rows, impl: str, mode: str | None = None) -> float | None:
    """The fastest of an implementation."""
    found = [r["ms_p50"] for r in rows if r["impl"] == impl and mode in (None, r["mode"]) and r["ms_p50"] is not None]
    return min(found, default=None)


def _ratio(over: str, under: str = "fastgrpo", over_mode: str | None = None, under_mode: str | None = None):
    def value(rows: Rows) -> float | None:
        a, b = _ms(rows, over, over_mode), _ms(rows, under, under_mode)
        return None if a is None or b is None else a / b

    return value


def _best_share(rows: Rows) -> float | None:
    return max((r["roof_share"] for r in rows if r["impl"] == "fastgrpo" and r["roof_share"]), default=None)


def _worst_error(rows: Rows) -> float | None:
    return max((r["rel_err"] for r in rows if r["impl"] == "fastgrpo" and r["rel_err"] is not None), default=None)


def _error_over_eager(rows: Rows) -> float | None:
    eager = [r["rel_err"] for r in rows if r["impl"] == "eager" and r["rel_err"]]
    worst = _worst_error(rows)
    return None if worst is None or not eager else worst / min(eager)


def _both(bf16: float, fp32: float) -> tuple[tuple[str, float], ...]:
    return ("bf16", bf16), ("fp32", fp32)


TARGETS = [
    *(
        Target("from logits, in place: eager's time over ours", "loss", d, _ratio("eager", under_mode="in place"), x)
        for d, x in _both(10, 7)
    ),
    *(
        Target("from hidden states: our time over the GEMMs'", "linear", d, _ratio("fastgrpo", "GEMMs alone"), x, True)
        for d, x in _both(1.25, 1.25)
    ),
    *(
        Target("from hidden states: TRL's time over ours", "linear", d, _ratio("trl"), least)
        for d, least in _both(7, 1.6)
    ),
    *(
        Target("the same, half of the completions inactive", "linear", d, _ratio("trl"), least, inactive=True)
        for d, least in _both(11, 2.5)
    ),
    *(
        Target("TRL's step: TRL's time over the subclass's", "step", d, _ratio("trl", under_mode="GRPOTrainer"), least)
        for d, least in _both(4, 1.6)
    ),
    *(
        Target(f"{gpu}accuracy, {op}: our error", op, "fp32", _worst_error, 1e-5, True, on=on)
        for op in ("logps", "loss", "linear")
        for gpu, on in (("", "cpu"), ("GPU, ", "cuda"))
    ),
    *(
        Target(f"{gpu}accuracy, {op}: our error over eager's", op, "bf16", _error_over_eager, 2, True, on=on)
        for op in ("logps", "loss", "linear")
        for gpu, on in (("", "cpu"), ("GPU, ", "cuda"))
    ),
    Target("GPU, one pass in place: our time over a copy's", "loss", "bf16",
           _ratio("fastgrpo", "copy", "in place"), 1.15, True, on="cuda", of_device=(("H100", 1.10),)),
    Target("GPU, one pass in place: Liger's time over ours", "loss", "bf16",
           _ratio("liger", under_mode="in place"), 2, on="cuda"),
    Target("GPU, one pass in place: eager's time over ours", "loss", "bf16",
           _ratio("eager", under_mode="in place"), 8, on="cuda"),
    Target("GPU, logps: share of the copy's bandwidth", "logps", "bf16", _best_share, 0.92, on="cuda"),
    Target("GPU, from hidden states: our time over the GEMMs'", "linear", "bf16",
           _ratio("fastgrpo", "GEMMs alone"), 1.08, True, on="cuda"),
    Target("GPU, from hidden states: TRL's time over ours", "linear", "bf16", _ratio("trl"), 1.3, on="cuda"),
    Target("GPU, the same with inactive completions", "linear", "bf16", _ratio("trl"), 2, inactive=True, on="cuda"),
]  # fmt: skip


def verdicts(rows: Rows) -> list[tuple[str, str, str]]:
    """(what, the number and its bound, "met" | "missed" | "not measured") of every target and case."""
    by_case: dict[str, Rows] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    found = []
    for target in TARGETS:
        sign = "at most" if target.at_most else "at least"
        measured = False
        for case, group in by_case.items():
            first = group[0]
            if (first["op"], first["dtype"], first["on"]) != (target.op, target.dtype, target.on):
                continue
            if bool(first["inactive"]) != target.inactive or (value := target.value(group)) is None:
                continue
            measured = True
            numbers = f"{value:.3g}, {sign} {target.bound_on(first['device']):g} ({case})"
            found.append((target.what, numbers, "met" if target.is_met(value, first["device"]) else "missed"))
        if not measured:
            bounds = [f"{target.bound:g}", *(f"{bound:g} on {name}" for name, bound in target.of_device)]
            found.append((target.what, f"{sign} {', '.join(bounds)} ({target.dtype})", "not measured"))
    return found + growth_verdict(rows)


def growth(rows: Rows) -> list[tuple[int, float, float | None]]:
    """(tokens, milliseconds, MiB above inputs and gradients) of fastgrpo from hidden states, as tokens grow."""
    points = {}
    for row in rows:
        if row["op"] == "linear" and row["impl"] == "fastgrpo" and row["backend"] != "torch" and row["ms_p50"]:
            shape = row["shape"]
            key = shape["V"], shape["H"], row["dtype"], row["on"], row["inactive"], row["softcap"]
            tokens = shape["B"] * shape["T"]
            extra = None
            if row["peak_mb"] is not None:
                gradients = (tokens + shape["V"]) * shape["H"] * DTYPES[row["dtype"]].itemsize / 2**20
                extra = row["peak_mb"] - gradients
            sizes = points.setdefault(key, {})
            sizes[tokens] = min(sizes.get(tokens, (row["ms_p50"], extra)), (row["ms_p50"], extra))  # the fastest
    longest = max(points.values(), key=len, default={})
    return [(tokens, *longest[tokens]) for tokens in sorted(longest)]


def growth_verdict(rows: Rows) -> list[tuple[str, str, str]]:
    what, points = "memory above inputs and gradients as tokens grow 16 times", growth(rows)
    if len(points) < 2 or points[-1][0] < 16 * points[0][0] or None in (points[0][2], points[-1][2]):
        return [(what, "at most 1.1 times", "not measured")]
    times = points[-1][2] / points[0][2]
    numbers = f"{times:.3g} times, at most 1.1 ({points[0][0]} to {points[-1][0]} tokens)"
    return [(what, numbers, "met" if times <= 1.1 else "missed")]


def table(rows: Rows) -> str:
    """The verdicts as text, those of hardware that is not here on one line."""
    lines, elsewhere = ["targets:"], 0
    here = {row["on"] for row in rows}
    for what, numbers, verdict in verdicts(rows):
        if verdict == "not measured" and what.startswith("GPU") and "cuda" not in here:
            elsewhere += 1
            continue
        lines += textwrap.wrap(f"  {verdict:12} {what}: {numbers}", LINE, subsequent_indent=" " * 15)
    if elsewhere:
        lines.append(f"  not measured {elsewhere} targets of GPUs")
    return "\n".join(lines)
