"""TRL's own `GRPOTrainer._compute_loss`, called without a trainer: on given logps and entropies."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import GRPOTrainer


class _OneProcess:
    """What `_compute_loss` asks of an accelerator, for one process."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, x, reduction="sum"):
        return x

    def gather(self, x):
        return x

    def pad_across_processes(self, x, dim=0, pad_index=0):
        return x


def trl_loss(objective, logps, entropies, *, completion_mask, advantages, accumulation=1, **inputs):
    """(loss, metrics) of TRL for an Objective; differentiable in logps and entropies."""
    o = objective
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__.update(
        accelerator=_OneProcess(),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=accumulation,
        args=SimpleNamespace(
            delta=o.delta,
            use_bias_correction_kl=o.use_bias_correction_kl,
            steps_per_generation=accumulation,
            sapo_temperature_pos=o.sapo_temperature_pos,
            sapo_temperature_neg=o.sapo_temperature_neg,
            vespo_k_pos=o.vespo_k_pos,
            vespo_lambda_pos=o.vespo_lambda_pos,
            vespo_k_neg=o.vespo_k_neg,
            vespo_lambda_neg=o.vespo_lambda_neg,
        ),
        beta=o.beta,
        loss_type=o.loss_type,
        importance_sampling_level=o.importance_sampling_level,
        epsilon_low=o.epsilon,
        epsilon_high=o.epsilon if o.epsilon_high is None else o.epsilon_high,
        max_completion_length=o.max_completion_length,
        top_entropy_quantile=o.top_entropy_quantile,
        off_policy_mask_threshold=o.off_policy_mask_threshold,
        use_vllm="importance_sampling_ratio" in inputs,
        vllm_importance_sampling_correction="importance_sampling_ratio" in inputs,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=o.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=o.entropy_coef,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
    )
    tokens = completion_mask.sum()
    batch = dict(
        prompt_ids=completion_mask.new_zeros(len(logps), 1),
        prompt_mask=completion_mask.new_ones(len(logps), 1),
        completion_ids=torch.zeros_like(completion_mask),
        completion_mask=completion_mask,
        advantages=advantages,
        num_items_in_batch=inputs.pop("num_items_in_batch", tokens),
        **inputs,
    )
    loss = trainer._compute_loss(None, batch)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_loss_of_logits(objective, logits, ids, **inputs):
    """TRL's loss on the logps and entropies of logits (B, T, V) on the CPU; differentiable."""
    all_logps = logits.log_softmax(-1)
    entropies = -(all_logps.exp() * all_logps).sum(-1)
    inputs = {k: v.cpu() for k, v in inputs.items()}
    return trl_loss(objective, all_logps.gather(-1, ids.cpu()[..., None])[..., 0], entropies, **inputs)[0]
