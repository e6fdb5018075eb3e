"""Group-normalised advantages from rewards."""

from __future__ import annotations

from fastgrpo import group_advantages
from fastgrpo.bench.inputs import Random
from fastgrpo.bench.operation import GROUP, Case, Inputs, Operation, Results


def _inputs(case: Case) -> Inputs:
    return Inputs(case=case, rewards=Random(case).uniform(case.B))


def _truth(inputs: Inputs) -> Results:
    groups = inputs.rewards.double().view(-1, GROUP)
    centred = groups - groups.mean(-1, keepdim=True)
    return {"advantages": (centred / (groups.std(-1, keepdim=True) + 1e-4)).view(-1)}


_CASES = (Case("advantages", 65_536, 1, 1, dtype="fp32"),)
advantages = Operation(
    "advantages",
    title="group-normalised advantages",
    place=0,
    inputs=_inputs,
    truth=_truth,
    bytes=lambda case: 2 * 4 * case.B,
    sizes="B",
    quick=_CASES,
    full=_CASES,
    dtypes=("fp32",),
    size=lambda shape: f"{shape['B']:,} rewards",
)


@advantages.add("fastgrpo")
def _fastgrpo(inputs: Inputs) -> Results:
    return {"advantages": group_advantages(inputs.rewards, GROUP)}


@advantages.add("eager")
def _eager(inputs: Inputs) -> Results:
    groups = inputs.rewards.view(-1, GROUP)
    mean, std = (x.repeat_interleave(GROUP) for x in (groups.mean(1), groups.std(1)))
    return {"advantages": (inputs.rewards - mean) / (std + 1e-4)}
