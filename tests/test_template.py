"""The R1-Zero prompt: the paper's words, and the same from the function and from the chat template."""

import pytest
from jinja2 import TemplateError

from fastgrpo.recipes import sums
from fastgrpo.recipes.template import R1_ZERO_CHAT_TEMPLATE, r1_zero_prompt

QUESTIONS = [
    "What is 2 + 3?",
    "",
    "two\nlines\n",
    "  spaces  ",
    "braces {{ 7 * 7 }} {% raw %} 'quotes' \"too\" \\n",
    "中文 <think>",
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = sums.make_tokenizer()
    tokenizer.chat_template = R1_ZERO_CHAT_TEMPLATE
    return tokenizer


def test_words_of_the_paper():
    prompt = r1_zero_prompt("Q")
    assert prompt.startswith("A conversation between User and Assistant. The user asks a question, and the Assistant")
    assert prompt.endswith(
        "<think> reasoning process here </think> <answer> answer here </answer>. User: Q. Assistant:"
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_chat_template_gives_the_prompt(question, tokenizer):
    messages = [{"role": "user", "content": question}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == r1_zero_prompt(
        question
    )


def test_demonstration_continues_the_prompt(tokenizer):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>a</think>"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == r1_zero_prompt("Q") + " <think>a</think>" + tokenizer.eos_token


def test_system_message_is_refused(tokenizer):
    with pytest.raises(TemplateError, match="expected user and assistant, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
