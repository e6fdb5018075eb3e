"""The stages of DeepSeek-R1 (arXiv:2501.12948), each a function that trains a model in place.

R1-Zero is `reasoning_rl` on a base model. R1 has four stages: `supervised` on a few long-form examples (the cold
start); `reasoning_rl`; `rejection_sample`, with `supervised` on the samples that it keeps; `all_scenarios_rl`. Unlike
the paper, the third stage continues from the model of the second, not from the base model.

Every stage writes checkpoints to args.output_dir, as args says. With `resume=True` it continues from the last one
there, or starts if there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from fastgrpo.rewards import (
    RewardFunc,
    accuracy_reward,
    by_column,
    format_reward,
    language_consistency_reward,
)
from fastgrpo.trainer.base import HeadTrainer
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.evaluate import sample
from fastgrpo.trainer.grpo_trainer import GRPOTrainer
from fastgrpo.trainer.sft import SFTTrainer

__all__ = ["all_scenarios_rl", "reasoning_rewards", "reasoning_rl", "rejection_sample", "supervised"]

REASONING, GENERAL = "reasoning", "general"  # values of the column `scenario`


def supervised(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    args: TrainingArguments,
    *,
    backend: str = "auto",
    log: TrainerCallback | None = None,
    resume: bool = False,
    logits_dtype: str = "auto",
    column_tolerance: float = 0.0,
) -> None:
    """Supervised fine-tuning: the cold start on long-form examples, and the stage after rejection sampling.

    Args:
        model: it is trained in place.
        examples: rows with `prompt` and `completion`, as `SFTTrainer` takes them.
        backend: the backend of the loss.
        log: a callback, used in place of transformers' progress bar and prints.
        resume: continue from the last checkpoint in args.output_dir.
        logits_dtype, column_tolerance: as in `GRPOConfig`.
    """
    head: dict[str, Any] = dict(backend=backend, logits_dtype=logits_dtype, column_tolerance=column_tolerance)
    trainer = SFTTrainer(model, args, examples, tokenizer, **head)
    _train(trainer, log, resume)


def reasoning_rl(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    args: GRPOConfig,
    *,
    consistent_language: bool,
    log: TrainerCallback | None = None,
    resume: bool = False,
) -> None:
    """GRPO on questions, with rules alone as rewards: the answer is right, and it is in the format.

    Args:
        model: it is trained in place.
        questions: rows with `prompt` and `answer`.
        consistent_language: also reward reasoning in the language that the column `language` names, as R1 does and
            R1-Zero does not.
        log: a callback, used in place of transformers' progress bar and prints.
        resume: continue from the last checkpoint in args.output_dir.
    """
    rules = reasoning_rewards(questions)
    if not consistent_language:
        rules.pop("language", None)
    _train(GRPOTrainer(model, _named(rules), args, questions, processing_class=tokenizer), log, resume)


def rejection_sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    args: GRPOConfig,
    *,
    num_samples: int,
    batch_size: int,
) -> Dataset:
    """Sample completions of each question, and keep those that are right, in the format and consistent in language.

    Args:
        questions: rows with `prompt` and `answer`, and `language` if its consistency counts.
        args: max_completion_length, temperature and seed are read.
        num_samples: completions of each question.
        batch_size: completions that are sampled at once.

    Returns:
        Rows with `prompt` and `completion`, each pair once.

    Raises:
        ValueError: no completion was kept.
    """
    rules = reasoning_rewards(questions)
    samples = sample(
        model,
        tokenizer,
        questions,
        rules,
        args.max_completion_length,
        temperature=args.temperature,
        samples=num_samples,
        batch_size=batch_size,
        seed=args.seed,
    )
    kept = {}
    for row, text, *scores in zip(samples.rows, samples.completions, *samples.scores.values(), strict=True):
        by_rule = dict(zip(samples.scores, scores, strict=True))
        if row.get("language") is None:
            by_rule.pop("language", None)  # that rule has no say
        if all(score == 1 for score in by_rule.values()):
            kept[repr(row["prompt"]), text] = {"prompt": row["prompt"], "completion": text}
    if not kept:
        raise ValueError(f"questions: expected some to be answered well, got none of {len(samples.completions)}")
    return Dataset.from_list(list(kept.values()))


def all_scenarios_rl(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Dataset,
    requests: Dataset,
    judge: RewardFunc,
    args: GRPOConfig,
    *,
    log: TrainerCallback | None = None,
    resume: bool = False,
) -> None:
    """GRPO on questions, whose completions rules score, and on requests, whose completions `judge` scores.

    Args:
        model: it is trained in place.
        questions: rows with `prompt` and `answer`, and `language` if its consistency counts.
        requests: rows with `prompt`; repeated as often as they are a third of all rows at most, once at least.
        judge: a reward function, such as `model_reward(classifier, its_tokenizer)`.
        log: a callback, used in place of transformers' progress bar and prints.
        resume: continue from the last checkpoint in args.output_dir.
    """
    # a rule gives None for a request, and the judge for a question: neither has a say there
    rules = {name: by_column("scenario", {REASONING: rule}) for name, rule in reasoning_rewards(questions).items()} | {
        "general": by_column("scenario", {GENERAL: judge})
    }
    columns = [name for name in ("prompt", "answer", "language") if name in questions.column_names]
    questions = questions.select_columns(columns)
    questions = questions.add_column("scenario", [REASONING] * len(questions))
    requests = requests.select_columns(["prompt"])
    requests = requests.add_column("scenario", [GENERAL] * len(requests))
    copies = max(1, len(questions) // (2 * len(requests)))
    rows = concatenate_datasets([questions, *[requests] * copies])
    _train(GRPOTrainer(model, _named(rules), args, rows, processing_class=tokenizer), log, resume)


def reasoning_rewards(questions: Dataset) -> dict[str, RewardFunc]:
    """The rules for reasoning, by name: accuracy, format, and language if the questions have that column."""
    rules = {"accuracy": accuracy_reward, "format": format_reward}
    if "language" in questions.column_names:
        codes = sorted({code for code in questions["language"] if code is not None})
        rules["language"] = by_column("language", {code: language_consistency_reward(code) for code in codes})
    return rules


def _named(rules: dict[str, RewardFunc]) -> list[RewardFunc]:
    """The rules as a list, under whose names the trainer logs them."""

    def rename(name: str, rule: RewardFunc) -> Callable:
        def renamed(**arguments):
            return rule(**arguments)

        renamed.__name__ = name
        return renamed

    return [rename(name, rule) for name, rule in rules.items()]


def _train(trainer: HeadTrainer, log: TrainerCallback | None, resume: bool) -> None:
    if log is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(log)
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if resume else None)
