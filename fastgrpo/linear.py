"""The GRPO loss from hidden states: logits exist for a chunk of rows at a time, and become gradients there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.checks import FLOATS, check, check_dtype
from fastgrpo.layout import Batch, Packed, check_rows, make_batch
from fastgrpo.linear_ops import LinearLoss, encode_objective, linear_loss, linear_stats, wanted_statistics
from fastgrpo.loss import GRPOLoss, GRPOOutput, make_output, objective_of_stats
from fastgrpo.objective import Objective, entropy_weight, row_weight
from fastgrpo.projection import count_rows, default_chunk, wide


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
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
    backend: str = "auto",
) -> GRPOOutput:
    """The GRPO loss of a batch of completions from their hidden states, a chunk of logits at a time.

    It is the loss of `grpo_loss` with

        logits = softcap(logit_scale · (hidden @ weightᵀ + bias)),   softcap(x) = c tanh(x / c)

    by default loss = loss_scale · 1/D Σ mask · (-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta · KL)
    with r = exp(logp - old).

    Each chunk of rows is projected, its logits become their gradient in place, and from that come dL/dhidden and
    dL/dweight. For N rows that is 6NHV FLOPs (4NHV if the weight is frozen, 2NHV without gradients). Memory holds one
    chunk of logits, and the gradients until the backward pass. dL/dweight adds up in fp32 over several chunks; for an
    fp16 weight it stays fp32 until the backward pass. Masked rows enter no GEMM. Rows of advantage 0, with beta and
    entropy_coef 0, cost one forward GEMM, or none with `return_stats=False`.

    Objectives beyond token level keep sequences whole. If a sequence does not fit into a chunk (with
    top_entropy_quantile < 1: if the batch does not), the gradient is made in the backward pass instead, by projecting
    the rows that have one again: 8NHV.

    On a GPU a call waits for the device at most once, to learn how many rows there are to project, or how long packed
    sequences are. It does not wait without a mask and with beta or entropy_coef, at token level or in one chunk. A
    gradient that is made in the backward pass waits there once more.

    Args:
        hidden (B, T, H) or packed (N, H), fp32, bf16 or fp16: row t predicts completion_ids[:, t]. Any strides.
        weight (V, H): the language-model head, of hidden's dtype; under autocast both are cast, the weight once.
        completion_ids (B, T) or (N,) integer: the sampled tokens.
        bias (V,) float: added to the logits; None: none.
        logit_scale: factor > 0 of the logits.
        softcap: c > 0, applied to the scaled logits, before the temperature; None: none.
        vocab_size: the first `vocab_size` rows of the weight are tokens; the others are padding and get gradient 0.
            None: all are tokens.
        chunk_size: rows of logits that exist at once. None: as many as take 512 MiB on a CPU; on a GPU as many as take
            1/32 of its memory, at most 8192.
        The rest: as in `grpo_loss`.

    Returns:
        GRPOOutput; its loss is differentiable in hidden, weight and bias. If the gradient was made in the forward
        pass, one backward call is allowed; else any number.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here; a second backward call where one is allowed; a double
            backward.

    Equivalent to: `grpo_loss` of the logits above, in hidden's dtype (under autocast, in autocast's). The loss is
    DAPO's (arXiv:2503.14476) by default; `Objective` names the papers of the others.
    """
    check_rows(hidden, completion_ids, "hidden", "H")
    dtype, vocab = check_head(hidden, weight, bias, logit_scale, softcap, vocab_size, chunk_size)
    batch = make_batch(
        completion_ids,
        advantages,
        objective=objective,
        dtype=wide(dtype),
        vocab_size=vocab,
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
    head = (hidden if hidden.dim() == 3 else hidden[None], weight, bias)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in head]
    options = head_options(hidden, vocab, logit_scale, softcap, chunk_size, dtype, backend)
    inv_temperature = batch.inv_temperature if logit_scale == 1 else batch.inv_temperature * logit_scale
    batch.skip_inert = not return_stats
    batch.leave_out_inert(objective)
    scored = batch.scored if batch.masked or batch.scored is not batch.mask else None
    want_entropy = return_stats or objective.entropy_coef != 0 or objective.top_entropy_quantile < 1

    in_one_pass, counts = _row_counts(objective, batch, scored, options[2]) if any(needs) else (False, [])
    if not in_one_pass:
        count = counts[1] if counts else -1
        logps, _, entropies = linear_stats(*head, batch.ids, scored, count, inv_temperature, want_entropy, *options)
        loss, *terms = objective_of_stats(objective, logps, entropies, batch, want_entropy)
    else:
        weights, bonus_weight = row_weight(objective, batch), entropy_weight(objective, batch)
        h = bonus_weight
        # fp16 gradients of a mean would round to 0; a power of two keeps them in range until the upstream factor comes
        scale = (
            _power_of_two(objective, batch, weights, h)
            if torch.float16 in (dtype, hidden.dtype, weight.dtype)
            else None
        )
        if scale is not None:
            weights, h = weights * scale, None if h is None else h * scale
        call = linear_loss if torch.compiler.is_compiling() else LinearLoss.apply
        loss, table, *_ = call(
            *head,
            batch.ids,
            scored,
            _learners(objective, batch),
            inv_temperature,
            batch.advantages,
            weights,
            h,
            batch.old,
            batch.ref if objective.beta != 0 else None,
            batch.sampling,
            batch.importance_ratio,
            None if objective.is_token_local else batch.seq.long(),
            batch.layout.num_sequences,
            counts,
            batch.importance_ratio_per_sequence,
            *encode_objective(objective),
            want_entropy,
            needs,
            *options,
        )
        loss = loss if scale is None else loss / scale
        statistics = dict(zip(wanted_statistics(objective, want_entropy), table.unbind(), strict=True))
        logps, entropies = statistics["logp"], statistics.get("entropy")
    loss = loss.to(torch.float32)
    if not return_stats:
        return GRPOOutput(loss)
    if in_one_pass and objective.is_token_local:
        bonus = None if bonus_weight is None else (bonus_weight * entropies).sum()
        terms = statistics["ratio"], statistics.get("kl"), None, bonus
    elif in_one_pass:  # of whole sequences
        with torch.no_grad():
            _, *terms = objective_of_stats(objective, logps, entropies, batch, want_entropy)
    return make_output(objective, batch, loss, logps, entropies, *terms)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_size: int | None,
) -> tuple[torch.dtype, int]:
    """(dtype of the GEMMs, V) of a head, after checking that it fits hidden; a ValueError names the argument."""
    width, device = hidden.shape[-1], hidden.device
    matrix = isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) > 0
    check(matrix and weight.shape[1] == width, "weight", f"a tensor of shape (V, {width})", weight)
    check_dtype("weight", weight, *FLOATS)
    check(weight.device == device, "weight", f"device {device}", weight)
    if bias is not None:
        fits = isinstance(bias, Tensor) and bias.shape == weight.shape[:1]
        check(fits, "bias", f"a tensor of shape ({len(weight)},)", bias)
        check_dtype("bias", bias, *FLOATS)
        check(bias.device == device, "bias", f"device {device}", bias)
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
        check(number or (name == "softcap" and value is None), name, "a number > 0", value)
    cap = 1.0 if softcap is None else softcap / logit_scale
    check(1e-30 <= cap <= 1e30, "softcap", "softcap / logit_scale between 1e-30 and 1e30", softcap)
    for name, value, most in (("vocab_size", vocab_size, len(weight)), ("chunk_size", chunk_size, float("inf"))):
        whole = value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most)
        check(whole, name, f"None or an integer from 1 to {most}" if most < float("inf") else "None or an integer > 0",
              value)  # fmt: skip
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    else:
        check(weight.dtype == dtype, "weight", f"hidden's dtype, {dtype}, outside autocast", weight)
    return dtype, len(weight) if vocab_size is None else vocab_size


def head_options(
    hidden: Tensor,
    vocab: int,
    logit_scale: float,
    softcap: float | None,
    chunk_size: int | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[int, float, int, torch.dtype, str]:
    """(vocab, softcap, chunk, dtype, backend) as the operators take them.

    The caller puts `logit_scale` into the temperature; the softcap is divided by it here.
    """
    chunk = chunk_size or _default_chunk(vocab, dtype, hidden.device)
    backend = backends.select(hidden, backend, dtype, vocab=vocab, softcap=softcap)
    # c·tanh(s·x/c) = s · (c/s)·tanh(x / (c/s))
    return vocab, 0.0 if softcap is None else softcap / logit_scale, chunk, dtype, backend


_default_chunk = torch.compiler.assume_constant_result(default_chunk)


def _learners(objective: Objective, batch: Batch) -> Tensor | None:
    """(N,) bool: the scored rows that may have a gradient; None: all of them."""
    if not batch.may_be_inert(objective) or batch.scored is not batch.mask:  # the others were left out already
        return None
    return batch.scored & (batch.advantages != 0)


def _row_counts(objective: Objective, batch: Batch, scored: Tensor | None, chunk: int) -> tuple[bool, list[int]]:
    """(whether the gradient can be made in the forward pass, `counts` of linear_loss if they had to be known here)."""
    if objective.is_token_local or batch.ids.numel() <= chunk:
        return True, []  # chunks may end at any row, or there is one chunk
    if objective.top_entropy_quantile < 1 or torch.compiler.is_compiling():
        return False, []  # the quantile is over the whole batch, and a graph cannot hold the sequences' lengths
    learn, layout = _learners(objective, batch), batch.layout
    if scored is not None or learn is not None:
        learn = batch.scored if learn is None else learn
        counts = count_rows(learn, batch.scored, layout)
    else:
        n, s = batch.ids.numel(), layout.num_sequences
        counts = [n, n, *(layout.cu_seqlens.diff().tolist() if isinstance(layout, Packed) else [n // s] * s)]
    return max(counts[2:]) <= chunk, counts


def _power_of_two(objective: Objective, batch: Batch, weights: Tensor, h: Tensor | None) -> Tensor:
    """The power of two, 0-dim, that brings the largest coefficient of a row to about 2^8.

    It uses what is known before the pass. fp16 reaches from 2^-24 to 2^16, so 2^8 leaves room for small probabilities
    below it and for ratios above it.
    """
    size = batch.scored_only(batch.advantages).abs() + objective.beta
    if batch.importance_ratio is not None:
        size = size * batch.scored_only(batch.importance_ratio, fill=1.0)
    size = size * weights.abs()
    top = torch.cat([size, size if h is None else h.abs(), size.new_zeros(1)]).amax()
    return torch.where((top > 0) & top.isfinite(), torch.exp2(8 - torch.ceil(torch.log2(top))), 1.0)


class LinearGRPOLoss(GRPOLoss):
    """`linear_grpo_loss` as a module, which holds the objective and other options that do not change.

    Call it as `linear_grpo_loss`, without `objective`; a keyword of the call wins over one held here.

    Args:
        objective: the options of the loss.
        **options: keyword arguments of `linear_grpo_loss`, such as `softcap=30.0`.

    Raises:
        ValueError: an objective that is none, or a keyword that `linear_grpo_loss` does not have.
    """

    function = staticmethod(linear_grpo_loss)

    def forward(
        self, hidden: Tensor, weight: Tensor, completion_ids: Tensor, advantages: Tensor | None = None, **inputs
    ) -> GRPOOutput:
        options = {**self.options, **inputs}
        return linear_grpo_loss(hidden, weight, completion_ids, advantages, objective=self.objective, **options)
