"""GRPOConfig: transformers' training arguments plus the options of GRPO, under TRL's names and with TRL's defaults."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainingArguments

from fastgrpo import _defaults
from fastgrpo.advantages import SCALE_REWARDS, check_options, estimate, takes
from fastgrpo.engine.head import check_tolerance
from fastgrpo.objective import Objective
from fastgrpo.trainer.sampling import OTHER_TRUNCATIONS

# transformers 5.2x renamed the option and warns at the old name
_FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"

# the options of the objective, with its defaults; one of them has a default of its own here, and the loss is a text;
# nobody but the policy samples, so nothing is corrected
_NOT_OPTIONS = ("max_completion_length", "sampling_correction")
if TYPE_CHECKING:
    _Options = Objective
else:
    _Options = dataclasses.make_dataclass(
        "_Options",
        [
            (f.name, str if f.name == "loss_type" else typing.get_type_hints(Objective)[f.name], f.default)
            for f in dataclasses.fields(Objective)
            if f.name not in _NOT_OPTIONS
        ],
        namespace={"__module__": __name__},
    )


def as_dict(options: dict[str, Any] | str | None) -> dict[str, Any]:
    """Options of a training argument, of which `__post_init__` makes a dict where they are JSON."""
    assert not isinstance(options, str)
    return options or {}


def name_of_logits_dtype(
    given: str | torch.dtype, args: TrainingArguments, of_model: torch.dtype | str | None = None
) -> str:
    """`logits_dtype` as a configuration holds it, after a check against the dtype that the GEMMs take.

    Args:
        of_model: the model's dtype, which counts unless training is mixed; None or "auto": not known.

    Raises:
        ValueError: no dtype of logits, or one that hidden states do not have.
    """
    name = str(given).removeprefix("torch.")
    operands = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(of_model).removeprefix("torch.")
    known = operands in _defaults.LOGITS_DTYPES[1:]
    possible = tuple(dict.fromkeys(("auto", "float32", operands))) if known else _defaults.LOGITS_DTYPES
    if name not in possible:
        because = f", because hidden states are {operands}" if known and name in _defaults.LOGITS_DTYPES else ""
        raise ValueError(f"logits_dtype: expected one of {', '.join(possible)}{because}, got {given!r}")
    return name


def as_logits_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """As `linear_grpo_loss` takes it."""
    return "auto" if name == "auto" else getattr(torch, name)


@dataclass
class GRPOConfig(_Options, TrainingArguments):  # type: ignore[misc]  # frozen for type checkers alone
    """Options of `GRPOTrainer`.

    Everything of `transformers.TrainingArguments`, with other defaults for learning_rate (1e-6), logging_steps (10),
    activation or gradient checkpointing (True), bf16 (True unless fp16) and remove_unused_columns (False, since reward
    functions read the columns).

    Args:
        model_init_kwargs: for `from_pretrained`, if the model is given as a path or hub id. The dtype is float32 by
            default.
        trust_remote_code: allow models and tokenizers that bring their own code.
        disable_dropout: set every dropout of the policy to 0.
        num_generations: the number of completions per prompt, a group.
        num_generations_eval: the same in evaluation; None: num_generations.
        max_completion_length: the most tokens that are sampled for a completion.
        shuffle_dataset: visit the prompts in random order.
        temperature, top_p, top_k, min_p, repetition_penalty: how completions are sampled.
        keep_sampling_mask: where top_p, top_k or min_p truncate, take the policy's, the old and the reference logps
            over the tokens that were kept at each place, as `kept_ids` of `linear_grpo_loss`, so that they are of the
            distribution that was sampled from. False: over the whole vocabulary, as in TRL.
        cache_implementation: the cache that `generate` uses.
        generation_kwargs: more options for `GenerationConfig`; they win over the ones above.
        chat_template_kwargs: for `apply_chat_template`, if prompts are lists of messages.
        steps_per_generation: the number of micro-batches that are sampled together; None: gradient_accumulation_steps.
        generation_batch_size: the number of completions that are sampled together, over all processes; it may be given
            in place of steps_per_generation.
        num_iterations: how often each completion is used for an update.
        reward_weights: a factor per reward function; None: 1 each.
        multi_objective_aggregation: "sum_then_normalize": the weighted sum of the rewards is normalised.
            "normalize_then_sum" (GDPO, arXiv:2601.05242): the rewards of each function are normalised within their
            group, and their weighted sum is normalised over the batch.
        scale_rewards: the std that advantages are divided by: "group", "batch" or "none". True means "group", False
            "none".
        advantage_estimator: what makes advantages of the rewards, a name of `fastgrpo.advantages.ESTIMATORS`; "group":
            as scale_rewards says. For estimators with statistics of the batch, a round of sampling is the batch.
        advantage_kwargs: its options, such as {"gamma": 0.99} of "reinforce_plus_plus" or {"k": 4} of "pass_at_k".
        mask_truncated_completions: leave completions without an end token out of the loss.
        log_completions: write prompts, completions and rewards of the last round of sampling, when a step is logged,
            to `output_dir/completions/completions_<step>.parquet`; those of an evaluation to
            `eval_completions_<step>.parquet`.
        chunk_size: rows of logits that exist at once; None: as the device's memory allows, see `linear_grpo_loss`.
        backend: the backend of the loss, "auto" or one of `fastgrpo.backends.NAMES`.
        logits_dtype: the dtype of the logits in the loss and in old and reference logps: "auto", "float32", or that of
            hidden states in training, "bfloat16" or "float16"; see `linear_grpo_loss`.
        column_tolerance: the share of a token's gradient that may be left out at the head, see `linear_grpo_loss`.

    The remaining options are those of `fastgrpo.Objective` but for `sampling_correction`; it explains them, holds
    their defaults and checks them.

    Raises:
        ValueError: names the option, what was expected and what came.
    """

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "advantage_kwargs",
    ]

    # model
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    disable_dropout: bool = False

    # data and sampling
    remove_unused_columns: bool = False
    shuffle_dataset: bool = True
    num_generations: int = _defaults.NUM_GENERATIONS
    num_generations_eval: int | None = None
    max_completion_length: int = 512
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    temperature: float = _defaults.TEMPERATURE
    top_p: float = _defaults.TOP_P
    top_k: int = _defaults.TOP_K
    min_p: float | None = None
    repetition_penalty: float = 1.0
    keep_sampling_mask: bool = False
    cache_implementation: str | None = None
    generation_kwargs: dict[str, Any] | str | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None

    # rewards
    reward_weights: list[float] | None = None
    multi_objective_aggregation: str = "sum_then_normalize"
    scale_rewards: str = "group"
    advantage_estimator: str = _defaults.ADVANTAGE_ESTIMATOR
    advantage_kwargs: dict[str, Any] | str | None = None

    # objective
    num_iterations: int = _defaults.NUM_ITERATIONS
    mask_truncated_completions: bool = False
    chunk_size: int | None = None
    backend: str = _defaults.BACKEND
    logits_dtype: str = _defaults.LOGITS_DTYPE
    column_tolerance: float = _defaults.COLUMN_TOLERANCE

    # training arguments with another default
    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool | None = None
    bf16: bool | None = field(  # type: ignore[assignment]  # None until __post_init__
        default=None, metadata={"help": "Train in bfloat16; the default is not fp16."}
    )
    log_completions: bool = False

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        if self.gradient_checkpointing is None and getattr(self, CHECKPOINTING) is None:
            setattr(self, CHECKPOINTING, True)
        super().__post_init__()
        if self.checkpoints_activations and CHECKPOINTING == "gradient_checkpointing":
            # the reentrant kind, once the default, needs inputs that require grad
            given = as_dict(self.gradient_checkpointing_kwargs)
            self.gradient_checkpointing_kwargs = {"use_reentrant": False, **given}
        if not isinstance(self.loss_type, str):  # a config is saved as JSON
            raise ValueError(
                f"loss_type: expected a name or 'module:function' in a config, got {self.loss_type!r}; "
                "fastgrpo.register_loss gives a function a name"
            )
        older: dict[Any, str] = {True: "group", False: "none"}
        self.scale_rewards = older.get(self.scale_rewards, self.scale_rewards)
        self.logits_dtype = name_of_logits_dtype(self.logits_dtype, self)
        self._check_choices()
        self._check_estimator()
        self._size_generation()
        objective = self.objective()  # so that a bad option is refused here rather than at the first step
        objective.items_in_batch(tokens=torch.ones(()), sequences=1)

    @property
    def checkpoints_activations(self) -> bool:
        """Whether activations are recomputed in the backward pass, under whichever name transformers has for it."""
        return bool(getattr(self, CHECKPOINTING))

    @property
    def head_options(self) -> dict[str, Any]:
        """The keyword arguments of `linear_grpo_loss` and `linear_logps` that these options hold."""
        return {
            "chunk_size": self.chunk_size,
            "backend": self.backend,
            "logits_dtype": as_logits_dtype(self.logits_dtype),
            "column_tolerance": self.column_tolerance,
        }

    def objective(self) -> Objective:
        """The `Objective` of these options."""
        names = {f.name for f in dataclasses.fields(Objective)} - {"sampling_correction"}
        return Objective(**{name: getattr(self, name) for name in names})

    def _check_choices(self) -> None:
        for name, choices in (
            ("scale_rewards", SCALE_REWARDS),
            ("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in (("num_generations", 2), ("num_iterations", 1), ("max_completion_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        check_tolerance(self.column_tolerance)
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a number > 0, got {self.temperature}")
        others = [name for name in OTHER_TRUNCATIONS if as_dict(self.generation_kwargs).get(name) is not None]
        if self.keep_sampling_mask and others:
            raise ValueError(
                "generation_kwargs: expected no truncation beside top_k, top_p and min_p with keep_sampling_mask, "
                f"got {', '.join(others)}"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size: expected False, since a smaller batch would cut through the groups"
            )

    def _check_estimator(self) -> None:
        """So that a bad option is refused here rather than after the first round of sampling."""
        name, given = self.advantage_estimator, self.advantage_kwargs
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"advantage_kwargs: expected a dict, or one as JSON, got {given!r}")
        if "scale_rewards" in as_dict(given):
            raise ValueError("advantage_kwargs: expected scale_rewards as an option of its own, got it here")
        check_options(name, as_dict(given))
        if name != "group" and self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "advantage_estimator: expected 'group' with multi_objective_aggregation='normalize_then_sum', which "
                f"makes the advantages itself, got {name!r}"
            )
        if self.scale_rewards != "group" and not takes(name, "scale_rewards"):
            raise ValueError(
                f"scale_rewards: expected 'group' with advantage_estimator={name!r}, which does not read it, got "
                f"{self.scale_rewards!r}"
            )
        for size in (self.num_generations, self.num_generations_eval or self.num_generations):
            estimate(name, torch.zeros(size), size, completion_mask=torch.ones(size, 1), **as_dict(given))

    def _size_generation(self) -> None:
        """Derive steps_per_generation and generation_batch_size from each other, and check that groups stay whole."""
        per_step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("steps_per_generation and generation_batch_size: expected one of them, got both")
        if self.generation_batch_size is not None:
            if self.generation_batch_size % per_step:
                raise ValueError(
                    f"generation_batch_size: expected a multiple of the {per_step} completions of one micro-batch "
                    f"over all processes, got {self.generation_batch_size}"
                )
            self.steps_per_generation = self.generation_batch_size // per_step
        elif self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        self.generation_batch_size = per_step * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations: expected a divisor of the {self.generation_batch_size} completions of one round of "
                "sampling (per_device_train_batch_size x processes x steps_per_generation), got "
                f"{self.num_generations}"
            )
        if self.eval_strategy != "no":
            generations, batch = self.num_generations_eval or self.num_generations, self.per_device_eval_batch_size
            if (batch * self.world_size) % generations:
                raise ValueError(
                    f"per_device_eval_batch_size: expected {self.world_size} processes to hold whole groups of "
                    f"{generations}, got {batch}"
                )
