"""TRL's chunked log-probabilities on fastgrpo's kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.integrations.trl.versions import gathered
from fastgrpo.linear import head_options
from fastgrpo.projection import Projection, cut


class _Head:
    """What makes logits from hidden states (1, N, H): the library's projection in chunks and its sweeps.

    The caller puts `logit_scale` into the temperature.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.options = head_options(hidden, len(weight), logit_scale, softcap, None, dtype, "auto")
        self._tensors = hidden, weight, bias
        self._kernels = backends.get(self.options[-1])

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits (1, n, V), valid until the next) of each chunk."""
        vocab, _, chunk, dtype, _ = self.options
        n = self._tensors[0].shape[1]
        projection = Projection(*self._tensors, vocab, dtype, min(chunk, n))
        for rows in cut(0, n, chunk):
            yield rows, projection.logits(rows)

    def row_stats(self, logits: Tensor, ids: Tensor, inv_temperature: Tensor, want_entropy: bool):
        """(logp, lse, entropy) of each row."""
        every = torch.ones_like(ids, dtype=torch.bool)
        return self._kernels.row_stats(logits, ids, every, inv_temperature, want_entropy, self.options[1])

    def capped(self, logits: Tensor) -> Tensor:
        softcap = self.options[1]
        return logits if not softcap else softcap * torch.tanh(logits.to(self.wide) / softcap)


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
        head = _Head(hidden, weight, bias, logit_scale, final_logit_softcapping)
        inv_temperature = torch.full(targets.shape, logit_scale / temperature, dtype=head.wide, device=hidden.device)
        results = {name: torch.empty_like(inv_temperature) for name in ("log_probs", "lse", *outputs)}
        if "is_top1" in outputs:
            results["is_top1"] = torch.empty_like(targets, dtype=torch.bool)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits in head.logits():
                ids, inv_t = targets[rows], inv_temperature[rows]
                stats = head.row_stats(logits, ids, inv_t, "entropy" in outputs)
                for name, values in zip(("log_probs", "lse", "entropy"), stats, strict=True):
                    if name in results:
                        results[name][rows] = values
                if "log_sum_sq_probs" in outputs:  # Σp² = Σexp(2z) / exp(2 lse)
                    _, twice, _ = head.row_stats(logits, ids, 2 * inv_t, False)
                    results["log_sum_sq_probs"][rows] = twice - 2 * stats[1]
                if "mean_logits" in outputs:
                    results["mean_logits"][rows] = head.capped(logits[0]).mean(-1, dtype=inv_t.dtype) * inv_t
                if "is_top1" in outputs:
                    results["is_top1"][rows] = logits[0].argmax(-1) == ids
        entropy = results.get("entropy")
        ctx.save_for_backward(hidden, weight, bias, targets, inv_temperature, results["lse"], entropy)
        ctx.options = head.options
        rest = [results.get(name) for name in ("log_sum_sq_probs", "mean_logits", "is_top1")]
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        return results["log_probs"], entropy, *rest

    @staticmethod
    def backward(ctx, d_logp: Tensor | None, d_entropy: Tensor | None, *_):
        hidden, weight, bias, targets, inv_temperature, lse, entropy = ctx.saved_tensors
        if d_logp is None and d_entropy is None:
            return (None,) * 9
        g = torch.zeros_like(lse) if d_logp is None else d_logp.to(lse.dtype).contiguous()
        h = None if d_entropy is None else d_entropy.to(lse.dtype).contiguous()
        needs = list(ctx.needs_input_grad[:3])
        with gathered(weight, bias):
            gradients = torch.ops.fastgrpo.linear_grad(
                hidden, weight, bias, targets, lse, lse if entropy is None else entropy, g, h, inv_temperature, needs,
                *ctx.options,
            )  # fmt: skip
        d_hidden, *others = (x if need else None for x, need in zip(gradients, needs, strict=True))
        return d_hidden if d_hidden is None else d_hidden[0], *others, *(None,) * 6
