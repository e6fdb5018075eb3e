"""The datasets and the models that the options of `fastgrpo train` name."""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fastgrpo import _defaults
from fastgrpo.commands.errors import UsageError
from fastgrpo.recipes import smollm2
from fastgrpo.rewards.text import is_conversation

_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_KINDS = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
_LEADING_BYTES = 100  # of a JSON file, in which a list begins
_SHOWN_LENGTH = 60  # characters of a line in an error


def load_rows(options: argparse.Namespace, needed: list[str], wanted_by: str) -> Dataset:
    """The dataset with its columns renamed to `prompt` and `answer`, and with the columns that `wanted_by` needs."""
    data = load_table("--dataset", options.dataset, options.dataset_config, options.split)
    columns = {**{column: column for column in needed}, "prompt": options.prompt_column}
    for wanted, column in {**columns, "answer": options.answer_column}.items():
        if column in data.column_names:
            if column != wanted:  # it takes the place of one that has the name already
                data = data.select_columns([name for name in data.column_names if name != wanted])
                data = data.rename_column(column, wanted)
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
    name = os.path.expanduser(name)
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
            if path.suffix == ".json" and file.read(_LEADING_BYTES).lstrip()[:1] == b"[":
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
    return repr(text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 3] + "...")


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
    """The model and its tokenizer, of a hub id, a folder or the name smollm2; `kind` is an AutoModel class.

    The tokenizer of a causal language model pads on the left, for generation, another on the side that it was saved
    with.
    """
    if name == smollm2.NAME and kind is AutoModelForCausalLM:
        return smollm2.load(f"{argument} {name}")
    name = os.path.expanduser(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.isdir(name):
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
