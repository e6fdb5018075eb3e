"""What the trainer checks and prepares before it starts: datasets, the tokenizer, end tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def check_dataset(name: str, dataset: Any, needed: Sequence[str] = ("prompt",)) -> None:
    """Raise unless `dataset` is None, or has a length, rows by index and the needed columns."""
    if dataset is None:
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name}: expected a dataset with a length and rows by index, got {type(dataset).__name__}")
    columns = getattr(dataset, "column_names", None) or (list(dataset[0]) if len(dataset) else [])
    for column in needed:
        if column not in columns:
            raise ValueError(f"{name}: expected a column {column!r}, got the columns {', '.join(columns) or 'none'}")


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
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    return ends


def warn_of_router_loss(model: nn.Module) -> None:
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0):
        warnings.warn("the load-balancing loss of experts models is not part of the objective", stacklevel=3)
