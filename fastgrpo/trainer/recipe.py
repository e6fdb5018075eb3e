"""The stages of DeepSeek-R1 (arXiv:2501.12948), each a function that trains a model in place.

R1-Zero is `reasoning_rl` of a base model. R1 is `supervised` on a few long-form examples (the cold start),
`reasoning_rl`, `rejection_sample` and `supervised` on what that keeps, and `all_scenarios_rl`. Here the third stage
goes on from the model of the second, where the paper starts from the base model again.

Every stage writes checkpoints to args.output_dir as args says, and with `resume=True` goes on from the last one there,
or starts where there is none.
"""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from fastgrpo.trainer.base import HeadTrainer
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.evaluate import sample
from fastgrpo.trainer.grpo_trainer import GRPOTrainer
from fastgrpo.trainer.rewards import (
    RewardFunc,
    accuracy_reward,
    by_column,
    format_reward,
    language_consistency_reward,
)
from fastgrpo.trainer.sft import SFTTrainer

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
) -> None:
    """Supervised fine-tuning: the cold start on long-form examples, and the stage after rejection sampling.

    Args:
        examples: rows with `prompt` and `completion`, as `SFTTrainer` takes them.
        backend: of the loss.
        log: takes the place of transformers' progress bar and prints.
    """
    _train(SFTTrainer(model, args, examples, tokenizer, backend=backend), log, resume)


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
    """GRPO on questions with rules alone: is the answer right, and is it in the format.

    Args:
        questions: rows with `prompt` and `answer`.
        consistent_language: also reward reasoning in the language that the column `language` names; R1 does, R1-Zero
            does not.
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
    """Of `num_samples` completions of each question, those that are right, in the format, and consistent in language.

    Returns:
        rows with `prompt` and `completion`, each pair once.

    Raises:
        ValueError: none is left.
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
        if all(score == 1 for score in scores):
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
        questions: rows with `prompt` and `answer`, and `language` where its consistency counts.
        requests: rows with `prompt`; repeated until they are a third of all rows.
        judge: a reward function, such as `model_reward(classifier, its_tokenizer)`.
    """
    # rules that have no say about a request are None there; so is the judge about a question
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
    """The rules for reasoning by name: accuracy, format, and language where the questions have that column."""
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
