"""The task behind `fastgrpo train` without arguments: sums of three digits, for a model that is made on the spot.

Nothing is downloaded. A supervised warm start teaches the format and most of the arithmetic, from demonstrations of
which every other one goes on after the answer, and stops early. So a sampled answer is right less than half of the
time: often enough for GRPO to find out what pays (stopping in time, and the sums that are still wrong), and seldom
enough to show it.
"""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastgrpo._defaults import SUMS
from fastgrpo.recipes import tiny
from fastgrpo.rewards import exact
from fastgrpo.trainer import terminal
from fastgrpo.trainer.evaluate import sampled_accuracy

CHARACTERS = "0123456789+="
HELD_OUT, MAX_COMPLETION_LENGTH = SUMS.held_out, SUMS.max_completion_length
MOST_HELD_OUT = 500  # half of the questions
SAMPLES = 2  # of each held-out question, to measure the accuracy
WARM_START_ACCURACY = 0.44  # where the warm start stops, on questions of the training part
WARM_START_MAX_STEPS = 400


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    return tiny.make_tokenizer(CHARACTERS, ".")


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Two layers, 64 wide, about 130 thousand parameters, random."""
    return tiny.make_model(LlamaForCausalLM, tokenizer, seed)


def make_datasets(seed: int, held_out: int = HELD_OUT) -> tuple[Dataset, Dataset]:
    """(training questions, held-out questions), disjoint, with columns `prompt` and `answer`."""
    digits = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    random.Random(seed).shuffle(digits)
    rows = [{"prompt": f"{a}+{b}+{c}=", "answer": str(a + b + c)} for a, b, c in digits]
    return Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])


def warm_start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, train: Dataset, seed: int) -> None:
    """Supervised steps on random training questions until sampled answers reach WARM_START_ACCURACY."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    sample = train.select(range(400))
    rows, accuracy = train.to_list(), 0.0
    bar = terminal.start("warm start", WARM_START_MAX_STEPS)
    for step in range(1, WARM_START_MAX_STEPS + 1):
        model.train()
        batch = [_demonstration(rng, row) for row in rng.choices(rows, k=192)]
        loss = model(**_supervised_batch(tokenizer, batch, model.device)).loss
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 30)
        optimizer.step()
        if step % 20 == 0:
            accuracy = sampled_accuracy(model, tokenizer, sample, exact, MAX_COMPLETION_LENGTH, seed=seed + step)
        bar.set_postfix({"loss": f"{loss.item():.2f}", "accuracy": f"{accuracy:.2f}"})
        bar.update()
        if accuracy >= WARM_START_ACCURACY:
            break
    bar.finish()
    model.zero_grad(set_to_none=True)


def _demonstration(rng: random.Random, row: dict) -> dict:
    """The question with its answer; every other one does not stop there, and so would not be right."""
    return {**row, "answer": row["answer"] + "="} if rng.random() < 0.5 else row


def _supervised_batch(tokenizer: PreTrainedTokenizerFast, rows: list[dict], device: torch.device) -> dict:
    """Questions with their answers; only the answers are learnt."""
    batch = tokenizer(
        [row["prompt"] + row["answer"] + tokenizer.eos_token for row in rows], padding=True, return_tensors="pt"
    ).to(device)
    labels = torch.full_like(batch["input_ids"], -100)
    for i, row in enumerate(rows):
        answer = len(row["answer"]) + 1  # left padding: the answer and the end token stand at the end
        labels[i, -answer:] = batch["input_ids"][i, -answer:]
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
