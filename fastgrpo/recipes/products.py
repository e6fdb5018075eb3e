"""The task behind `fastgrpo train --model smollm2`: products of two numbers from 3 to 12.

    17 - 4    17 - 4 = 13
    12 * 7    12 * 7 = 84

The first line is an example that every prompt holds. The model knows most of these products; at temperature 1 it gives
half of them, and drifts from the form or slips in the others. The questions lie in `products.jsonl`, in an order of a
fixed seed, so that every run sees the same ones: the first are held out. `python -m fastgrpo.recipes.products` writes
them.

`--recipe` asks for the same products in R1's tags, which the example of its prompts then has.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from datasets import Dataset

from fastgrpo._defaults import PRODUCTS

FILE = Path(__file__).with_suffix(".jsonl")
HELD_OUT = PRODUCTS.held_out
MOST_HELD_OUT = 50  # half of the questions
SAMPLES = 4  # of each held-out question, to measure the accuracy

_TAGGED = "<think>{} = {}</think><answer>{}</answer>"
COLD_START_EXAMPLES, GENERAL_SAMPLES = 48, 48


def _example(reply: str) -> list[dict]:
    pairs = (("system", "Calculate."), ("user", "17 - 4"), ("assistant", reply))
    return [{"role": role, "content": text} for role, text in pairs]


def make_rows(seed: int = 0) -> list[dict]:
    """Every question with its answer, as messages, in random order."""
    pairs = [(a, b) for a in range(3, 13) for b in range(3, 13)]
    random.Random(seed).shuffle(pairs)
    return [
        {
            "prompt": [*_example("17 - 4 = 13"), {"role": "user", "content": f"{a} * {b}"}],
            "answer": str(a * b),
        }
        for a, b in pairs
    ]


def make_datasets(seed: int, held_out: int = HELD_OUT) -> tuple[Dataset, Dataset]:
    """(training questions, held-out questions) with the columns `prompt` and `answer`, the same for every seed."""
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    return Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])


def tagged(questions: Dataset) -> Dataset:
    """The questions with an example in R1's tags in place of theirs."""
    example = _example(_TAGGED.format("17 - 4", 13, 13))
    return Dataset.from_list([{**row, "prompt": [*example, row["prompt"][-1]]} for row in questions])


def cold_start_examples(questions: Dataset, count: int) -> Dataset:
    """`count` of the questions with their solutions in R1's tags: the columns `prompt` and `completion`."""
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": _TAGGED.format(row["prompt"][-1]["content"], row["answer"], row["answer"]),
            }
            for row in questions.select(range(count))
        ]
    )


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
