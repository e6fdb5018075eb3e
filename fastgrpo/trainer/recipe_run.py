"""What `fastgrpo train --recipe` does: the stages one after the other, and what the model can do after each."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from fastgrpo import _defaults
from fastgrpo.commands.errors import UsageError, check_folder
from fastgrpo.trainer import recipe, terminal, word_problems
from fastgrpo.trainer.checkpoints import append_whole, whole_folder, write_whole
from fastgrpo.trainer.config import CHECKPOINTING, GRPOConfig
from fastgrpo.trainer.evaluate import sample
from fastgrpo.trainer.rewards import RewardFunc, model_reward
from fastgrpo.trainer.rollout import is_conversation
from fastgrpo.trainer.run import (
    RunLog,
    check_backend,
    check_round,
    check_texts,
    checked,
    load_model,
    load_rows,
    load_table,
    make_config,
    mistakes_are_shown,
    require_column,
    split,
)
from fastgrpo.trainer.template import R1_ZERO_CHAT_TEMPLATE

# the supervised stages of the embedded task; a constant rate and a short memory find the sums soonest
_WARM_START = {
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "adam_beta2": 0.98,
    "per_device_train_batch_size": 128,
    "num_train_epochs": 1,
}
_COLD_START = {"learning_rate": 1e-3, "per_device_train_batch_size": 32, "num_train_epochs": 4}
_SAMPLED = {"learning_rate": 5e-4, "per_device_train_batch_size": 64, "num_train_epochs": 1}
WARM_START_STEPS = 400
_SAMPLES = "samples.jsonl"  # in the folder of the stage that learns from them
_COLUMNS = {"accuracy": ".2f", "format": ".2f", "language": ".2f", "length": ".1f", "general": ".2f"}


@dataclass
class Task:
    """What the stages learn from, and what they are measured on."""

    questions: Dataset  # prompt, answer, perhaps language
    held_out: Dataset
    examples: Dataset | None = None  # prompt, completion: long-form solutions for the cold start
    general: Dataset | None = None  # prompt, completion: samples of everything else
    requests: Dataset | None = None  # prompt, of the general scenario
    held_out_requests: Dataset | None = None
    judge: RewardFunc | None = None  # of the replies to requests
    documents: Dataset | None = None  # prompt, completion: what a random model is pretrained on
    is_embedded: bool = False


@dataclass
class Stage:
    name: str
    train: Callable[[Path, RunLog, bool], None]  # (folder, log, resume)


class Recipe:
    """A model on its way through the stages; `options` are those of the command line."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.output = options, Path(options.output_dir)
        embedded = options.model is None
        self.defaults = _defaults.WORD_PROBLEMS if embedded else _defaults.MODEL
        self.config = checked(make_config, options, self.output, self.defaults, embedded)
        if self.config.world_size > 1:
            raise UsageError(f"--recipe: expected one process, got {self.config.world_size}")
        self.task = _embedded_task(options) if embedded else _task_of_files(options)
        checked(recipe.reasoning_rewards, self.task.questions)  # so that an unknown language is found out now
        check_round(self.config, len(self.task.questions))
        check_backend(self.config)
        check_folder("--output-dir", self.output)
        self.model, self.tokenizer = self._load()

    def _load(self) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
        if self.task.is_embedded:
            if self.config.device.type == "cpu":
                torch.set_num_threads(1)  # a second thread saves a model this small nothing
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
        r1, args = self.options.recipe == "r1", self._rl_args(folder)
        if r1 and self.task.is_embedded and self.options.steps is None:
            args.max_steps //= 2  # after a cold start it is enough, and leaves the next stage something to select
        recipe.reasoning_rl(
            self.model,
            self.tokenizer,
            self.task.questions,
            args,
            consistent_language=r1,
            log=log,
            resume=resume,
        )

    def _rejection_sft(self, folder: Path, log: RunLog, resume: bool) -> None:
        path = folder / _SAMPLES
        if path.exists():  # of the run that is resumed, whose checkpoints have seen them
            examples = Dataset.from_json(str(path))
        else:
            batch = 512 if self.task.is_embedded else self.config.per_device_train_batch_size
            kept = checked(
                lambda: recipe.rejection_sample(
                    self.model, self.tokenizer, self.task.questions, self.config, num_samples=4, batch_size=batch
                )
            )
            general = self.task.general.select_columns(["prompt", "completion"])
            examples = concatenate_datasets([kept, general.cast(kept.features)])
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples))
        self._supervised(examples, _SAMPLED, folder, log, resume)

    def _all_scenarios_rl(self, folder: Path, log: RunLog, resume: bool) -> None:
        task = self.task
        recipe.all_scenarios_rl(
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
            "num_train_epochs": 2,
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
        recipe.supervised(self.model, self.tokenizer, examples, args, backend=options.backend, log=log, resume=resume)

    def _rl_args(self, folder: Path) -> GRPOConfig:
        return make_config(self.options, folder, self.defaults, self.task.is_embedded)

    # Measuring

    def measure(self) -> tuple[dict[str, float], str]:
        """(the means on the held-out prompts, some of their completions as text)."""
        task = self.task
        scores, shown = {}, []
        parts = [(task.held_out, recipe.reasoning_rewards(task.held_out))]
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
                samples=8 if task.is_embedded else 1,
                batch_size=512 if task.is_embedded else self.config.per_device_train_batch_size,
                seed=self.options.seed,
            )
            scores |= {name: samples.mean(name) for name in rewards}
            scores.setdefault("length", samples.mean_length())  # of the questions' completions
            for row, text in list(zip(samples.rows, samples.completions, strict=True))[:8]:
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
        plot(path, self.output / "recipe.png")
        print(format_table(table))
        print(f"models, metrics.jsonl, samples.txt and recipe.png are in {self.output}")
        accuracies = [scores["accuracy"] for scores in table.values()]
        print(f"accuracy {accuracies[0]:.2f} -> {accuracies[-1]:.2f}", flush=True)

    def _finished(self, path: Path, head: dict) -> list[dict]:
        """The lines of metrics.jsonl up to the last finished stage."""
        if not path.is_file():
            raise UsageError(f"--resume: no run in {self.output}")
        entries = _read_metrics(path)
        if not entries or entries[0] != head:
            raise UsageError(f"--resume: the run in {self.output} is not one of {json.dumps(head)}")
        done = [entry["stage"] for entry in entries if "held_out" in entry]
        return [entry for entry in entries if "stage" not in entry or entry["stage"] in done]


def _discard_progress(folder: Path) -> None:
    """Remove what an earlier run left of this stage, so that no later --resume takes it for its own."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / _SAMPLES).unlink(missing_ok=True)


def _read_metrics(path: Path) -> list[dict]:
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:  # the run ended in the middle of a line
            break
    return entries


def run_recipe(options: argparse.Namespace) -> None:
    """Run `fastgrpo train --recipe`."""
    if options.reward is not None:
        raise UsageError("--reward: a recipe has its own rewards")
    for name in ("cold_start", "general", "reward_model"):
        if options.recipe == "r1-zero" and getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs --recipe r1")
    with mistakes_are_shown(options.output_dir):
        Recipe(options).run()


def _embedded_task(options: argparse.Namespace) -> Task:
    for name in ("dataset", "cold_start", "general", "reward_model"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs --model: the embedded model knows its own task only")
    seed, count = options.seed, word_problems.HELD_OUT if options.held_out is None else options.held_out
    if not 0 < count <= 400:
        raise UsageError(f"--held-out: expected between 1 and 400 of the embedded questions, got {count}")
    questions, held_out = word_problems.make_questions(seed, count)
    requests, held_out_requests = word_problems.make_requests(seed)
    return Task(
        questions=questions,
        held_out=held_out,
        examples=word_problems.cold_start_examples(questions, 96, seed),
        general=word_problems.general_samples(requests, 300, seed),
        requests=requests,
        held_out_requests=held_out_requests,
        judge=word_problems.courtesy_reward,
        documents=word_problems.documents(questions, requests, WARM_START_STEPS * 128, seed),
        is_embedded=True,
    )


def _task_of_files(options: argparse.Namespace) -> Task:
    if options.dataset is None:
        raise UsageError("--recipe with --model needs a --dataset with the columns prompt and answer")
    data = _as_conversations(load_rows(options, ["answer"], "--recipe"))
    questions, held_out = split(data, options.held_out, options.seed)
    if options.recipe == "r1-zero":
        return Task(questions, held_out)
    tables = {}
    for argument, name in (("--cold-start", options.cold_start), ("--general", options.general)):
        if name is None:
            raise UsageError(f"--recipe r1 with --model needs {argument}, a file with prompt and completion")
        tables[argument] = load_table(argument, name)
        for column in ("prompt", "completion"):
            require_column(tables[argument], argument, name, column)
            check_texts(tables[argument], argument, name, column)
    if options.reward_model is None:
        raise UsageError("--recipe r1 with --model needs --reward-model, a classifier for the general prompts")
    general = _as_conversations(tables["--general"])
    requests, held_out_requests = split(general, None, options.seed)
    classifier = load_model(options.reward_model, "--reward-model", AutoModelForSequenceClassification)
    return Task(
        questions,
        held_out,
        examples=_as_conversations(tables["--cold-start"]),
        general=requests,
        requests=requests,
        held_out_requests=held_out_requests,
        judge=checked(model_reward, *classifier),
    )


def _as_conversations(data: Dataset) -> Dataset:
    """Prompts as lists of messages, which go through the chat template."""
    if len(data) == 0 or is_conversation(data[0]["prompt"]):
        return data
    prompts = [[{"role": "user", "content": prompt}] for prompt in data["prompt"]]
    return data.remove_columns("prompt").add_column("prompt", prompts)


def format_table(table: dict[str, dict[str, float]]) -> str:
    """{stage: {metric: mean}} as lines of text."""
    columns = [name for name in _COLUMNS if any(name in scores for scores in table.values())]
    lines = [f"{'stage':<18}" + "".join(f"{name:>10}" for name in columns)]
    for stage, scores in table.items():
        cells = [format(scores.get(name, math.nan), _COLUMNS[name]) for name in columns]
        lines.append(f"{stage:<18}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def plot(metrics: Path, path: Path) -> None:
    """Rewards over the steps of reinforcement learning, and the held-out figures by stage, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = _read_metrics(metrics)
    steps = [entry for entry in entries if "reward" in entry]
    table = {entry["stage"]: entry["held_out"] for entry in entries if "held_out" in entry}
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)  # no display is asked for, whatever the environment's default
    training, held_out = figure.subplots(2)
    colors = {name: f"C{i}" for i, name in enumerate(_COLUMNS)}
    for name, color in colors.items():
        values = [entry.get(f"rewards/{name}/mean") for entry in steps]
        if any(value is not None for value in values):
            gaps = [math.nan if value is None else value for value in values]
            training.plot(gaps, color=color, label=name)
    for i in range(1, len(steps)):
        if steps[i]["stage"] != steps[i - 1]["stage"]:
            training.axvline(i, color="tab:grey", linestyle=":")
    training.set_xlabel("step of reinforcement learning")
    training.set_ylabel("mean reward")
    for name, color in colors.items():
        if name != "length" and any(name in scores for scores in table.values()):
            means = [scores.get(name, math.nan) for scores in table.values()]
            held_out.plot(list(table), means, "o-", color=color, label=name)
    held_out.set_ylabel("mean on held-out prompts")
    for axes in (training, held_out):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
