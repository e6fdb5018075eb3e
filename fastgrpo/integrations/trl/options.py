"""TRL's options as an Objective, or why the loss stays TRL's."""

from __future__ import annotations

from fastgrpo import Objective
from fastgrpo.integrations.seam import NotHonoured
from fastgrpo.integrations.trl.versions import OwnGRPOTrainer, check_model

_PARTS = (
    "get_high_entropy_mask",
    "get_off_policy_mask",
    "get_gamma_weights",
)  # of TRL's loss
_OF_TRAINER = ("loss_type", "importance_sampling_level", "beta", "epsilon_high", "top_entropy_quantile",
               "off_policy_mask_threshold", "max_completion_length")  # fmt: skip
_OF_ARGS = ("use_bias_correction_kl", "delta", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
            "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")  # fmt: skip


def objective_of(trainer) -> Objective:
    """The Objective of a trainer's options, with the entropy coefficient of this step.

    Raises:
        NotHonoured: an option, a method of a subclass or a model that the loss at the head has no counterpart of.
    """
    coefficient = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coefficient = 0.0
    try:
        objective = Objective(
            epsilon=trainer.epsilon_low,
            entropy_coef=coefficient,
            **{name: getattr(trainer, name) for name in _OF_TRAINER},
            **{name: getattr(trainer.args, name) for name in _OF_ARGS},
        )
    except (ValueError, AttributeError) as error:
        raise NotHonoured(str(error)) from error
    return checked(trainer, objective)


def checked(trainer, objective: Objective) -> Objective:
    """The objective, if the loss at the head of this trainer's model is that of all its processes.

    Raises:
        NotHonoured: it is not.
    """
    for name in _PARTS:
        if getattr(type(trainer), name, None) is not getattr(OwnGRPOTrainer, name, None):
            raise NotHonoured(f"{type(trainer).__name__} overrides {name}")
    check_model(trainer)
    if objective.needs_whole_batch and trainer.accelerator.num_processes > 1:
        name = "top_entropy_quantile" if objective.top_entropy_quantile < 1 else f"the loss {objective.loss_name}"
        raise NotHonoured(f"{name} is of the tokens of all processes")
    return objective
