"""The GRPO loss from hidden states: logits exist for a chunk of rows at a time, and become gradients there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastgrpo.batch.batch import wide
from fastgrpo.batch.inputs import LinearInputs, check_names, check_rows, head_options, make_batch, takes
from fastgrpo.engine import autograd
from fastgrpo.engine.head import make_head
from fastgrpo.loss import GRPOLoss
from fastgrpo.objective import Objective
from fastgrpo.objective.options import check_objective
from fastgrpo.objective.sampler import corrected
from fastgrpo.output import GRPOOutput, make_output

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(LinearInputs)
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    return_stats: bool = True,
    backend: str = "auto",
    **inputs: Unpack[LinearInputs],
) -> GRPOOutput:
    """The GRPO loss of a batch of completions from their hidden states, a chunk of logits at a time.

    It is the loss of `grpo_loss` with

        logits = softcap(logit_scale · (hidden @ weightᵀ + bias)),   softcap(x) = c tanh(x / c)

    by default loss = loss_scale · 1/D Σ mask · (-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta · KL)
    with r = exp(logp - old).

    Each chunk of rows is projected, its logits become their gradient in place, and from that come dL/dhidden and
    dL/dweight. For N rows that is 6NHV FLOPs (4NHV if the weight is frozen, 2NHV without gradients). Memory holds one
    chunk of logits, and the gradients until the backward pass. dL/dweight adds up in fp32 over several chunks.
    Gradients of fp32 tensors leave their GEMMs in fp32; those of fp16 tensors, too, and stay fp32 until the backward
    pass. With a `column_tolerance`, gradients that lie in few columns are made of these alone, with 4H FLOPs for each
    column in place of 4HV for the row. Masked rows enter no GEMM, nor do rows with few `kept_ids`: k kept tokens take
    2kH FLOPs forward and 6kH backward. Rows of advantage 0, with the default objective, cost one forward GEMM, or none
    with `return_stats=False` (docs/api.md says when else).

    Objectives beyond token level keep sequences whole. If a sequence does not fit into a chunk (of an objective of the
    whole batch, or in a compiled graph: if the batch does not), the gradient is made in the backward pass instead, by
    projecting the rows that have one again: 8NHV. With `kept_ids` it always is.

    On a GPU a call waits for the device at most once, to learn how many rows there are to project, or how long packed
    sequences are. It does not wait without a mask and with beta or entropy_coef, at token level or in one chunk. A
    gradient that is made in the backward pass waits there once more. With a `column_tolerance` it waits with every
    chunk that learns, with `kept_ids` once more forward and twice more backward.

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
        logits_dtype: what the GEMM writes. torch.float32: its fp32 sums as they are, on which bias, scale, softcap and
            temperature act; from bf16 or fp16, whose products are exact in fp32, that is the precision of an fp32
            head. hidden's dtype (under autocast, autocast's): the sums rounded to it. "auto": fp32 where a GEMM writes
            it at the speed of hidden's dtype, which is on CPUs and NVIDIA GPUs; hidden's dtype elsewhere.
        column_tolerance: τ, 0 <= τ < 1. 0: gradients of all columns. Else those of a row's smallest
            dz_j = dL/dlogits_j are left out that sum to at most τ of all |dz_j|; never the target's. The others' are
            fp32. A row that keeps more than about V/37 columns on a CPU or V/233 on a GPU goes through the GEMMs with
            all of them. The error for row n, and for the weight in the Frobenius norm, is at most

                ‖ΔdL/dhidden_n‖ <= τ Σ_j |dz_nj| max_j ‖weight_j‖,   ‖ΔdL/dweight‖ <= τ Σ_n ‖hidden_n‖ Σ_j |dz_nj|
        The rest: as in `grpo_loss`.

    Returns:
        GRPOOutput; its loss is differentiable in hidden, weight and bias. If the gradient was made in the forward
        pass, one backward call is allowed; else any number.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here; a second backward call where one is allowed; a double
            backward.

    Equivalent to: `grpo_loss` of the logits above, in `logits_dtype`. The loss is DAPO's (arXiv:2503.14476) by
    default; `Objective` names the papers of the others.
    """
    check_names(inputs, LinearInputs, "linear_grpo_loss")
    check_rows(hidden, completion_ids, "hidden", "H")
    check_objective(objective, inputs)
    head = make_head(hidden, weight, backend=backend, **head_options(inputs))
    batch = make_batch(completion_ids, advantages, inputs, dtype=wide(head.dtype), vocab_size=head.vocab)
    batch = corrected(objective.corrections, batch)
    hidden = hidden if hidden.dim() == 3 else hidden[None]
    within = objective.in_pass(inputs)
    logps, entropies, terms, counts = autograd.hidden_loss(hidden, head, within, batch, return_stats)
    return make_output(objective, batch, logps, entropies, terms.in_fp32(), return_stats, counts)


class Options(LinearInputs, total=False):
    """What a `LinearGRPOLoss` may hold: the keyword arguments of `linear_grpo_loss` without the objective."""

    return_stats: bool
    backend: str


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

    def forward(  # type: ignore[override]  # it takes hidden states and a weight where the other takes logits
        self,
        hidden: Tensor,
        weight: Tensor,
        completion_ids: Tensor,
        advantages: Tensor | None = None,
        **inputs: Unpack[Options],
    ) -> GRPOOutput:
        options: dict[str, Any] = {**self.options, **inputs}
        return self.function(hidden, weight, completion_ids, advantages, objective=self.objective, **options)

    if TYPE_CHECKING:  # the options are others, too

        def __init__(self, objective: Objective = ..., **options: Unpack[Options]) -> None: ...

        __call__ = forward  # type: ignore[assignment]  # as above
