"""The loss and its gradients from hidden states."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo import linear_grpo_loss, linear_logps
from fastgrpo.bench.inputs import Random, add_completions, add_policies
from fastgrpo.bench.operation import Case, Inputs, Operation, Results, Target, head_bytes, head_flops, leaf_of, needs
from fastgrpo.bench.sides import (
    add_eager,
    add_fastgrpo,
    chunk_rows,
    chunks,
    eager_loss,
    fastgrpo_options,
    liger_cannot,
)
from fastgrpo.bench.targets import accuracy, both, ratio
from fastgrpo.bench.truth import exact_loss


def _inputs(case: Case) -> Inputs:
    random, inputs = Random(case), Inputs(case=case)
    inputs.weight = random.normal(case.V, case.H, scale=2 / case.H**0.5)
    inputs.hidden = random.normal(case.B, case.T, case.H)
    add_completions(inputs, random)
    logps = linear_logps(inputs.hidden.float(), inputs.weight.float(), inputs.ids, softcap=case.softcap)
    add_policies(inputs, random, logps)
    return inputs


def truth(inputs: Inputs, kept: Tensor | None = None) -> Results:
    """The gradients are kept as fp32, which is exact enough here; `kept` (B, T, k): the tokens that count."""
    rows, weight = inputs.hidden.flatten(0, 1), inputs.weight.double()
    d_hidden, d_weight = torch.empty_like(rows, dtype=torch.float32), torch.zeros_like(weight)

    def each(part: slice):
        hidden = rows[part].double()

        def take(d_logits: Tensor) -> None:
            d_hidden[part] = d_logits @ weight
            d_weight.addmm_(d_logits.T, hidden)

        logits = hidden @ weight.T
        if kept is not None:
            outside = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, kept.flatten(0, 1)[part], False)
            logits.masked_fill_(outside, -torch.inf)
        return logits, take

    loss = exact_loss(inputs, each)
    return {"loss": loss, "d_hidden": d_hidden.view_as(inputs.hidden), "d_weight": d_weight.float()}


_NEXT_TO_GEMMS = ratio("fastgrpo", "GEMMs alone")
linear = Operation(
    "linear",
    title="loss and gradients from hidden states",
    place=4,
    inputs=_inputs,
    truth=truth,
    bytes=head_bytes,
    flops=head_flops,
    sizes="BTVH",
    quick=(
        *(Case("linear", 8, 16, 32_768, dtype=dtype) for dtype in ("bf16", "fp32")),
        Case("linear", 8, 16, 32_768, inactive=0.5),
    ),
    full=tuple(Case("linear", 8, 64, 151_936, dtype=d, inactive=i) for d in ("bf16", "fp32") for i in (0.0, 0.5)),
    growth=(  # H is small, so that the vocabulary is most of the work; the first N is one chunk
        *(Case("linear", 8, 128, V, 128, "fp32") for V in (16_384, 32_768, 65_536, 262_144)),
        *(Case("linear", N // 128, 128, 131_072, 128, "fp32") for N in (1024, 2048, 4096, 8192, 16_384)),
    ),
    quick_peaks=(("bf16", 0.0),),
    targets=(
        *both("from hidden states: our time over the GEMMs'", _NEXT_TO_GEMMS, 1.25, 1.25, at_most=True),
        *both("from hidden states: TRL's time over ours", ratio("trl"), 7, 1.6),
        *both("the same, half of the completions inactive", ratio("trl"), 11, 2.5, inactive=True),
        *accuracy("linear"),
        Target("GPU, from hidden states: our time over the GEMMs'", "bf16", _NEXT_TO_GEMMS, 1.08, at_most=True,
               on="cuda"),
        Target("GPU, from hidden states: TRL's time over ours", "bf16", ratio("trl"), 1.3, on="cuda"),
        Target("GPU, the same with inactive completions", "bf16", ratio("trl"), 2, inactive=True, on="cuda"),
    ),
    has_inactive=True,
    softcap="taken",
    page=1,
    short="from hidden states",
    gradient_bytes=lambda shape, size: (shape["B"] * shape["T"] + shape["V"]) * shape["H"] * size,
)  # fmt: skip


def results(loss: Tensor, hidden: Tensor, weight: Tensor) -> Results:
    loss.backward()
    return {"loss": loss.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}


def fastgrpo_step(inputs: Inputs, backend: str, **more) -> Results:
    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    options = dict(fastgrpo_options(inputs, backend), softcap=inputs.case.softcap, **more)
    loss = linear_grpo_loss(hidden, weight, inputs.ids, inputs.advantages, **options).loss
    return results(loss, hidden, weight)


def eager_step(inputs: Inputs, made) -> Results:
    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    return results(made(_eager_loss)(hidden, weight, inputs), hidden, weight)


def _eager_loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    logits, softcap = hidden @ weight.T, inputs.case.softcap
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return eager_loss(logits, inputs)


add_fastgrpo(linear, {"": fastgrpo_step})
add_eager(linear, eager_step)


@linear.add("trl", why_not=needs("trl"))
def trl_step(inputs: Inputs) -> Results:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    from fastgrpo.bench.trl_loss import trl_loss

    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    logps, entropies, *_ = _ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1), weight, None, inputs.ids.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE,
        inputs.case.softcap, 1.0, ("entropy",),
    )  # fmt: skip
    logps, entropies = (x.view(inputs.ids.shape) for x in (logps, entropies))
    loss, _ = trl_loss(
        inputs.case.objective, logps, entropies, completion_mask=inputs.mask, advantages=inputs.advantages,
        old_per_token_logps=inputs.old,
    )  # fmt: skip
    return results(loss, hidden, weight)


def _liger(inputs: Inputs, compiled: bool) -> Results:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="dapo")
    loss, *_ = function(hidden, weight, inputs.ids, inputs.mask, inputs.advantages, old_per_token_logps=inputs.old)
    return results(loss, hidden, weight)


for _mode, _compiled in (("", True), ("not compiled", False)):  # its default is the first
    linear.add("liger", mode=_mode, why_not=liger_cannot, compiles=_compiled)(
        functools.partial(_liger, compiled=_compiled)
    )


# ---- torch's own cross-entropy, which is a part of the operation


def _cross_entropy_truth(inputs: Inputs) -> Results:
    hidden, weight = inputs.hidden.double(), inputs.weight.double()
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows, ids, gradient in zip(hidden, inputs.ids, d_hidden, strict=True):
        d_logits = ((rows @ weight.T).softmax(-1) - F.one_hot(ids, len(weight))) / inputs.ids.numel()
        gradient.copy_(d_logits @ weight)
        d_weight += d_logits.T @ rows
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def _cross_entropy_cannot(case: Case) -> str | None:
    if case.softcap:
        return "no softcap"
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no F.linear_cross_entropy"


@linear.add("F.linear_cross_entropy", mode="cross-entropy", why_not=_cross_entropy_cannot, truth=_cross_entropy_truth)
def _cross_entropy(inputs: Inputs) -> Results:
    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    rows = hidden.flatten(0, 1)
    chunk = min(chunk_rows(inputs.case, rows.device), len(rows))  # its own choice is far slower on a CPU
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    F.linear_cross_entropy(rows, weight, inputs.ids.flatten(), options=options).backward()
    return {"d_hidden": hidden.grad, "d_weight": weight.grad}


def gemms_work(case: Case) -> int:
    return 6 * case.B * case.T * case.H * case.V


@linear.add("GEMMs alone", is_floor=True, work=gemms_work)
def gemms_step(inputs: Inputs) -> Results:
    """`h @ Wᵀ`, `dL @ W` and `dLᵀ @ h` into buffers that are there already, in fastgrpo's chunks, all tokens."""
    rows, weight = inputs.hidden.flatten(0, 1), inputs.weight
    parts = chunks(inputs.case, rows.device)
    if not hasattr(inputs, "gemm_buffers"):
        logits = torch.randn(parts[0].stop, len(weight), device=rows.device).to(rows.dtype)
        inputs.gemm_buffers = logits, torch.zeros_like(rows), torch.zeros_like(weight)
    logits, d_hidden, d_weight = inputs.gemm_buffers
    for part in parts:
        chunk = logits[: part.stop - part.start]
        torch.mm(rows[part], weight.T, out=chunk)
        torch.mm(chunk, weight, out=d_hidden[part])
        torch.mm(chunk.T, rows[part], out=d_weight)
    return {}
