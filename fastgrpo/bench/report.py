"""From recorded rows to docs/benchmarks.md, the README's table and the plots, so that no figure is typed by hand.

A figure is worth what its commit says: rows that were recorded while tracked files had changes ("+changes"), or
without a commit, are left out, and the report says how many.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from fastgrpo.bench import verdicts
from fastgrpo.bench.figures import colour, duration
from fastgrpo.bench.operation import Rows, label
from fastgrpo.bench.origin import plain
from fastgrpo.bench.registry import FLOORS, GROWING, OPERATIONS

START, END = "<!-- fastgrpo bench --report writes from here -->", "<!-- to here -->"
PAGE = Path("docs", "benchmarks.md")  # beside the README
_PAGES = sorted((op for op in OPERATIONS.values() if op.page is not None), key=lambda op: op.page)
_SHORT = {op.name: op.short for op in _PAGES if op.short is not None}
_SIDES = {"fastgrpo": "fastgrpo", "eager": "eager PyTorch", "trl": "TRL", "liger": "Liger"}


def load(folder: Path) -> tuple[Rows, Rows]:
    """The rows of a folder's .jsonl files, in order; of a measurement that was repeated, the last.

    Rows of a rehearsal, of no operation (sweeps of a kernel's choices) and of an operation with other choices than the
    default ones are not reported.

    Returns:
        (rows recorded on a committed tree, the other measurements, which are in no table and no plot).
    """
    committed, others = {}, {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                if row["op"] not in OPERATIONS or row.get("rehearsed") or row.get("choice"):
                    continue
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: expected a row of the bench, got {line[:60]!r}") from error
            rows = committed if row["commit"] and not row["commit"].endswith("+changes") else others
            rows[row["case"], row["on"], row["impl"], row["backend"], row["mode"]] = row
    return list(committed.values()), [row for key, row in others.items() if key not in committed]


def write_report(results: Path, readme: Path) -> None:
    """Rewrite the generated parts of `readme` and of docs/benchmarks.md beside it, and the plot of each device.

    Raises:
        ValueError: no rows of a committed tree, or a file without the two lines that enclose its generated part.
    """
    devices = [(folder, *load(folder)) for folder in sorted(results.iterdir()) if folder.is_dir()]
    devices = [device for device in devices if device[1]]
    if not devices:
        raise ValueError(f"expected folders with .jsonl files of a committed tree in {results}, found none")
    page = readme.parent / PAGE
    texts = {file: _split(file) for file in (readme, page)}  # both are looked at before one is written
    parts = []
    for folder, rows, left_out in devices:
        parts.append(section(rows, left_out))
        if len(verdicts.growth(_growing(rows))) > 1:
            plot(rows, folder / "growth.svg")
            where = Path(os.path.relpath(folder / "growth.svg", page.parent)).as_posix()
            parts.append(f"![time and memory as tokens and vocabulary grow]({where})")
    for file, generated in ((page, parts), (readme, [short_table([rows for _, rows, _ in devices])])):
        before, after = texts[file]
        file.write_text("\n\n".join([before + START, *generated, END + after]))


def _split(file: Path) -> tuple[str, str]:
    """What stands before and after the generated part of a file."""
    text = file.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"expected {file} to have the lines {START} and {END}")
    before, rest = text.split(START)
    return before, rest.split(END)[1]


def short_table(devices: list[Rows]) -> str:
    """The README's table: fastgrpo beside its peers, and what has not been measured.

    Of the sizes of an operation, each device shows the one that the most sides were measured at.
    """
    parts = []
    for rows in devices:
        groups: dict[tuple, dict[str, Rows]] = {}
        for row in rows:
            if row["op"] in _SHORT and row["impl"] in _SIDES and row["ms_p50"] and "--growth" not in row["command"]:
                key = list(_SHORT).index(row["op"]), row["inactive"] > 0, row["dtype"]
                groups.setdefault(key, {}).setdefault(_size(row), []).append(row)
        chosen = []
        for key in sorted(groups):
            size, found = max(groups[key].items(), key=lambda item: len({row["impl"] for row in item[1]}))
            best = {row["impl"]: row for row in sorted(found, key=lambda row: -row["ms_p50"])}  # the last: the fastest
            chosen.append((key, size, best))
        modes = {side: {best[side]["mode"] for *_, best in chosen if side in best} for side in _SIDES}
        names, lines = [], []
        for side, name in _SIDES.items():
            in_head = side != "fastgrpo" and len(modes[side]) == 1
            names.append(name + (_in_brackets(*modes[side]) if in_head else ""))
        for (*_, dtype), size, best in chosen:
            cells, op = [], next(iter(best.values()))["op"]
            for side in _SIDES:
                cell = " · ".join(filter(None, _facts(best[side]))) if side in best else "–"
                in_cell = side != "fastgrpo" and side in best and len(modes[side]) > 1
                cells.append(cell + (_in_brackets(best[side]["mode"]) if in_cell else ""))
            what = _SHORT[op] + _in_brackets(best.get("fastgrpo", {}).get("mode"))
            lines.append(f"| {what}, {dtype} | {size} | " + " | ".join(cells) + " |")
        head = [f"| {_device(rows[0])} | size | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(_SIDES)]
        parts.append("\n".join(head + lines))
    if not any(row["on"] == "cuda" and row["ms_p50"] for rows in devices for row in rows):
        others = "" if len(devices) > 1 else ", and any other CPU"
        parts.append(
            f"**Not measured yet: any GPU{others}.** No timing of the Triton and CUDA kernels has been recorded."
        )
    return "\n\n".join(parts)


def _in_brackets(mode: str | None) -> str:
    return f" ({mode})" if mode else ""


def section(rows: Rows, left_out: Rows = ()) -> str:
    """One device's tables as Markdown; `left_out` are measurements that may not be shown."""
    growing = _growing(rows)
    points = verdicts.growth(growing)
    shown = rows if len(points) > 1 else [row for row in rows if row not in growing]
    dates = sorted({(row["date"], row["commit"][:12]) for row in shown})
    commits = ", ".join(f"{commit} ({date})" for date, commit in dates)
    commands = ", ".join(f"`{command}`" for command in sorted({plain(row["command"]) for row in shown}))
    parts = [f"## {_device(rows[0])}", f"Commit {commits}: {commands}."]
    timed = {label(row) for row in rows if row["ms_p50"] is not None}
    for op in _PAGES:
        found = [row for row in rows if row["op"] == op.name and row not in growing and label(row) in timed]
        sizes = {_size(row): None for row in found}
        parts += [_table(op.title, size, [row for row in found if _size(row) == size]) for size in sizes]
    if len(points) > 1:
        parts.append(_growth_table(growing, points))
    if missing := _missing(rows):
        parts.append(f"Not measured on this machine: {missing}.")
    if left_out:
        commands = ", ".join(f"`{command}`" for command in sorted({plain(row["command"]) for row in left_out}))
        parts.append(f"Left out, because the files had changes that were not committed: {len(left_out)} measurements "
                     f"of {commands}. They have to be recorded again.")  # fmt: skip
    parts.append(_targets_table(rows))
    return "\n\n".join(parts)


def _device(row: dict) -> str:
    versions = [f"{name} {row['versions'][name]}" for name in ("torch", "trl", "liger_kernel")
                if name in row["versions"]]  # fmt: skip
    return "; ".join(filter(None, (row["device"], ", ".join(versions))))


def _size(row: dict) -> str:
    shape = row["shape"]
    words = [OPERATIONS[row["op"]].size(shape)]
    words += [f"{name} = {shape[name]:,}" for name in "VH" if name in shape]
    words += [f"{row['inactive']:.0%} of the completions inactive"] * (row["inactive"] > 0)
    words += [row["model"]] * bool(row["model"])
    return ", ".join(words)


def _growing(rows: Rows) -> Rows:
    """The rows of sweeps, which are for the plot and the growth table."""
    return [row for row in rows if "--growth" in row["command"]]


def _table(title: str, size: str, rows: Rows) -> str:
    dtypes = [d for d in ("bf16", "fp16", "fp32") if any(row["dtype"] == d for row in rows)]
    by_name: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_name.setdefault(label(row), {})[row["dtype"]] = row
    ours = [row for row in rows if row["impl"] == "fastgrpo" and row["ms_p50"]]
    best = {d: min((row["ms_p50"] for row in ours if row["dtype"] == d), default=None) for d in dtypes}
    lines = [
        f"{title[0].upper()}{title[1:]}, {size}:",
        "",
        "| | " + " | ".join(f"{d}, time | × | memory | error" for d in dtypes) + " |",
        "|---|" + "---:|---:|---:|---:|" * len(dtypes),
    ]
    for name in sorted(by_name, key=lambda name: min(row["ms_p50"] or math.inf for row in by_name[name].values())):
        cells = [cell for d in dtypes for cell in _cells(by_name[name].get(d), best[d])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _missing(rows: Rows) -> str:
    """Who was measured nowhere, and why."""
    timed = {label(row) for row in rows if row["ms_p50"] is not None}
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if label(row) not in timed:
            reasons.setdefault(row["reason"], {})[label(row)] = None
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())


def _cells(row: dict | None, best: float | None) -> list[str]:
    if row is None:
        return [""] * 4
    if row["ms_p50"] is None:
        return [row["reason"] or "", "", "", ""]
    time, memory, error = _facts(row)
    return [time, f"{row['ms_p50'] / best:.2f}×" if best else "", memory, error or "floor"]


def _facts(row: dict) -> tuple[str, str, str]:
    """(time, memory, error) of a row that has a time; empty where it holds none."""
    return (
        duration(row["ms_p50"]),
        "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f} MiB",
        "" if row["rel_err"] is None else f"{row['rel_err']:.0e}",
    )


def _growth_table(rows: Rows, points: list[tuple[int, float, float | None]]) -> str:
    first = next(row for row in rows if row["op"] == GROWING.name)
    lines = [
        f"{GROWING.short.capitalize()} as tokens grow, {first['dtype']}; the vocabulary in the plot:",
        "",
        "| tokens | fastgrpo | per thousand tokens | memory above inputs and gradients |",
        "|---:|---:|---:|---:|",
    ]
    for tokens, ms, extra in points:
        memory = "" if extra is None else f"{extra:.0f} MiB"
        lines.append(f"| {tokens:,} | {duration(ms)} | {duration(1e3 * ms / tokens)} | {memory} |")
    return "\n".join(lines)


def _targets_table(rows: Rows) -> str:
    lines = ["The project's targets, on these rows:", "", "| target | measured | |", "|---|---|---|"]
    growing = _growing(rows)
    plain = [row for row in rows if row not in growing]
    for what, numbers, verdict in verdicts.verdicts(plain)[:-1] + verdicts.growth_verdict(growing):
        if verdict != "not measured":
            lines.append(f"| {what} | {numbers} | {verdict} |")
    return "\n".join(lines)


def plot(rows: Rows, path: Path) -> None:
    """Time and memory against tokens and against vocabulary, on log axes, all sides beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _swept(rows)
    with pyplot.rc_context({"svg.hashsalt": "fastgrpo", "font.size": 9}):  # the same file from the same rows
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
        for column, (size, vary, fixed) in enumerate((("tokens", "N", "V"), ("vocabulary", "V", "N"))):
            chosen = _longest_sweep(rows, vary, fixed)
            for line, (key, unit) in enumerate((("ms_p50", "ms"), ("peak_mb", "MiB at the peak, above inputs"))):
                axis = axes[line][column]
                for name in dict.fromkeys(label(row) for row in chosen):
                    points = sorted((_xs(r)[vary], r[key]) for r in chosen if label(r) == name and r[key])
                    if points:
                        style = "--" if name in {*FLOORS, "fastgrpo (torch)"} else "-"
                        axis.plot(
                            *zip(*points, strict=True),
                            style,
                            marker="o",
                            ms=3,
                            label=name,
                            color=colour(name.split(" (")[0]),
                        )
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.set_xlabel(size)
                axis.set_ylabel(unit)
                axis.grid(alpha=0.3, which="both")
        axes[0][0].legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def is_sweep(rows: Rows) -> bool:
    """Whether `plot` has more than a point to draw."""
    found = [_longest_sweep(_swept(rows), *axes) for axes in (("N", "V"), ("V", "N"))]
    return any(len({json.dumps(row["shape"]) for row in each}) > 2 for each in found)


def _swept(rows: Rows) -> Rows:
    return [row for row in rows if row["op"] == GROWING.name and row["ms_p50"] is not None and not row["inactive"]]


def _xs(row: dict) -> dict[str, int]:
    shape = row["shape"]
    return {"N": shape["B"] * shape["T"], "V": shape["V"]}


def _longest_sweep(rows: Rows, vary: str, fixed: str) -> Rows:
    """The rows that differ in one size alone, of which there are the most sizes."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault((_xs(row)[fixed], row["shape"]["H"], row["dtype"]), []).append(row)
    return max(groups.values(), key=lambda found: len({_xs(row)[vary] for row in found}), default=[])
