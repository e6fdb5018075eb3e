"""model_reward with small classifiers: the same scores as the model gives to each text alone."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastgrpo.commands.train import files
from fastgrpo.recipes import word_problems
from fastgrpo.rewards import call_reward_func, model_reward

PROMPTS = ["Thank Tom.", "感谢明。", "Greet Ann.", "Greet Ann."]
COMPLETIONS = ["Thanks Tom!", "谢谢明!", "", "Hello"]


@pytest.fixture
def tokenizer():
    return word_problems.make_tokenizer()


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
CLASSIFIERS = {
    "qwen2": SIZES | dict(num_key_value_heads=4),
    "gpt2": dict(n_embd=32, n_inner=64, n_layer=2, n_head=4),
    "opt": SIZES | dict(ffn_dim=64, word_embed_proj_dim=32),
    "bert": SIZES,
    "roberta": SIZES,
    "deberta-v2": SIZES | dict(relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": SIZES,
    "distilbert": dict(dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    "mpnet": SIZES,
}
READ_PADDING = {  # their attention, or what stands for it, sees padding
    "fnet": SIZES,
    "convbert": SIZES | dict(embedding_size=32),
}


def classifier(kind, tokenizer, labels=1):
    torch.manual_seed(0)
    tokens = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=tokenizer.eos_token_id)
    sizes = dict(vocab_size=len(tokenizer), num_labels=labels) | {**CLASSIFIERS, **READ_PADDING}[kind]
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes, **tokens))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # so that an error shows
    return model


def decoder(tokenizer, labels=1):
    return classifier("qwen2", tokenizer, labels)


def alone(model, tokenizer, text):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_each_text_alone(tokenizer, kind, side):
    model = classifier(kind, tokenizer)
    model.config.pad_token_id = None if kind == "qwen2" else model.config.pad_token_id
    tokenizer.padding_side = side
    expected = [alone(model, tokenizer, p + c).item() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for batch_size in (1, 3, 16):
        reward = model_reward(model.train(), tokenizer, batch_size=batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scores = call_reward_func(reward, "reward", COMPLETIONS, prompts=PROMPTS, answer=[None] * 4)
        assert model.training and all(p.grad is None for p in model.parameters())
        assert scores == pytest.approx(expected, abs=1e-5)
    assert tokenizer.padding_side == side and len({round(score, 4) for score in expected}) == 4


@pytest.mark.parametrize("kind", READ_PADDING)
def test_texts_of_one_length_share_a_batch_where_padding_counts(tokenizer, kind):
    model = classifier(kind, tokenizer)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = [alone(model, tokenizer, text).item() for text in texts]
    reward = model_reward(model, tokenizer)
    with pytest.warns(RuntimeWarning, match="scores a text differently when it is padded"):
        first = reward(prompts=PROMPTS, completions=COMPLETIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        second = reward(prompts=PROMPTS[::-1], completions=COMPLETIONS[::-1])
    assert first == second[::-1] == pytest.approx(expected, abs=1e-5)


def test_reward_model_of_the_command(tokenizer, tmp_path):
    """It keeps the side that its tokenizer was saved with; a policy's is left, for generation."""
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    model = classifier("gpt2", tokenizer)
    model.save_pretrained(tmp_path)
    loaded, its_tokenizer = files.load_model(str(tmp_path), "--reward-model", AutoModelForSequenceClassification)
    assert its_tokenizer.padding_side == "right"
    scores = model_reward(loaded, its_tokenizer)(prompts=PROMPTS, completions=COMPLETIONS)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores == pytest.approx([alone(model, tokenizer, text).item() for text in texts], abs=1e-5)


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
