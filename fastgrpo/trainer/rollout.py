"""From prompts to completions: tokenising, generation, and micro-batches of what was sampled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from fastgrpo.models.calls import AnyModel, frozen
from fastgrpo.models.head import unwrap
from fastgrpo.rewards.text import is_conversation
from fastgrpo.trainer.config import GRPOConfig, as_dict
from fastgrpo.trainer.sampling import SetRecorder
from fastgrpo.trainer.setup import as_list


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
        encoded: Any = tokenizer.apply_chat_template(
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
def _generation_config(model: AnyModel, config: GenerationConfig) -> Iterator[None]:
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


def make_generation_config(args: GRPOConfig, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> GenerationConfig:
    """How `args` says that completions are sampled; `ends` are the tokens that end one."""
    options = dict(
        max_new_tokens=args.max_completion_length,
        do_sample=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        cache_implementation=args.cache_implementation,
        disable_compile=True,  # each new length would compile again
    )
    return GenerationConfig(**{**options, **as_dict(args.generation_kwargs)})


def generate_completions(
    model: AnyModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    recorder: SetRecorder | None = None,
) -> list[list[int]]:
    """One sampled completion per row of prompt_ids (B, P), left-padded; each ends with its end token or is cut off."""
    options: dict[str, Any] = {}
    if recorder is not None:
        config, options = recorder.plain, {"logits_processor": LogitsProcessorList([recorder])}
    with frozen(model), _generation_config(model, config):
        output = model.generate(input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=config, **options)
    ends = as_list(config.eos_token_id)
    completions = []
    for row in output[:, prompt_ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        completions.append(row[: end + 1])
    return completions


def gather_mask(mask: Tensor) -> Tensor:
    """The masks of all processes' completions, of the longest one's length; `mask` (B, T) is padded on the right."""
    lengths = gather(mask.sum(1))
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def own_advantages(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(advantages (B,), or (B, T) of the mask's length; (B,) their means over each completion)."""
    if advantages.dim() == 1:
        return advantages, advantages
    advantages = nn.functional.pad(advantages, (0, mask.shape[1] - advantages.shape[1]))  # or cut, where that is < 0
    return advantages, advantages.sum(1) / mask.sum(1).clamp(min=1)


def shuffle_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same random order of rows for every tensor with rows."""
    order = torch.randperm(len(batch["completion_ids"]))
    return {name: x[order.to(x.device)] if x.dim() else x for name, x in batch.items()}


def split_rows(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """`parts` equal batches; a 0-dim tensor goes to each."""
    size = len(batch["completion_ids"]) // parts
    return [{name: x[i * size : (i + 1) * size] if x.dim() else x for name, x in batch.items()} for i in range(parts)]
