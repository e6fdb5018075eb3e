"""SFTTrainer: supervised fine-tuning whose loss is made from hidden states at the completion's positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from fastgrpo.engine.head import check_tolerance
from fastgrpo.logps import linear_logps
from fastgrpo.models.calls import pad
from fastgrpo.models.head import run_completion_head
from fastgrpo.rewards.text import is_conversation
from fastgrpo.trainer.base import HeadTrainer
from fastgrpo.trainer.config import as_logits_dtype
from fastgrpo.trainer.groups import RepeatedRows
from fastgrpo.trainer.rollout import without_added_end
from fastgrpo.trainer.setup import (
    check_dataset,
    check_logits_dtype,
    only_iterates,
    prepare_to_iterate,
    prepare_tokenizer,
)


class SFTTrainer(HeadTrainer):
    """Cross-entropy of completions given their prompts, without logits:

        loss = -(1/D) Σ_t log p(token_t | prompt, tokens before t)

    The sum runs over the tokens of the completions, the end token included. D is their number in the whole optimiser
    step, over all micro-batches and processes. The tokens of the prompts do not count.

    Args:
        model: a transformers model with a language-model head, or a PEFT model of one.
        args: transformers' options; remove_unused_columns has to be False, because the collator reads the texts.
        train_dataset: rows with the columns `prompt` and `completion`, both texts, or a list of messages and what the
            assistant answers as text or messages; then both go through the tokenizer's chat template. Of a row with
            an empty prompt the first token is not learnt. A dataset that can only be iterated needs max_steps, and
            is not shuffled.
        processing_class: the tokenizer (None: the one at the model's path).
        callbacks: as in transformers' Trainer.
        backend: "auto", or one of `fastgrpo.backends.NAMES`.
        logits_dtype, column_tolerance: as in `GRPOConfig`.

    Raises:
        ValueError: a missing column, an empty dataset, a row that is not text or messages, a template under which the
            conversation does not begin with its prompt, a head that is not supported.

    Equivalent to: TRL's SFTTrainer with completion_only_loss=True.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        backend: str = "auto",
        logits_dtype: str | torch.dtype = "auto",
        column_tolerance: float = 0.0,
    ):
        check_tolerance(column_tolerance)
        self._head_options: dict[str, Any] = {
            "backend": backend,
            "logits_dtype": as_logits_dtype(check_logits_dtype(logits_dtype, args, model)),
            "column_tolerance": column_tolerance,
        }
        check_dataset("train_dataset", train_dataset, ("prompt", "completion"))
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, since the collator reads texts, got True")
        prepare_to_iterate(args, [train_dataset])
        if train_dataset is not None and only_iterates(train_dataset):
            train_dataset = RepeatedRows(train_dataset, group_size=1)
        tokenizer = prepare_tokenizer(model, processing_class, trust_remote_code=False)
        self._check_head_early(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: collate(tokenizer, rows),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # the Trainer counts the step's labels, and leaves the loss as it is

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro-batch; those of a step add up to the step's loss."""
        if return_outputs:
            raise ValueError("return_outputs: expected False, since the loss makes no model outputs")
        mask = inputs["completion_mask"]
        logps = run_completion_head(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            mask.shape[1],
            lambda hidden, head: linear_logps(
                hidden, head.weight, inputs["completion_ids"], mask=mask, **self._head_options, **head.options
            ),
        )
        if num_items_in_batch is None:
            return -logps.sum() / mask.sum().clamp(min=1)
        # gradients are averaged over processes, while the count is over all of them
        parts = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return -logps.sum() / max(num_items_in_batch, 1) * parts

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def collate(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """B rows with P tokens of prompt, padded on the left, and T of completion, padded on the right.

    Returns:
        input_ids and attention_mask (B, P + T), completion_ids and completion_mask (B, T), int64; labels (B, P + T),
        which the Trainer counts: -100 where nothing is learnt.
    """
    pairs = [_tokens(tokenizer, row["prompt"], row["completion"]) for row in rows]
    prompt_ids, prompt_mask = pad([prompt for prompt, _ in pairs], tokenizer.pad_token_id, "left")
    ids, mask = pad([completion for _, completion in pairs], tokenizer.pad_token_id, "right")
    labels = torch.cat([torch.full_like(prompt_ids, -100), ids.masked_fill(mask == 0, -100)], dim=1)
    return {
        "input_ids": torch.cat([prompt_ids, ids], dim=1),
        "attention_mask": torch.cat([prompt_mask, mask], dim=1),
        "completion_ids": ids,
        "completion_mask": mask,
        "labels": labels,
    }


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
    """(prompt's ids, completion's ids with the end token once); what nothing comes before counts as prompt."""
    for name, value in (("prompt", prompt), ("completion", completion)):
        messages = is_conversation(value) and is_conversation(prompt)
        if not isinstance(value, str) and not messages:
            wanted = "a text or a list of messages" if name == "prompt" or is_conversation(prompt) else "a text"
            raise ValueError(f"{name}: expected {wanted}, got {value!r} in the row with the prompt {prompt!r}")
    if not is_conversation(prompt):
        begin = without_added_end(tokenizer, prompt, tokenizer(prompt)["input_ids"])
        rest = tokenizer(completion, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None and rest[-1:] != [tokenizer.eos_token_id]:
            rest = [*rest, tokenizer.eos_token_id]
        return (begin, rest) if begin else (rest[:1], rest[1:])
    answer = completion if is_conversation(completion) else [{"role": "assistant", "content": completion}]
    start: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole: Any = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    if not whole.startswith(start):
        raise ValueError(
            "chat_template: expected the conversation to begin with its prompt, so that the completion can be told "
            f"from it, got {whole!r} after {start!r}"
        )
    encode = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole[len(start) :])]
    return encode[0], encode[1]
