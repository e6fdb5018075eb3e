"""From recorded rows to the README's section and the plots, so that no figure in it is typed by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from fastgrpo.bench import targets
from fastgrpo.bench.cases import OPS
from fastgrpo.bench.implementations import label

Rows = list[dict]

START, END = "<!-- fastgrpo bench --report writes from here -->", "<!-- to here -->"
_TABLES = ("loss", "linear", "step", "logps")  # the others are in the rows
_COLOURS = {"fastgrpo": "tab:blue", "eager": "tab:gray", "trl": "tab:orange", "liger": "tab:green", "copy": "black",
            "GEMMs alone": "black", "F.linear_cross_entropy": "tab:purple", "torch.compile": "tab:brown"}  # fmt: skip


def load(folder: Path) -> Rows:
    """The rows of a folder's .jsonl files, in order; of a measurement that was repeated, the last. Rows of other
    operations than `cases.OPS`, such as sweeps of a kernel's choices, are not for the report."""
    rows = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["op"] not in OPS:
                continue
            rows[row["case"], row["on"], row["impl"], row["backend"], row["mode"]] = row
    return list(rows.values())


def write_report(results: Path, readme: Path) -> None:
    """Rewrite the section of `readme`, and the plot beside each device's rows.

    Raises:
        ValueError: no rows, or no section to write.
    """
    devices = [(folder, rows) for folder in sorted(results.iterdir()) if folder.is_dir() and (rows := load(folder))]
    if not devices:
        raise ValueError(f"expected folders with .jsonl files in {results}, found none")
    text = readme.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"expected {readme} to have the lines {START} and {END}")
    parts = []
    for folder, rows in devices:
        parts.append(section(rows))
        if len(targets.growth(_growing(rows))) > 1:
            plot(rows, folder / "growth.svg")
            where = (folder / "growth.svg").resolve().relative_to(readme.resolve().parent).as_posix()
            parts.append(f"![time and memory as tokens and vocabulary grow]({where})")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(before + START + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after)


def section(rows: Rows) -> str:
    """One device's tables as Markdown."""
    first = rows[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "trl", "liger_kernel")
                         if name in first["versions"])  # fmt: skip
    commits = ", ".join(sorted({re.sub(r"^(\w{12})\w*", r"\1", str(row["commit"])) for row in rows}))
    commands = ", ".join(f"`{command}`" for command in sorted({_plain(row["command"]) for row in rows}))
    parts = [f"**{first['device']}**; {versions}; {max(row['date'] for row in rows)}, commit {commits}: {commands}."]
    growing = _growing(rows)
    timed = {label(row) for row in rows if row["ms_p50"] is not None}
    for op in _TABLES:
        found = [row for row in rows if row["op"] == op and row not in growing and label(row) in timed]
        sizes = {_size(row): None for row in found}
        parts += [_table(op, size, [row for row in found if _size(row) == size]) for size in sizes]
    if len(points := targets.growth(growing)) > 1:
        parts.append(_growth_table(growing, points))
    if missing := _missing(rows):
        parts.append(f"Not measured: {missing}.")
    parts.append(_targets_table(rows))
    return "\n\n".join(parts)


def _plain(command: str) -> str:
    return re.sub(r" --json \S+", "", command)


def _size(row: dict) -> str:
    shape = row["shape"]
    words = [f"{shape['B'] * shape.get('T', 1):,} {'tokens' if 'T' in shape else 'rewards'}"]
    if row["op"] == "step":
        words = [f"{shape['B']} completions of {shape['T'] // 2} to {shape['T']} tokens"]
    words += [f"{name} = {shape[name]:,}" for name in "VH" if name in shape]
    words += [f"{row['inactive']:.0%} of the completions inactive"] * (row["inactive"] > 0)
    words += [row["model"]] * bool(row["model"])
    return ", ".join(words)


def _growing(rows: Rows) -> Rows:
    """The rows of sweeps, which are for the plot and the growth table."""
    return [row for row in rows if "--growth" in row["command"]]


def _table(op: str, size: str, rows: Rows) -> str:
    dtypes = [d for d in ("bf16", "fp16", "fp32") if any(row["dtype"] == d for row in rows)]
    by_name: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_name.setdefault(label(row), {})[row["dtype"]] = row
    ours = [row for row in rows if row["impl"] == "fastgrpo" and row["ms_p50"]]
    best = {d: min((row["ms_p50"] for row in ours if row["dtype"] == d), default=None) for d in dtypes}
    lines = [
        f"{OPS[op][0].upper()}{OPS[op][1:]}, {size}:",
        "",
        "| | " + " | ".join(f"{d} | | memory | error" for d in dtypes) + " |",
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
    return [
        _milliseconds(row["ms_p50"]),
        f"{row['ms_p50'] / best:.2f}×" if best else "",
        "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f} MiB",
        "floor" if row["rel_err"] is None else f"{row['rel_err']:.0e}",
    ]


def _milliseconds(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def _growth_table(rows: Rows, points: list[tuple[int, float, float | None]]) -> str:
    first = next(row for row in rows if row["op"] == "linear")
    lines = [
        f"From hidden states as tokens grow, {first['dtype']}; the vocabulary in the plot:",
        "",
        "| tokens | fastgrpo | a thousand tokens | memory above inputs and gradients |",
        "|---:|---:|---:|---:|",
    ]
    for tokens, ms, extra in points:
        memory = "" if extra is None else f"{extra:.0f} MiB"
        lines.append(f"| {tokens:,} | {_milliseconds(ms)} | {_milliseconds(1e3 * ms / tokens)} | {memory} |")
    return "\n".join(lines)


def _targets_table(rows: Rows) -> str:
    lines = ["What the project holds itself to, on these rows:", "", "| | | |", "|---|---|---|"]
    growing = _growing(rows)
    plain = [row for row in rows if row not in growing]
    for what, numbers, verdict in targets.verdicts(plain)[:-1] + targets.growth_verdict(growing):
        if verdict != "not measured":
            lines.append(f"| {what} | {numbers} | {verdict} |")
    return "\n".join(lines)


def plot(rows: Rows, path: Path) -> None:
    """Time and memory from hidden states against tokens and against vocabulary, on log axes, all sides beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["op"] == "linear" and row["ms_p50"] is not None and not row["inactive"]]
    with pyplot.rc_context({"svg.hashsalt": "fastgrpo", "font.size": 9}):  # the same file from the same rows
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
        for column, (size, vary, fixed) in enumerate((("tokens", "N", "V"), ("vocabulary", "V", "N"))):
            chosen = _longest_sweep(rows, vary, fixed)
            for line, (key, unit) in enumerate((("ms_p50", "ms"), ("peak_mb", "MiB at the peak, above inputs"))):
                axis = axes[line][column]
                for name in dict.fromkeys(label(row) for row in chosen):
                    points = sorted((_xs(r)[vary], r[key]) for r in chosen if label(r) == name and r[key])
                    if points:
                        style = "--" if name in ("GEMMs alone", "fastgrpo (torch)") else "-"
                        colour = _COLOURS.get(name.split(" (")[0])
                        axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, label=name, color=colour)
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.set_xlabel(size)
                axis.set_ylabel(unit)
                axis.grid(alpha=0.3, which="both")
        axes[0][0].legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _xs(row: dict) -> dict[str, int]:
    shape = row["shape"]
    return {"N": shape["B"] * shape["T"], "V": shape["V"]}


def _longest_sweep(rows: Rows, vary: str, fixed: str) -> Rows:
    """The rows that differ in one size alone, of which there are the most sizes."""
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault((_xs(row)[fixed], row["shape"]["H"], row["dtype"]), []).append(row)
    return max(groups.values(), key=lambda found: len({_xs(row)[vary] for row in found}), default=[])
