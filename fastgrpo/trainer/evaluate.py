"""Sampled completions of a dataset's prompts, and what reward functions hold of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastgrpo.models.calls import pad
from fastgrpo.rewards import RewardFunc, call_reward_func, completion_text, reward_arguments, reward_name
from fastgrpo.rewards.text import is_conversation, rendered
from fastgrpo.trainer.rollout import decode_completions, generate_completions, tokenize_prompts
from fastgrpo.trainer.setup import end_tokens
from fastgrpo.trainer.terminal import track

SAMPLED_AT_ONCE = 512  # completions; a tiny model's fit into any memory


@dataclass(frozen=True)
class Samples:
    """N sampled completions: the rows that they belong to, their texts, and their scores by name, NaN for no say."""

    rows: list[dict]
    completions: list[str]
    lengths: list[int]  # in tokens, the end token included
    scores: dict[str, list[float]]

    def mean(self, name: str) -> float:
        """Mean score over the completions that the function called `name` has scored; NaN without any."""
        return torch.tensor(self.scores[name]).nanmean().item()

    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    reward_funcs: Mapping[str, RewardFunc],
    max_completion_length: int,
    *,
    temperature: float = 1.0,
    samples: int = 1,
    batch_size: int = SAMPLED_AT_ONCE,
    seed: int = 0,
) -> Samples:
    """`samples` completions for each row of a dataset with `prompt` and the rewards' columns, scored by each function.

    Sampled from the whole distribution, whatever top-p and top-k training has. The global random state is as before
    afterwards.
    """
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer) or None,
        disable_compile=True,
    )
    device: Any = model.device
    rows = [dataset[i] for i in range(len(dataset))] * samples
    texts: list[str] = []
    lengths: list[int] = []
    scores: dict[str, list[float]] = {name: [] for name in reward_funcs}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in track("sampling", range(0, len(rows), batch_size)):
            part = rows[start : start + batch_size]
            prompts = [row["prompt"] for row in part]
            prompt_tokens = tokenize_prompts(tokenizer, prompts)
            ids, mask = pad(prompt_tokens, tokenizer.pad_token_id, "left", device)
            tokens = generate_completions(model, ids, mask, config)
            completions = decode_completions(tokenizer, tokens, is_conversation(prompts[0]))
            texts += map(completion_text, completions)
            lengths += map(len, tokens)
            arguments = reward_arguments(
                part,
                rendered(tokenizer, prompts, prompt_tokens),
                tokens,
                trainer_state=None,
                log_metric=_ignore,
                log_extra=_ignore,
            )
            for name, func in reward_funcs.items():
                scores[name] += call_reward_func(func, name, completions, **arguments)
    return Samples(rows, texts, lengths, scores)


def sampled_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    reward_func: RewardFunc,
    max_completion_length: int,
    **options: Any,
) -> float:
    """Mean reward of sampled completions, with the options of `sample`.

    With the built-in rewards, 1 for right and 0 for wrong, that is an accuracy. Completions that the function does not
    judge are left out.
    """
    name = reward_name(reward_func)
    return sample(model, tokenizer, dataset, {name: reward_func}, max_completion_length, **options).mean(name)


def _ignore(*_: Any) -> None:
    """Stands where the trainer would log."""
