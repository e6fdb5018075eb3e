"""`Objective`, every option of the loss, checked on construction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastgrpo.batch.checks import wrong
from fastgrpo.objective.averages import AVERAGES, Average
from fastgrpo.objective.kl import KL_ESTIMATORS
from fastgrpo.objective.own import name_of, record_of, title
from fastgrpo.objective.presets import PRESETS
from fastgrpo.objective.record import LOSSES, Loss, TokenLoss
from fastgrpo.objective.sampler import Correction, corrections_of, rejects

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
CHOICES: dict[str, tuple[str, ...]] = {  # of options that are names
    "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
    "average": tuple(AVERAGES),
    "ratio_anchor": ("old", "sampling"),
    "kl_estimator": KL_ESTIMATORS,
    "kl_anchor": ("old", "current"),
    "kl_average": tuple(AVERAGES),
}


@dataclass(frozen=True)
class Objective:
    """Every option of the loss, with TRL 1.16's names and defaults; checked on construction.

    docs/objectives.md has each loss as a formula.

    Args:
        loss_type: the loss of a token, and how tokens are averaged. The loss is the clipped ratio for "grpo"
            (arXiv:2402.03300), "bnpo", "dr_grpo" (arXiv:2503.20783), "dapo" (arXiv:2503.14476) and "luspo"
            (arXiv:2602.05261), which differ in the average. Losses of their own have "cispo" and "cispo_clip"
            (arXiv:2506.13585), "sapo" (arXiv:2511.20347), "vespo" (arXiv:2602.10693), "reinforce", "icepop"
            (arXiv:2510.18855), "dppo", "dppo_tv" and "dppo_kl" (arXiv:2602.04879), "gmpo" (arXiv:2507.20673),
            "clip_cov" and "kl_cov" (arXiv:2505.22617). Or a function of one's own, from `Tokens` to (N,) the loss of
            each token; "module:function"; or a name given by `register_loss`.
        importance_sampling_level: what the ratio is of: "token"; "sequence" (GSPO, arXiv:2507.18071); or
            "sequence_token" (GSPO-token), which has the value of the sequence's ratio and the gradient of the token's.
        beta: coefficient of the KL to the reference policy; 0: no reference is needed.
        epsilon: the ratio is clipped at 1 - epsilon from below. For "gmpo" -epsilon bounds the log ratio, and for the
            losses "dppo…" epsilon a divergence.
        epsilon_high: the ratio is clipped at 1 + epsilon_high from above; None: as epsilon. For "cispo", "gmpo" and
            the losses "dppo…" it is the bound itself.
        delta: bound of the unclipped ratio from above (two-sided clipping, arXiv:2505.07291); None: none.
        use_bias_correction_kl: multiply the KL estimate by the ratio (DeepSeek-V3.2, arXiv:2512.02556).
        entropy_coef: coefficient of the mean entropy, which is subtracted from the loss.
        top_entropy_quantile: share of the tokens, those of highest entropy, that have a policy gradient
            (arXiv:2506.01939); 1: all.
        off_policy_mask_threshold: sequences of negative advantage have no policy gradient if their mean of
            sampler's logp - logp exceeds it (DeepSeek-V3.2); None: all have.
        max_completion_length: the constant that the average "dr_grpo" divides by, and needs, and
            "seq-mean-token-sum-norm" too, in place of the length of padded completions.
        sapo_temperature_pos, sapo_temperature_neg: temperatures of SAPO's gate, by the advantage's sign.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: parameters of VESPO's weight, by the advantage's
            sign.
        average: how tokens are averaged, whatever the loss: "dapo", "grpo", "bnpo", "dr_grpo" or "luspo", as those
            loss types do; verl's "token-mean", "seq-mean-token-mean", "seq-mean-token-sum",
            "seq-mean-token-sum-norm" and "token-sum"; or "prompt-mean". None: the loss type's own.
        ratio_anchor: the policy that the ratio is to: "old", or "sampling", the sampler's logps where they are given
            and not NaN.
        log_ratio_clamp: the log ratio of a token is bounded to ± this, that of a sequence from above; no gradient
            beyond; None: it is not.
        clip_ratio_c: bound of the ratio where A < 0, for the clipped losses (dual clip, arXiv:1912.09729); for
            "dppo_tv" and "dppo_kl" of the weight; None: none.
        log_ratio_penalty: coefficient of (logp - old)², which is added to the loss of each token.
        kl_estimator: of the KL to the reference: "k1", "abs", "k2", "k3" or "low_var_kl", or with a "+" the value of
            that and the gradient of k2.
        kl_log_ratio_clamp, kl_clamp: bounds of ref - logp and of the estimate, times the ratio if
            `use_bias_correction_kl`, on both sides; None: none.
        kl_anchor: the policy of the ratio in `use_bias_correction_kl`: "old", or "current", whose ratio is 1.
        kl_average: how the KL is averaged; None: as the loss.
        cov_share: share of the tokens that "clip_cov" and "kl_cov" select by covariance (arXiv:2505.22617).
        cov_low, cov_high: "clip_cov" selects between them.
        cov_coef: coefficient of |logp - old| at the tokens that "kl_cov" selects.
        sampling_correction: what corrects for a sampler that is not quite the old policy, from
            `sampling_per_token_logps`: one or several `Correction`, or their text, such as "token_truncate:2" (TIS),
            "token_mask:0.5_5" (IcePop) or "sequence_mask:3" (TRL's default with vLLM); None: nothing does.

    Raises:
        ValueError: names the option, what was expected and what came.
    """

    loss_type: str | TokenLoss = "dapo"
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
    average: str | None = None
    ratio_anchor: str = "old"
    log_ratio_clamp: float | None = None
    clip_ratio_c: float | None = None
    log_ratio_penalty: float = 0.0
    kl_estimator: str = "k3"
    kl_log_ratio_clamp: float | None = None
    kl_clamp: float | None = None
    kl_anchor: str = "old"
    kl_average: str | None = None
    cov_share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_coef: float = 1.0
    sampling_correction: str | Correction | Sequence[Correction] | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        self.record  # noqa: B018 (a ValueError if there is none)
        object.__setattr__(self, "sampling_correction", corrections_of(self.sampling_correction))
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), CHOICES.get(field.name)
            if field.name in ("loss_type", "sampling_correction") or (value is None and field.default is None):
                continue
            if choices is not None:
                check(field.name, value in choices, f"one of {', '.join(choices)}")
                continue
            if isinstance(field.default, bool):
                check(field.name, isinstance(value, bool), "True or False")
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            check(field.name, number and math.isfinite(value), "a finite number")
        for name in ("beta", "epsilon"):
            check(name, getattr(self, name) >= 0, "a number >= 0")
        check("epsilon_high", self.epsilon_high is None or self.epsilon_high >= 0, "None or a number >= 0")
        for name in ("delta", "log_ratio_clamp", "clip_ratio_c", "kl_log_ratio_clamp", "kl_clamp"):
            value = getattr(self, name)
            check(name, value is None or value > 0, "None or a number > 0")
        check("cov_share", 0 < self.cov_share <= 1, "a share above 0, at most 1")
        check("top_entropy_quantile", 0 <= self.top_entropy_quantile <= 1, "a share between 0 and 1")
        check("sapo_temperature_pos", self.sapo_temperature_pos > 0, "a number > 0")
        check("sapo_temperature_neg", self.sapo_temperature_neg > 0, "a number > 0")
        for option, average in (("average", self.average_name), ("kl_average", self.kl_average)):
            if average is not None and (needed := AVERAGES[average].needs) is not None:
                given = getattr(self, needed)
                check(needed, given is not None and given > 0, f"a number > 0 with {option} {average!r}")
        length = self.max_completion_length
        check("max_completion_length", length is None or length > 0, "None or a number > 0")
        if self.corrections is not None:  # made here, because a compiled graph could not
            object.__setattr__(self, "_uncorrected", dataclasses.replace(self, sampling_correction=None))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Objective:
        """An objective with the settings of a paper, or of another framework.

        Args:
            name: a paper's: "grpo-paper" (arXiv:2402.03300), "dapo" (arXiv:2503.14476), "dr_grpo" (arXiv:2503.20783),
                "bnpo" (TRL's), "gspo" and "gspo-token" (arXiv:2507.18071), "luspo" (arXiv:2602.05261), "cispo"
                (arXiv:2506.13585), "scale-rl" (arXiv:2510.13786), "sapo" (arXiv:2511.20347), "vespo"
                (arXiv:2602.10693), "dual-clip" (arXiv:1912.09729), "gmpo" (arXiv:2507.20673), "dppo-tv" and "dppo-kl"
                (arXiv:2602.04879), "clip-cov" and "kl-cov" (arXiv:2505.22617), "gpg" (arXiv:2504.02546), "reinforce",
                "rloo" (arXiv:2402.14740), "dro" (arXiv:2405.19107) or "icepop" (arXiv:2510.18855). Or the defaults of
                a framework: "verl", "prime-rl", "skyrl", "nemo-rl", "openrlhf", "slime", "miles", "areal" or "roll".
            **overrides: options that take other values.

        Raises:
            ValueError: another name, or an option's bad value.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def record(self) -> Loss:
        """What `loss_type` stands for."""
        return LOSSES[self.loss_type] if self.loss_type in LOSSES else record_of(self.loss_type)

    @property
    def loss_name(self) -> str:
        """What the loss is called in an error."""
        return repr(self.loss_type) if isinstance(self.loss_type, str) else title(self.loss_type)

    @property
    def registered_name(self) -> str | None:
        """The name by which an operator of a compiled graph finds the loss; None: it has none."""
        return name_of(self.loss_type)

    @property
    def average_name(self) -> str:
        """How tokens are averaged, a name in `AVERAGES`."""
        return self.record.average if self.average is None else self.average

    @property
    def averaging(self) -> Average:
        """What `average_name` stands for."""
        return AVERAGES[self.average_name]

    @property
    def kl_averaging(self) -> Average | None:
        """How the KL is averaged; None: there is none, or as the loss."""
        if self.beta == 0 or self.kl_average is None or AVERAGES[self.kl_average] == self.averaging:
            return None
        return AVERAGES[self.kl_average]

    @property
    def counts(self) -> tuple[str, ...]:
        """What `num_items_in_batch` would have to number: "tokens", "sequences", "prompts", or several of these."""
        averages = [self.averaging, *([] if self.kl_averaging is None else [self.kl_averaging])]
        return tuple(dict.fromkeys(average.counts for average in averages if average.counts is not None))

    @property
    def clip_high(self) -> float:
        """The upper bound: 1 + epsilon_high of the ratio, or for some losses epsilon_high of what they bound."""
        return self.record.clip_high(self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def corrections(self) -> tuple[Correction, ...] | None:
        """What `sampling_correction` stands for."""
        return self.sampling_correction  # type: ignore[return-value]  # as __post_init__ made it

    def in_pass(self, inputs: Mapping[str, Any]) -> Objective:
        """The objective of the pass of a call: corrections between two given policies are made before it."""
        if self.corrections is None or inputs.get("old_per_token_logps") is None:
            return self
        return self._uncorrected  # type: ignore[attr-defined]  # as __post_init__ made it

    @property
    def is_token_local(self) -> bool:
        """Whether a token's loss and gradient need nothing of other tokens' logits: then one pass over V is enough."""
        return not self.record.whole_sequences and not self.record.whole_batch and not self._beyond_tokens()

    def _beyond_tokens(self) -> list[str]:
        """The options that make a token's loss depend on other tokens."""
        names = {
            "importance_sampling_level": self.importance_sampling_level != "token",
            "top_entropy_quantile": self.top_entropy_quantile < 1,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "sampling_correction": any(one.of_sequences for one in self.corrections or ()),
        }
        return [name for name, true in names.items() if true]

    @property
    def unheld(self) -> tuple[str, ...]:
        """The options, by name, that kernels do not hold between two looks at a row of logits; none: one pass."""
        names = {
            "loss_type": self.record.kind is None,
            "ratio_anchor": self.ratio_anchor != "old",
            "log_ratio_penalty": self.log_ratio_penalty != 0,
            "sampling_correction": self.corrections is not None,  # `in_pass` takes out what is made before
        }
        if self.beta != 0:
            names["kl_estimator"] = self.kl_estimator != "k3"
            names["kl_anchor"] = self.use_bias_correction_kl and self.kl_anchor != "old"
            names["kl_average"] = self.kl_averaging is not None
            names |= {name: getattr(self, name) is not None for name in ("kl_log_ratio_clamp", "kl_clamp")}
        return tuple(dict.fromkeys([*(name for name, true in names.items() if true), *self._beyond_tokens()]))

    @property
    def is_fused(self) -> bool:
        """Whether kernels can hold it, between two looks at a row of logits; `unheld` says why not."""
        return not self.unheld

    @property
    def reads_ratio(self) -> bool:
        """Whether loss and gradient depend on the ratio, and so on the policy that it is to."""
        return self.record.reads_ratio or (self.beta != 0 and self.use_bias_correction_kl)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a token's loss depends on all tokens of the batch."""
        return self.record.whole_batch or self.top_entropy_quantile < 1

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss, not only its statistics, depends on entropies."""
        return self.differentiates_entropy or self.top_entropy_quantile < 1

    @property
    def differentiates_entropy(self) -> bool:
        """Whether the loss has a gradient in the entropies."""
        return self.entropy_coef != 0 or self.record.needs_entropy

    @property
    def needs_ref(self) -> bool:
        """Whether the loss depends on the reference policy."""
        return self.beta != 0 or self.record.needs_ref

    def items_in_batch(self, *, tokens: Tensor, sequences: float) -> Tensor | float | None:
        """`num_items_in_batch` as the averages count it, from a micro-batch's share of tokens and of sequences.

        Raises:
            ValueError: one counts prompts, whose completions micro-batches part; or the KL's counts something else.
        """
        if "prompts" in self.counts:
            name = "average" if self.averaging.counts == "prompts" else "kl_average"
            raise ValueError(f"{name}: expected one of tokens or sequences in a trainer, got 'prompt-mean'")
        if len(self.counts) > 1:
            expected = f"one that counts {self.counts[0]} in a trainer, as average {self.average_name!r} does"
            raise ValueError(f"kl_average: expected {expected}, got {self.kl_average!r}")
        return tokens if self.counts == ("tokens",) else sequences

    def wants_entropy(self, statistics: bool) -> bool:
        """Whether a call computes entropies, given whether it returns statistics."""
        return statistics or self.needs_entropy

    def may_be_inert(self, advantages_per_token: bool) -> bool:
        """Whether a row of advantage 0 is known to add exactly nothing to loss and gradient."""
        nothing_else = (self.beta, self.log_ratio_penalty) == (0, 0) and not self.needs_entropy and self.record.inert
        return nothing_else and (self.is_token_local or not advantages_per_token)


def check_objective(objective: object, inputs: Mapping[str, Any]) -> None:
    """Raise a ValueError unless it is an Objective that can be computed from a call's inputs."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective: expected an Objective, got {objective!r}")
    if objective.needs_ref and inputs.get("ref_per_token_logps") is None:
        why = "beta is not 0" if objective.beta != 0 else f"{objective.loss_name} reads t.ref_logp"
        raise wrong("ref_per_token_logps", f"a tensor because {why}", None)
    if len(objective.counts) > 1 and (items := inputs.get("num_items_in_batch")) is not None:
        what = " and ".join(objective.counts)
        raise wrong("num_items_in_batch", f"None, because average and kl_average count {what}", items)
    if objective.corrections is None:
        return
    if inputs.get("sampling_per_token_logps") is None:
        raise wrong("sampling_per_token_logps", "a tensor because the objective has a sampling_correction", None)
    if (ratio := inputs.get("importance_sampling_ratio")) is not None:
        raise wrong("importance_sampling_ratio", "None beside a sampling_correction, which makes one", ratio)
    if inputs.get("old_per_token_logps") is None and rejects(objective.corrections):
        why = "a sampling_correction rejects tokens before the pass; 'drop' takes the current logps"
        raise wrong("old_per_token_logps", f"a tensor because {why}", None)
