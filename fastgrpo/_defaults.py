"""The defaults of `fastgrpo train`, each written once: the help, the run and `GRPOConfig` read them here.

Reading them imports nothing, so `--help` is quick and works where the packages of the trainer are missing.
"""

from __future__ import annotations

from typing import NamedTuple

NUM_GENERATIONS = 8
NUM_ITERATIONS = 1
TEMPERATURE = 1.0
TOP_P, TOP_K = 1.0, 0
BACKEND = "auto"
COLUMN_TOLERANCE = 0.0
ADVANTAGE_ESTIMATOR = "group"
LOGITS_DTYPE, LOGITS_DTYPES = "auto", ("auto", "float32", "bfloat16", "float16")
ACCUMULATION = 1  # micro-batches of a step
SEED = 0
SAVE_STEPS = 50
OUTPUT_DIR = "fastgrpo-train"
SFT_LEARNING_RATE = 1e-5  # of a recipe's supervised stages, with a model of the user's
PROMPT_COLUMN, ANSWER_COLUMN = "prompt", "answer"
SPLIT = "train"  # of a hub dataset
REWARD = "exact"  # of a run without a recipe, but for products
MOST_HELD_OUT = 128  # rows of a dataset of the user's; of a small dataset, a tenth


class Sizes(NamedTuple):
    """The defaults that depend on what is trained."""

    max_completion_length: int
    steps: int  # under a recipe, of each stage of reinforcement learning
    learning_rate: float
    warmup_steps: int
    batch_size: int
    held_out: int | str
    reward: str = REWARD


MODEL = Sizes(256, 100, 1e-6, 0, 8, f"a tenth, at most {MOST_HELD_OUT}")  # a model of the user's
SUMS = Sizes(
    max_completion_length=4,  # the largest sum, 27, one character too many, and the end token
    steps=120,
    learning_rate=3e-4,
    warmup_steps=5,
    batch_size=512,
    held_out=200,  # of the 1000 questions
)
WORD_PROBLEMS = Sizes(
    max_completion_length=24,  # a solution with both steps and two-digit numbers takes 23 tokens in English
    steps=80,
    learning_rate=5e-4,
    warmup_steps=5,
    batch_size=256,
    held_out=100,  # questions, half of them in each language
)
PRODUCTS = Sizes(  # for --model smollm2
    max_completion_length=12,  # an equation such as 12 * 9 = 108 takes 10 tokens, and the end token
    steps=60,
    learning_rate=2e-5,
    warmup_steps=5,
    batch_size=32,
    held_out=32,  # of the 100 questions
    reward="numeric",
)
TAGGED_PRODUCTS = PRODUCTS._replace(max_completion_length=40, steps=40)  # those of its recipes, in R1's tags
