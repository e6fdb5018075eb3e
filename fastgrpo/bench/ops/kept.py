"""The loss and its gradients from hidden states, over the tokens that a sampler kept."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import linear_logps
from fastgrpo.bench.inputs import Random, add_completions, add_policies
from fastgrpo.bench.operation import Case, Inputs, Operation, Results, Target, leaf_of, needs
from fastgrpo.bench.ops import linear
from fastgrpo.bench.sides import add_eager, add_fastgrpo, eager_loss
from fastgrpo.bench.targets import ratio

SIZE = 64  # tokens of a set


def _inputs(case: Case) -> Inputs:
    random, inputs = Random(case), Inputs(case=case)
    inputs.weight = random.normal(case.V, case.H, scale=2 / case.H**0.5)
    inputs.hidden = random.normal(case.B, case.T, case.H)
    add_completions(inputs, random)
    inputs.kept = torch.cat([inputs.ids[..., None], random.whole(case.V, case.B, case.T, SIZE - 1)], dim=-1)
    logps = linear_logps(inputs.hidden.float(), inputs.weight.float(), inputs.ids, kept_ids=inputs.kept)
    add_policies(inputs, random, logps)
    return inputs


def _truth(inputs: Inputs) -> Results:
    return linear.truth(inputs, inputs.kept)


kept = Operation(
    "kept",
    title=f"loss and gradients from hidden states, over {SIZE} kept tokens a row",
    place=7,
    inputs=_inputs,
    truth=_truth,
    bytes=lambda case: 0,  # most of it is a gradient that is filled with zeroes
    sizes="BTVH",
    quick=(Case("kept", 8, 16, 32_768),),
    full=tuple(Case("kept", 8, 64, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
    targets=(
        Target(f"from hidden states, {SIZE} kept tokens a row: our time over the GEMMs' of all", "bf16",
               ratio("fastgrpo", "GEMMs alone"), 0.15, at_most=True),
    ),
    softcap="refused",
    page=4,
    short=f"from hidden states, {SIZE} kept tokens a row",
)  # fmt: skip


def _fastgrpo(inputs: Inputs, backend: str) -> Results:
    return linear.fastgrpo_step(inputs, backend, kept_ids=inputs.kept)


def _eager(inputs: Inputs, made) -> Results:
    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    loss = made(_eager_loss)(hidden, weight, inputs)
    return linear.results(loss, hidden, weight)


def _eager_loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    return eager_loss(masked(hidden @ weight.T, inputs.kept), inputs)


def masked(logits: Tensor, kept: Tensor) -> Tensor:
    """-inf in all but the kept columns."""
    outside = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, kept, False)
    return logits.masked_fill(outside, -torch.inf)


add_fastgrpo(kept, {"": _fastgrpo})
add_eager(kept, _eager)
kept.add("trl", mode="all tokens", why_not=needs("trl"), truth=linear.truth)(linear.trl_step)
kept.add("GEMMs alone", is_floor=True, work=linear.gemms_work)(linear.gemms_step)
