"""What is learnt: the tasks that are made here, and those of the user's files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from fastgrpo.commands.errors import UsageError
from fastgrpo.commands.train.files import check_texts, load_model, load_rows, load_table, require_column, split
from fastgrpo.commands.train.mistakes import OF_R1, checked, refuse
from fastgrpo.recipes import products, smollm2, word_problems
from fastgrpo.rewards import RewardFunc, model_reward
from fastgrpo.rewards.text import is_conversation

# of the embedded recipe's stages
WARM_START_STEPS, WARM_START_BATCH = 400, 128
COLD_START_EXAMPLES, GENERAL_SAMPLES = 96, 300


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
    is_embedded: bool = False  # of a tiny model that is made here
    samples: int = 1  # of each held-out prompt, to measure


def held_out_count(options: argparse.Namespace, default: int, most: int) -> int:
    """How many embedded questions are held out."""
    count = default if options.held_out is None else options.held_out
    if not 0 < count <= most:
        raise UsageError(f"--held-out: expected between 1 and {most} of the embedded questions, got {count}")
    return count


def one_thread_on_cpu(device: torch.device) -> None:
    """A second thread saves an embedded model nothing, and costs a lot where other work shares the cores."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def embedded_task(options: argparse.Namespace) -> Task:
    """The word problems, for a model that is made here."""
    refuse(options, ("dataset", *OF_R1), "--model: the embedded model knows its own task only")
    seed, count = options.seed, held_out_count(options, word_problems.HELD_OUT, word_problems.MOST_HELD_OUT)
    questions, held_out = word_problems.make_questions(seed, count)
    requests, held_out_requests = word_problems.make_requests(seed)
    return Task(
        questions=questions,
        held_out=held_out,
        examples=word_problems.cold_start_examples(questions, COLD_START_EXAMPLES, seed),
        general=word_problems.general_samples(requests, GENERAL_SAMPLES, seed),
        requests=requests,
        held_out_requests=held_out_requests,
        judge=word_problems.courtesy_reward,
        documents=word_problems.documents(questions, requests, WARM_START_STEPS * WARM_START_BATCH, seed),
        is_embedded=True,
        samples=word_problems.SAMPLES,
    )


def has_products(options: argparse.Namespace) -> bool:
    """Whether a run is of the products that are for SmolLM2."""
    return options.model == smollm2.NAME and options.dataset is None


def products_task(options: argparse.Namespace) -> Task:
    """Products in R1's tags, and requests in English, for SmolLM2."""
    refuse(options, OF_R1, f"--dataset: --model {smollm2.NAME} without one brings its own")
    seed, count = options.seed, held_out_count(options, products.HELD_OUT, products.MOST_HELD_OUT)
    questions, held_out = map(products.tagged, products.make_datasets(seed, count))
    requests, held_out_requests = word_problems.make_requests(seed, languages=("en",))
    general = word_problems.general_samples(requests, products.GENERAL_SAMPLES, seed)
    return Task(
        questions=questions,
        held_out=held_out,
        examples=products.cold_start_examples(questions, products.COLD_START_EXAMPLES),
        general=_as_conversations(general),
        requests=_as_conversations(requests),
        held_out_requests=_as_conversations(held_out_requests),
        judge=word_problems.courtesy_reward,
        samples=products.SAMPLES,
    )


def task_of_files(options: argparse.Namespace) -> Task:
    """The files that the options name, for a model of the user's."""
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
    return Dataset.from_dict({**data.remove_columns("prompt").to_dict(), "prompt": prompts})
