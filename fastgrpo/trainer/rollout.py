"""From prompts to padded completions: the sampler that keeps groups whole, tokenising, generation, splitting."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Sampler
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastgrpo.models.calls import frozen
from fastgrpo.models.head import unwrap
from fastgrpo.rewards.text import is_conversation
from fastgrpo.trainer.setup import as_list


class RepeatSampler(Sampler[int]):
    """Indices of prompts: each `group_size` times in a row, each batch of `batch_size` prompts `repeat_count` times.

    With batch_size=2, group_size=3, repeat_count=2 and no shuffling: 000111 000111 222333 222333 …; prompts that do
    not fill a batch are left out. The repeats are there because the trainer asks for a batch at every micro-step, also
    where it goes on with the completions that it has. Order depends on seed and epoch only, so a resumed run sees the
    same one.
    """

    def __init__(
        self,
        data: Sized,
        group_size: int,
        batch_size: int = 1,
        repeat_count: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ):
        self.num_prompts = len(data)
        self.group_size, self.batch_size, self.repeat_count = group_size, batch_size, repeat_count
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        for start in range(0, self.num_prompts - self.batch_size + 1, self.batch_size):
            for _ in range(self.repeat_count):
                for index in order[start : start + self.batch_size]:
                    yield from [index] * self.group_size

    def __len__(self) -> int:
        return self.num_prompts // self.batch_size * self.batch_size * self.group_size * self.repeat_count


class RepeatedRows(IterableDataset):
    """The rows of a dataset that can only be iterated, in the order in which RepeatSampler has their indices."""

    def __init__(self, rows: Iterable[dict[str, Any]], group_size: int, batch_size: int = 1, repeat_count: int = 1):
        self.rows = rows
        self.group_size, self.batch_size, self.repeat_count = group_size, batch_size, repeat_count

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.rows)
        while len(batch := list(itertools.islice(rows, self.batch_size))) == self.batch_size:
            for row in itertools.chain.from_iterable([batch] * self.repeat_count):
                yield from (copy.deepcopy(row) for _ in range(self.group_size))


def without_added_end(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """Token ids of a text that goes on, without the end token that the tokenizer puts behind every text."""
    end = tokenizer.eos_token_id
    if not ids or ids[-1] != end:
        return ids
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    own, all_ = (len(list(itertools.takewhile(end.__eq__, reversed(x)))) for x in (plain, ids))
    return ids[: len(ids) - max(all_ - own, 0)]


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list, **chat_template_kwargs: Any
) -> list[list[int]]:
    """Token ids of each prompt; a list of messages goes through the chat template."""
    if is_conversation(prompts[0]):
        encoded = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
        )
    else:
        encoded = tokenizer(text=prompts)
        return [without_added_end(tokenizer, *pair) for pair in zip(prompts, encoded["input_ids"], strict=True)]
    return encoded["input_ids"]


def decode_completions(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], conversational: bool) -> list:
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts


@contextlib.contextmanager
def _generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    # `generate` fills what it takes for unset from the model's own config, and takes the library's default values for
    # unset: temperature 1 would become the checkpoint's 0.7. So the model's own config has to step aside.
    owners = list({id(m): m for m in (model, unwrap(model))}.values())
    saved = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, saved, strict=True):
            owner.generation_config = own


def generate_completions(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, config: GenerationConfig
) -> list[list[int]]:
    """One sampled completion per row of prompt_ids (B, P), left-padded; each ends with its end token or is cut off."""
    with frozen(model), _generation_config(model, config):
        output = model.generate(input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=config)
    ends = as_list(config.eos_token_id)
    completions = []
    for row in output[:, prompt_ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        completions.append(row[: end + 1])
    return completions


def shuffle_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same random order of rows for every tensor with rows."""
    order = torch.randperm(len(batch["completion_ids"]))
    return {name: x[order.to(x.device)] if x.dim() else x for name, x in batch.items()}


def split_rows(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """`parts` equal batches; a 0-dim tensor goes to each."""
    size = len(batch["completion_ids"]) // parts
    return [{name: x[i * size : (i + 1) * size] if x.dim() else x for name, x in batch.items()} for i in range(parts)]
