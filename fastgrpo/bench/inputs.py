"""Random inputs that operations share. Every number has a bf16 value, so that one truth serves all dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import selective_logps
from fastgrpo.bench.operation import DTYPES, EPSILON, Case, Inputs


class Random:
    """Numbers for a case, from one seed."""

    def __init__(self, case: Case):
        self.case, self._generator = case, torch.Generator(case.device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """In the case's dtype."""
        out = torch.empty(shape, dtype=torch.bfloat16, device=self.case.device)
        for part in out.split(max(1, (1 << 26) // max(out[0].numel(), 1))):
            part.copy_(self.wide(*part.shape) * scale)
        return out.to(DTYPES[self.case.dtype])

    def wide(self, *shape: int) -> Tensor:
        """Normal, in fp32."""
        return torch.randn(shape, generator=self._generator, device=self.case.device)

    def uniform(self, *shape: int) -> Tensor:
        """From 0 to 1, in fp32."""
        return torch.rand(shape, generator=self._generator, device=self.case.device)

    def whole(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self._generator, device=self.case.device)


def add_completions(inputs: Inputs, random: Random) -> None:
    """Token ids, a mask of ones, and an advantage for each completion, 0 for the inactive ones."""
    case = inputs.case
    inputs.ids = random.whole(case.V, case.B, case.T)
    inputs.mask = torch.ones_like(inputs.ids)
    inputs.advantages = random.wide(case.B)
    inputs.advantages[: round(case.inactive * case.B)] = 0.0


def add_policies(inputs: Inputs, random: Random, logps: Tensor) -> None:
    """Log-probabilities of an old and of a reference policy.

    The old ones are the policy's own `logps` with noise of 0.1, as after an update, and no ratio lies within 0.05 of a
    clip edge: there, rounding alone would decide about a gradient.
    """
    log_ratio = 0.1 * random.wide(*logps.shape)
    for edge in (1 - EPSILON, 1 + EPSILON):
        away = log_ratio.exp() - edge
        log_ratio = torch.where(away.abs() < 0.05, (edge + 0.05 * away.sign()).log(), log_ratio)
    inputs.old, inputs.ref = logps - log_ratio, logps + 0.1 * random.wide(*logps.shape)


def from_logits(case: Case) -> Inputs:
    """Logits, completions, and both policies."""
    random, inputs = Random(case), Inputs(case=case)
    inputs.logits = random.normal(case.B, case.T, case.V, scale=2.0)
    add_completions(inputs, random)
    rows = range(case.B)
    logps = torch.cat([selective_logps(inputs.logits[[i]].float(), inputs.ids[[i]]) for i in rows])
    add_policies(inputs, random, logps)
    return inputs
