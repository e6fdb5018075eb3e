"""What is logged of a loss: TRL's metrics, and how processes merge them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.objective.options import Objective
from fastgrpo.objective.terms import Terms


@torch.no_grad()
def compute_metrics(o: Objective, batch: Batch, entropies: Tensor | None, terms: Terms) -> dict[str, Tensor]:
    """TRL's metrics, 0-dim tensors: means over the loss tokens, or over sequences for one number a sequence."""
    layout, sequences = batch.layout, batch.layout.num_sequences
    per_sequence = o.importance_sampling_level == "sequence" and not batch.advantages_per_token
    vectors = dict(kl=terms.kl, entropy=entropies) | dict(zip(o.record.logs, terms.logged, strict=True))
    vectors = {name: x for name, x in vectors.items() if x is not None}
    shares = o.record.shares(o, terms.ratio, batch.row_advantages())  # 0 or 1

    # all of them in one table: on a GPU each operation is a launch, whatever its size
    table = torch.stack([*vectors.values(), *shares.values(), batch.mask], dim=1).to(batch.dtype)
    sums = layout.seq_sum(torch.where(batch.mask[:, None], table, 0.0))  # (S, columns); the last: the lengths
    totals, lengths = sums.sum(0), sums[:, -1:]
    means = totals / totals[-1].clamp(min=1)
    metrics = {name: means[i] for i, name in enumerate((*vectors, *shares))}
    if per_sequence and shares:
        of_sequence = sums / lengths.clamp(min=1)
        means = of_sequence.sum(0) / max(sequences, 1)
        metrics |= {name: means[len(vectors) + i] for i, name in enumerate(shares)}
    if "clip_ratio/low_mean" in shares:
        metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        if not per_sequence:
            of_sequence = sums / lengths  # NaN for a sequence without loss tokens, which has no say in the extremes
        if sequences == 0:
            extremes = sums.new_full((2,), torch.nan)
        else:
            low, high = of_sequence[:, len(vectors)], of_sequence[:, len(vectors) + 1]
            extremes = torch.stack([low.nan_to_num(nan=torch.inf).amin(), high.nan_to_num(nan=-torch.inf).amax()])
            extremes = extremes + (extremes - extremes)  # infinite where no sequence had a say: NaN
        metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"] = extremes.unbind()
    if not batch.advantages_per_token:
        for name in o.record.logs:  # one number for each sequence, which is 1 where that has no loss token
            weight = torch.where(lengths[:, 0] > 0, sums[:, [*vectors].index(name)] / lengths[:, 0], 1.0)
            metrics[name] = weight.sum() / max(sequences, 1)
    if terms.bonus is not None:
        metrics["policy_loss"] = terms.loss.detach() - terms.bonus
    return metrics
