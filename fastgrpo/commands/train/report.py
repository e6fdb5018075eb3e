"""What `fastgrpo train` leaves to look at: plots, and the table of a recipe's stages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120
_PARTS = 20  # of a run; the running mean of the reward is over one of them
_COLUMNS = {"accuracy": ".2f", "format": ".2f", "language": ".2f", "length": ".1f", "general": ".2f"}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display is asked for, whatever the environment's default
    return figure


def plot_rewards(history: list[dict], path: Path, what: str, before: float, after: float) -> None:
    """The reward of each step, its running mean, and the held-out figure before and after, as a PNG."""
    points = [(entry["step"], entry["reward"]) for entry in history if entry.get("reward") is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    window = max(1, len(values) // _PARTS)
    running = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    figure = _figure(7, 4)
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, label="reward, each step")
    axes.plot(steps, running, color="tab:blue", label=f"reward, mean of {window} steps")
    axes.axhline(before, color="tab:grey", linestyle=":", label=f"held-out {what} before: {before:.2f}")
    axes.axhline(after, color="tab:green", linestyle="--", label=f"held-out {what} after: {after:.2f}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean reward")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, up to one that the end of a run has cut short."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:  # the run ended in the middle of a line
            break
    return entries


def format_table(table: dict[str, dict[str, float]]) -> str:
    """{stage: {metric: mean}} as lines of text."""
    columns = [name for name in _COLUMNS if any(name in scores for scores in table.values())]
    lines = [f"{'stage':<18}" + "".join(f"{name:>10}" for name in columns)]
    for stage, scores in table.items():
        cells = [format(scores.get(name, math.nan), _COLUMNS[name]) for name in columns]
        lines.append(f"{stage:<18}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def plot_stages(metrics: Path, path: Path) -> None:
    """Rewards over the steps of reinforcement learning, and the held-out figures by stage, as a PNG."""
    entries = read_metrics(metrics)
    steps = [entry for entry in entries if "reward" in entry]
    table = {entry["stage"]: entry["held_out"] for entry in entries if "held_out" in entry}
    figure = _figure(8, 7)
    training, held_out = figure.subplots(2)
    colors = {name: f"C{i}" for i, name in enumerate(_COLUMNS)}
    for name, color in colors.items():
        values = [entry.get(f"rewards/{name}/mean") for entry in steps]
        if any(value is not None for value in values):
            gaps = [math.nan if value is None else value for value in values]
            training.plot(gaps, color=color, label=name)
    for i in range(1, len(steps)):
        if steps[i]["stage"] != steps[i - 1]["stage"]:
            training.axvline(i, color="tab:grey", linestyle=":")
    training.set_xlabel("step of reinforcement learning")
    training.set_ylabel("mean reward")
    for name, color in colors.items():
        if name != "length" and any(name in scores for scores in table.values()):
            means = [scores.get(name, math.nan) for scores in table.values()]
            held_out.plot(list(table), means, "o-", color=color, label=name)
    held_out.set_ylabel("mean on held-out prompts")
    for axes in (training, held_out):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)
