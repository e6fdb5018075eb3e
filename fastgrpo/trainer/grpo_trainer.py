"""GRPOTrainer: sampling, rewards and the fused loss on top of transformers' Trainer.

A round: one generation batch (steps_per_generation micro-batches) of prompts is completed and scored, shuffled, cut
into micro-batches, and used for num_iterations passes. The Trainer's loop asks for a batch at every micro-step; only
the first request of a round generates.
"""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from fastgrpo.linear import linear_grpo_loss
from fastgrpo.logps import linear_logps
from fastgrpo.loss import GRPOOutput
from fastgrpo.metrics import reduce_metrics
from fastgrpo.models import sharding
from fastgrpo.models.adapters import add_reference, reference
from fastgrpo.models.calls import frozen, pad
from fastgrpo.models.head import Head, is_peft, run_completion_head, unwrap
from fastgrpo.rewards import (
    RewardFunc,
    as_reward_list,
    call_reward_func,
    combine_rewards,
    nanstd,
    reward_arguments,
)
from fastgrpo.rewards.text import is_conversation, rendered
from fastgrpo.trainer.base import HeadTrainer
from fastgrpo.trainer.checkpoints import ResumeError, is_whole
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.rollout import (
    RepeatedRows,
    RepeatSampler,
    decode_completions,
    generate_completions,
    shuffle_rows,
    split_rows,
    tokenize_prompts,
)
from fastgrpo.trainer.setup import (
    as_list,
    check_dataset,
    end_tokens,
    only_iterates,
    prepare_to_iterate,
    prepare_tokenizer,
    warn_of_router_loss,
)


class GRPOTrainer(HeadTrainer):
    """Group Relative Policy Optimisation (arXiv:2402.03300) of a causal language model.

    For each prompt the trainer samples G completions, scores them with the reward functions, and takes as advantage of
    completion i

        A_i = (r_i - mean(r_1 ... r_G)) / (std(r_1 ... r_G) + 1e-4)

    with r the weighted sum of the rewards (`scale_rewards` chooses another divisor). The loss is that of
    `linear_grpo_loss`, made from the hidden states, so no logits of a whole batch exist.

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

    The model's forward is not changed (see `head.py`). What is: its configs get the tokenizer's pad token,
    disable_dropout sets the p of its dropout modules to 0, and with gradient checkpointing the input embeddings of a
    PEFT model give outputs that require a gradient.

    Equivalent to: TRL's GRPOTrainer, with the same metrics, for what `GRPOConfig` offers. One difference: with several
    processes, top_entropy_quantile takes its quantile over a process's own micro-batch, not over all of them.

    Raises:
        ValueError: a dataset without a "prompt" column, a number of reward weights that is not that of the functions,
            a tokenizer without a pad and an end token, a head that is not supported, several GPUs in one process.
    """

    _tag_names = ["grpo", "fastgrpo"]
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
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GRPOConfig(f"{os.path.basename(name.rstrip('/')) or 'model'}-GRPO")
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
        if isinstance(model, str):
            options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
            model = AutoModelForCausalLM.from_pretrained(model, **{**options, **(args.model_init_kwargs or {})})
        elif args.model_init_kwargs:
            warnings.warn("model_init_kwargs has no effect on a model that is passed as an object", stacklevel=2)
        self._reference_adapters: list[str] = []
        if args.beta != 0 and is_peft(model) and peft_config is None:
            self._reference_adapters = add_reference(model)
        if peft_config is not None:
            from peft import get_peft_model

            if is_peft(model):
                raise ValueError("peft_config: expected None with a model that has an adapter already, got both")
            model = get_peft_model(model, peft_config)
        processing_class = prepare_tokenizer(model, processing_class, args.trust_remote_code)
        self.eos_token_ids = end_tokens(model, processing_class)
        self.ref_model = None
        if args.beta != 0 and not is_peft(model):
            self.ref_model = sharding.copy_model(unwrap(model), args.trust_remote_code).requires_grad_(False).eval()
        if self.ref_model is not None:
            self._check_head_early(self.ref_model)
        self._check_head_early(model)
        warn_of_router_loss(model)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if args.checkpoints_activations and is_peft(model):
            model.enable_input_require_grads()  # the first checkpointed layer's input comes from frozen weights

        self.objective = args.objective()
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        self._step = 0  # micro-steps so far
        self._buffered_inputs: list[dict[str, Tensor]] | None = None  # this round's micro-batches
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._pending_metrics: dict[str, list[float]] = defaultdict(list)
        self._completion_log: dict[str, list] = {}
        self._step_time = 0.0

        super().__init__(
            model=model,
            args=args,
            data_collator=_rows_as_they_are,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_loss_func=_never_called,  # transformers < 5.19: its presence turns the Trainer's loss scaling off
        )
        self.model_accepts_loss_kwargs = False
        if self.args.n_gpu > 1:
            raise ValueError("GRPOTrainer runs one process per GPU: start it with `accelerate launch` or `torchrun`")
        self.generation_config = self._make_generation_config()
        self.eos_token_ids = as_list(self.generation_config.eos_token_id)  # generation_kwargs may bring others
        sharding.keep_output_dtype(self.accelerator)
        if self.ref_model is not None:
            self.ref_model = sharding.prepare_reference(self.ref_model, self.accelerator)
        # processes that share a group must not sample the same completions
        set_seed(args.seed, device_specific=True)

    # Set-up

    def _make_generation_config(self) -> GenerationConfig:
        args = self.args
        options = dict(
            max_new_tokens=args.max_completion_length,
            do_sample=True,
            pad_token_id=self.processing_class.pad_token_id,
            bos_token_id=self.processing_class.bos_token_id,
            eos_token_id=self.eos_token_ids or None,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            cache_implementation=args.cache_implementation,
            disable_compile=True,  # each new length would compile again
        )
        return GenerationConfig(**{**options, **(args.generation_kwargs or {})})

    # Data

    @property
    def _requests_of_a_round(self) -> int:
        """How often the Trainer's loop asks for a micro-batch of the same completions."""
        return self.args.num_iterations * self.args.steps_per_generation

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # what remove_unused_columns=True keeps
            self._signature_columns = ["prompt"]

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's, with the completions of a whole round as a batch."""
        args, dataset = self.args, self.train_dataset
        if only_iterates(dataset):
            prompts, repeats = args.generation_batch_size // args.num_generations, self._requests_of_a_round
            shuffled = args.shuffle_dataset and hasattr(dataset, "shuffle")
            dataset = dataset.shuffle(seed=args.seed) if shuffled else dataset
            dataset = RepeatedRows(dataset, args.num_generations, prompts, repeats)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> RepeatSampler:
        args = self.args
        data = self.train_dataset if train_dataset is None else train_dataset
        prompts = args.generation_batch_size // args.num_generations
        if len(data) < prompts:
            raise ValueError(
                f"train_dataset: expected at least the {prompts} prompts of one round of sampling "
                f"(generation_batch_size / num_generations), got {len(data)} rows"
            )
        return RepeatSampler(
            data,
            group_size=args.num_generations,
            batch_size=prompts,
            repeat_count=self._requests_of_a_round,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if eval_dataset is not None and only_iterates(eval_dataset):
            eval_dataset = RepeatedRows(eval_dataset, self.num_generations_eval)
        return super().get_eval_dataloader(eval_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> RepeatSampler:
        return RepeatSampler(eval_dataset, group_size=self.num_generations_eval, seed=self.args.seed)

    # Sampling and scoring

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        self._step_time += time.perf_counter() - start
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._step_time)
            self._step_time = 0.0
        return loss

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The micro-batch of this step: out of the buffer in training, freshly sampled at a round's start."""
        self._check_head()
        if not self.model.training:
            return self._sample_and_score(inputs, "eval")
        steps = self.args.steps_per_generation
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
        prompt_tokens = tokenize_prompts(self.processing_class, prompts, **(args.chat_template_kwargs or {}))
        pad_id = self.processing_class.pad_token_id
        prompt_ids, prompt_mask = pad(prompt_tokens, pad_id, "left", device)
        prompts = rendered(self.processing_class, prompts, prompt_tokens)
        completion_tokens = self._generate(prompt_ids, prompt_mask)
        completions = decode_completions(self.processing_class, completion_tokens, is_conversation(prompts[0]))
        completion_ids, completion_mask = pad(completion_tokens, pad_id, "right", device)

        truncated = [tokens[-1] not in (*self.eos_token_ids, pad_id) for tokens in completion_tokens]
        truncated = torch.tensor(truncated, device=device)
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
        batch |= self._frozen_logps(batch, mode)
        batch["advantages"] = self._score(rows, prompts, completions, completion_tokens, group, mode)
        return batch

    def _generate(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[list[int]]:
        """Sampled completions of (B, P) prompts; one method, so that another sampler can take its place."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        return generate_completions(model, prompt_ids, prompt_mask, self.generation_config)

    def _frozen_logps(self, batch: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
        """Per-token logps (B, T) of the policy that samples, where they will differ from the learner's, and of the
        reference."""
        args, logps = self.args, {}
        # When every optimiser step ends with its round, the learner has not moved since it sampled: old = current.
        if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations):
            logps["old_per_token_logps"] = self._score_logps(self.model, batch, mode)
        if args.beta != 0:
            if self.ref_model is not None:
                logps["ref_per_token_logps"] = self._score_logps(self.ref_model, batch, mode)
            else:
                with reference(self.accelerator.unwrap_model(self.model), self._reference_adapters):
                    logps["ref_per_token_logps"] = self._score_logps(self.model, batch, mode)
        return logps

    def _score_logps(self, model: nn.Module, batch: dict[str, Tensor], mode: str) -> Tensor:
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        with frozen(model):
            return torch.cat(
                [
                    _over_completion(
                        model,
                        {name: x[start : start + size] for name, x in batch.items() if x.dim()},
                        lambda hidden, head, part: linear_logps(
                            hidden,
                            head.weight,
                            part["completion_ids"],
                            mask=part["completion_mask"],
                            temperature=self.args.temperature,
                            chunk_size=self.args.chunk_size,
                            backend=self.args.backend,
                            **head.options,
                        ),
                    )
                    for start in range(0, len(batch["completion_ids"]), size)
                ]
            )

    def _score(
        self, rows: list[dict], prompts: list, completions: list, completion_tokens: list, group: int, mode: str
    ) -> Tensor:
        """Advantages (B,) of this process's completions; groups may be spread over processes."""
        extra: dict[str, list] = {}
        arguments = reward_arguments(
            rows,
            prompts,
            completion_tokens,
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
        )

        metrics = self._metrics[mode]
        for name, column in zip(self.reward_func_names, per_func.unbind(dim=1), strict=True):
            metrics[f"rewards/{name}/mean"].append(column.nanmean())
            metrics[f"rewards/{name}/std"].append(nanstd(column))
        metrics["reward"].append(rewards.nanmean())
        metrics["reward_std"].append(nanstd(rewards))
        metrics["frac_reward_zero_std"].append(zero_std.float().mean())
        for key in sorted(set(gather_object(list(self._pending_metrics)))):  # the same order on every process
            values = self._pending_metrics[key]
            totals = torch.tensor([float(sum(values)), len(values)], device=per_func.device)
            totals = self.accelerator.gather(totals).view(-1, 2).sum(0)
            metrics[key].append(totals[0] / totals[1])
        self._pending_metrics.clear()

        local = slice(self.accelerator.process_index * len(rows), (self.accelerator.process_index + 1) * len(rows))
        if self.args.log_completions:
            table = {"prompt": prompts, "completion": completions, **extra}
            table |= {name: per_func[local, i].tolist() for i, name in enumerate(self.reward_func_names)}
            table["advantage"] = advantages[local].tolist()
            self._completion_log = {name: gather_object(values) for name, values in table.items()}
        return advantages[local]

    def _log_lengths(self, mode: str, prompt_lengths: Tensor, lengths: Tensor, truncated: Tensor) -> None:
        prompt_lengths, lengths, truncated = self.accelerator.gather((prompt_lengths, lengths, truncated))
        if mode == "train":
            self.state.num_input_tokens_seen += int(prompt_lengths.sum() + lengths.sum())
        metrics, ended = self._metrics[mode], lengths[~truncated].float()
        ended = ended if len(ended) else torch.zeros(1, device=ended.device)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, values in (("", lengths.float()), ("terminated_", ended)):
            metrics[f"completions/mean_{name}length"].append(values.mean())
            metrics[f"completions/min_{name}length"].append(values.min())
            metrics[f"completions/max_{name}length"].append(values.max())
        metrics["completions/clipped_ratio"].append(truncated.float().mean())

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
        parts = self.accelerator.num_processes * (self.args.steps_per_generation if train else 1)
        num_items = inputs["num_items_in_batch"].clamp(min=1) / parts

        output: GRPOOutput | None = None

        def loss_at_head(hidden: Tensor, head: Head, batch: dict[str, Tensor]) -> Tensor:
            nonlocal output
            output = linear_grpo_loss(
                hidden,
                head.weight,
                batch["completion_ids"],
                batch["advantages"],
                completion_mask=batch["completion_mask"],
                old_per_token_logps=batch.get("old_per_token_logps"),
                ref_per_token_logps=batch.get("ref_per_token_logps"),
                num_items_in_batch=num_items,
                loss_scale=1.0 / accumulation,
                temperature=self.args.temperature,
                objective=self.objective,
                chunk_size=self.args.chunk_size,
                backend=self.args.backend,
                **head.options,
            )
            return output.loss

        loss = _over_completion(model, inputs, loss_at_head)
        self._log_loss(output, inputs["completion_mask"], "train" if train else "eval", accumulation)
        return loss

    def _log_loss(self, output: GRPOOutput, mask: Tensor, mode: str, accumulation: int) -> None:
        metrics = self._metrics[mode]
        for name, value in reduce_metrics(self.accelerator, self.objective, output, mask, accumulation).items():
            metrics[name].append(value)
        if self.objective.entropy_coef != 0 and mode == "train" and self.accelerator.sync_gradients:
            metrics["entropy_coef"].append(self.objective.entropy_coef)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer would estimate it from model inputs, and here it only has rows of the dataset

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log, averaged; in evaluation their names begin with "eval_"."""
        mode = "train" if self.model.training else "eval"
        for name, values in self._metrics[mode].items():
            finite = [value for value in map(float, values) if math.isfinite(value)]
            logs[name if mode == "train" else f"eval_{name}"] = sum(finite) / len(finite) if finite else None
        self._metrics[mode].clear()
        super().log(logs, start_time)
        if self._completion_log and self.accelerator.is_main_process:
            self._write_completions()

    def _write_completions(self) -> None:
        from datasets import Dataset

        folder = os.path.join(self.args.output_dir, "completions")
        os.makedirs(folder, exist_ok=True)
        step = [self.state.global_step] * len(self._completion_log["prompt"])
        path = os.path.join(folder, f"completions_{self.state.global_step:05d}.parquet")
        Dataset.from_dict({"step": step, **self._completion_log}).to_parquet(path)
        self._completion_log = {}

    @staticmethod
    def files_of_process(checkpoint: str, index: int) -> tuple[str, ...]:
        own = _STATE_FILE.format(index)
        if not os.path.isfile(os.path.join(checkpoint, own)):
            before = _any_state(checkpoint, "cpu") or {}
            if index >= before.get("options", {}).get("world_size", index + 1):
                return ()  # the run that wrote it had fewer processes
        return (own,)

    def _save_own(self, folder: str) -> None:
        mid_round = self._step % self._requests_of_a_round != 0
        state = {
            "options": {name: getattr(self.args, name) for name in _ROUND_OPTIONS},
            "step": self._step if mid_round else 0,
            "buffered_inputs": self._buffered_inputs if mid_round else None,
            "metrics": {name: [float(v) for v in values] for name, values in self._metrics["train"].items()},
        }
        torch.save(state, os.path.join(folder, _STATE_FILE.format(self.args.process_index)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also the round that the checkpoint was taken in, so that the run goes on as if it had not stopped."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (state := self._load_own(checkpoint)) is not None:
            self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
            self._metrics["train"] = defaultdict(list, state["metrics"])

    def _load_own(self, checkpoint: str) -> dict[str, Any] | None:
        path = os.path.join(checkpoint, _STATE_FILE.format(self.args.process_index))
        if not os.path.isfile(path):
            return None
        return torch.load(path, map_location=self.accelerator.device, weights_only=True)

    def _check_resume(self, checkpoint: str) -> None:
        """Between two rounds every option may change; within one, those that made its micro-batches may not."""
        own = self._load_own(checkpoint)
        # a process that the saved run did not have reads from another's whether it may join
        state = _any_state(checkpoint, self.accelerator.device) if own is None else own
        if state is None:
            warnings.warn(f"{checkpoint} has no state of this process: a round of sampling begins", stacklevel=3)
        if state is None or (buffered := state["buffered_inputs"]) is None:
            return
        before = {"steps_per_generation": len(buffered), **state.get("options", {})}
        before["beta"] = before.get("beta", 0.0) if "ref_per_token_logps" in buffered[0] else 0.0
        for name, value in before.items():
            now = getattr(self.args, name)
            if now != value and not (name == "beta" and (now == 0 or value != 0)):
                raise ResumeError(
                    f"resume_from_checkpoint: {checkpoint} is within a round of sampling that was made with "
                    f"{name}={value}, and cannot go on with {name}={now}"
                )
        if own is None:
            raise ResumeError(
                f"resume_from_checkpoint: {checkpoint} is within a round of sampling, and has no state of process "
                f"{self.args.process_index}"
            )


_STATE_FILE = "grpo_state_{}.pt"  # in a checkpoint, of each process
_ROUND_OPTIONS = (
    "steps_per_generation",
    "num_iterations",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "world_size",
    "beta",
)


def _any_state(checkpoint: str, device: torch.device | str) -> dict[str, Any] | None:
    """What the first process that has saved its state in a checkpoint here has saved."""
    for path in sorted(Path(checkpoint).glob(_STATE_FILE.format("*"))):
        if is_whole(path):
            return torch.load(path, map_location=device, weights_only=True)
    return None


def _over_completion(
    model: nn.Module, batch: dict[str, Tensor], fn: Callable[[Tensor, Head, dict[str, Tensor]], Tensor]
) -> Tensor:
    """fn(hidden (B, T, H), head, batch) at the completion's positions of a batch."""
    return run_completion_head(
        model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
        lambda hidden, head: fn(hidden, head, batch),
    )


def _rows_as_they_are(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collator: prompts are tokenised when they are sampled from."""
    return rows


def _never_called(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("GRPOTrainer.compute_loss stands in for this function")
