"""Log-probabilities and entropies from hidden states, over the tokens that a sampler kept."""

from __future__ import annotations

import torch

from fastgrpo import linear_logps
from fastgrpo.bench.operation import Case, Inputs, Operation, Results, Target
from fastgrpo.bench.ops import kept, linear
from fastgrpo.bench.sides import add_fastgrpo
from fastgrpo.bench.targets import ratio


def _truth(inputs: Inputs) -> Results:
    weight, logps, entropies = inputs.weight.double(), [], []
    for rows, sets, ids in zip(inputs.hidden.double(), inputs.kept, inputs.ids, strict=True):
        logits = rows @ weight.T
        outside = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, sets, False)
        every = logits.masked_fill_(outside, -torch.inf).log_softmax(-1)
        logps.append(every.gather(-1, ids[:, None])[:, 0])
        p = every.exp()
        entropies.append(-torch.where(p == 0, 0.0, p * every).sum(-1))
    return {"logps": torch.stack(logps), "entropies": torch.stack(entropies)}


kept_logps = Operation(
    "kept-logps",
    title=f"log-probabilities and entropies from hidden states, over {kept.SIZE} kept tokens a row",
    place=8,
    inputs=kept.kept.inputs,
    truth=_truth,
    bytes=lambda case: 0,
    sizes="BTVH",
    full=tuple(Case("kept-logps", 8, 64, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
    targets=(
        Target(f"scores of {kept.SIZE} kept tokens a row: our time over the three GEMMs' of all", "bf16",
               ratio("fastgrpo", "GEMMs alone"), 0.02, at_most=True),
    ),
    softcap="refused",
    page=5,
)  # fmt: skip


@torch.no_grad()
def _fastgrpo(inputs: Inputs, backend: str) -> Results:
    options = dict(return_entropy=True, backend=backend, kept_ids=inputs.kept)
    found = linear_logps(inputs.hidden, inputs.weight, inputs.ids, **options)
    return dict(zip(("logps", "entropies"), found, strict=True))


add_fastgrpo(kept_logps, {"": _fastgrpo})
kept_logps.add("GEMMs alone", is_floor=True, work=linear.gemms_work)(linear.gemms_step)
