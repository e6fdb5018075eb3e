"""Estimates of the KL to another policy from one sampled token, and that KL as a part of the reward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.advantages.tokens import at_last_token
from fastgrpo.batch.batch import wide
from fastgrpo.batch.checks import FLOATS, check, check_tensor, wrong
from fastgrpo.batch.inputs import make_mask

_VALUES = {
    "k1": lambda x: -x,
    "abs": lambda x: x.abs(),
    "k2": lambda x: x.square() / 2,
    "k3": lambda x: torch.expm1(x) - x,  # exp(x) - 1 - x without its cancellation
    "low_var_kl": lambda x: (torch.expm1(x.clamp(-20, 20)) - x.clamp(-20, 20)).clamp(-10, 10),
}
KL_ESTIMATORS = (*_VALUES, *(f"{name}+" for name in _VALUES if name != "k2"))


def estimate(name: str, x: Tensor, clamp_x: float | None = None, clamp: float | None = None) -> Tensor:
    """The estimate `name` of KL(π || π_ref) from x = ref - logp, differentiable in x; bounded where asked.

    With x = ref - logp: "k1" is -x; "abs" |x|; "k2" x²/2; "k3" exp(x) - x - 1 (Schulman); "low_var_kl" k3 of x within
    ±20, within ±10. A "+" gives the value of that and the gradient of k2, whose expectation is that of the KL.
    """
    bounded = x if clamp_x is None else x.clamp(-clamp_x, clamp_x)
    value = _VALUES[name.removesuffix("+")](bounded)
    if clamp is not None:
        value = value.clamp(-clamp, clamp)
    if not name.endswith("+"):
        return value
    k2 = _VALUES["k2"](x)
    return value.detach() + (k2 - k2.detach())


@torch.no_grad()
def kl_in_reward(
    rewards: Tensor,
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    *,
    beta: float,
    completion_mask: Tensor | None = None,
    kl_estimator: str = "k1",
    kl_log_ratio_clamp: float | None = None,
    kl_clamp: float | None = None,
) -> Tensor:
    """The reward of each token with the KL to the reference policy taken off: for the advantages, not for the loss.

        r_t = mask · (reward of the token - beta · KL_t)

    A reward of the whole completion is that of its last loss token. The sum over tokens is the reward of a completion
    for `group_advantages`, and the whole is what `gae` takes.

    Args:
        rewards (B,) or (B, T) float: one per completion, or one per token.
        per_token_logps (B, T) float: of the policy that sampled.
        ref_per_token_logps (B, T) float: of the reference policy.
        beta: coefficient of the KL.
        completion_mask (B, T): nonzero for the loss tokens; None: all. Masked tokens may hold NaN.
        kl_estimator: "k1", "abs", "k2", "k3" or "low_var_kl", as in `Objective`.
        kl_log_ratio_clamp, kl_clamp: bounds of ref - logp and of the estimate, on both sides; None: none.

    Returns:
        (B, T) in the dtype of the logps, fp32 at least; 0 where masked.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    check(isinstance(per_token_logps, Tensor) and per_token_logps.dim() == 2, "per_token_logps", "a tensor of shape "
          "(B, T)", per_token_logps)  # fmt: skip
    shape, device = per_token_logps.shape, per_token_logps.device
    check_tensor("per_token_logps", per_token_logps, shape, device, *FLOATS)
    check_tensor("ref_per_token_logps", ref_per_token_logps, shape, device, *FLOATS)
    per_token = isinstance(rewards, Tensor) and rewards.shape == shape
    check_tensor("rewards", rewards, shape if per_token else shape[:1], device, *FLOATS)
    if kl_estimator not in KL_ESTIMATORS:
        raise wrong("kl_estimator", f"one of {', '.join(KL_ESTIMATORS)}", kl_estimator)
    mask = make_mask(completion_mask, shape, device).view(shape)
    dtype = wide(per_token_logps.dtype)
    x = ref_per_token_logps.to(dtype) - per_token_logps.to(dtype)
    kl = estimate(kl_estimator, torch.where(mask, x, 0.0), kl_log_ratio_clamp, kl_clamp)
    if not per_token:
        rewards = at_last_token(rewards, mask)
    return torch.where(mask, rewards.to(dtype) - beta * kl, 0.0)
