"""GRPOTrainer: sampling, rewards and the fused loss on top of transformers' Trainer.

A round: one generation batch (steps_per_generation micro-batches) of prompts is completed and scored, shuffled, cut
into micro-batches, and used for num_iterations passes. The Trainer's loop asks for a batch at every micro-step; only
the first request of a round generates.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather, gather_object, set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastgrpo.advantages import takes
from fastgrpo.models import sharding
from fastgrpo.models.adapters import reference
from fastgrpo.models.calls import AnyModel, pad
from fastgrpo.models.head import is_peft, unwrap
from fastgrpo.objective import Objective
from fastgrpo.objective.metrics import reduce_metrics
from fastgrpo.output import GRPOOutput
from fastgrpo.rewards import RewardFunc, as_reward_list, call_reward_func, combine_rewards, reward_arguments
from fastgrpo.rewards.text import is_conversation, rendered
from fastgrpo.trainer import rounds
from fastgrpo.trainer.completion import completion_loss, frozen_logps
from fastgrpo.trainer.config import GRPOConfig, as_dict
from fastgrpo.trainer.groups import GroupTrainer
from fastgrpo.trainer.logs import MetricLog, length_metrics, mean_over_processes, reward_metrics, write_completions
from fastgrpo.trainer.rollout import (
    decode_completions,
    gather_mask,
    generate_completions,
    make_generation_config,
    own_advantages,
    shuffle_rows,
    split_rows,
    tokenize_prompts,
)
from fastgrpo.trainer.sampling import Sampled, SetRecorder, pack_sets, truncates
from fastgrpo.trainer.setup import (
    as_list,
    check_dataset,
    check_logits_dtype,
    end_tokens,
    load_policy,
    prepare_policy,
    prepare_to_iterate,
    prepare_tokenizer,
)


class GRPOTrainer(GroupTrainer):
    """Group Relative Policy Optimisation (arXiv:2402.03300) of a causal language model.

    For each prompt the trainer samples G completions, scores them with the reward functions, and takes as advantage of
    completion i

        A_i = (r_i - mean(r_1 ... r_G)) / (std(r_1 ... r_G) + 1e-4)

    with r the weighted sum of the rewards (`scale_rewards` chooses another divisor, `advantage_estimator` another
    formula). The loss is that of `linear_grpo_loss`, made from the hidden states, so no logits of a whole batch exist.

    Args:
        model: a transformers model, a PEFT model, or the path or hub id of one.
        reward_funcs: one or several functions, called with keywords as `f(prompts=..., completions=...,
            completion_ids=..., **columns) -> list[float | None]`, one number per completion. They also get
            trainer_state, log_metric(name, value) and log_extra(column, values). None leaves the completion to the
            other functions; if all of them return None, its advantage is 0.
        args: the options (None: the defaults).
        train_dataset: rows with a column "prompt", a text or a list of messages; the reward functions get the others.
            One that can only be iterated needs max_steps, and is shuffled by its own `shuffle` where it has one.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer (None: the one at the model's path).
        callbacks, optimizers: as in transformers' Trainer.
        peft_config: wrap the model in an adapter first.

    With beta > 0 the reference policy is a frozen copy of the model as it was passed. Where it was passed as a PEFT
    model, that is a copy of its adapter, named "ref"; with peft_config it is the model without the adapter.

    The model's forward is not changed (see `models/head.py`). What is: its configs get the tokenizer's pad token,
    disable_dropout sets the p of its dropout modules to 0, and with gradient checkpointing the input embeddings of a
    PEFT model give outputs that require a gradient.

    Equivalent to: TRL's GRPOTrainer, with the same metrics, for what `GRPOConfig` offers. One difference: with several
    processes, top_entropy_quantile takes its quantile over a process's own micro-batch, not over all of them.

    Raises:
        ValueError: a dataset without a "prompt" column, a number of reward weights that is not that of the functions,
            a tokenizer without a pad and an end token, a head that is not supported, a `logits_dtype` that the model
            does not have, several GPUs in one process.
    """

    _tag_names = ["grpo", "fastgrpo"]
    processing_class: PreTrainedTokenizerBase
    objective: Objective
    loss_is_scaled_for_ga = True  # transformers >= 5.19: do not divide the loss by the accumulation steps again

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any = None,
    ):
        if args is None:
            given: str | AnyModel = model
            name = given if isinstance(given, str) else given.config._name_or_path
            args = GRPOConfig(f"{os.path.basename(name.rstrip('/')) or 'model'}-GRPO")
        check_logits_dtype(args.logits_dtype, args, model)
        check_dataset("train_dataset", train_dataset)
        eval_datasets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in eval_datasets:
            check_dataset("eval_dataset", dataset)
        prepare_to_iterate(args, [train_dataset, *eval_datasets])
        self.reward_funcs, self.reward_func_names = as_reward_list(reward_funcs)
        weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights: expected {len(self.reward_funcs)}, one per function, got {len(weights)}"
            )
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)

        set_seed(args.seed)  # an adapter starts from random weights
        model, self._reference_adapters = load_policy(model, args, peft_config)
        processing_class = prepare_tokenizer(model, processing_class, args.trust_remote_code)
        self.eos_token_ids = end_tokens(model, processing_class)
        self.ref_model = None
        if args.objective().needs_ref and not is_peft(model):
            self.ref_model = sharding.copy_model(unwrap(model), args.trust_remote_code).requires_grad_(False).eval()
            self._check_head_early(self.ref_model)
        self._check_head_early(model)
        prepare_policy(model, args)

        self.objective = args.objective()
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        self._step = 0  # micro-steps so far
        self._buffered_inputs: list[dict[str, Tensor]] | None = None  # this round's micro-batches
        self._log = MetricLog()
        self._pending_metrics: dict[str, list[float]] = defaultdict(list)
        self._completion_log: dict[str, dict[str, list]] = {}
        self._step_time = 0.0

        super().__init__(
            model=model,
            args=args,
            data_collator=_rows_as_they_are,  # it makes no tensors
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_loss_func=_never_called,  # transformers < 5.19: its presence turns the Trainer's loss scaling off
        )
        self.model_accepts_loss_kwargs = False
        self.generation_config = make_generation_config(self.args, processing_class, self.eos_token_ids)
        self.eos_token_ids = as_list(self.generation_config.eos_token_id)  # generation_kwargs may bring others
        self._records_sets = self.args.keep_sampling_mask and truncates(self.generation_config)
        sharding.keep_output_dtype(self.accelerator)
        if self.ref_model is not None:
            self.ref_model = sharding.prepare_reference(self.ref_model, self.accelerator)
        # processes that share a group must not sample the same completions
        set_seed(args.seed, device_specific=True)

    # Sampling and scoring

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        self._step_time += time.perf_counter() - start
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._log.add("train", {"step_time": self._step_time})
            self._step_time = 0.0
        return loss

    def _prepare_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """The micro-batch of this step, for rows: out of the buffer in training, sampled at a round's start."""
        self._check_head()
        steps = self._steps_per_generation
        if not self.model.training:
            return self._sample_and_score(inputs, "eval")
        if self._step % self._requests_of_a_round == 0 or self._buffered_inputs is None:
            # shuffled, so that a micro-batch is not one prompt's completions
            self._buffered_inputs = split_rows(shuffle_rows(self._sample_and_score(inputs, "train")), steps)
        return self._buffered_inputs[self._step % steps]

    def _sample_and_score(self, rows: list[dict[str, Any]], mode: str) -> dict[str, Tensor]:
        """Rows of the dataset, each prompt once per completion, to the tensors that the loss needs."""
        args, device, accelerator = self.args, self.accelerator.device, self.accelerator
        group = args.num_generations if mode == "train" else self.num_generations_eval
        if len(rows) * accelerator.num_processes % group:
            raise ValueError(
                f"per_device_eval_batch_size: expected batches of whole groups of {group} completions, got "
                f"{len(rows)} on each of {accelerator.num_processes} processes"
            )
        prompts = copy.deepcopy([row["prompt"] for row in rows])  # a reward function may change its arguments
        prompt_tokens = tokenize_prompts(self.processing_class, prompts, **as_dict(args.chat_template_kwargs))
        pad_id = self.processing_class.pad_token_id
        prompt_ids, prompt_mask = pad(prompt_tokens, pad_id, "left", device)
        prompts = rendered(self.processing_class, prompts, prompt_tokens)
        sampled = self._generate(prompt_ids, prompt_mask)
        completion_tokens, kept = sampled if isinstance(sampled, Sampled) else (sampled, None)
        completions = decode_completions(self.processing_class, completion_tokens, is_conversation(prompts[0]))
        completion_ids, completion_mask = pad(completion_tokens, pad_id, "right", device)

        is_cut_off = [tokens[-1] not in (*self.eos_token_ids, pad_id) for tokens in completion_tokens]
        truncated = torch.tensor(is_cut_off, device=device)
        self._log_lengths(mode, prompt_mask.sum(1), completion_mask.sum(1), truncated)
        if args.mask_truncated_completions:
            completion_mask = completion_mask * (~truncated[:, None])
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "num_items_in_batch": accelerator.gather(completion_mask.sum()).sum(),
        }
        if args.keep_sampling_mask:  # also where nothing was kept, so that every process logs the same metrics
            batch |= pack_sets(kept, completion_ids, needed=self._records_sets)
        batch |= self._frozen_logps(batch, mode)
        batch["advantages"] = self._score(rows, prompts, completions, completion_tokens, completion_mask, group, mode)
        return batch

    def _generate(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[list[int]] | Sampled:
        """Sampled completions of (B, P) prompts; one method, so that another sampler can take its place."""
        model, config = self.accelerator.unwrap_model(self.model_wrapped), self.generation_config
        recorder = SetRecorder(config) if self._records_sets else None
        completions = generate_completions(model, prompt_ids, prompt_mask, config, recorder)
        return completions if recorder is None else Sampled(completions, recorder.sets(completions))

    def _frozen_logps(self, batch: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
        """Per-token logps (B, T) of the policy that samples, where they will differ from the learner's, and of the
        reference."""
        args, logps = self.args, {}
        # When every optimiser step ends with its round, the learner has not moved since it sampled: old = current.
        if args.gradient_accumulation_steps % self._requests_of_a_round:
            logps["old_per_token_logps"] = self._score_logps(self.model, batch, mode)
        if self.objective.needs_ref:
            if self.ref_model is not None:
                logps["ref_per_token_logps"] = self._score_logps(self.ref_model, batch, mode)
            else:
                with reference(self.accelerator.unwrap_model(self.model), self._reference_adapters):
                    logps["ref_per_token_logps"] = self._score_logps(self.model, batch, mode)
        return logps

    def _score_logps(self, model: nn.Module, batch: dict[str, Tensor], mode: str) -> Tensor:
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        return frozen_logps(model, batch, self.args, size)

    def _score(
        self, rows: list[dict], prompts: list, completions: list, tokens: list, mask: Tensor, group: int, mode: str
    ) -> Tensor:
        """Advantages (B,) or (B, T) of this process's completions; groups may be spread over processes."""
        extra: dict[str, list] = {}
        arguments = reward_arguments(
            rows,
            prompts,
            tokens,
            trainer_state=self.state,
            log_metric=lambda key, value: self._pending_metrics[key].append(value),
            log_extra=lambda column, values: extra.setdefault(column, []).extend(values),
        )
        scores = [
            call_reward_func(func, name, completions, **arguments)
            for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        per_func = torch.tensor(scores, dtype=torch.float32, device=self.accelerator.device).T.contiguous()
        if per_func.isnan().all(dim=1).any():
            warnings.warn("no reward function scored some completions; their advantage is 0", stacklevel=2)
        per_func = gather(per_func)
        rewards, advantages, zero_std = combine_rewards(
            per_func,
            self.reward_weights.to(per_func.device),
            group,
            self.args.scale_rewards,
            self.args.multi_objective_aggregation,
            estimator=self.args.advantage_estimator,
            completion_mask=gather_mask(mask) if takes(self.args.advantage_estimator, "completion_mask") else None,
            **as_dict(self.args.advantage_kwargs),
        )

        self._log.add(mode, reward_metrics(self.reward_func_names, per_func, rewards, zero_std))
        self._log.add(mode, mean_over_processes(self.accelerator, self._pending_metrics))
        self._pending_metrics.clear()

        local = slice(self.accelerator.process_index * len(rows), (self.accelerator.process_index + 1) * len(rows))
        advantages, mean = own_advantages(advantages[local], mask)
        if self.args.log_completions:
            table = {"prompt": prompts, "completion": completions, **extra}
            table |= {name: per_func[local, i].tolist() for i, name in enumerate(self.reward_func_names)}
            table["advantage"] = mean.tolist()
            self._completion_log[mode] = {name: gather_object(values) for name, values in table.items()}
        return advantages

    def _log_lengths(self, mode: str, prompt_lengths: Tensor, lengths: Tensor, truncated: Tensor) -> None:
        prompt_lengths, lengths, truncated = self.accelerator.gather((prompt_lengths, lengths, truncated))
        if mode == "train":
            self.state.num_input_tokens_seen += int(prompt_lengths.sum() + lengths.sum())
        self._log.values[mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        self._log.add(mode, length_metrics(lengths, truncated))

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The fused loss of a micro-batch, scaled so that the micro-batches of a window add up to the step's loss."""
        if return_outputs:
            raise ValueError("return_outputs: expected False, since the loss makes no model outputs")
        train = self.model.training
        accumulation = self.current_gradient_accumulation_steps if train else 1
        # The denominator of dapo and the like is a global number of tokens: those of the round, shared out to the
        # micro-batches and processes whose sum (over the window) or mean (over processes) makes the gradient.
        parts = self.accelerator.num_processes * (self._steps_per_generation if train else 1)
        tokens = inputs["num_items_in_batch"].clamp(min=1) / parts
        num_items = self.objective.items_in_batch(tokens=tokens, sequences=len(inputs["completion_ids"]))
        loss, output = completion_loss(
            model, inputs, self.args, self.objective, num_items=num_items, loss_scale=1.0 / accumulation
        )
        self._log_loss(output, inputs, "train" if train else "eval", accumulation)
        return loss

    def _log_loss(self, output: GRPOOutput, inputs: dict[str, Tensor], mode: str, accumulation: int) -> None:
        assert output.metrics is not None  # as return_stats has it
        mask, per_token = inputs["completion_mask"], inputs["advantages"].dim() == 2
        reduced = reduce_metrics(self.accelerator, self.objective, output.metrics, mask, accumulation, per_token)
        self._log.add(mode, reduced)
        if self.objective.entropy_coef != 0 and mode == "train" and self.accelerator.sync_gradients:
            self._log.add(mode, {"entropy_coef": self.objective.entropy_coef})

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer would estimate it from model inputs, and here it only has rows of the dataset

    # Logs and checkpoints

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the metrics since the last log, averaged; in evaluation their names begin with "eval_"."""
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        logs.update({prefix + name: value for name, value in self._log.take(mode).items()})
        super().log(logs, start_time)
        table = self._completion_log.pop(mode, None)
        if table is not None and self.accelerator.is_main_process:
            assert self.args.output_dir is not None  # as __post_init__ sees to
            folder = os.path.join(self.args.output_dir, "completions")
            write_completions(folder, prefix, self.state.global_step, table)

    files_of_process = staticmethod(rounds.files_of_process)

    def _check_resume(self, checkpoint: str) -> None:
        rounds.check(checkpoint, self.args, self.accelerator.device)

    def _save_own(self, folder: str) -> None:
        mid_round = self._step % self._requests_of_a_round != 0
        rounds.save(
            folder,
            self.args,
            step=self._step if mid_round else 0,
            buffered_inputs=self._buffered_inputs if mid_round else None,
            metrics=self._log.state(),
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also the round that the checkpoint was taken in, so that the run goes on as if it had not stopped."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = rounds.load(checkpoint, self.args, self.accelerator.device)
        if state is not None:
            self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
            self._log.load_state(state["metrics"])


def _rows_as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collator: prompts are tokenised when they are sampled from."""
    return rows


def _never_called(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("GRPOTrainer.compute_loss stands in for this function")
