"""Per-token logps and entropies, differentiable, for the current, the old and the reference policy."""

from __future__ import annotations

from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastgrpo import backends
from fastgrpo.backends import Rows
from fastgrpo.batch.batch import wide
from fastgrpo.batch.inputs import (
    HeadOptions,
    check_ids,
    check_names,
    check_rows,
    make_inv_temperature,
    make_mask,
    takes,
)
from fastgrpo.batch.kept import make_kept
from fastgrpo.batch.layout import Padded
from fastgrpo.engine import autograd
from fastgrpo.engine.head import make_head
from fastgrpo.engine.logits import Sweeps, as_rows
from fastgrpo.engine.plan import Roles


class _Options(TypedDict, total=False):
    mask: Tensor | None
    temperature: float | Tensor
    backend: str
    kept_ids: Tensor | None
    kept_offsets: Tensor | None


class _LinearOptions(HeadOptions, _Options, total=False):
    pass


@overload
def selective_logps(
    logits: Tensor, completion_ids: Tensor, *, return_entropy: Literal[False] = ..., **options: Unpack[_Options]
) -> Tensor: ...
@overload
def selective_logps(
    logits: Tensor, completion_ids: Tensor, *, return_entropy: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
@overload
def selective_logps(
    logits: Tensor, completion_ids: Tensor, *, return_entropy: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
def selective_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each sampled token, and the entropy of its distribution, from one read of the logits.

        logp_t = z_t[id_t] - logsumexp(z_t),   H_t = -Σ p_t log p_t   with z = logits / temperature, p = softmax(z)

    A row's result depends on that row alone, bit for bit. So a completion has the same logps alone and in any batch,
    and they equal those inside `grpo_loss` on the same backend: the ratio of a first update is exactly 1.

    Args:
        logits (B, T, V) or (N, V), fp32, bf16, fp16 (float64 in plain torch): row t predicts completion_ids[:, t].
        completion_ids (B, T) or (N,) integer.
        mask like completion_ids: nonzero for the tokens to score; the others are not read and give 0. None: all.
        temperature: number > 0, or a tensor per sequence (B,) or per token (B, T) / (N,).
        return_entropy: also return the entropies, in nats.
        backend: "auto" (see `fastgrpo.backends.select`), "cpu", "cuda", "triton" or "torch".
        kept_ids, kept_offsets: the tokens over which each row's distribution is, as in `grpo_loss`.

    Returns:
        logps like completion_ids, fp32 (float64 from float64); or (logps, entropies). Differentiable in logits.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here.

    Equivalent to: trl.trainer.utils.selective_log_softmax, and entropy_from_logits for the entropy.
    """
    check_rows(logits, completion_ids, "logits", "V")
    rows = _rows(completion_ids, mask, temperature, wide(logits.dtype), logits.size(-1))
    scored = rows.mask
    assert scored is not None
    kept = make_kept(kept_ids, kept_offsets, completion_ids, scored, logits.size(-1))
    sweeps = Sweeps(backends.select(logits, backend), kept=kept)
    logps, _, entropies = autograd.stats(as_rows(logits), sweeps, rows, return_entropy)
    shape = completion_ids.shape
    return logps.view(shape) if entropies is None else (logps.view(shape), entropies.view(shape))


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    return_entropy: Literal[False] = ...,
    **options: Unpack[_LinearOptions],
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    return_entropy: Literal[True],
    **options: Unpack[_LinearOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logps(
    hidden: Tensor, weight: Tensor, completion_ids: Tensor, *, return_entropy: bool, **options: Unpack[_LinearOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
@takes(HeadOptions)
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
    kept_ids: Tensor | None = None,
    kept_offsets: Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_logps` from hidden states, a chunk of logits at a time; for old and reference policies, too.

        logp_t = z_t[id_t] - logsumexp(z_t)   with z = softcap(logit_scale · (hidden @ weightᵀ + bias)) / temperature

    The forward pass takes 2NHV FLOPs for N rows. The backward pass projects only the rows whose upstream gradient is
    not 0, and takes 6HV for each; with a `column_tolerance` 2HV, and 4H for each column that carries its gradient.

    On a CPU the logps have the bits of those inside `linear_grpo_loss`, and their logits never lie in memory as a
    whole. On a GPU they may differ in the last bits, because the GEMM may sum in another order for another number of
    rows; with fp32 logits those are fp32's.

    Args:
        hidden (B, T, H) or (N, H), fp32, bf16 or fp16: row t predicts completion_ids[:, t]. Any strides.
        weight (V, H): the language-model head, of hidden's dtype; under autocast both are cast, the weight once.
        completion_ids (B, T) or (N,) integer.
        mask like completion_ids: nonzero for the tokens to score; the others enter no GEMM and give 0. None: all.
        temperature: number > 0, or a tensor per sequence (B,) or per token (B, T) / (N,).
        return_entropy: also return the entropies, in nats.
        bias, logit_scale, softcap, vocab_size, chunk_size, logits_dtype, column_tolerance: as in `linear_grpo_loss`.
        backend: "auto" (see `fastgrpo.backends.select`), "cpu", "cuda", "triton" or "torch".
        kept_ids, kept_offsets: the tokens over which each row's distribution is, as in `grpo_loss`; a row with k of
            them takes 2kH FLOPs in place of 2HV.

    Returns:
        logps like completion_ids, fp32; or (logps, entropies). Differentiable in hidden, weight and bias.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here.

    Equivalent to: `selective_logps` of softcap(logit_scale · (hidden @ weightᵀ + bias)) in `logits_dtype`.
    """
    check_names(options, HeadOptions, "linear_logps")
    check_rows(hidden, completion_ids, "hidden", "H")
    head = make_head(hidden, weight, backend=backend, **options)
    ids, scored, inv_temperature = _rows(completion_ids, mask, temperature, wide(head.dtype), head.vocab)
    assert scored is not None
    kept = make_kept(kept_ids, kept_offsets, completion_ids, scored, head.vocab)
    rows, roles = Rows(ids, scored, head.scaled(inv_temperature)), Roles(None if mask is None else scored, None)
    hidden = hidden if hidden.dim() == 3 else hidden[None]
    logps, _, entropies = autograd.hidden_scores(hidden, head, rows, roles, return_entropy, kept=kept)
    shape = completion_ids.shape
    return logps.view(shape) if entropies is None else (logps.view(shape), entropies.view(shape))


def _rows(
    completion_ids: Tensor, mask: Tensor | None, temperature: float | Tensor, dtype: torch.dtype, vocab: int
) -> Rows:
    """The arguments of a call, checked and put on rows; each packed row counts as a sequence."""
    shape = completion_ids.shape
    ids = completion_ids.reshape(-1).long().contiguous()
    scored = make_mask(mask, shape, completion_ids.device, "mask")
    check_ids(ids, scored, vocab, mask_name="mask")
    layout = Padded(*shape) if len(shape) == 2 else Padded(shape[0], 1)
    return Rows(ids, scored, make_inv_temperature(temperature, layout, shape, scored, dtype))
