"""Which targets the rows of a run meet, miss, or do not measure; and how memory grows with the tokens."""

from __future__ import annotations

import textwrap

from fastgrpo.bench.figures import LINE
from fastgrpo.bench.operation import DTYPES, Rows, Target
from fastgrpo.bench.registry import GROWING, OPERATIONS


def _order(target: Target) -> tuple:
    """Speed, then accuracy in fp32 and in bf16, then speed on a GPU."""
    return target.on == "cuda" and not target.accuracy, target.accuracy, target.accuracy and target.dtype != "fp32"


TARGETS = sorted(
    ((op, target) for op in OPERATIONS.values() for target in op.targets), key=lambda item: _order(item[1])
)


def verdicts(rows: Rows) -> list[tuple[str, str, str]]:
    """(what, the number and its bound, "met" | "missed" | "not measured") of every target and case."""
    by_case: dict[str, Rows] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    found = []
    for op, target in TARGETS:
        sign = "at most" if target.at_most else "at least"
        measured = False
        for case, group in by_case.items():
            first = group[0]
            if (first["op"], first["dtype"], first["on"]) != (op.name, target.dtype, target.on):
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
    """(tokens, milliseconds, MiB above inputs and gradients) of fastgrpo, as tokens grow."""
    points = {}
    for row in rows:
        if row["op"] == GROWING.name and row["impl"] == "fastgrpo" and row["backend"] != "torch" and row["ms_p50"]:
            shape = row["shape"]
            key = shape["V"], shape["H"], row["dtype"], row["on"], row["inactive"], row["softcap"]
            tokens = shape["B"] * shape["T"]
            extra = None
            if row["peak_mb"] is not None:
                gradients = GROWING.gradient_bytes(shape, DTYPES[row["dtype"]].itemsize)
                extra = row["peak_mb"] - gradients / 2**20
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
