"""What GRPOTrainer logs: metrics of lengths and rewards, their averages between two logs, tables of completions."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fastgrpo.rewards import nanstd


class MetricLog:
    """The metrics since the last log, in training ("train") and in evaluation ("eval")."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def add(self, mode: str, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self.values[mode][name].append(value)

    def take(self, mode: str) -> dict[str, float | None]:
        """The averages of what was added, without NaN; None where nothing else was. The log is empty afterwards."""
        averages = {}
        for name, values in self.values[mode].items():
            known = [value for value in map(float, values) if not math.isnan(value)]
            averages[name] = sum(known) / len(known) if known else None
        self.values[mode].clear()
        return averages

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps: the metrics of training."""
        return {name: [float(value) for value in values] for name, values in self.values["train"].items()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        self.values["train"] = defaultdict(list, state)


def length_metrics(lengths: Tensor, truncated: Tensor) -> dict[str, Tensor]:
    """Of the lengths (B,) in tokens of all completions, and whether each was cut off (B,) bool."""
    ended = lengths[~truncated].float()
    ended = ended if len(ended) else torch.zeros(1, device=ended.device)
    metrics = {}
    for name, values in (("", lengths.float()), ("terminated_", ended)):
        metrics[f"completions/mean_{name}length"] = values.mean()
        metrics[f"completions/min_{name}length"] = values.min()
        metrics[f"completions/max_{name}length"] = values.max()
    return {**metrics, "completions/clipped_ratio": truncated.float().mean()}


def reward_metrics(names: Sequence[str], per_func: Tensor, rewards: Tensor, zero_std: Tensor) -> dict[str, Tensor]:
    """Of the scores per_func (B, F) of the functions called `names`, and of what `combine_rewards` made of them."""
    metrics = {}
    for name, column in zip(names, per_func.unbind(dim=1), strict=True):
        metrics[f"rewards/{name}/mean"] = column.nanmean()
        metrics[f"rewards/{name}/std"] = nanstd(column)
    return {
        **metrics,
        "reward": rewards.nanmean(),
        "reward_std": nanstd(rewards),
        "frac_reward_zero_std": zero_std.float().mean(),
    }


def mean_over_processes(accelerator: Accelerator, values: Mapping[str, list[float]]) -> dict[str, Tensor]:
    """The mean of each name's values over all processes, of which some may not have that name."""
    means = {}
    for name in sorted(set(gather_object(list(values)))):  # the same order on every process
        own = values.get(name, [])
        totals = torch.tensor([float(sum(own)), len(own)], device=accelerator.device)
        total, count = accelerator.gather(totals).view(-1, 2).sum(0)
        means[name] = total / count
    return means


def write_completions(folder: str, prefix: str, step: int, table: Mapping[str, list]) -> None:
    """The columns of a table of completions as folder/<prefix>completions_<step>.parquet."""
    from datasets import Dataset

    os.makedirs(folder, exist_ok=True)
    steps = [step] * len(table["prompt"])
    path = os.path.join(folder, f"{prefix}completions_{step:05d}.parquet")
    Dataset.from_dict({"step": steps, **table}).to_parquet(path)
