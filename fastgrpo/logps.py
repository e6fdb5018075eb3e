"""Per-token logps and entropies, differentiable, for the current, the old and the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastgrpo import backends
from fastgrpo.backends import Rows, Scores
from fastgrpo.batch.batch import wide
from fastgrpo.batch.checks import wrong
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
from fastgrpo.engine.statistics import NAMES, Found, Statistic


class LogpsOutput(NamedTuple):
    """What `selective_logps` and `linear_logps` return with `statistics`; all like completion_ids, 0 where masked."""

    logps: Tensor
    entropies: Tensor | None  # nats; None without `return_entropy`
    statistics: dict[str, Tensor]  # by name; without a gradient


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
@overload
def selective_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    statistics: Sequence[Statistic],
    return_entropy: bool = ...,
    **options: Unpack[_Options],
) -> LogpsOutput: ...
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
    statistics: Sequence[Statistic] | None = None,
) -> Tensor | tuple[Tensor, Tensor] | LogpsOutput:
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
        statistics: names of what else to return, over the same distribution and without a gradient:

            - "sum_pi_squared": Σ p²;
            - "log_sum_sq_probs": its logarithm, which near p = 1 is good to 5e-7;
            - "mean_logits": the mean of z, each token counted alike; its last bits may depend on the batch;
            - "is_top1": bool, whether the token has the largest logit; of equal ones the first in the vocabulary has.

            The first two take two more sweeps, one of them of the rows alone whose token is not the first.

    Returns:
        logps like completion_ids, fp32 (float64 from float64); or (logps, entropies). Differentiable in logits.
        With `statistics`, () too, a `LogpsOutput`.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here.

    Equivalent to: trl.trainer.utils.selective_log_softmax, and entropy_from_logits for the entropy.
    """
    wanted = _wanted(statistics)
    check_rows(logits, completion_ids, "logits", "V")
    rows = _rows(completion_ids, mask, temperature, wide(logits.dtype), logits.size(-1))
    scored = rows.mask
    assert scored is not None
    kept = make_kept(kept_ids, kept_offsets, completion_ids, scored, logits.size(-1))
    sweeps = Sweeps(backends.select(logits, backend), kept=kept)
    scores, found = autograd.stats(as_rows(logits), sweeps, rows, return_entropy, wanted)
    return _result(completion_ids.shape, scores, None if statistics is None else found)


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
@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    statistics: Sequence[Statistic],
    return_entropy: bool = ...,
    **options: Unpack[_LinearOptions],
) -> LogpsOutput: ...
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
    statistics: Sequence[Statistic] | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor | tuple[Tensor, Tensor] | LogpsOutput:
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
        statistics: as in `selective_logps`; a chunk of logits then lies in memory on a CPU, too.

    Returns:
        logps like completion_ids, fp32; or (logps, entropies). Differentiable in hidden, weight and bias.
        With `statistics`, () too, a `LogpsOutput`.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here.

    Equivalent to: `selective_logps` of softcap(logit_scale · (hidden @ weightᵀ + bias)) in `logits_dtype`.
    """
    check_names(options, HeadOptions, "linear_logps")
    wanted = _wanted(statistics)
    check_rows(hidden, completion_ids, "hidden", "H")
    head = make_head(hidden, weight, backend=backend, **options)
    ids, scored, inv_temperature = _rows(completion_ids, mask, temperature, wide(head.dtype), head.vocab)
    assert scored is not None
    kept = make_kept(kept_ids, kept_offsets, completion_ids, scored, head.vocab)
    rows, roles = Rows(ids, scored, head.scaled(inv_temperature)), Roles(None if mask is None else scored, None)
    hidden = hidden if hidden.dim() == 3 else hidden[None]
    scores, found = autograd.hidden_scores(hidden, head, rows, roles, return_entropy, kept=kept, wanted=wanted)
    return _result(completion_ids.shape, scores, None if statistics is None else found)


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


def _wanted(statistics: Sequence[Statistic] | None) -> tuple[Statistic, ...]:
    if statistics is None:
        return ()
    listed = isinstance(statistics, Sequence) and not isinstance(statistics, str)
    if not (listed and all(name in NAMES for name in statistics)):
        raise wrong("statistics", f"a sequence of names out of {', '.join(NAMES)}", statistics)
    return tuple(statistics)


def _result(shape: torch.Size, scores: Scores, found: Found | None) -> Tensor | tuple[Tensor, Tensor] | LogpsOutput:
    logps = scores.logp.view(shape)
    entropies = None if scores.entropy is None else scores.entropy.view(shape)
    if found is not None:
        return LogpsOutput(logps, entropies, {name: x.view(shape) for name, x in found.items()})
    return logps if entropies is None else (logps, entropies)
