"""The command `fastgrpo`: env | bench | train."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

from fastgrpo._extras import MissingPackage, require


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastgrpo", description="GRPO training with fused loss kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions, and which backends work here").set_defaults(run=_env)
    _add_bench(commands)
    _add_train(commands)
    options = parser.parse_args(argv)
    try:
        return options.run(options) or 0
    except MissingPackage as error:
        print(f"fastgrpo {options.command}: error: {error}", file=sys.stderr)
        return 2


def _env(_: argparse.Namespace) -> None:
    import torch

    from fastgrpo import __version__, backends

    print(f"fastgrpo {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "trl"):
        try:
            print(f"{name}: {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed")
    print(f"threads: {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(devices) or 'none'}")
    for name in backends.NAMES:
        why = backends.get(name).unavailable()
        print(f"backend {name}: {'works' if why is None else f'unavailable: {why}'}")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure fastgrpo beside its peers on this machine; without arguments, in about a minute",
        description="Check every implementation against float64, then time it beside the others: medians of turns in "
        "one process. Prints a table for each size, who could not be measured and why, and the project's targets.",
    )
    bench.set_defaults(run=_bench)
    add = bench.add_argument
    add("--quick", action="store_true", help="small sizes, in less than two minutes on two cores; the default")
    add("--full", action="store_true", help="the sizes of the tables in docs/benchmarks.md")
    add("--growth", action="store_true", help="sweeps of the number of tokens and of the vocabulary")
    add("--op", action="append", choices=("advantages", "logps", "forward", "loss", "linear", "step"),
        help="only this operation; repeatable: loss is from logits, linear from hidden states")  # fmt: skip
    add("--impl", action="append", help="only this implementation, such as fastgrpo, eager, trl, liger; repeatable")
    add("--backend", action="append", choices=("cpu", "cuda", "triton", "torch"),
        help="only this backend of fastgrpo; repeatable")  # fmt: skip
    add("--model", action="append", choices=("qwen2.5-0.5b", "qwen2.5-7b", "llama3-8b", "gemma2-9b"),
        help="the size of this one's head; repeatable")  # fmt: skip
    add("--shape", action="append",
        help="B=8,T=64,V=151936,H=896 or some: completions, tokens, vocabulary, width; repeatable")  # fmt: skip
    add("--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="repeatable (default: bf16 and fp32)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--inactive", type=float, action="append",
        help="share of the completions with advantage 0, from hidden states; repeatable")  # fmt: skip
    add("--seconds", type=float, default=2.0, help="of timing for each implementation (default: %(default)s)")
    add("--json", metavar="FILE", help="append the rows, one JSON object a line")
    add("--plot", metavar="FILE", help="draw time and memory of the rows, as SVG or PNG by the file's name")
    add("--report", nargs="?", const="benchmarks/results", metavar="FOLDER",
        help="measure nothing: write docs/benchmarks.md and the README's table from rows in %(const)s")  # fmt: skip


def _bench(options: argparse.Namespace) -> int:
    from fastgrpo.bench.command import UsageError, run

    try:
        run(options)
    except UsageError as error:
        print(f"fastgrpo bench: error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train a model with GRPO; without arguments, a small one on an arithmetic task made here",
        description="Train a model with GRPO. Without --model, a small random model learns sums of three digits: a "
        "short supervised warm start, then GRPO. The last line shows the accuracy on held-out questions before and "
        "after; the output folder gets metrics.jsonl, reward.png and the model.",
    )
    train.set_defaults(run=_train)
    add = train.add_argument
    add("--model", help="hub id or folder of a causal language model (default: a small one made here)")
    add("--dataset", help="hub id, or a JSONL or Parquet file, with the columns prompt and answer; needs --model")
    add("--dataset-config", help="configuration of a hub dataset")
    add("--split", default="train", help="split of a hub dataset (default: %(default)s)")
    add("--prompt-column", default="prompt", help="column with the prompts (default: %(default)s)")
    add("--answer-column", default="answer", help="column with the answers (default: %(default)s)")
    add("--reward", help="exact, numeric, contains, accuracy, format, ..., or module:function (default: exact)")
    add("--beta", type=float, default=0.0, help="KL coefficient (default: %(default)s)")
    add("--loss-type", default="dapo", help="grpo, dapo, dr_grpo, bnpo, cispo, ... (default: %(default)s)")
    add("--num-generations", type=int, default=8, help="completions per prompt (default: %(default)s)")
    add("--num-iterations", type=int, default=1, help="passes over each batch of completions (default: %(default)s)")
    add("--max-completion-length", type=int, help="tokens per completion at most (default: 256; embedded task: 4)")
    add("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    add("--steps", type=int, help="optimiser steps (default: 100; embedded task: 120)")
    add("--learning-rate", type=float, help="(default: 1e-6; embedded task: 3e-4)")
    add("--batch-size", type=int, help="completions per micro-batch and process (default: 8; embedded task: 512)")
    add("--gradient-accumulation-steps", type=int, default=1, help="micro-batches per step (default: %(default)s)")
    add("--held-out", type=int, help="rows kept for the accuracy (default: a tenth, at most 128; embedded task: 200)")
    add("--save-steps", type=int, default=50, help="steps between checkpoints, 0: none (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--output-dir", default="fastgrpo-train", help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add("--backend", default="auto", help="of the loss: auto, cpu, cuda, triton or torch (default: %(default)s)")

    add = train.add_argument_group(
        "DeepSeek-R1's stages, instead of one run of GRPO",
        "--steps, --learning-rate and --batch-size are then those of each stage of RL; embedded: 80, 5e-4 and 256",
    ).add_argument
    add("--recipe", choices=("r1-zero", "r1"), help="r1-zero: RL alone; r1: cold start, RL, rejection sampling, RL")
    add("--cold-start", help="r1 with --model: long-form solutions, a file with the columns prompt and completion")
    add("--general", help="r1 with --model: samples of everything else, a file with the columns prompt and completion")
    add("--reward-model", help="r1 with --model: a sequence classifier that scores replies to the general prompts")
    add("--sft-learning-rate", type=float, default=1e-5, help="with --model, of supervised stages (default: 1e-5)")


def _train(options: argparse.Namespace) -> int:
    require("fastgrpo train", "train", "accelerate", "datasets", "matplotlib", "transformers")
    from fastgrpo.trainer.recipe_run import run_recipe
    from fastgrpo.trainer.run import UsageError, run

    try:
        if options.recipe is not None:
            run_recipe(options)
        else:
            run(options)
    except UsageError as error:
        print(f"fastgrpo train: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
