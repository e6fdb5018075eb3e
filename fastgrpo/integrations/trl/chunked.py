"""TRL's chunked log-probabilities on fastgrpo's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.backends import Rows, Scores
from fastgrpo.batch.batch import wide
from fastgrpo.engine.head import Head, choose_logits_dtype, default_chunk
from fastgrpo.engine.hidden import gradients, score
from fastgrpo.engine.plan import Roles, plan_rows
from fastgrpo.integrations.trl.versions import gathered

_STATISTICS = ("log_sum_sq_probs", "mean_logits", "is_top1")  # TRL's names are the engine's


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Head:
    """What makes logits of hidden states (1, N, H), in their dtype or autocast's, whatever the weight's is."""
    device, vocab = hidden.device, len(weight)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    logits_dtype = choose_logits_dtype("auto", dtype, device)
    cap, chunk = None if softcap is None else softcap / scale, default_chunk(vocab, logits_dtype, device)
    backend = backends.select(hidden, "auto", logits_dtype, vocab=vocab, softcap=cap)
    return Head(weight, bias, vocab, scale, cap, dtype, logits_dtype, chunk, backend)


class ChunkedLogProb(torch.autograd.Function):
    """TRL's `_ChunkedLogProbFunction` on fastgrpo's kernels, with its arguments and results.

    The forward pass takes 2NHV FLOPs, a chunk of logits at a time. The backward pass takes 6HV for each row whose
    upstream gradient is not exactly 0, and nothing for the others.

    Args of `apply`:
        hidden (N, H), weight (V, H), bias (V,) or None: as in `linear_logps`.
        targets (N,) int64: the tokens to score.
        temperature: number > 0.
        chunk_size: not used.
        final_logit_softcapping, logit_scale: `softcap` and `logit_scale` of `linear_logps`.
        outputs: the results to compute beside logp.

    Returns:
        logp, entropy, log_sum_sq_probs, mean_logits (N,) fp32, is_top1 (N,) bool; None if not in `outputs`. The first
        two are differentiable.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        ctx.set_materialize_grads(False)
        hidden = hidden[None]
        head = _head(hidden, weight, bias, logit_scale, final_logit_softcapping)
        ones = torch.ones(len(targets), dtype=wide(head.dtype), device=hidden.device)
        rows = Rows(targets, ones != 0, head.scaled(ones / temperature))
        plan = plan_rows(len(targets), Roles(None, None), head.chunk, learn=False)
        wanted = [name for name in _STATISTICS if name in outputs]
        scores, found = score(hidden, head, rows, plan, "entropy" in outputs, wanted=wanted)
        logp = scores.logp.clone()  # the caller may change its own in place
        ctx.save_for_backward(hidden, weight, bias, targets, rows.inv_temperature, logp, scores.lse, scores.entropy)
        ctx.head = head.without_tensors()
        ctx.mark_non_differentiable(*found.values())
        return scores.logp, scores.entropy, *(found.get(name) for name in _STATISTICS)

    @staticmethod
    def backward(ctx, d_logp: Tensor | None, d_entropy: Tensor | None, *_):
        hidden, weight, bias, targets, inv_temperature, logp, lse, entropy = ctx.saved_tensors
        if d_logp is None and d_entropy is None:
            return (None,) * 9
        g = torch.zeros_like(lse) if d_logp is None else d_logp.to(lse.dtype).contiguous()
        h = None if d_entropy is None else d_entropy.to(lse.dtype).contiguous()
        rows, scores = Rows(targets, None, inv_temperature), Scores(logp, lse, entropy)
        with gathered(weight, bias):
            made = gradients(hidden, ctx.head.of(weight, bias), rows, scores, g, h, ctx.needs_input_grad[:3])
        d_hidden, *others = made
        return d_hidden if d_hidden is None else d_hidden[0], *others, *(None,) * 6
