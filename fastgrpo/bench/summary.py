"""What a run of the bench ends with: one table and one picture of all its cases."""

from __future__ import annotations

import textwrap
from pathlib import Path

from fastgrpo.bench.figures import LINE, colour, duration, multiple
from fastgrpo.bench.operation import Rows, label
from fastgrpo.bench.registry import FLOORS

# columns of the table, and whose rows they are; the fastest row of each case counts
_SIDES = {
    "eager": ("eager",),
    "compile": ("torch.compile",),
    "trl": ("trl",),
    "liger": ("liger",),
    "floor": tuple(FLOORS),
}
_WIDTH, _TIME = 8, 11


def _cases(rows: Rows) -> dict[str, Rows]:
    """The rows with a time of each case that has some, the fastest first."""
    found: dict[str, Rows] = {}
    for row in sorted((row for row in rows if row["ms_p50"] is not None), key=lambda row: row["ms_p50"]):
        found.setdefault(row["case"], []).append(row)
    return {case: found[case] for case in dict.fromkeys(row["case"] for row in rows) if case in found}


def table(rows: Rows) -> str:
    """The time of fastgrpo in every case, and that of the others as a multiple of it."""
    name_width = LINE - _TIME - _WIDTH * len(_SIDES)
    head = "in all; the others as multiples of fastgrpo"
    lines = [f"{head:{name_width}}{'fastgrpo':>{_TIME}}" + "".join(f"{side:>{_WIDTH}}" for side in _SIDES)]
    for case, found in _cases(rows).items():
        best: dict[str, float] = {}
        for row in found:
            best.setdefault(row["impl"], row["ms_p50"])
        ours = best.get("fastgrpo")
        cells = f"{'-' if ours is None else duration(ours):>{_TIME}}"
        for impls in _SIDES.values():
            times = [best[impl] for impl in impls if impl in best]
            cells += f"{multiple(min(times) / ours) if ours and times else '-':>{_WIDTH}}"
        first, *more = textwrap.wrap(case, name_width - 2, subsequent_indent="  ")
        lines += [f"  {first:{name_width - 2}}{cells}", *(f"  {line}" for line in more)]
    return "\n".join(lines)


def draw(rows: Rows, path: Path) -> None:
    """The times of every case as bars; of a sweep, time and memory as its size grows. SVG or PNG by the file's name.

    Raises:
        OSError: the file cannot be written.
    """
    from fastgrpo.bench.report import is_sweep, plot

    if is_sweep(rows):
        plot(rows, path)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = _cases(rows)
    columns = 2 if len(cases) > 1 else 1
    lines = -(-max(len(cases), 1) // columns)
    bars = max((len(found) for found in cases.values()), default=1)
    with pyplot.rc_context({"font.size": 8}):
        figure, axes = pyplot.subplots(
            lines, columns, figsize=(6 * columns, lines * (0.9 + 0.2 * bars)), layout="constrained", squeeze=False
        )
        for axis in axes.flat[len(cases) :]:
            axis.set_axis_off()
        for axis, (case, found) in zip(axes.flat, cases.items(), strict=False):
            colours = [colour(row["impl"]) for row in found]
            drawn = axis.barh([label(row) for row in found], [row["ms_p50"] for row in found], color=colours)
            axis.bar_label(drawn, [duration(row["ms_p50"]) for row in found], padding=3)
            axis.invert_yaxis()  # the fastest on top
            axis.set_xscale("log")
            axis.margins(x=0.25)
            axis.set_xlabel("median ms")
            axis.set_title(case, fontsize=8)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
