"""What the trainer checks and prepares before it starts: datasets, the tokenizer, end tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments


def only_iterates(dataset: Any) -> bool:
    """Whether a dataset has no length or no rows by index, such as one that is streamed."""
    return not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def check_dataset(name: str, dataset: Any, needed: Sequence[str] = ("prompt",)) -> None:
    """Raise unless `dataset` is None, or has rows, by index or to iterate over, with the needed columns."""
    if dataset is None:
        return
    if only_iterates(dataset) and (not hasattr(dataset, "__iter__") or hasattr(dataset, "__next__")):
        raise TypeError(
            f"{name}: expected a dataset with rows by index, or one to iterate over again and again, got "
            f"{type(dataset).__name__}"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None and only_iterates(dataset):
        columns = next(iter(dataset), [])
    elif not columns:
        columns = list(dataset[0]) if len(dataset) else []
    for column in needed:
        if column not in columns:
            raise ValueError(f"{name}: expected a column {column!r}, got the columns {', '.join(columns) or 'none'}")


def prepare_to_iterate(args: TrainingArguments, datasets: Sequence[Any]) -> None:
    """Set what the loader needs for datasets that can only be iterated: each process reads them itself."""
    if not any(dataset is not None and only_iterates(dataset) for dataset in datasets):
        return
    if args.accelerator_config.dispatch_batches:
        raise ValueError("dispatch_batches: expected False with a dataset that can only be iterated, got True")
    args.accelerator_config.dispatch_batches = False
    if args.dataloader_num_workers != 0:
        warnings.warn(
            f"a dataset that can only be iterated is read by one worker, not by {args.dataloader_num_workers}",
            stacklevel=3,
        )
        args.dataloader_num_workers = 0


def prepare_tokenizer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer, loaded from the model's path if None, with a pad token that the model's configs agree on."""
    config = model.config.get_text_config()
    if tokenizer is None:
        path = model.config._name_or_path
        if not path:
            raise ValueError("processing_class: expected a tokenizer, since the model was not loaded from a path")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class: expected a tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("processing_class: expected a tokenizer with a pad or an eos token, got neither")
    config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: a model may end its turn with another one than the tokenizer's."""
    ends = as_list(model.generation_config.eos_token_id)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    return ends


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    """Token ids as a generation config has them: none, one or several."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def warn_of_router_loss(model: nn.Module) -> None:
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0):
        warnings.warn("the load-balancing loss of experts models is not part of the objective", stacklevel=3)
