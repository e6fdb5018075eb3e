"""Sampled accuracy: the share of sampled completions that a reward function holds to be right."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastgrpo.trainer.rewards import RewardFunc, call_reward_func
from fastgrpo.trainer.rollout import decode_completions, generate_completions, is_conversation, pad, tokenize_prompts
from fastgrpo.trainer.setup import end_tokens


def sampled_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset,
    reward_func: RewardFunc,
    max_completion_length: int,
    *,
    temperature: float = 1.0,
    samples: int = 1,
    batch_size: int = 512,
    seed: int = 0,
) -> float:
    """Mean reward of `samples` completions for each row of a dataset with `prompt` and the reward's columns.

    With the built-in rewards, 1 for right and 0 for wrong, that is an accuracy. Completions that the function does not
    judge are left out. The global random state is as before afterwards.
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
    rows = [dataset[i] for i in range(len(dataset))] * samples
    scores: list[float] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            prompts = [row["prompt"] for row in part]
            ids, mask = pad(tokenize_prompts(tokenizer, prompts), tokenizer.pad_token_id, "left", model.device)
            tokens = generate_completions(model, ids, mask, config)
            scores += call_reward_func(
                reward_func,
                getattr(reward_func, "__name__", "reward"),
                decode_completions(tokenizer, tokens, is_conversation(prompts[0])),
                prompts=prompts,
                completion_ids=tokens,
                trainer_state=None,
                log_metric=_ignore,
                log_extra=_ignore,
                **{name: [row[name] for row in part] for name in part[0] if name != "prompt"},
            )
    return torch.tensor(scores).nanmean().item()


def _ignore(*_) -> None:
    """Stands where the trainer would log."""
