"""The tokenizer and the model of the tasks that are made on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Model = TypeVar("Model", bound=PreTrainedModel)

MOST_TOKENS = 64  # of a prompt with its completion


def make_tokenizer(tokens: Iterable[str], pattern: str) -> PreTrainedTokenizerFast:
    """Each of `tokens` is one token; `pattern` is the regular expression that finds them in a text."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces between the tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=MOST_TOKENS,
    )


def make_model(kind: type[Model], tokenizer: PreTrainedTokenizerFast, seed: int) -> Model:
    """A random model of two layers, 64 wide: about 130 thousand parameters and the vocabulary's."""
    torch.manual_seed(seed)
    return kind(
        kind.config_class(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=MOST_TOKENS,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
