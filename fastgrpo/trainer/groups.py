"""Prompts in groups: each as often in a row as completions are sampled of it, and whole rounds as batches."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from fastgrpo.trainer.base import HeadTrainer
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.setup import only_iterates


class RepeatSampler(Sampler[int]):
    """Indices of prompts: each `group_size` times in a row, each batch of `batch_size` prompts `repeat_count` times.

    With batch_size=2, group_size=3, repeat_count=2 and no shuffling: 000111 000111 222333 222333 …; prompts that do
    not fill a batch are left out. The repeats are there because the trainer asks for a batch at every micro-step, also
    where it goes on with the completions that it has. The order of every epoch is TRL's, and depends on seed and epoch
    only, so a resumed run sees the same one.
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
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.epoch + 1):  # TRL's generator lives on from epoch to epoch
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


class GroupTrainer(HeadTrainer):
    """A Trainer whose batches are groups; in training a batch is a whole round, asked for at every micro-step."""

    args: GRPOConfig
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: list[str] | None  # type: ignore[assignment]  # the Trainer declares its first value alone
    num_generations_eval: int  # of a group in evaluation

    @property
    def _requests_of_a_round(self) -> int:
        """How often the Trainer's loop asks for a micro-batch of the same completions."""
        return self.args.num_iterations * self._steps_per_generation

    @property
    def _steps_per_generation(self) -> int:
        """The micro-batches of a round."""
        assert self.args.steps_per_generation is not None  # as __post_init__ sees to
        return self.args.steps_per_generation

    @property
    def _prompts_of_a_round(self) -> int:
        assert self.args.generation_batch_size is not None  # as __post_init__ sees to
        return self.args.generation_batch_size // self.args.num_generations

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # what remove_unused_columns=True keeps
            self._signature_columns = ["prompt"]

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's, with the completions of a whole round as a batch."""
        args, dataset = self.args, self.train_dataset
        if only_iterates(dataset):
            shuffled = args.shuffle_dataset and hasattr(dataset, "shuffle")
            dataset = dataset.shuffle(seed=args.seed) if shuffled else dataset
            dataset = RepeatedRows(dataset, args.num_generations, self._prompts_of_a_round, self._requests_of_a_round)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * self._steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> RepeatSampler:
        args = self.args
        data = self.train_dataset if train_dataset is None else train_dataset
        prompts = self._prompts_of_a_round
        if len(data) < prompts:
            raise ValueError(
                f"train_dataset: expected at least the {prompts} prompts of one round of sampling "
                f"(generation_batch_size / num_generations), got {len(data)} rows"
            )
        return RepeatSampler(
            data,
            group_size=args.num_generations,
            batch_size=prompts,
            repeat_count=self._requests_of_a_round,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
        if eval_dataset is not None and only_iterates(eval_dataset):
            eval_dataset = RepeatedRows(eval_dataset, self.num_generations_eval)
        return super().get_eval_dataloader(eval_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> RepeatSampler:
        return RepeatSampler(eval_dataset, group_size=self.num_generations_eval, seed=self.args.seed)
