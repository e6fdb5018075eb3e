"""The loss from hidden states of a sure policy, whose gradient lies in few columns, and of a flat one.

The logits of a sure policy fall by a Zipf law, each row with its own exponent and one of 64 orders of the tokens. At
V = 151,936 and a tolerance of 2^-12 its rows keep about 42 columns on average, half of them at most 19 and nine in ten
at most 100, about as those of a real model's completions at temperature 0.6 do; the mean entropy is 0.5 nats.
"""

from __future__ import annotations

import functools
import math

import torch

from fastgrpo import linear_logps
from fastgrpo.bench.inputs import Random, add_completions, add_policies
from fastgrpo.bench.operation import Case, Inputs, Operation, Rows, Target, head_bytes, head_flops, needs
from fastgrpo.bench.ops import linear as dense
from fastgrpo.bench.sides import add_eager, add_fastgrpo
from fastgrpo.bench.targets import ratio

TOLERANCE, MODE = 2**-12, "columns 2^-12"  # of the option column_tolerance
_WAYS = 64  # orders of the tokens, each a column of the weight
_FIRST = 1.15  # the rank of the likeliest token, whose neighbours are so a little nearer
_FEW = 64  # rows of logits at a time


def _sure(case: Case) -> Inputs:
    random = Random(case)
    inputs = _heads(case, random)
    n, ways = case.B * case.T, inputs.ways
    # of a Zipf law with exponent a, the first K columns carry all but K^(1 - a) of what is not on the first
    kept = (math.log(14) + 1.3 * random.wide(n)).exp().clamp(2.2, 300)
    hidden = 0.02 * random.wide(n, case.H)
    hidden[:, :ways] = 0
    rows = torch.arange(n, device=hidden.device)
    hidden[rows, rows % ways] = 1 + math.log(0.5 / TOLERANCE) / kept.log()
    return _complete(inputs, random, hidden)


def _flat(case: Case) -> Inputs:
    """Of about 8 nats at V = 151,936."""
    random = Random(case)
    inputs = _heads(case, random)
    hidden = random.wide(case.B * case.T, case.H) * (2.8 / (case.H - inputs.ways) ** 0.5)
    hidden[:, : inputs.ways] = 0
    return _complete(inputs, random, hidden)


def _heads(case: Case, random: Random) -> Inputs:
    """With a weight whose first columns are -ln(rank) of the tokens."""
    inputs = Inputs(case=case)
    inputs.ways = min(_WAYS, case.H // 2)
    inputs.weight = random.normal(case.V, case.H)
    for way in range(inputs.ways):
        rank = random.wide(case.V).argsort().argsort().float() + 1
        inputs.weight[:, way] = -rank.clamp(min=_FIRST).log().bfloat16()
    return inputs


def _complete(inputs: Inputs, random: Random, hidden: torch.Tensor) -> Inputs:
    """With tokens that the policy samples."""
    case = inputs.case
    inputs.hidden = hidden.bfloat16().to(inputs.weight.dtype).view(case.B, case.T, case.H)
    add_completions(inputs, random)
    weight = inputs.weight.float()
    for rows, ids in zip(hidden.bfloat16().split(_FEW), inputs.ids.view(-1).split(_FEW), strict=True):
        chances = (rows.float() @ weight.T).softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(chances, random.uniform(len(rows), 1) * chances[:, -1:])
        ids.copy_(drawn[:, 0].clamp(max=case.V - 1))
    logps = linear_logps(inputs.hidden.float(), weight, inputs.ids)
    add_policies(inputs, random, logps)
    return inputs


def _error_over_dense(rows: Rows) -> float | None:
    errors = {row["mode"]: row["rel_err"] for row in rows if row["impl"] == "fastgrpo" and row["backend"] != "torch"}
    return errors[MODE] / errors[""] if errors.get(MODE) and errors.get("") else None


def _too_exact(case: Case) -> str | None:
    return "it leaves out more than fp32 may err by" if case.dtype == "fp32" else None


def _operation(name: str, title: str, place: int, page: int, inputs, *targets: Target, **more) -> Operation:
    made = Operation(
        name, title=title, place=place, page=page, inputs=inputs, truth=dense.truth, bytes=head_bytes,
        flops=head_flops, sizes="BTVH", quick=(Case(name, 8, 16, 32_768),), full=(Case(name, 8, 64, 151_936),),
        targets=targets, softcap="refused", **more,
    )  # fmt: skip
    few = functools.partial(dense.fastgrpo_step, column_tolerance=TOLERANCE)
    add_fastgrpo(made, {MODE: few, "": dense.fastgrpo_step}, why_not={MODE: _too_exact})
    add_eager(made, dense.eager_step)
    made.add("trl", why_not=needs("trl"))(dense.trl_step)
    made.add("GEMMs alone", is_floor=True, work=dense.gemms_work)(dense.gemms_step)
    return made


sure = _operation(
    "sure", "loss and gradients from hidden states of a sure policy", 5, 2, _sure,
    Target("a sure policy, column_tolerance 2^-12: our time over the GEMMs'", "bf16",
           ratio("fastgrpo", "GEMMs alone", MODE), 0.45, at_most=True),
    Target("a sure policy, column_tolerance 2^-12: our error over that of all columns", "bf16", _error_over_dense, 1.5,
           at_most=True, accuracy=True),
    short="from hidden states, a sure policy",
)  # fmt: skip
flat = _operation(
    "flat", "loss and gradients from hidden states of a flat policy", 6, 3, _flat,
    Target("a flat policy, column_tolerance 2^-12: our time over that without", "bf16",
           ratio("fastgrpo", "fastgrpo", MODE, ""), 1.03, at_most=True),
)  # fmt: skip
