"""model_reward with small classifiers: the same scores as the model gives to each text alone."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

from fastgrpo.trainer import word_problems
from fastgrpo.trainer.rewards import call_reward_func, model_reward

PROMPTS = ["Thank Tom.", "感谢明。", "Greet Ann.", "Greet Ann."]
COMPLETIONS = ["Thanks Tom!", "谢谢明!", "", "Hello"]


@pytest.fixture
def tokenizer():
    return word_problems.make_tokenizer()


def decoder(tokenizer, labels=1):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=4, num_labels=labels, **sizes)
    return Qwen2ForSequenceClassification(config)


def encoder(tokenizer, labels=1):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=labels, **sizes))


def alone(model, tokenizer, text):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]


@pytest.mark.parametrize("make", [decoder, encoder])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_each_text_alone(tokenizer, make, side, batch_size):
    model = make(tokenizer)
    model.config.pad_token_id = None
    tokenizer.padding_side = side if make is decoder else "right"  # BERT counts positions from the left edge
    reward = model_reward(model.train(), tokenizer, batch_size=batch_size)
    scores = call_reward_func(reward, "reward", COMPLETIONS, prompts=PROMPTS, answer=[None] * 4)
    assert model.training and all(p.grad is None for p in model.parameters())
    expected = [alone(model, tokenizer, p + c).item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 4


def test_several_labels(tokenizer):
    model = decoder(tokenizer, labels=3)
    scores = model_reward(model, tokenizer, label=2)(prompts=PROMPTS, completions=COMPLETIONS)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores == pytest.approx([alone(model, tokenizer, text).softmax(0)[2].item() for text in texts], abs=1e-5)


def test_conversations_go_through_the_classifiers_template(tokenizer):
    model = decoder(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    scores = model_reward(model, tokenizer)(prompts=prompts, completions=completions)
    texts = [f"{p}<eos>{c}<eos>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores == pytest.approx([alone(model, tokenizer, text).item() for text in texts], abs=1e-5)


def test_mistakes(tokenizer):
    with pytest.raises(ValueError, match="label: expected an index below 3, got None"):
        model_reward(decoder(tokenizer, labels=3), tokenizer)
    with pytest.raises(ValueError, match="label: expected None, since the model has one output, got 0"):
        model_reward(decoder(tokenizer), tokenizer, label=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        model_reward(decoder(tokenizer), tokenizer, batch_size=0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with a pad token"):
        model_reward(decoder(tokenizer), tokenizer)
