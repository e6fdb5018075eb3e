"""What is logged of a loss: TRL's metrics, and how processes merge them."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.objective.options import Objective
from fastgrpo.objective.sampler import mismatch, rejects
from fastgrpo.objective.terms import Terms


@torch.no_grad()
def compute_metrics(
    o: Objective, batch: Batch, logps: Tensor, entropies: Tensor | None, terms: Terms
) -> dict[str, Tensor]:
    """TRL's metrics and those of the sampler, 0-dim tensors: means over the loss tokens, or over sequences for one
    number a sequence."""
    layout, sequences = batch.layout, batch.layout.num_sequences
    per_sequence = o.importance_sampling_level == "sequence" and not batch.advantages_per_token
    given = dict(kl=terms.kl, entropy=entropies) | dict(zip(o.record.logs, terms.logged, strict=True))
    vectors = {name: x for name, x in given.items() if x is not None}
    shares = o.record.shares(o, terms.ratio, batch.row_advantages())  # 0 or 1

    # all of them in one table: on a GPU each operation is a launch, whatever its size
    table = torch.stack([*vectors.values(), *shares.values(), batch.mask], dim=1).to(batch.dtype)
    sums = layout.seq_sum(torch.where(batch.mask[:, None], table, 0.0))  # (S, columns); the last: the lengths
    totals, lengths = sums.sum(0), sums[:, -1:]
    means = (totals[:-1] / totals[-1].clamp(min=1)).unbind()
    metrics = dict(zip((*vectors, *shares), means, strict=True))
    if per_sequence and shares:
        of_sequence = sums / lengths.clamp(min=1)
        over_sequences = of_sequence.sum(0) / max(sequences, 1)
        metrics |= {name: over_sequences[len(vectors) + i] for i, name in enumerate(shares)}
    if "clip_ratio/low_mean" in shares:
        metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        if not per_sequence:
            of_sequence = sums / lengths  # NaN for a sequence without loss tokens, which has no say in the extremes
        if sequences == 0:
            extremes = sums.new_full((2,), torch.nan)
        else:
            low, high = of_sequence[:, len(vectors)], of_sequence[:, len(vectors) + 1]
            extremes = torch.stack([low.nan_to_num(nan=torch.inf).amin(), high.nan_to_num(nan=-torch.inf).amax()])
            extremes = extremes.nan_to_num(posinf=torch.nan, neginf=torch.nan)  # no sequence had a say
        metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"] = extremes.unbind()
    if o.record.logs_of_sequences and not batch.advantages_per_token:
        for name in o.record.logs:  # one number for each sequence, which is 1 where that has no loss token
            weight = torch.where(lengths[:, 0] > 0, sums[:, [*vectors].index(name)] / lengths[:, 0], 1.0)
            metrics[name] = weight.sum() / max(sequences, 1)
    if batch.kept_given:  # also if no row has a set: the names depend on no values
        sizes = torch.zeros_like(batch.ids) if batch.kept is None else torch.where(batch.mask, batch.kept.size, 0)
        count, tokens = (sizes > 0).sum(), batch.mask.sum().clamp(min=1)
        metrics["kept/mean"] = (sizes.sum() / count.clamp(min=1)).to(batch.dtype)
        metrics["kept/without"] = (1 - count / tokens).to(batch.dtype)
    if terms.bonus is not None:
        metrics["policy_loss"] = terms.loss.detach() - terms.bonus
    if batch.sampling is not None:
        metrics |= mismatch(o.corrections, batch, logps)
        if rejects(o.corrections):
            metrics["sampling/accepted"] = totals[-1]
    return metrics


class ColumnCounts(NamedTuple):
    """What was counted where gradients were made of a few columns of each row."""

    columns: int  # of the rows that fit
    fitting: int  # rows with a gradient that have few columns
    dense: int  # those that went through the GEMMs

    def plus(self, columns: int, fitting: int, dense: int) -> ColumnCounts:
        return ColumnCounts(self.columns + columns, self.fitting + fitting, self.dense + dense)


def column_metrics(counts: Tensor) -> dict[str, Tensor]:
    """Means over rows, fp32, from `ColumnCounts` as a tensor (3,); 0 over no rows."""
    columns, fitting, dense = counts.float().unbind()
    rows = fitting + dense
    mean, share = columns / fitting.clamp(min=1), dense / rows.clamp(min=1)
    return {"columns/mean": mean, "columns/dense": share, "columns/rows": rows}


class Gathers(Protocol):
    """What can put the tensors of all processes one after the other, such as accelerate's `Accelerator`."""

    def gather(self, tensor: Tensor) -> Tensor: ...


def reduce_metrics(
    accelerator: Gathers,
    objective: Objective,
    metrics: dict[str, Tensor],
    mask: Tensor,
    accumulation: int,
    advantages_per_token: bool = False,
) -> dict[str, Tensor]:
    """TRL's metrics of a loss, averaged over processes: by tokens, or by sequences for one number a sequence.

    A mean is weighed by the number of tokens, or of rows, that it was made of; these numbers are left out.

    One collective, and no wait for the device.

    Args:
        mask (B, T): the loss tokens of this process's micro-batch.
        accumulation: micro-batches of a step, by which the loss was divided.
        advantages_per_token: no share is then one number a sequence.

    Returns:
        {name: 0-dim fp32 tensor}, the same on every process.
    """
    values = {name: value.detach().float() for name, value in metrics.items()}
    if "policy_loss" in values and objective.averaging.counts != "tokens":
        values["policy_loss"] = values["policy_loss"] * accumulation  # TRL logs those per micro-batch, others by share
    packed = torch.stack([*values.values(), mask.sum().float()])
    *columns, tokens = accelerator.gather(packed).view(-1, len(packed)).T
    per_sequence, reduced = objective.importance_sampling_level == "sequence" and not advantages_per_token, {}
    nothing = mask.new_zeros(0, dtype=torch.float32)
    of_sequences: set[str] = set()
    if objective.record.logs_of_sequences and not advantages_per_token:
        of_sequences |= {*objective.record.logs}
    if per_sequence:
        of_sequences |= {*objective.record.shares(objective, nothing, nothing), "clip_ratio/region_mean"}
    gathered = dict(zip(values, columns, strict=True))
    rows = gathered.pop("columns/rows", None)  # of which those that fit have a mean
    known = gathered.pop("sampling/tokens", None)
    tokens = gathered.pop("sampling/accepted", tokens)
    for name, column in gathered.items():
        if rows is not None and name.startswith("columns/"):
            weight = rows * (1 - gathered["columns/dense"]) if name == "columns/mean" else rows
            reduced[name] = (column * weight).sum() / weight.sum().clamp(min=1)
        elif name == "kept/mean":
            weight = tokens * (1 - gathered["kept/without"])
            reduced[name] = (column * weight).sum() / weight.sum().clamp(min=1e-9)
        elif name.endswith("_min"):
            reduced[name] = _finite(column.nan_to_num(nan=math.inf).min())
        elif name.endswith("_max"):
            reduced[name] = _finite(column.nan_to_num(nan=-math.inf).max())
        elif name == "policy_loss" or name in of_sequences:
            reduced[name] = column.mean()
        else:
            weight = known if known is not None and name.startswith("sampling/") else tokens
            reduced[name] = (column * weight).sum() / weight.sum().clamp(min=1)
    return reduced


def _finite(x: Tensor) -> Tensor:
    """NaN where no process had a number."""
    return torch.where(x.isinf(), math.nan, x)
