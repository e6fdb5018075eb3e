"""The averages by name: how the losses of tokens become one number, whatever the loss of a token is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.batch.checks import wrong
from fastgrpo.batch.layout import Padded

Options = Any  # an Objective, which stands above its averages and losses


class Average(NamedTuple):
    """How tokens are averaged.

    Args:
        weights: (N,) the factor of each token's loss from (objective, batch, the mask in numbers).
        counts: what `num_items_in_batch` numbers, "tokens", "sequences" or "prompts"; None: it is not read.
        needs: the option that must be given.
    """

    weights: Callable[[Options, Batch, Tensor], Tensor]
    counts: str | None = None
    needs: str | None = None


def per_sequence(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / (B |o|): the mean over sequences of their mean over tokens."""
    return _mean_of_sequence(batch, mask) / max(batch.layout.num_sequences, 1)


def per_token(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / N: the mean over this batch's tokens."""
    return mask / mask.sum().clamp(min=1)


def per_item(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / D: the mean over all tokens of an optimiser's step, where their number is given; else over this batch's."""
    return mask / batch.num_items(mask.sum())


def per_length(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / (B L): the sum over tokens, over the number of sequences times a constant length."""
    assert o.max_completion_length is not None  # as the average says
    return mask / (max(batch.layout.num_sequences, 1) * o.max_completion_length)


def summed(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / B: the mean over sequences of their sum over tokens."""
    return mask / max(batch.layout.num_sequences, 1)


def over_sequences(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / S: S is the step's number of sequences, where it is given; else of those here that have a loss token."""
    return mask / _sequences(batch, mask)


def mean_over_sequences(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / (S |o|)"""
    return _mean_of_sequence(batch, mask) / _sequences(batch, mask)


def length_over_sequences(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / (S L), L being `max_completion_length`, or the length of padded completions."""
    length = o.max_completion_length
    if length is None:
        if not isinstance(batch.layout, Padded):
            raise wrong("max_completion_length", "a number > 0 with 'seq-mean-token-sum-norm' of packed inputs", None)
        length = max(batch.layout.length, 1)
    return over_sequences(o, batch, mask) / length


def total(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m: the sum over tokens, for `token_weights` to weigh."""
    return mask


def per_prompt(o: Options, batch: Batch, mask: Tensor) -> Tensor:
    """m / (P n), n being the loss tokens of all completions of a prompt: the mean over prompts of the mean over those.

    P is the step's number of prompts, where it is given; else of those here that have a loss token.
    """
    groups = batch.prompts()
    if groups is None:
        raise wrong("num_generations, group_ids", "one of the two with the average 'prompt-mean'", None)
    lengths = batch.layout.seq_sum(mask)  # (S,)
    tokens = lengths.new_zeros(lengths.shape).index_add_(0, groups, lengths)  # by group, of which there are at most S
    return mask / batch.layout.to_rows(tokens[groups].clamp(min=1)) / batch.num_items((tokens > 0).sum())


def _mean_of_sequence(batch: Batch, mask: Tensor) -> Tensor:
    layout = batch.layout
    return mask / layout.to_rows(layout.seq_sum(mask).clamp(min=1))


def _sequences(batch: Batch, mask: Tensor) -> Tensor | float:
    return batch.num_items((batch.layout.seq_sum(mask) > 0).sum())


AVERAGES: dict[str, Average] = {
    # TRL's, under the names of the loss types that use them
    "grpo": Average(per_sequence),
    "bnpo": Average(per_token),
    "dr_grpo": Average(per_length, needs="max_completion_length"),
    "dapo": Average(per_item, "tokens"),
    "luspo": Average(summed),
    # verl's loss_agg_mode
    "token-mean": Average(per_item, "tokens"),
    "seq-mean-token-mean": Average(mean_over_sequences, "sequences"),
    "seq-mean-token-sum": Average(over_sequences, "sequences"),
    "seq-mean-token-sum-norm": Average(length_over_sequences, "sequences"),
    "token-sum": Average(total),
    "prompt-mean": Average(per_prompt, "prompts"),
}
