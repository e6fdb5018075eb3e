"""`fastgrpo train --recipe`: the stages one after the other, and what the model can do after each."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainingArguments

from fastgrpo import _defaults
from fastgrpo.commands.errors import UsageError, check_folder
from fastgrpo.commands.train.config import check_backend, check_round, make_config
from fastgrpo.commands.train.files import load_model
from fastgrpo.commands.train.log import RunLog
from fastgrpo.commands.train.mistakes import OF_R1, checked, mistakes_are_shown, refuse
from fastgrpo.commands.train.report import format_table, plot_stages, read_metrics
from fastgrpo.commands.train.tasks import (
    WARM_START_BATCH,
    embedded_task,
    has_products,
    one_thread_on_cpu,
    products_task,
    task_of_files,
)
from fastgrpo.recipes import r1, word_problems
from fastgrpo.recipes.template import R1_ZERO_CHAT_TEMPLATE
from fastgrpo.rewards.text import is_conversation
from fastgrpo.trainer import terminal
from fastgrpo.trainer.checkpoints import append_whole, whole_folder, write_whole
from fastgrpo.trainer.config import CHECKPOINTING, GRPOConfig
from fastgrpo.trainer.evaluate import SAMPLED_AT_ONCE, sample

# the supervised stages of the embedded task; a constant rate and a short memory find the sums soonest
_WARM_START = {
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "adam_beta2": 0.98,
    "per_device_train_batch_size": WARM_START_BATCH,
    "num_train_epochs": 1,
}
_COLD_START = {"learning_rate": 1e-3, "per_device_train_batch_size": 32, "num_train_epochs": 4}
_SAMPLED = {"learning_rate": 5e-4, "per_device_train_batch_size": 64, "num_train_epochs": 1}
_EPOCHS_OF_FILES = 2  # of a supervised stage with a model of the user's
_SAMPLES = "samples.jsonl"  # in the folder of the stage that learns from them
_SAMPLES_PER_QUESTION = 4  # of which the good ones are learnt
_SHOWN = 8  # completions of a stage in samples.txt, of each kind of prompts


@dataclass
class Stage:
    name: str
    train: Callable[[Path, RunLog, bool], None]  # (folder, log, resume)


class Recipe:
    """A model on its way through the stages; `options` are those of the command line."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.output = options, Path(options.output_dir)
        embedded = options.model is None
        self.defaults, make_task = _defaults.MODEL, task_of_files
        if embedded:
            self.defaults, make_task = _defaults.WORD_PROBLEMS, embedded_task
        elif has_products(options):
            self.defaults, make_task = _defaults.TAGGED_PRODUCTS, products_task
        self.config = checked(make_config, options, self.output, self.defaults, embedded)
        if self.config.world_size > 1:
            raise UsageError(f"--recipe: expected one process, got {self.config.world_size}")
        if self.config.n_gpu > 1:
            raise UsageError(f"--recipe: expected one GPU (CUDA_VISIBLE_DEVICES chooses it), got {self.config.n_gpu}")
        self.task = make_task(options)
        checked(r1.reasoning_rewards, self.task.questions)  # so that an unknown language is found out now
        check_round(self.config, len(self.task.questions))
        check_backend(self.config)
        check_folder("--output-dir", self.output)
        self.model, self.tokenizer = self._load()

    def _load(self) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
        if self.task.is_embedded:
            one_thread_on_cpu(self.config.device)
            tokenizer = word_problems.make_tokenizer()
            model = word_problems.make_model(tokenizer, self.options.seed)
        else:
            model, tokenizer = load_model(self.options.model)
            if tokenizer.chat_template is None:
                tokenizer.chat_template = R1_ZERO_CHAT_TEMPLATE
        return model.to(self.config.device), tokenizer

    def stages(self) -> list[Stage]:
        rl = Stage("reasoning-rl", self._reasoning_rl)
        if self.options.recipe == "r1-zero":
            return [Stage("base", self._base), rl]
        sampled = Stage("rejection-sft", self._rejection_sft)
        last = Stage("all-scenarios-rl", self._all_scenarios_rl)
        return [Stage("base", self._base), Stage("cold-start", self._cold_start), rl, sampled, last]

    # Stages

    def _base(self, folder: Path, log: RunLog, resume: bool) -> None:
        if self.task.documents is not None:
            self._supervised(self.task.documents, _WARM_START, folder, log, resume)

    def _cold_start(self, folder: Path, log: RunLog, resume: bool) -> None:
        self._supervised(self.task.examples, _COLD_START, folder, log, resume)

    def _reasoning_rl(self, folder: Path, log: RunLog, resume: bool) -> None:
        after_cold_start, args = self.options.recipe == "r1", self._rl_args(folder)
        if after_cold_start and self.task.is_embedded and self.options.steps is None:
            args.max_steps //= 2  # after a cold start it is enough, and leaves the next stage something to select
        r1.reasoning_rl(
            self.model,
            self.tokenizer,
            self.task.questions,
            args,
            consistent_language=after_cold_start,
            log=log,
            resume=resume,
        )

    def _rejection_sft(self, folder: Path, log: RunLog, resume: bool) -> None:
        path = folder / _SAMPLES
        if path.exists():  # of the run that is resumed, whose checkpoints have seen them
            examples = Dataset.from_json(str(path))
        else:
            kept = checked(
                lambda: r1.rejection_sample(
                    self.model,
                    self.tokenizer,
                    self.task.questions,
                    self.config,
                    num_samples=_SAMPLES_PER_QUESTION,
                    batch_size=self._sampled_at_once(),
                )
            )
            general = self.task.general.select_columns(["prompt", "completion"])
            examples = concatenate_datasets([kept, general.cast(kept.features)])
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples))
        self._supervised(examples, _SAMPLED, folder, log, resume)

    def _all_scenarios_rl(self, folder: Path, log: RunLog, resume: bool) -> None:
        task = self.task
        r1.all_scenarios_rl(
            self.model,
            self.tokenizer,
            task.questions,
            task.requests,
            task.judge,
            self._rl_args(folder),
            log=log,
            resume=resume,
        )

    def _supervised(
        self, examples: Dataset, of_embedded: dict[str, Any], folder: Path, log: RunLog, resume: bool
    ) -> None:
        """A supervised stage; the embedded task has its own arguments for each."""
        options, rl = self.options, self.config
        of_files = {
            "learning_rate": options.sft_learning_rate,
            "num_train_epochs": _EPOCHS_OF_FILES,
            "per_device_train_batch_size": rl.per_device_train_batch_size,
            "gradient_accumulation_steps": rl.gradient_accumulation_steps,
        }
        args = TrainingArguments(
            output_dir=str(folder),
            remove_unused_columns=False,
            use_cpu=rl.use_cpu,
            bf16=rl.bf16,
            report_to="none",
            logging_steps=1,
            save_strategy=rl.save_strategy,
            save_steps=rl.save_steps,
            save_total_limit=1,
            seed=rl.seed,
            dataloader_pin_memory=rl.dataloader_pin_memory,
            **{CHECKPOINTING: rl.checkpoints_activations},
            **(of_embedded if self.task.is_embedded else of_files),
        )
        head = {name: getattr(options, name) for name in ("backend", "logits_dtype", "column_tolerance")}
        r1.supervised(self.model, self.tokenizer, examples, args, log=log, resume=resume, **head)

    def _rl_args(self, folder: Path) -> GRPOConfig:
        return make_config(self.options, folder, self.defaults, self.task.is_embedded)

    def _sampled_at_once(self) -> int:
        return SAMPLED_AT_ONCE if self.task.is_embedded else self.config.per_device_train_batch_size

    # Measuring

    def measure(self) -> tuple[dict[str, float], str]:
        """(the means on the held-out prompts, some of their completions as text)."""
        task = self.task
        scores, shown = {}, []
        parts = [(task.held_out, r1.reasoning_rewards(task.held_out))]
        if self.options.recipe == "r1":
            parts.append((task.held_out_requests, {"general": task.judge}))
        for rows, rewards in parts:
            samples = sample(
                self.model,
                self.tokenizer,
                rows,
                rewards,
                self.config.max_completion_length,
                temperature=self.options.temperature,
                samples=task.samples,
                batch_size=self._sampled_at_once(),
                seed=self.options.seed,
            )
            scores |= {name: samples.mean(name) for name in rewards}
            scores.setdefault("length", samples.mean_length())  # of the questions' completions
            for row, text in list(zip(samples.rows, samples.completions, strict=True))[:_SHOWN]:
                prompt = row["prompt"]
                shown.append(f"{prompt[-1]['content'] if is_conversation(prompt) else prompt}\n    {text}\n")
        return scores, "".join(shown)

    def run(self) -> None:
        """All stages that are not finished yet; the last line on stdout is `accuracy 0.xx -> 0.yy`."""
        path, texts = self.output / "metrics.jsonl", self.output / "samples.txt"
        head = {"recipe": self.options.recipe, "seed": self.options.seed, "model": self.options.model}
        entries = self._finished(path, head) if self.options.resume else [head]
        table = {entry["stage"]: entry["held_out"] for entry in entries if "held_out" in entry}
        self.output.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        if not table:
            write_whole(texts, "")
        elif (last := self.output / list(table)[-1] / "model").is_dir():  # a base model of the user's is not copied
            self.model = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).to(self.config.device)
        for i, stage in enumerate(self.stages()[len(table) :]):
            folder, resume = self.output / stage.name, self.options.resume and i == 0
            folder.mkdir(exist_ok=True)
            if not resume:
                _discard_progress(folder)
            stage.train(folder, RunLog(path, stage.name), resume)
            if stage.name != "base" or self.task.documents is not None:
                with whole_folder(folder / "model") as part:
                    self.model.save_pretrained(part)
                    self.tokenizer.save_pretrained(part)
            table[stage.name], shown = self.measure()
            append_whole(texts, f"After {stage.name}:\n\n{shown}\n")
            # the stage is finished when this line is there
            append_whole(path, json.dumps({"stage": stage.name, "held_out": table[stage.name]}) + "\n")
            print(
                f"after {stage.name}: " + ", ".join(f"{k} {v:.2f}" for k, v in table[stage.name].items()), flush=True
            )
        terminal.close()
        plot_stages(path, self.output / "recipe.png")
        print(format_table(table))
        print(f"models, metrics.jsonl, samples.txt and recipe.png are in {self.output}")
        accuracies = [scores["accuracy"] for scores in table.values()]
        print(f"accuracy {accuracies[0]:.2f} -> {accuracies[-1]:.2f}", flush=True)

    def _finished(self, path: Path, head: dict) -> list[dict]:
        """The lines of metrics.jsonl up to the last finished stage."""
        if not path.is_file():
            raise UsageError(f"--resume: no run in {self.output}")
        entries = read_metrics(path)
        if not entries or entries[0] != head:
            raise UsageError(f"--resume: the run in {self.output} is not one of {json.dumps(head)}")
        done = [entry["stage"] for entry in entries if "held_out" in entry]
        return [entry for entry in entries if "stage" not in entry or entry["stage"] in done]


def _discard_progress(folder: Path) -> None:
    """Remove what an earlier run left of this stage, so that no later --resume takes it for its own."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / _SAMPLES).unlink(missing_ok=True)


def run(options: argparse.Namespace) -> None:
    """Run `fastgrpo train --recipe`."""
    if options.reward is not None:
        raise UsageError("--reward: a recipe has its own rewards")
    if options.recipe == "r1-zero":
        refuse(options, OF_R1, "--recipe r1")
    with mistakes_are_shown(options.output_dir):
        Recipe(options).run()
