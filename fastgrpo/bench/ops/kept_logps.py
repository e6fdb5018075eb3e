"""Log-probabilities and entropies from hidden states, over the tokens that a sampler kept."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import linear_logps
from fastgrpo.bench.operation import Case, Inputs, Operation, Results, Target
from fastgrpo.bench.ops import kept, linear
from fastgrpo.bench.sides import add_eager, add_fastgrpo
from fastgrpo.bench.targets import ratio


def _truth(inputs: Inputs) -> Results:
    weight, logps, entropies = inputs.weight.double(), [], []
    for rows, sets, ids in zip(inputs.hidden.double(), inputs.kept, inputs.ids, strict=True):
        made = _logps(rows, weight, sets, ids)
        logps.append(made[0])
        entropies.append(made[1])
    return {"logps": torch.stack(logps), "entropies": torch.stack(entropies)}


def _logps(hidden: Tensor, weight: Tensor, sets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    every = kept.masked(hidden @ weight.T, sets).log_softmax(-1)
    p = every.exp()
    return every.gather(-1, ids[..., None])[..., 0], -torch.where(p == 0, 0.0, p * every).sum(-1)


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


@torch.no_grad()
def _eager(inputs: Inputs, made) -> Results:
    found = made(_logps)(inputs.hidden, inputs.weight, inputs.kept, inputs.ids)
    return dict(zip(("logps", "entropies"), (x.float() for x in found), strict=True))


add_fastgrpo(kept_logps, {"": _fastgrpo})
add_eager(kept_logps, _eager)
kept_logps.add("GEMMs alone", is_floor=True, work=linear.gemms_work)(linear.gemms_step)
