"""A reward model as a reward function."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch

from fastgrpo.models.calls import frozen, pad
from fastgrpo.rewards.scoring import RewardFunc
from fastgrpo.rewards.text import is_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_reward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, label: int | None = None, batch_size: int = 16
) -> RewardFunc:
    """The score that a sequence classifier gives to a prompt with its completion.

    A plain prompt and its completion are read as one text; a conversation goes through the classifier's own chat
    template. The model runs on the device that it is on, in evaluation mode and without gradients. A config without a
    pad token gets the tokenizer's.

    A score does not depend on the other texts: batches are padded on the right, on whatever side the tokenizer pads;
    and for a model that reads its padding (the first call finds out, and warns), only texts of one length are a batch.

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
    outputs: Any = model.config.num_labels
    if (label is None) != (outputs == 1) or (label is not None and not 0 <= label < outputs):
        expected = "None, since the model has one output" if outputs == 1 else f"an index below {outputs}"
        raise ValueError(f"label: expected {expected}, got {label!r}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: expected one with a pad token, got one without")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # a decoder reads its last token that is not padding

    is_padded: bool | None = None  # decided at the first batch of texts of several lengths

    def scores(rows: list[list[int]]) -> list[float]:
        ids, mask = pad(rows, tokenizer.pad_token_id, "right", model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        return (logits[:, 0] if label is None else logits.softmax(-1)[:, label]).tolist()

    def reward_model(prompts: list, completions: list, **_: Any) -> list[float]:
        nonlocal is_padded
        conversational = bool(prompts) and is_conversation(prompts[0])
        texts: Any = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if conversational:
            texts = tokenizer.apply_chat_template(texts, tokenize=False)
        # a chat template writes the special tokens itself
        rows = tokenizer(texts, add_special_tokens=not conversational)["input_ids"] if texts else []
        lengths = {len(row) for row in rows}
        with frozen(model):
            if is_padded is None and batch_size > 1 and len(lengths) > 1:
                short, long = min(rows, key=len), max(rows, key=len)
                tolerance = 1e-3 if model.dtype == torch.float32 else 0.02
                both, alone = scores([short, long])[0], scores([short])[0]
                is_padded = math.isclose(both, alone, rel_tol=tolerance, abs_tol=tolerance)
                if not is_padded:
                    warnings.warn(
                        f"model_reward: {type(model).__name__} scores a text differently when it is padded, so only "
                        "texts of one length share a batch",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            found: list[float] = [0.0] * len(rows)
            for length in [None] if is_padded is not False else sorted(lengths):
                places = [i for i, row in enumerate(rows) if length in (None, len(row))]
                for start in range(0, len(places), batch_size):
                    part = places[start : start + batch_size]
                    for i, score in zip(part, scores([rows[i] for i in part]), strict=True):
                        found[i] = score
        return found

    return reward_model
