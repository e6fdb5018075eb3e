"""The task behind `fastgrpo train --model smollm2`: products of a number up to 30 and a digit.

    17 - 4    17 - 4 = 13
    24 * 7    24 * 7 = 168

The first line is an example that every prompt holds. At temperature 1 a third of the answers are right or fewer; the
others drift from the form, or go wrong in the product. The questions lie in `products.jsonl`, in an order of a fixed
seed, so that every run sees the same ones: the first are held out. `python -m fastgrpo.recipes.products` writes them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from datasets import Dataset

from fastgrpo._defaults import PRODUCTS

FILE = Path(__file__).with_suffix(".jsonl")
HELD_OUT = PRODUCTS.held_out
MOST_HELD_OUT = 116  # half of the questions
SAMPLES = 4  # of each held-out question, to measure the accuracy

_EXAMPLE = (("system", "Calculate."), ("user", "17 - 4"), ("assistant", "17 - 4 = 13"))


def make_rows(seed: int = 0) -> list[dict]:
    """Every question with its answer, as messages, in random order."""
    pairs = [(a, b) for a in range(2, 31) for b in range(2, 10)]
    random.Random(seed).shuffle(pairs)
    return [
        {
            "prompt": [{"role": role, "content": text} for role, text in (*_EXAMPLE, ("user", f"{a} * {b}"))],
            "answer": str(a * b),
        }
        for a, b in pairs
    ]


def make_datasets(seed: int, held_out: int = HELD_OUT) -> tuple[Dataset, Dataset]:
    """(training questions, held-out questions) with the columns `prompt` and `answer`, the same for every seed."""
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    return Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
