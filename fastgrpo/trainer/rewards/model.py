"""A reward model as a reward function."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fastgrpo.trainer.rewards.scoring import RewardFunc
from fastgrpo.trainer.rollout import frozen, is_conversation


def model_reward(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, label: int | None = None, batch_size: int = 16
) -> RewardFunc:
    """The score that a sequence classifier gives to a prompt with its completion.

    A plain prompt and its completion are read as one text; a conversation goes through the classifier's own chat
    template. The model runs on the device that it is on, in evaluation mode and without gradients.

    Args:
        model: an `AutoModelForSequenceClassification`. With one output, the score is that logit; with several, the
            probability of the output `label`.
        tokenizer: the classifier's own, not the policy's; with a pad token.
        label: index of the output to read, for models with several.
        batch_size: texts in one forward pass.

    Raises:
        ValueError: a label that is missing, not needed or out of range; a tokenizer without a pad token;
            batch_size below 1.
    """
    outputs = model.config.num_labels
    if (label is None) != (outputs == 1) or (label is not None and not 0 <= label < outputs):
        expected = "None, since the model has one output" if outputs == 1 else f"an index below {outputs}"
        raise ValueError(f"label: expected {expected}, got {label!r}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: expected one with a pad token, got one without")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # a decoder reads its last token that is not padding

    def scores(texts: list[str], add_special_tokens: bool) -> list[float]:
        batch = tokenizer(texts, add_special_tokens=add_special_tokens, padding=True, return_tensors="pt")
        keep = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        logits = model(**keep).logits.float()
        return (logits[:, 0] if label is None else logits.softmax(-1)[:, label]).tolist()

    def reward_model(prompts: list, completions: list, **_: Any) -> list[float]:
        conversational = bool(prompts) and is_conversation(prompts[0])
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if conversational:
            texts = tokenizer.apply_chat_template(texts, tokenize=False)
        with frozen(model):
            return [
                score
                for start in range(0, len(texts), batch_size)
                # a chat template writes the special tokens itself
                for score in scores(texts[start : start + batch_size], add_special_tokens=not conversational)
            ]

    return reward_model
