"""The GRPO loss from logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo import backends, ops
from fastgrpo.backends import Kind, TokenRows, TokenSpec
from fastgrpo.layout import Batch, check_rows, make_batch
from fastgrpo.objective import (
    Objective,
    Terms,
    compute_metrics,
    compute_objective,
    entropy_weight,
    row_weight,
)


class GRPOOutput(NamedTuple):
    """What a loss returns: the loss, which alone is differentiable, and statistics.

    With `return_stats=False` only `loss` is filled. All are fp32; from float64 inputs the statistics are float64.
    """

    loss: Tensor  # 0-dim
    per_token_logps: Tensor | None = None  # like completion_ids; 0 where masked
    entropies: Tensor | None = None  # like completion_ids, nats; 0 where masked
    kl: Tensor | None = None  # like completion_ids; None when beta is 0
    metrics: dict[str, Tensor] | None = None  # 0-dim tensors under TRL's names; reading one waits for the device


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    completion_mask: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    rewards: Tensor | None = None,
    num_generations: int | None = None,
    scale_rewards: str = "group",
    importance_sampling_ratio: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    loss_scale: Tensor | float = 1.0,
    temperature: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    return_stats: bool = True,
    inplace: bool = False,
    backend: str = "auto",
) -> GRPOOutput:
    """The GRPO loss of a batch of completions from their logits, without a full softmax.

    With logp = log_softmax(logits / temperature)[id] and r = exp(logp - old) of each token, and d = ref - logp, the
    default objective is that of DAPO (arXiv:2503.14476), GRPO's (arXiv:2402.03300) averaged over tokens:

        loss = loss_scale · 1/D Σ mask · (-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta · KL)
        KL = r (exp(d) - d - 1),   without the factor r if use_bias_correction_kl=False

    summed over all tokens, D being the number of loss tokens (`num_items_in_batch`). `Objective` has the other losses,
    ratios and averages, and docs/objectives.md their formulas.

    With `inplace=True` the gradient is made in the forward pass and written over the logits: token-level objectives
    take one pass over them, and nothing is allocated that grows with V. With `inplace=False` the forward pass reads
    the logits once, and the backward pass makes the gradient in a new tensor.

    Args:
        logits (B, T, V) or packed (N, V), fp32, bf16 or fp16: row t predicts completion_ids[:, t] (the caller drops
            the last position; a strided slice is fine and is not copied). float64 works too, in plain torch.
        completion_ids (B, T) or (N,) integer: the sampled tokens.
        advantages (B,) or (B, T), packed (S,) or (N,) float: A; or None, and then `rewards` with `num_generations`.
        completion_mask like completion_ids: nonzero for the loss tokens; None: all. Masked tokens are never read, so
            they may hold NaN.
        old_per_token_logps like completion_ids, float: logps under the policy that sampled; None: the current ones,
            detached, so that r = 1.
        ref_per_token_logps like completion_ids, float: logps under the reference policy; needed if beta is not 0.
        rewards (B,), packed (S,): one per completion, in whole contiguous groups of `num_generations`; they become
            advantages as in `group_advantages`. NaN: not judged.
        num_generations: completions in a group of `rewards`.
        scale_rewards: "group", "batch" or "none", see `group_advantages`.
        importance_sampling_ratio (B, T), (B, 1) or (B,): factor of the policy term, for samples of another policy than
            the old one, such as an inference engine's.
        sampling_per_token_logps like completion_ids: the sampler's logps, for the off-policy mask (None: old ones).
        num_items_in_batch: number of loss tokens that "dapo", "cispo" and "vespo" divide by (number or 0-dim tensor;
            None: this batch's).
        loss_scale: factor of loss and gradient, such as 1/accumulation steps (number or 0-dim tensor).
        temperature: number > 0, or a tensor (B,) or (B, T): logits are divided by it.
        cu_seqlens (S+1,) integer: boundaries of the S sequences in a packed batch.
        objective: every option of the loss.
        return_stats: fill per_token_logps, entropies, kl and metrics; if False, tokens that cannot learn are not
            scored.
        inplace: overwrite `logits` with their gradient if they require one. Use them for nothing else afterwards; the
            .grad of a leaf shares its memory. One backward call is allowed. torch.compile(fullgraph=True) takes it
            on the kernel backends, in fp32 and bf16, at token level.
        backend: "auto" (see `fastgrpo.backends.select`), "cpu", "cuda", "triton" or "torch".

    Returns:
        GRPOOutput; its loss is differentiable in logits.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here; a second backward call after inplace=True; a double backward.

    Equivalent to: TRL 1.16's `GRPOTrainer._compute_loss` after its forward pass.
    """
    check_rows(logits, completion_ids, "logits", "V")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    batch = make_batch(
        completion_ids,
        advantages,
        objective=objective,
        dtype=dtype,
        vocab_size=logits.size(-1),
        completion_mask=completion_mask,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        rewards=rewards,
        num_generations=num_generations,
        scale_rewards=scale_rewards,
        importance_sampling_ratio=importance_sampling_ratio,
        sampling_per_token_logps=sampling_per_token_logps,
        num_items_in_batch=num_items_in_batch,
        loss_scale=loss_scale,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
    )
    logits = as_rows(logits, inplace)
    inplace = inplace and logits.requires_grad and torch.is_grad_enabled()
    backend = backends.select(logits, backend)
    batch.skip_inert = not return_stats
    want_entropy = return_stats or objective.entropy_coef != 0 or objective.top_entropy_quantile < 1

    call = _InPlaceLoss.apply if inplace else _loss
    loss, *stats = call(logits, objective, batch, want_entropy, backend)
    loss = loss.to(torch.float32)
    return make_output(objective, batch, loss, *stats) if return_stats else GRPOOutput(loss)


def make_output(objective: Objective, batch: Batch, loss, logps, entropies, ratio, kl, phi, bonus) -> GRPOOutput:
    """The public result from row vectors and the entropy bonus."""
    metrics = compute_metrics(objective, batch, ratio, kl, entropies, phi)
    if bonus is not None:
        metrics["policy_loss"] = loss.detach() - bonus
    logps, entropies, kl = (None if x is None else x.detach().view(batch.shape) for x in (logps, entropies, kl))
    return GRPOOutput(loss, logps, entropies, kl, metrics)


def as_rows(logits: Tensor, inplace: bool = False) -> Tensor:
    """The logits as (B, T, V) with unit stride in V; packed (N, V) becomes (1, N, V)."""
    if logits.stride(-1) != 1 and logits.size(-1) > 1:
        if inplace:
            raise ValueError(f"logits: expected unit stride in V with inplace=True, got strides {logits.stride()}")
        logits = logits.contiguous()
    rows = logits if logits.dim() == 3 else logits.unsqueeze(0)
    if inplace and ops.row_span(rows) is None:
        raise ValueError(
            "logits: expected rows that share no memory with inplace=True, got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}"
        )
    return rows


def _loss(logits: Tensor, objective: Objective, batch: Batch, want_entropy: bool, backend: str):
    """(loss, logps, entropies, ratio, kl, phi, bonus); the gradient is made in the backward pass, in a new tensor."""
    if backend != "torch" and objective.is_token_local:
        return _token_loss(ops.token_loss, logits, objective, batch, want_entropy, backend)
    batch.leave_out_inert(objective)
    logps, _, entropies = ops.row_stats(logits, batch.ids, batch.scored, batch.inv_temperature, want_entropy, backend)
    terms = objective_of_stats(objective, logps, entropies, batch, want_entropy)
    return terms.loss, logps.detach(), entropies.detach() if want_entropy else None, *terms[1:]


def objective_of_stats(
    objective: Objective, logps: Tensor, entropies: Tensor, batch: Batch, want_entropy: bool
) -> Terms:
    if objective.entropy_coef == 0:
        entropies = entropies.detach()  # a statistic only: no gradient sweep for it
    return compute_objective(objective, logps, entropies if want_entropy else None, batch)


def _token_loss(op, logits: Tensor, objective: Objective, batch: Batch, want_entropy: bool, backend: str):
    """The same by the one-pass kernels: `op` is ops.token_loss, or ops.token_loss_, which writes over the logits."""
    rows, spec = token_inputs(objective, batch)
    loss, logps, _, entropies, kl, ratio, _ = op(
        logits, batch.ids, batch.scored, batch.inv_temperature, want_entropy, *rows, ops.encode_spec(spec), backend
    )
    bonus = None if rows.h is None else (rows.h * entropies).sum()
    kl = kl if objective.beta != 0 else None
    return loss.sum(), logps, entropies if want_entropy else None, ratio, kl, None, bonus


def token_inputs(objective: Objective, batch: Batch) -> tuple[TokenRows, TokenSpec]:
    """The fused objective's view of a batch."""
    o = objective
    # the pass cannot take a std over the batch, nor float64 rewards: their advantages are made before it
    in_pass = batch.rewards is not None and batch.scale_rewards != "batch" and batch.rewards.dtype != torch.float64
    rows = TokenRows(
        weight=row_weight(o, batch),
        advantages=None if in_pass else batch.advantages,
        rewards=batch.rewards.float() if in_pass else None,
        seq=batch.seq if in_pass else None,
        old=batch.old,
        ref=batch.ref if o.beta != 0 else None,
        policy_scale=batch.importance_ratio,
        h=entropy_weight(o, batch),
    )
    kind = {"cispo": Kind.CISPO, "sapo": Kind.SAPO}.get(o.loss_type, Kind.CLIP)
    numbers = {
        Kind.CLIP: (1 - o.epsilon, o.clip_high, math.inf if o.delta is None else o.delta),
        Kind.CISPO: (o.clip_high,),
        Kind.SAPO: (o.sapo_temperature_pos, o.sapo_temperature_neg),
    }
    spec = TokenSpec(
        kind=kind.value,  # a plain int: torch.compile cannot make a float of an enum
        numbers=numbers[kind],
        beta=o.beta,
        bias_correction=o.use_bias_correction_kl,
        group_size=batch.num_generations if in_pass else 0,
        scale_by_std=in_pass and batch.scale_rewards == "group",
        skip_zero=batch.skip_inert and o.zero_advantage_is_inert,
    )
    return rows, spec


class _InPlaceLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, over the logits; backward scales it and returns it, once."""

    @staticmethod
    def forward(ctx, logits: Tensor, objective: Objective, batch: Batch, want_entropy: bool, backend: str):
        # detach() shares the version counter: an operation that saved these logits for its own backward pass gets
        # autograd's error about an in-place change, and does not read a gradient as logits
        buffer = logits.detach()
        # fp16 gradients wait for the upstream factor, because a GradScaler's keeps them from rounding to 0
        ctx.wait = buffer.dtype == torch.float16
        if backend != "torch" and objective.is_token_local and not ctx.wait:
            results = _token_loss(ops.token_loss_, buffer, objective, batch, want_entropy, backend)
            saved = (buffer,)
        else:
            batch.leave_out_inert(objective)
            stats = ops.row_stats(buffer, batch.ids, batch.scored, batch.inv_temperature, want_entropy, backend)
            terms, g, h = coefficients(objective, stats, batch, want_entropy)
            results = (terms.loss, stats[0], stats[2] if want_entropy else None, *terms[1:])
            saved = (buffer, batch.ids, stats[1], stats[2], g, h, batch.inv_temperature)
            if not ctx.wait:
                ops.row_grad_(*saved, backend)
                saved = (buffer,)
        ctx.save_for_backward(*saved)
        ctx.backend, ctx.handed_out = backend, False
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, d_loss: Tensor | None, *_):
        if d_loss is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():  # create_graph=True
            ops.refuse_double_backward()
        if ctx.handed_out:
            raise RuntimeError(
                "fastgrpo: a second backward through a loss with inplace=True; its gradient, written over the logits, "
                "was handed out by the first. Use inplace=False to keep the graph."
            )
        ctx.handed_out = True
        buffer, *rest = ctx.saved_tensors
        if ctx.wait:
            ids, lse, entropy, g, h, inv_temperature = rest
            h = None if h is None else h * d_loss
            ops.row_grad_(buffer, ids, lse, entropy, g * d_loss, h, inv_temperature, ctx.backend)
        else:
            ops.scale_(buffer, d_loss, ctx.backend)
        return buffer, None, None, None, None


def coefficients(objective: Objective, stats: tuple[Tensor, Tensor, Tensor], batch: Batch, want_entropy: bool):
    """(the objective's terms, g = dL/dlogp, h = dL/dentropy or None), g and h (N,), by autograd on vectors."""
    with torch.enable_grad():
        logps = stats[0].detach().requires_grad_()
        entropies = stats[2].detach().requires_grad_(objective.entropy_coef != 0)
        terms = objective_of_stats(objective, logps, entropies, batch, want_entropy)
        wanted = [logps, entropies] if objective.entropy_coef != 0 else [logps]
        g, *h = torch.autograd.grad(terms.loss, wanted, materialize_grads=True)
    return Terms(terms.loss.detach(), *terms[1:]), g, h[0] if h else None


class GRPOLoss(nn.Module):
    """`grpo_loss` as a module, which holds the objective and other options that do not change from call to call.

    Call it as `grpo_loss`, without `objective`; a keyword of the call wins over one held here.

    Args:
        objective: the options of the loss.
        **options: keyword arguments of `grpo_loss`, such as `inplace=True`.

    Raises:
        ValueError: an objective that is none, or a keyword that `grpo_loss` does not have.
    """

    function = staticmethod(grpo_loss)

    def __init__(self, objective: Objective = Objective(), **options):  # noqa: B008 (frozen)
        super().__init__()
        if not isinstance(objective, Objective):
            raise ValueError(f"objective: expected an Objective, got {objective!r}")
        if unknown := set(options) - set(self.function.__kwdefaults__):
            raise ValueError(f"{unknown.pop()}: expected a keyword argument of {self.function.__name__}")
        self.objective = objective
        self.options = options

    def forward(
        self, logits: Tensor, completion_ids: Tensor, advantages: Tensor | None = None, **inputs
    ) -> GRPOOutput:
        return grpo_loss(logits, completion_ids, advantages, objective=self.objective, **{**self.options, **inputs})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{k}={v!r}" for k, v in self.options.items())])
