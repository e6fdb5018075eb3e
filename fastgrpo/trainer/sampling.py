"""What a sampler kept: recorded while `generate` truncates, and carried beside a batch's completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgrpo.batch.kept import kept_sets

# other truncations of `generate`, which it applies behind its caller's
OTHER_TRUNCATIONS = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
_PLAIN = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=None)


class Sampled(NamedTuple):
    """Sampled completions, and what was kept at each of their tokens."""

    completions: list[list[int]]
    kept: Sequence[Sequence[Any]]  # for each completion, for each token, ids or None


def truncates(config: GenerationConfig) -> bool:
    """Whether top_k, top_p or min_p take tokens out of the distribution."""
    return bool(config.top_k or (config.top_p or 1.0) < 1.0 or config.min_p)


class SetRecorder(LogitsProcessor):
    """Does what `generate` does with temperature, top_k, top_p and min_p, and notes which tokens are left.

    `generate` runs its caller's processors before its own temperature and truncation, so these are done here, and
    `plain` is the configuration without them.
    """

    def __init__(self, config: GenerationConfig):
        self.plain = GenerationConfig(**{**config.to_dict(), **_PLAIN})
        self._warpers = LogitsProcessorList()
        if config.temperature not in (None, 1.0):
            self._warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self._warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            self._warpers.append(MinPLogitsWarper(config.min_p))
        self._rows: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._counts: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = self._warpers(input_ids, scores)
        kept = scores.isfinite()
        rows, ids = kept.nonzero(as_tuple=True)
        self._rows.append(rows.int())
        self._ids.append(ids.int())
        self._counts.append(kept.sum(-1))
        return scores

    def sets(self, completions: list[list[int]]) -> list[list[Tensor]]:
        """What was kept for each token of these completions."""
        order = torch.cat(self._rows).argsort(stable=True)
        counts = torch.stack(self._counts, dim=1).cpu()  # (B, steps)
        of_token = torch.cat(self._ids)[order].cpu().split(counts.flatten().tolist())
        steps = counts.shape[1]
        return [list(of_token[i * steps : i * steps + length]) for i, length in enumerate(map(len, completions))]


def pack_sets(
    kept: Sequence[Sequence[Any]] | None, completion_ids: Tensor, *, needed: bool = False
) -> dict[str, Tensor]:
    """The sets of B completions as tensors with B rows: the ids of a completion, one token after the other, (B, L)
    int32 with -1 behind them, and how many belong to each of its tokens, like completion_ids (B, T).

    Args:
        kept: None: no token has one, which is a ValueError where they are `needed`.
    """
    if kept is None and needed:
        raise ValueError("keep_sampling_mask: expected a sampler that gives `Sampled`, got completions alone")
    (count, width), device = completion_ids.shape, completion_ids.device
    kept = [()] * count if kept is None else kept
    flat = [kept_sets([*tokens, *[None] * (width - len(tokens))]) for tokens in kept]
    ids = pad_sequence([x.kept_ids.int() for x in flat], batch_first=True, padding_value=-1)
    counts = torch.stack([x.kept_offsets.diff() for x in flat])
    return {"kept_ids": ids.to(device), "kept_counts": counts.to(device)}


def sets_of(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The keywords of a loss, or of logps, for the sets that a batch carries, if it does."""
    if "kept_ids" not in batch:
        return {}
    ids, counts = batch["kept_ids"], batch["kept_counts"]
    own = torch.arange(ids.shape[1], device=ids.device) < counts.sum(1, keepdim=True)
    return kept_sets(ids[own], counts)._asdict()
