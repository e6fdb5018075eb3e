"""The GRPO loss from logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgrpo import backends
from fastgrpo.backends import Rows
from fastgrpo.batch.batch import wide
from fastgrpo.batch.inputs import Inputs, check_names, check_rows, make_batch, takes
from fastgrpo.engine import autograd
from fastgrpo.engine.logits import Apart, How, Sweeps, as_rows, fuse, fuses
from fastgrpo.engine.plan import roles
from fastgrpo.objective import Objective
from fastgrpo.objective.options import check_objective
from fastgrpo.objective.sampler import corrected
from fastgrpo.objective.terms import row_weights
from fastgrpo.output import GRPOOutput, make_output

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(Inputs)
def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    return_stats: bool = True,
    inplace: bool = False,
    backend: str = "auto",
    **inputs: Unpack[Inputs],
) -> GRPOOutput:
    """The GRPO loss of a batch of completions from their logits, without a full softmax.

    With logp = log_softmax(logits / temperature)[id] and r = exp(logp - old) of each token, and d = ref - logp, the
    default objective is that of DAPO (arXiv:2503.14476), GRPO's (arXiv:2402.03300) averaged over tokens:

        loss = loss_scale · 1/D Σ mask · (-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta · KL)
        KL = r (exp(d) - d - 1),   without the factor r if use_bias_correction_kl=False

    summed over all tokens, D being the number of loss tokens (`num_items_in_batch`). `Objective` has the other losses,
    ratios and averages, and docs/objectives.md their formulas.

    With `inplace=True` the gradient is made in the forward pass and written over the logits: objectives that kernels
    hold (`Objective.is_fused`) take one pass over them, and nothing is allocated that grows with V. With
    `inplace=False` the forward pass reads the logits once, and the backward pass makes the gradient in a new tensor.

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
        sampling_per_token_logps like completion_ids: the sampler's logps, for `sampling_correction`, `ratio_anchor`,
            the off-policy mask (None: old ones) and the sampler's metrics. NaN: it has none for that token.
        num_items_in_batch: the number D that the objective's average divides by: of loss tokens for "dapo", of
            sequences or prompts for others (docs/objectives.md; number or 0-dim tensor; None: this batch's). For the
            n micro-batches of a step on P processes: that of the whole step divided by P, and loss_scale=1; or divided
            by n P, and loss_scale=1/n.
        loss_scale: factor of loss and gradient (number or 0-dim tensor). Averages that do not read
            `num_items_in_batch` take 1/n.
        temperature: number > 0, or a tensor (B,) or (B, T): logits are divided by it.
        cu_seqlens (S+1,) integer: boundaries of the S sequences in a packed batch.
        token_weights (B, T), (B, 1) or (B,): factors of each token's loss, KL included, beside the average's.
        group_ids (B,), packed (S,) integer: the prompt of each completion, for the average "prompt-mean"; None:
            contiguous groups of `num_generations`.
        kept_ids, kept_offsets: the tokens that the sampler kept at each place after top-k, top-p or min-p. A token's
            logp and entropy, and so everything here, is then of the distribution over these:
            logp = z[id] - logsumexp of the kept z. kept_ids (M,) integer are those of all rows, one after the other,
            and kept_offsets (N+1,) integer says where those of row n of `completion_ids.reshape(-1)` begin; or
            kept_ids (B, T, k), packed (N, k), with -1 behind them and no kept_offsets. `kept_sets` makes the first
            two. A row without any is over all V. An id more than once counts once. Sets are constants: nothing has a
            gradient through them. Old and reference logps have to be over the same sets. From a set's row only the
            kept logits are read, in two sweeps, whatever the objective; the others get gradient 0.
        objective: every option of the loss.
        return_stats: fill per_token_logps, entropies, kl and metrics; if False, tokens that cannot learn are not
            scored.
        inplace: overwrite `logits` with their gradient if they require one. Use them for nothing else afterwards; the
            .grad of a leaf shares its memory. One backward call is allowed. torch.compile(fullgraph=True) takes it
            on the kernel backends, in fp32 and bf16, with an objective that they hold.
        backend: "auto" (see `fastgrpo.backends.select`), "cpu", "cuda", "triton" or "torch".

    Returns:
        GRPOOutput; its loss is differentiable in logits.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here; a second backward call after inplace=True; a double backward.

    Equivalent to: TRL 1.16's `GRPOTrainer._compute_loss` after its forward pass.
    """
    check_names(inputs, Inputs, "grpo_loss")
    check_rows(logits, completion_ids, "logits", "V")
    check_objective(objective, inputs)
    sweeps = Sweeps(backends.select(logits, backend))
    inplace_now = inplace and logits.requires_grad and torch.is_grad_enabled()
    within = objective.in_pass(inputs)
    fused = fuses(within, sweeps.backend, logits, logits.dtype)
    if (inplace_now and logits.dtype == torch.float16) or inputs.get("kept_ids") is not None:
        fused = False  # such a gradient waits for the upstream factor; and sets are for the sweeps
    dtype, vocab = wide(logits.dtype), logits.size(-1)
    batch = make_batch(completion_ids, advantages, inputs, dtype=dtype, vocab_size=vocab, groups_in_pass=fused)
    batch = corrected(objective.corrections, batch)
    sweeps = sweeps._replace(kept=batch.kept)
    weights, want_entropy = row_weights(objective, batch), objective.wants_entropy(return_stats)
    rows = Rows(batch.ids, batch.mask, batch.inv_temperature)
    how: How
    if fused:
        how = fuse(rows, within, batch, weights, skip_zero=not return_stats)
    else:
        scored = roles(within, batch, return_stats).scored
        rows = rows if scored is None else Rows(batch.ids, scored, batch.inv_temperature)
        how = Apart(rows, within, batch, weights, scored)
    call = autograd.loss_in_place if inplace_now else autograd.loss
    scores, terms = call(as_rows(logits, inplace), sweeps, how, want_entropy)
    return make_output(objective, batch, scores.logp, scores.entropy, terms.in_fp32(), return_stats)


class Options(Inputs, total=False):
    """What a `GRPOLoss` may hold: the keyword arguments of `grpo_loss` without the objective."""

    return_stats: bool
    inplace: bool
    backend: str


class GRPOLoss(nn.Module):
    """`grpo_loss` as a module, which holds the objective and other options that do not change from call to call.

    Call it as `grpo_loss`, without `objective`; a keyword of the call wins over one held here.

    Args:
        objective: the options of the loss.
        **options: keyword arguments of `grpo_loss`, such as `inplace=True`.

    Raises:
        ValueError: an objective that is none, or a keyword that `grpo_loss` does not have.
    """

    function: Callable[..., GRPOOutput] = staticmethod(grpo_loss)

    def __init__(self, objective: Objective = Objective(), **options: Unpack[Options]) -> None:  # noqa: B008 (frozen)
        super().__init__()
        if not isinstance(objective, Objective):
            raise ValueError(f"objective: expected an Objective, got {objective!r}")
        arguments = inspect.signature(self.function).parameters
        for name in options:
            if name not in arguments or arguments[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                raise ValueError(f"{name}: expected a keyword argument of {self.function.__name__}")
        self.objective = objective
        self.options: dict[str, Any] = {**options}

    def forward(
        self, logits: Tensor, completion_ids: Tensor, advantages: Tensor | None = None, **inputs: Unpack[Options]
    ) -> GRPOOutput:
        options: dict[str, Any] = {**self.options, **inputs}
        return self.function(logits, completion_ids, advantages, objective=self.objective, **options)

    if TYPE_CHECKING:  # nn.Module's takes anything
        __call__ = forward

    def extra_repr(self) -> str:
        return ", ".join([repr(self.objective), *(f"{k}={v!r}" for k, v in self.options.items())])
