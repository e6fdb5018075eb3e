"""Generalised advantage estimation with a value function (arXiv:1506.02438)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrpo.batch.checks import FLOATS, INTEGERS, check, check_dtype


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438), for PPO with a value function.

    With t+1 the next token that is not masked, and V = A = 0 after the last one:

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1},   return_t = A_t + V_t

    Masked tokens, padding as well as holes such as a tool's output, are skipped as if the sequence did not contain
    them: they cost no discount, and may hold NaN. Put a reward on a token that counts. The results carry no gradient.

    Args:
        rewards (B, T) float or integer: the reward of each token; often 0 except for the last one.
        values (B, T) float: V of the state before each token.
        mask (B, T) bool or integer: nonzero where a token counts.
        gamma: discount γ in [0, 1].
        lam: λ in [0, 1]; 0 gives the one-step error δ, 1 the discounted return minus the value.

    Returns:
        (advantages (B, T), returns (B, T)): fp32, or float64 if an input is; 0 where masked.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, gamma or lam outside [0, 1].
    """
    _check_gae(rewards, values, mask, gamma, lam)
    dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    mask = mask != 0
    rewards, values = (torch.where(mask, x.to(dtype), 0.0) for x in (rewards, values))

    # V of the next token that counts; its position is a running minimum, from the right, of such tokens' positions
    length = mask.shape[1]
    here = torch.where(mask, torch.arange(length, device=mask.device), length)
    after = nn.functional.pad(here.flip(1).cummin(1).values.flip(1)[:, 1:], (0, 1), value=length) if length else here
    next_values = nn.functional.pad(values, (0, 1)).gather(1, after)

    # A_t = a_t A_{t+1} + b_t; a masked token is the identity (1, 0). Composing the maps of 1, 2, 4, … tokens takes
    # log2(T) steps. Every a is in [0, 1] and nothing is divided, so no digits are lost; a cumulative sum divided by
    # powers of γλ would lose them all.
    a = torch.where(mask, torch.full_like(values, gamma * lam), 1.0)
    b = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    step = 1
    while step < length:
        b = b + a * nn.functional.pad(b[:, step:], (0, step))
        a = a * nn.functional.pad(a[:, step:], (0, step))
        step *= 2
    advantages = torch.where(mask, b, 0.0)
    return advantages, advantages + values


def _check_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> None:
    check(isinstance(values, Tensor) and values.dim() == 2, "values", "a tensor of shape (B, T)", values)
    check_dtype("values", values, *FLOATS)
    for name, x in (("rewards", rewards), ("mask", mask)):
        fits = isinstance(x, Tensor) and x.shape == values.shape
        check(fits, name, f"a tensor of values' shape {tuple(values.shape)}", x)
        check(x.device == values.device, name, f"values' device {values.device}", x)
        check_dtype(name, x, torch.bool, *INTEGERS, *(FLOATS if name == "rewards" else ()))
    for name, number in (("gamma", gamma), ("lam", lam)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {number!r}")
