"""What a loss type is: `Loss`, a record, and `Tokens`, the vectors that the loss of a token may read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.batch.checks import wrong
from fastgrpo.objective.averages import Options


class _Exp(torch.autograd.Function):
    """exp(x), at most the dtype's largest number, so that 0 times it is 0; its gradient is the same number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.exp().clamp(max=torch.finfo(x.dtype).max)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return gradient * result


@dataclass(frozen=True)
class Tokens:
    """What the loss of a token may read: (N,) vectors, one value a row; a row that is not scored holds harmless ones.

    Attributes:
        logp: logp of the sampled token, differentiable.
        old_logp: under the policy that sampled; without `old_per_token_logps`, logp without its gradient.
        sampling_logp: under the sampler; old_logp where `sampling_per_token_logps` is NaN or not given.
        ref_logp: under the reference policy; reading it makes `ref_per_token_logps` a needed argument.
        log_ratio: logarithm of the ratio at the objective's `importance_sampling_level`; at "token" logp - old_logp.
        ratio: exp(log_ratio), at most the dtype's largest number.
        advantages: A.
        entropy: of the row's distribution, in nats, differentiable.
        mask: 1 for loss tokens, 0 for others.
        importance_ratio: `importance_sampling_ratio`, by which the loss is multiplied afterwards, or None.
        objective: the options, such as `t.objective.epsilon`.
    """

    objective: Options
    batch: Batch
    logp: Tensor
    old_logp: Tensor
    sampling_logp: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    importance_ratio: Tensor | None = None
    reference: Tensor | None = None  # ref_logp, where there is one
    entropies: Tensor | None = None
    on_policy: bool = False  # old_logp is logp without its gradient
    off: Tensor | None = None  # bool: a factor or a weight of 0 awaits the loss; None: none does
    scored: Tensor | None = None  # bool; None: all

    @property
    def ratio(self) -> Tensor:
        return _Exp.apply(self.log_ratio)

    @property
    def ref_logp(self) -> Tensor:
        self._read("ref_logp", self.objective.record.needs_ref)
        if self.reference is None:
            raise wrong("ref_per_token_logps", f"a tensor because {self.objective.loss_name} reads t.ref_logp", None)
        return self.reference

    @property
    def entropy(self) -> Tensor:
        self._read("entropy", self.objective.record.needs_entropy)
        assert self.entropies is not None  # as needs_entropy says
        return self.entropies

    def seq_sum(self, x: Tensor) -> Tensor:
        """(N,) the sum of x (N,) over the loss tokens of each sequence, on each of its rows."""
        self._read("seq_sum", self.objective.record.whole_sequences)
        return self.batch.layout.to_rows(self._summed(x))

    def seq_mean(self, x: Tensor) -> Tensor:
        """(N,) the mean of x (N,) over the loss tokens of each sequence, on each of its rows; 0 without any."""
        self._read("seq_mean", self.objective.record.whole_sequences)
        layout = self.batch.layout
        return layout.to_rows(self._summed(x) / layout.seq_sum(self.mask).clamp(min=1))

    def _summed(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.shape != self.mask.shape:
            raise wrong("loss_type", f"t.seq_mean and t.seq_sum of a tensor {tuple(self.mask.shape)} of rows", x)
        return self.batch.layout.seq_sum(x * self.mask)

    def _read(self, what: str, declared: bool) -> None:
        if not declared:
            needs = {"ref_logp": "needs_ref", "entropy": "needs_entropy"}.get(what, "needs_sequences")
            raise ValueError(
                f"loss_type: {self.objective.loss_name} reads t.{what}, which it did not do when it was tried; "
                f"give {needs}=True to register_loss"
            )


TokenLoss = Callable[[Tokens], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Loss:
    """What a loss type is. Everything that depends on one is read from here.

    Args:
        token: (N,) the loss of each token, without KL and entropy bonus; and for each name in `logs` (N,) weights.
        average: how tokens are averaged, a name in `AVERAGES`.
        kind, numbers: the fused objective that does the same, a `Kind`, and its numbers, at most 4; None: there is
            none.
        reads_ratio: `token` reads the ratio; otherwise its kind gets the ratio 1, unless the KL needs another.
        whole_sequences: a token's loss needs the other tokens of its sequence at every level.
        whole_batch: it needs all tokens of the batch.
        needs_entropy, needs_ref: `token` reads t.entropy, which it may differentiate; or t.ref_logp.
        inert: a token of advantage 0 adds exactly nothing to loss and gradient.
        takes_importance_ratio: `token` reads the importance sampling ratio; otherwise it multiplies the loss.
        clip_high: the upper bound of the ratio.
        logs: metrics, each the mean over loss tokens of a weight.
        logs_of_sequences: those weights are one number for each sequence, and the mean is over sequences.
        shares: what else is logged of (objective, ratio, advantages): (N,) bools by their metric's name.
    """

    token: TokenLoss
    average: str
    kind: int | None = None
    numbers: Callable[[Options], tuple[float, ...]] = lambda o: ()
    reads_ratio: bool = True
    whole_sequences: bool = False
    whole_batch: bool = False
    needs_entropy: bool = False
    needs_ref: bool = False
    inert: bool = True
    takes_importance_ratio: bool = False
    clip_high: Callable[[float], float] = lambda epsilon_high: 1 + epsilon_high
    logs: tuple[str, ...] = ()
    logs_of_sequences: bool = False
    shares: Callable[[Options, Tensor, Tensor], dict[str, Tensor]] = lambda o, ratio, advantages: {}


LOSSES: dict[str, Loss] = {}  # by loss_type; `fastgrpo.objective.losses` fills it
