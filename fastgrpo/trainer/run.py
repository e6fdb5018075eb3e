"""What `fastgrpo train` does: load, measure, train, measure again, and write it all down."""

from __future__ import annotations

import argparse
import contextlib
import errno
import inspect
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from fastgrpo import _defaults, backends
from fastgrpo.commands.errors import UsageError, check_folder
from fastgrpo.trainer import embedded, rewards, terminal
from fastgrpo.trainer.checkpoints import (
    DiskFull,
    ResumeError,
    append_whole,
    last_whole_checkpoint,
    raise_if_full,
    whole_folder,
    write_whole,
)
from fastgrpo.trainer.config import CHECKPOINTING, GRPOConfig
from fastgrpo.trainer.evaluate import sampled_accuracy
from fastgrpo.trainer.grpo_trainer import GRPOTrainer
from fastgrpo.trainer.rollout import is_conversation

# what the system says about a disk, not about a program
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_KINDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


@contextlib.contextmanager
def mistakes_are_shown(folder: str | Path) -> Iterator[None]:
    """Turn a checkpoint of another run into a UsageError, and what cannot be written in the output folder.

    Any other error keeps its traceback: the files are then a reward function's, or nobody knows whose.
    """
    try:
        yield
    except ResumeError as error:
        raise UsageError(f"--resume: {error}") from error
    except DiskFull as error:  # of what we write there
        raise UsageError(f"--output-dir: {error.strerror}") from error
    except OSError as error:
        if error.errno not in _OF_THE_DISK or not _is_below(error.filename, folder):
            raise
        file = os.fsdecode(error.filename)
        message = f"{file}: {error.strerror}"
        try:
            raise_if_full(error, file)
        except DiskFull as full:  # says what is free
            message = full.strerror
        raise UsageError(f"--output-dir: {message}") from error


def _is_below(name: Any, folder: str | Path) -> bool:
    """Whether a file, as an OSError names it, is `folder` or lies in it."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    return Path(os.path.abspath(os.fsdecode(name))).is_relative_to(os.path.abspath(folder))


def run(options: argparse.Namespace) -> None:
    """Run `fastgrpo train`; the last line on stdout is `accuracy 0.xx -> 0.yy`.

    With a reward function of the user's own it is `reward x -> y`, its mean over the held-out prompts.
    """
    with mistakes_are_shown(options.output_dir):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    for name in ("cold_start", "general", "reward_model"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs --recipe r1")
    is_embedded = options.model is None
    reward_name = options.reward or _defaults.REWARD
    reward_func = checked(rewards.resolve, reward_name)
    if is_embedded and options.dataset is not None:
        raise UsageError("--dataset needs --model: the model of the embedded task knows digits only")
    output = Path(options.output_dir)
    args = checked(make_config, options, output, _defaults.SUMS if is_embedded else _defaults.MODEL, is_embedded)
    checkpoint = None
    if options.resume:
        index = args.process_index
        checkpoint = last_whole_checkpoint(output, lambda path: GRPOTrainer.files_of_process(path, index))
        if checkpoint is None:
            raise UsageError(f"--resume: no checkpoint in {output} that is whole")

    needed = _columns_of(reward_func) if reward_name in rewards.BUILT_IN else []
    if options.dataset is None and not {"answer"}.issuperset(needed):
        raise UsageError(f"--reward {reward_name} needs a --dataset with the column {' and '.join(needed)}")
    if options.dataset is None:
        count = embedded.HELD_OUT if options.held_out is None else options.held_out
        if not 0 < count <= 500:
            raise UsageError(f"--held-out: expected between 1 and 500 of the embedded questions, got {count}")
        train_set, held_out = embedded.make_datasets(options.seed, count)
    else:
        data = load_rows(options, needed, f"--reward {reward_name}")
        train_set, held_out = split(data, options.held_out, options.seed)
    check_round(args, len(train_set))
    check_backend(args)
    check_folder("--output-dir", output)
    if is_embedded:
        if args.device.type == "cpu":
            # a second thread saves a model this small nothing, and costs a lot where other work shares the cores
            torch.set_num_threads(1)
        tokenizer = embedded.make_tokenizer()
        model = embedded.make_model(tokenizer, options.seed).to(args.device)
        embedded.warm_start(model, tokenizer, train_set, options.seed)
    else:
        model, tokenizer = load_model(options.model)
        model.to(args.device)

    def measure() -> float:
        return sampled_accuracy(
            model,
            tokenizer,
            held_out,
            reward_func,
            args.max_completion_length,
            temperature=options.temperature,
            samples=2 if is_embedded else 1,
            batch_size=512 if is_embedded else args.per_device_train_batch_size,
            seed=options.seed,
        )

    what = "accuracy" if "answer" in needed else "reward"
    # a built-in reward's complaint is about the columns; a function of the user's own keeps its traceback
    before = checked(measure) if reward_name in rewards.BUILT_IN else measure()
    if args.process_index == 0:
        print(f"{what} before, on {len(held_out)} held-out prompts: {before:.2f}", flush=True)

    trainer = checked(lambda: GRPOTrainer(model, reward_func, args, train_set, processing_class=tokenizer))
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    log = RunLog(output / "metrics.jsonl")
    trainer.add_callback(log)
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


def _columns_of(reward_func: rewards.RewardFunc) -> list[str]:
    """The columns of the dataset that a built-in reward needs."""
    given = ("prompts", "completions", "completion_ids")
    parameters = inspect.signature(reward_func).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in given]


def checked(function, *args: Any) -> Any:
    """function(*args), with its complaints about what it was given turned into a UsageError."""
    try:
        return function(*args)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_config(options: argparse.Namespace, output_dir: Path, defaults: _defaults.Sizes, is_tiny: bool) -> GRPOConfig:
    """The options, and where they are None the defaults; a tiny model gains nothing from saving memory."""
    on_gpu = torch.cuda.is_available()
    names = ("max_completion_length", "steps", "learning_rate", "batch_size")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    sizes = defaults._replace(**given)
    return GRPOConfig(
        output_dir=str(output_dir),
        use_cpu=not on_gpu,
        bf16=on_gpu and not is_tiny,
        report_to="none",
        loss_type=options.loss_type,
        beta=options.beta,
        num_generations=options.num_generations,
        num_iterations=options.num_iterations,
        temperature=options.temperature,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        logging_steps=1,
        save_strategy="steps" if options.save_steps > 0 else "no",
        save_steps=options.save_steps,
        save_total_limit=1,
        seed=options.seed,
        backend=options.backend,
        dataloader_pin_memory=on_gpu,
        **{CHECKPOINTING: on_gpu and not is_tiny},
        max_completion_length=sizes.max_completion_length,
        max_steps=sizes.steps,
        learning_rate=sizes.learning_rate,
        warmup_steps=sizes.warmup_steps,
        per_device_train_batch_size=sizes.batch_size,
    )


def check_backend(args: GRPOConfig) -> None:
    """Raise a UsageError unless the backend asked for can run here."""
    if args.backend == "auto":
        return
    backend = backends.get(args.backend)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    why = backend.unavailable() or backend.refuses(backends.Call(args.device.type, args.device.index, dtype, 1))
    if why is not None:
        raise UsageError(f"--backend: {args.backend} cannot be used here: {why}")


def check_round(args: GRPOConfig, count: int) -> None:
    """Raise a UsageError unless `count` training prompts are enough for a round of sampling."""
    prompts = args.generation_batch_size // args.num_generations
    if count < prompts:
        raise UsageError(
            f"--batch-size: expected no more completions in a round than {count} training prompts have with "
            f"--num-generations {args.num_generations}, got {args.generation_batch_size} (--batch-size times "
            "--gradient-accumulation-steps times processes)"
        )


def load_rows(options: argparse.Namespace, needed: list[str], wanted_by: str) -> Dataset:
    """The dataset with its columns renamed to `prompt` and `answer`, and with the columns that `wanted_by` needs."""
    data = load_table("--dataset", options.dataset, options.dataset_config, options.split)
    columns = {**{column: column for column in needed}, "prompt": options.prompt_column}
    for wanted, column in {**columns, "answer": options.answer_column}.items():
        if column in data.column_names:
            data = data if column == wanted else data.rename_column(column, wanted)
        elif wanted in columns:
            require_column(data, "--dataset", options.dataset, column, "" if wanted == "prompt" else wanted_by)
    check_texts(data, "--dataset", options.dataset)
    for column in needed:
        if None in (values := data[column][:]):
            row = values.index(None) + 1
            raise UsageError(f"--dataset: {options.dataset}, row {row}: no {column!r} (for {wanted_by})")
    return data


def load_table(argument: str, name: str, config: str | None = None, split: str = _defaults.SPLIT) -> Dataset:
    """A JSONL or Parquet file, or a dataset of the hub."""
    path = Path(name)
    kind = _FILE_TYPES.get(path.suffix)
    is_file = os.path.isfile(path)  # unlike the path's own, it answers whatever the name is
    if kind is None and is_file:
        raise UsageError(f"{argument}: expected a file that ends in {', '.join(_FILE_TYPES)}, got {name}")
    if not os.path.exists(path) and (kind is not None or name.startswith((".", "/", "~"))):
        raise UsageError(f"{argument}: no such file: {name}")
    if is_file and (config is not None or split != _defaults.SPLIT):
        option = "--split" if config is None else "--dataset-config"
        raise UsageError(f"{option}: expected a hub dataset, got the file {name}")
    if is_file and kind == "json":
        check_json(argument, path)
    try:
        if kind is not None:
            return load_dataset(kind, data_files=str(path), split="train")
        return load_dataset(name, config, split=split)
    except Exception as error:  # of many types: a broken file, an unknown id, no network
        raise UsageError(f"{argument}: {name} cannot be loaded: {error.__cause__ or error}") from error


def check_json(argument: str, path: Path) -> None:
    """Raise a UsageError with the line's number unless each line of a file is an object, or the file a list of them.

    A column has to have values of one kind, or null.
    """

    def wrong(number: int, problem: str) -> UsageError:
        return UsageError(f"{argument}: {path}, line {number}: {problem}")

    kinds: dict[str, tuple[str, int]] = {}
    try:
        with path.open("rb") as file:
            if path.suffix == ".json" and file.read(100).lstrip()[:1] == b"[":
                json.loads(path.read_bytes())
                return
            file.seek(0)
            number = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    raise wrong(number, "expected UTF-8 text") from error
                except json.JSONDecodeError as error:
                    raise wrong(number, f"expected a JSON object, got {_shortened(line)}") from error
                if not isinstance(row, dict):
                    raise wrong(number, f"expected a JSON object, got {_shortened(line)}")
                for name, value in row.items():
                    if value is None:
                        continue
                    kind = _KINDS[type(value)]
                    known, first = kinds.setdefault(name, (kind, number))
                    if kind != known:
                        raise wrong(number, f"expected {name!r} to be {known} as in line {first}, got {kind}")
    except json.JSONDecodeError as error:  # of a list of objects
        raise wrong(error.lineno, f"expected JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{argument}: {path}: expected UTF-8 text") from error
    except OSError as error:
        raise UsageError(f"{argument}: {path} cannot be read: {error.strerror}") from error
    if not kinds:
        raise UsageError(f"{argument}: expected rows in {path}, found none")


def _shortened(line: bytes) -> str:
    text = line.decode().strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def check_texts(data: Dataset, argument: str, name: str, column: str = "prompt") -> None:
    """Raise a UsageError with the row's number unless a column has texts alone, or lists of messages alone."""
    first = None
    for number, value in enumerate(data[column], 1):
        kind = "a text" if isinstance(value, str) else "a list of messages" if is_conversation(value) else None
        first = first or kind
        if kind is None or kind != first:
            expected = first or "a text or a list of messages"
            raise UsageError(f"{argument}: {name}, row {number}: expected {expected} as {column}, got {value!r}")


def require_column(data: Dataset, argument: str, name: str, column: str, wanted_by: str = "") -> None:
    """Raise a UsageError unless the dataset called `name` has the column."""
    if column not in data.column_names:
        reason = f" (for {wanted_by})" if wanted_by else ""
        raise UsageError(
            f"{argument}: {name} has no column {column!r}{reason}; its columns are {', '.join(data.column_names)}"
        )


def split(data: Dataset, held_out: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows), drawn at random."""
    if len(data) < 2:
        raise UsageError(f"--dataset: expected at least 2 rows, one of them to be held out, got {len(data)}")
    count = max(1, min(_defaults.MOST_HELD_OUT, len(data) // 10)) if held_out is None else held_out
    if not 0 < count < len(data):
        raise UsageError(f"--held-out: expected between 1 and {len(data) - 1} of the dataset's rows, got {count}")
    order = random.Random(seed).sample(range(len(data)), len(data))
    return data.select(order[count:]), data.select(order[:count])


def load_model(
    name: str, argument: str = "--model", kind: Any = AutoModelForCausalLM
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model and its tokenizer, of a hub id or a folder; `kind` is one of transformers' AutoModel classes.

    The tokenizer of a causal language model pads on the left, for generation, another on the side that it was saved
    with.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.isdir(os.path.expanduser(name)):
        raise UsageError(f"{argument}: no such folder: {name}")
    try:
        # fp32 weights: at GRPO's learning rates most updates would round away in bf16
        model = kind.from_pretrained(name, dtype=torch.float32)
        side = {"padding_side": "left"} if kind is AutoModelForCausalLM else {}
        tokenizer = AutoTokenizer.from_pretrained(name, **side)
    except Exception as error:  # of many types: an unknown id, no network, a broken file of weights, a missing package
        raise UsageError(f"{argument}: {name} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


class RunLog(TrainerCallback):
    """The run's progress bar with the reward or the loss, and every logged step as a line of metrics.jsonl.

    Without a `stage`, the file is written afresh. With one, lines are appended, each with a field for the stage, and
    the bar has its name.
    """

    def __init__(self, path: Path, stage: str | None = None):
        self.path, self.stage, self.bar = path, stage, None

    def _line(self, entry: dict) -> str:
        return json.dumps(entry if self.stage is None else {"stage": self.stage, **entry}) + "\n"

    def on_train_begin(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a resumed run continues the file up to its checkpoint; a new one starts it afresh
            write = write_whole if self.stage is None else append_whole
            write(self.path, "".join(map(self._line, state.log_history)))
            name = self.stage or "GRPO"
            self.bar = terminal.start(name, state.max_steps, state.global_step)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if self.bar is None:
            return
        append_whole(self.path, self._line({**logs, "step": state.global_step}))
        name = "reward" if "reward" in logs else "loss"
        if logs.get(name) is not None:
            self.bar.set_postfix({name: f"{logs[name]:.2f}"}, refresh=False)

    def on_step_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_train_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.finish()


def plot_rewards(history: list[dict], path: Path, what: str, before: float, after: float) -> None:
    """The reward of each step, its running mean, and the held-out figure before and after, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(entry["step"], entry["reward"]) for entry in history if entry.get("reward") is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    window = max(1, len(values) // 20)
    running = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no display is asked for, whatever the environment's default
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, label="reward, each step")
    axes.plot(steps, running, color="tab:blue", label=f"reward, mean of {window} steps")
    axes.axhline(before, color="tab:grey", linestyle=":", label=f"held-out {what} before: {before:.2f}")
    axes.axhline(after, color="tab:green", linestyle="--", label=f"held-out {what} after: {after:.2f}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean reward")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
