"""The prompt that DeepSeek-R1-Zero was trained with (DeepSeek-R1, arXiv:2501.12948, Table 1), for base models."""

from __future__ import annotations

__all__ = ["R1_ZERO_CHAT_TEMPLATE", "r1_zero_prompt"]

_INSTRUCTION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>."
)

# A user's message gives r1_zero_prompt(its content). An assistant's message, in demonstrations, follows "Assistant: "
# and ends with the end token.
R1_ZERO_CHAT_TEMPLATE = (
    f"{{{{ '{_INSTRUCTION}' }}}}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' User: ' + message['content'] + '.' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' Assistant: ' + message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('R1-Zero template: expected user and assistant, got ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}"
)


def r1_zero_prompt(question: str) -> str:
    """The prompt of DeepSeek-R1-Zero for a question; the completion follows its last word, "Assistant:".

    It is Table 1 of arXiv:2501.12948, word for word and with the full stop after the question. For prompts that are
    lists of messages, set `tokenizer.chat_template = R1_ZERO_CHAT_TEMPLATE`.

    Equivalent to: `tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
    add_generation_prompt=True, chat_template=R1_ZERO_CHAT_TEMPLATE)`.
    """
    return f"{_INSTRUCTION} User: {question}. Assistant:"
