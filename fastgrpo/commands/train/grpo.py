"""`fastgrpo train` without a recipe: load, measure, train, measure again, and write it all down."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from types import ModuleType

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from fastgrpo import _defaults, rewards
from fastgrpo.commands.errors import UsageError, check_folder
from fastgrpo.commands.train.config import check_backend, check_round, make_config
from fastgrpo.commands.train.files import load_model, load_rows, split
from fastgrpo.commands.train.log import RunLog
from fastgrpo.commands.train.mistakes import OF_R1, checked, mistakes_are_shown, refuse
from fastgrpo.commands.train.report import plot_rewards
from fastgrpo.commands.train.tasks import has_products, held_out_count, one_thread_on_cpu
from fastgrpo.recipes import products, sums
from fastgrpo.trainer import terminal
from fastgrpo.trainer.checkpoints import last_whole_checkpoint, whole_folder
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.evaluate import SAMPLED_AT_ONCE, sampled_accuracy
from fastgrpo.trainer.grpo_trainer import GRPOTrainer


def run(options: argparse.Namespace) -> None:
    """Run `fastgrpo train`; the last line on stdout is `accuracy 0.xx -> 0.yy`.

    With a reward that does not compare with an answer it is `reward x -> y`, its mean over the held-out prompts.
    """
    with mistakes_are_shown(options.output_dir):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    refuse(options, OF_R1, "--recipe r1")
    is_tiny = options.model is None
    task, sizes = _embedded_task(options)
    reward_name = options.reward or sizes.reward
    reward_func, is_built_in = checked(rewards.resolve, reward_name), reward_name in rewards.BUILT_IN
    if is_tiny:
        refuse(options, ["dataset"], "--model: the model of the embedded task knows digits only")
    output = Path(options.output_dir)
    args = checked(make_config, options, output, sizes, is_tiny)
    checkpoint = _checkpoint(output, args) if options.resume else None
    needed = _columns_of(reward_func) if is_built_in else []
    train_set, held_out = _datasets(options, needed, reward_name, task or sums)
    check_round(args, len(train_set))
    check_backend(args)
    check_folder("--output-dir", output)
    model, tokenizer = _embedded_model(options, args, train_set) if is_tiny else load_model(options.model)
    model.to(args.device)

    def measure() -> float:
        return sampled_accuracy(
            model,
            tokenizer,
            held_out,
            reward_func,
            args.max_completion_length,
            temperature=options.temperature,
            samples=task.SAMPLES if task else 1,
            batch_size=SAMPLED_AT_ONCE if is_tiny else args.per_device_train_batch_size,
            seed=options.seed,
        )

    what = "accuracy" if "answer" in needed else "reward"
    # a built-in reward's complaint is about the columns; a function of the user's own keeps its traceback
    before = checked(measure) if is_built_in else measure()
    if args.process_index == 0:
        print(f"{what} before, on {len(held_out)} held-out prompts: {before:.2f}", flush=True)

    trainer = checked(lambda: GRPOTrainer(model, reward_func, args, train_set, processing_class=tokenizer))
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunLog(output / "metrics.jsonl"))
    trainer.train(checkpoint)
    after = measure()
    terminal.close()

    processes = (trainer.accelerator.wait_for_everyone, args.should_save, trainer.is_local_process_zero())
    with whole_folder(output / "model", *processes) as folder:
        trainer.save_model(folder)
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(folder)
    if trainer.is_world_process_zero():
        plot_rewards(trainer.state.log_history, output / "reward.png", what, before, after)
        print(f"model, metrics.jsonl and reward.png are in {output}")
        print(f"{what} {before:.2f} -> {after:.2f}", flush=True)


def _embedded_task(options: argparse.Namespace) -> tuple[ModuleType | None, _defaults.Sizes]:
    """The task of the package that the model is for, None for the user's rows; and the defaults."""
    if options.model is None:
        return sums, _defaults.SUMS
    if has_products(options):
        return products, _defaults.PRODUCTS
    return None, _defaults.MODEL


def _checkpoint(output: Path, args: GRPOConfig) -> str:
    """The checkpoint that --resume goes on from."""
    index = args.process_index
    checkpoint = last_whole_checkpoint(output, lambda path: GRPOTrainer.files_of_process(path, index))
    if checkpoint is None:
        raise UsageError(f"--resume: no checkpoint in {output} that is whole")
    return checkpoint


def _columns_of(reward_func: rewards.RewardFunc) -> list[str]:
    """The columns of the dataset that a built-in reward needs."""
    given = ("prompts", "completions", "completion_ids")
    parameters = inspect.signature(reward_func).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in given]


def _datasets(
    options: argparse.Namespace, needed: list[str], reward_name: str, task: ModuleType
) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows): the user's, or the task's; with the columns that the reward needs."""
    if options.dataset is not None:
        data = load_rows(options, needed, f"--reward {reward_name}")
        return split(data, options.held_out, options.seed)
    if not {"answer"}.issuperset(needed):
        raise UsageError(f"--reward {reward_name} needs a --dataset with the column {' and '.join(needed)}")
    return task.make_datasets(options.seed, held_out_count(options, task.HELD_OUT, task.MOST_HELD_OUT))


def _embedded_model(
    options: argparse.Namespace, args: GRPOConfig, train_set: Dataset
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that is made here, after its supervised warm start."""
    one_thread_on_cpu(args.device)
    tokenizer = sums.make_tokenizer()
    model = sums.make_model(tokenizer, options.seed).to(args.device)
    sums.warm_start(model, tokenizer, train_set, options.seed)
    return model, tokenizer
