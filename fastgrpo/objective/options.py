"""`Objective`, every option of the loss; and what a loss type is, as a record that others register."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.batch.checks import wrong

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")


class Tokens(NamedTuple):
    """What the loss of a token may read; (N,) each, one value a row. Rows without a score hold harmless numbers."""

    logps: Tensor  # differentiable
    log_ratio: Tensor  # of the objective's level, differentiable
    token_log_ratio: Tensor  # logp - old, detached
    advantages: Tensor
    importance_ratio: Tensor | None
    off: Tensor | None  # bool: a factor of 0 awaits the loss
    mask: Tensor  # the loss tokens, 0 or 1
    scored: Tensor | None  # bool; None: all
    batch: Batch


@dataclass(frozen=True)
class Loss:
    """What a loss type is. Everything that depends on one is read from here.

    Args:
        token: (N,) the loss of each token, without KL and entropy bonus; and for each name in `logs` (N,) weights.
        average: (N,) the factor of each token's loss from the mask in numbers: how tokens are averaged.
        over_items: the average is over `num_items_in_batch`, so that the losses of micro-batches add up to a step's.
        kind, numbers: the fused objective that does the same, a `Kind`, and its numbers, at most 4; None: there is
            none.
        whole_sequences: a token's loss needs the other tokens of its sequence at every level.
        takes_importance_ratio: `token` reads the importance sampling ratio; otherwise it multiplies the loss.
        clip_high: the upper bound of the ratio.
        logs: metrics, each the mean over sequences of a weight that is one number for each sequence.
        shares: what else is logged of (objective, ratio, advantages): (N,) bools by their metric's name.
        needs: option that must be given.
    """

    token: Callable[[Objective, Tokens], tuple[Tensor, ...]]
    average: Callable[[Objective, Batch, Tensor], Tensor]
    over_items: bool = False
    kind: int | None = None
    numbers: Callable[[Objective], tuple[float, ...]] = lambda o: ()
    whole_sequences: bool = False
    takes_importance_ratio: bool = False
    clip_high: Callable[[float], float] = lambda epsilon_high: 1 + epsilon_high
    logs: tuple[str, ...] = ()
    shares: Callable[[Objective, Tensor, Tensor], dict[str, Tensor]] = lambda o, ratio, advantages: {}
    needs: str | None = None


LOSSES: dict[str, Loss] = {}  # by loss_type; `fastgrpo.objective.losses` fills it

# the settings of papers
PRESETS: dict[str, dict[str, Any]] = {
    "grpo-paper": dict(loss_type="grpo", beta=0.04, use_bias_correction_kl=False),  # arXiv:2402.03300
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),  # arXiv:2503.14476
    "dr_grpo": dict(loss_type="dr_grpo"),  # arXiv:2503.20783; needs max_completion_length
    "bnpo": dict(loss_type="bnpo"),  # TRL's: an average over the tokens of a batch
    # GSPO, arXiv:2507.18071
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "gspo-token": dict(loss_type="grpo", importance_sampling_level="sequence_token", epsilon=3e-4, epsilon_high=4e-4),
    # arXiv:2602.05261
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3),
    "cispo": dict(loss_type="cispo", epsilon_high=5.0),  # arXiv:2506.13585
    "sapo": dict(loss_type="sapo"),  # arXiv:2511.20347
    "vespo": dict(loss_type="vespo"),  # arXiv:2602.10693
}


@dataclass(frozen=True)
class Objective:
    """Every option of the loss, with TRL 1.16's names and defaults; checked on construction.

    docs/objectives.md has each loss as a formula.

    Args:
        loss_type: the loss of a token, and how tokens are averaged. The loss is the clipped ratio for "grpo"
            (arXiv:2402.03300), "bnpo", "dr_grpo" (arXiv:2503.20783), "dapo" (arXiv:2503.14476) and "luspo"
            (arXiv:2602.05261), which differ in the average. "cispo" (arXiv:2506.13585), "sapo" (arXiv:2511.20347)
            and "vespo" (arXiv:2602.10693) have losses of their own.
        importance_sampling_level: what the ratio is of: "token"; "sequence" (GSPO, arXiv:2507.18071); or
            "sequence_token" (GSPO-token), which has the value of the sequence's ratio and the gradient of the token's.
        beta: coefficient of the KL to the reference policy, estimated by k3; 0: no reference is needed.
        epsilon: the ratio is clipped at 1 - epsilon from below.
        epsilon_high: the ratio is clipped at 1 + epsilon_high from above; None: as epsilon. For "cispo" it is the
            bound itself.
        delta: bound of the unclipped ratio from above (two-sided clipping, arXiv:2505.07291); None: none.
        use_bias_correction_kl: multiply the KL estimate by the ratio (DeepSeek-V3.2, arXiv:2512.02556).
        entropy_coef: coefficient of the mean entropy, which is subtracted from the loss.
        top_entropy_quantile: share of the tokens, those of highest entropy, that have a policy gradient
            (arXiv:2506.01939); 1: all.
        off_policy_mask_threshold: sequences of negative advantage have no policy gradient if their mean of
            sampler's logp - logp exceeds it (DeepSeek-V3.2); None: all have.
        max_completion_length: the constant that "dr_grpo" divides by, and needs.
        sapo_temperature_pos, sapo_temperature_neg: temperatures of SAPO's gate, by the advantage's sign.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: parameters of VESPO's weight, by the advantage's
            sign.

    Raises:
        ValueError: names the option, what was expected and what came.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        check("loss_type", self.loss_type in LOSSES, f"one of {', '.join(LOSSES)}")
        check(
            "importance_sampling_level",
            self.importance_sampling_level in IMPORTANCE_SAMPLING_LEVELS,
            f"one of {', '.join(IMPORTANCE_SAMPLING_LEVELS)}",
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("loss_type", "importance_sampling_level"):
                continue
            if isinstance(field.default, bool):
                check(field.name, isinstance(value, bool), "True or False")
                continue
            if value is None and field.default is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            check(field.name, number and math.isfinite(value), "a finite number")
        for name in ("beta", "epsilon"):
            check(name, getattr(self, name) >= 0, "a number >= 0")
        check("epsilon_high", self.epsilon_high is None or self.epsilon_high >= 0, "None or a number >= 0")
        check("delta", self.delta is None or self.delta > 0, "None or a number > 0")
        check("top_entropy_quantile", 0 <= self.top_entropy_quantile <= 1, "a share between 0 and 1")
        check("sapo_temperature_pos", self.sapo_temperature_pos > 0, "a number > 0")
        check("sapo_temperature_neg", self.sapo_temperature_neg > 0, "a number > 0")
        length, needed = self.max_completion_length, self.record.needs
        if needed is not None:
            given = getattr(self, needed)
            check(needed, given is not None and given > 0, f"a number > 0 with loss_type {self.loss_type!r}")
        check("max_completion_length", length is None or length > 0, "None or a number > 0")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Objective:
        """An objective with the settings of a paper.

        Args:
            name: "grpo-paper" (arXiv:2402.03300), "dapo" (arXiv:2503.14476), "dr_grpo" (arXiv:2503.20783), "bnpo"
                (TRL's), "gspo" and "gspo-token" (arXiv:2507.18071), "luspo" (arXiv:2602.05261), "cispo"
                (arXiv:2506.13585), "sapo" (arXiv:2511.20347) or "vespo" (arXiv:2602.10693).
            **overrides: options that take other values than the paper's.

        Raises:
            ValueError: another name, or an option's bad value.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def record(self) -> Loss:
        """What `loss_type` stands for."""
        return LOSSES[self.loss_type]

    @property
    def clip_high(self) -> float:
        """The upper bound of the ratio: 1 + epsilon_high, or for CISPO epsilon_high itself."""
        return self.record.clip_high(self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def is_token_local(self) -> bool:
        """Whether a token's loss and gradient need nothing of other tokens' logits: then one pass over V is enough."""
        return (
            self.importance_sampling_level == "token"
            and not self.record.whole_sequences
            and self.top_entropy_quantile == 1
            and self.off_policy_mask_threshold is None
        )

    @property
    def is_fused(self) -> bool:
        """Whether kernels can hold it, between two looks at a row of logits."""
        return self.is_token_local and self.record.kind is not None

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss, not only its statistics, depends on entropies."""
        return self.entropy_coef != 0 or self.top_entropy_quantile < 1

    def wants_entropy(self, statistics: bool) -> bool:
        """Whether a call computes entropies, given whether it returns statistics."""
        return statistics or self.needs_entropy

    def may_be_inert(self, advantages_per_token: bool) -> bool:
        """Whether a row of advantage 0 is known to add exactly nothing to loss and gradient."""
        nothing_else = self.beta == 0 and not self.needs_entropy
        return nothing_else and (self.is_token_local or not advantages_per_token)


def check_objective(objective: object, inputs: Mapping[str, Any]) -> None:
    """Raise a ValueError unless it is an Objective that can be computed from a call's inputs."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective: expected an Objective, got {objective!r}")
    if objective.beta != 0 and inputs.get("ref_per_token_logps") is None:
        raise wrong("ref_per_token_logps", "a tensor because beta is not 0", None)
