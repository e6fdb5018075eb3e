"""TRL's GRPOTrainer with fastgrpo's loss."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from fastgrpo import Objective
from fastgrpo.engine.head import check_tolerance
from fastgrpo.integrations.seam import NotHonoured, in_place
from fastgrpo.integrations.trl.at_head import LossAtHead
from fastgrpo.integrations.trl.options import checked, objective_of
from fastgrpo.integrations.trl.versions import SCORE, TRL, OwnGRPOTrainer, places_of
from fastgrpo.objective.metrics import reduce_metrics


class GRPOTrainer(OwnGRPOTrainer):
    """TRL's GRPOTrainer with fastgrpo's loss from hidden states; arguments, config, data, logs and results are TRL's.

    The gradients are made in the forward pass, with 6NHV FLOPs in place of 8NHV. Masked and tool tokens enter no GEMM;
    tokens of advantage 0, with beta and the entropy coefficient 0, enter only the first. The metrics take one
    collective and one wait.

    Where a step's inputs have `kept_ids` (B, T, k), the tokens that the sampler kept with -1 behind them, the loss
    is over these, as in `linear_grpo_loss`; old and reference logps in the inputs have to be, too. TRL makes no such
    inputs: a subclass adds them in `_generate_and_score_completions`.

    If a subclass overrides a method that makes the loss, or an option has no counterpart in `Objective`, the loss is
    TRL's own, and a RuntimeWarning says why.

    Args:
        objective: a loss that TRL does not have, such as `Objective(loss_type=function)`. The options of the loss in
            the config are then not read, but for `beta`: if it is not 0, TRL loads a reference policy. None: the
            config's loss.
        column_tolerance: the share of a token's gradient that may be left out at the head, see `linear_grpo_loss`. The
            metrics then tell how many columns were kept.

    Raises:
        ValueError: an objective that is none, or that needs a reference policy where the config's beta is 0; a
            tolerance outside [0, 1).
        RuntimeError: with `objective`, where TRL's own loss would stand otherwise; at the first step.
    """

    def __init__(self, *args, objective: Objective | None = None, column_tolerance: float = 0.0, **kwargs):
        check_tolerance(column_tolerance)
        super().__init__(*args, **kwargs)
        self._fastgrpo_tolerance = column_tolerance
        self._fastgrpo_objective = objective
        if objective is None:
            return
        if not isinstance(objective, Objective):
            raise ValueError(f"objective: expected an Objective or None, got {objective!r}")
        objective.items_in_batch(tokens=torch.ones(()), sequences=1)  # a ValueError for an average of prompts
        if objective.needs_ref and self.beta == 0:
            raise ValueError("objective: expected one that needs no reference policy, because the config's beta is 0; "
                             f"got {objective!r}")  # fmt: skip

    def _compute_loss(self, model, inputs):
        objective = vars(self).get("_fastgrpo_objective")
        try:
            if (why := vars(self).get("_fastgrpo_left")) is not None:
                raise NotHonoured(why)
            return self._fused_loss(
                model, inputs, objective_of(self) if objective is None else checked(self, objective)
            )
        except NotHonoured as why:
            if objective is not None:
                raise RuntimeError(f"objective: the loss cannot be made at the head: {why}") from why
            TRL.leave(self, why)
            return super()._compute_loss(model, inputs)

    def _fused_loss(self, model, inputs, objective: Objective) -> Tensor:
        mode = "train" if self.model.training else "eval"
        train = mode == "train"
        accumulation = self.current_gradient_accumulation_steps if train else 1
        completion_mask = inputs["completion_mask"]
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        parts = self.accelerator.num_processes * (self.args.steps_per_generation if train else 1)
        corrected = objective.corrections is None and (
            objective.record.takes_importance_ratio or (self.use_vllm and self.vllm_importance_sampling_correction)
        )
        at_head = LossAtHead(
            completion_mask,
            dict(
                completion_ids=inputs["completion_ids"],
                advantages=inputs["advantages"],
                completion_mask=mask,
                old_per_token_logps=inputs.get("old_per_token_logps"),
                ref_per_token_logps=inputs["ref_per_token_logps"] if objective.needs_ref else None,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps"),
                importance_sampling_ratio=inputs.get("importance_sampling_ratio") if corrected else None,
                kept_ids=inputs.get("kept_ids"),
                num_items_in_batch=objective.items_in_batch(
                    tokens=inputs["num_items_in_batch"].clamp(min=1) / parts, sequences=len(mask)
                ),
                loss_scale=1.0 / accumulation,
                objective=objective,
                column_tolerance=vars(self).get("_fastgrpo_tolerance", 0.0),
            ),
        )
        logps, entropies, aux_loss = self._score(model, inputs, at_head)
        output, metrics = at_head.output, self._metrics[mode]
        # The way back to the loss is at every scored position; one is enough.
        carrier = logps.view(-1).gather(0, completion_mask.view(-1).argmax()[None])[0]
        loss = output.loss.detach() + (carrier - carrier.detach())
        made = {"policy_loss": output.loss, **output.metrics}  # without an entropy bonus that is the whole loss
        of_config = vars(self).get("_fastgrpo_objective") is None
        if of_config:  # TRL logs numbers of its own of the sampler, where it samples
            made = {name: value for name, value in made.items() if not name.startswith("sampling/")}
        per_token = inputs["advantages"].dim() == 2
        reduced = reduce_metrics(self.accelerator, objective, made, mask, accumulation, per_token)
        if not (self._entropy_bonus_enabled if of_config else objective.entropy_coef != 0):
            del reduced["policy_loss"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            reduced["aux_loss"] = self.accelerator.gather_for_metrics(aux_loss.detach()).mean()
        names, values = list(reduced), torch.stack([x.to(loss.device) for x in reduced.values()]).tolist()
        for name, value in zip(names, values, strict=True):
            metrics[name].append(value)
        if self._entropy_bonus_enabled and train and of_config:
            self._control_entropy(entropies, mask)
        return loss

    def _score(self, model, inputs, at_head: LossAtHead):
        """TRL's own scoring of a batch, with `at_head` in the place of its log-probabilities."""
        prompt_and_completion = [
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        ]
        scoring = [getattr(self, name) for name in (SCORE, "_full_logits_logps") if hasattr(self, name)]  # 1.14: both
        known = {name for method in scoring for name in inspect.signature(method).parameters}
        extras = {name: inputs[name] for name in known if name in inputs}  # of images
        with in_place(places_of(at_head)):
            scores = self._get_per_token_logps_and_entropies(
                model, *prompt_and_completion, inputs["completion_ids"].size(1), compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled, **extras,
            )  # fmt: skip
        if at_head.output is None:
            self._fastgrpo_left = f"{type(self).__name__} did not score its tokens at the model's head"
            raise NotHonoured(self._fastgrpo_left)
        return scores

    def _control_entropy(self, entropies: Tensor, mask: Tensor) -> None:
        """Log the entropy coefficient at the end of a step; where it is adaptive, move it towards the target first.

        The entropy that counts is that of all tokens of a step that the bonus acts on, on all processes.
        """
        if self.use_adaptive_entropy:
            counted = mask.to(entropies.dtype)
            if self.top_entropy_quantile < 1.0:
                counted = counted * self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
            window = torch.stack([(entropies.detach() * counted).sum(), counted.sum()])
            if self._entropy_window_stats is not None:
                window = window + self._entropy_window_stats
            self._entropy_window_stats = window
            if self.accelerator.sync_gradients:
                total, tokens = self.accelerator.reduce(window, reduction="sum").tolist()
                self._last_world_entropy, self._entropy_window_stats = total / max(tokens, 1.0), None
                step = self.args.entropy_coef_delta
                if self._last_world_entropy <= self.args.entropy_target:
                    self.entropy_coef = min(self.entropy_coef + step, self.args.entropy_coef_max)
                else:
                    self.entropy_coef = max(self.entropy_coef - step, self.args.entropy_coef_min)
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
