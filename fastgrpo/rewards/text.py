"""What the rewards read in prompts and completions: their text, the parts of R1's template, boxes.

Completions are whatever a model wrote, a megabyte of one character included: everything here scans its text a fixed
number of times.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?:\[[^\[\]]{0,40}\]\s*){0,2}")
# an escaped character is one step, so that \{ and \\ are not taken for what follows the backslash
_BOX_OR_BRACE = re.compile(rf"(?P<box>{_BOX.pattern})(?P<braced>\{{)?|\\.|[{{}}]", re.DOTALL)
_UNBRACED = re.compile(r"(?P<formula>[^$\n]*?)(?:\$|\\\)|\\\])")
_MAX_UNBRACED = 100  # characters in which the content of a box without braces has to end
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}")
_MAX_NESTED = 4
_TOKENS_OF_END = 16


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt or a completion is a list of messages."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


def completion_text(completion: str | list[dict] | None) -> str:
    """The text of a completion, plain or a list of messages: what the model wrote, not what tools answered."""
    if isinstance(completion, str):
        return completion
    return "".join(_content(message) for message in completion or [] if message.get("role") != "tool")


def _content(message: dict) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):  # parts, of which images have no text
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content)


class RenderedPrompt(list):
    """A conversation as a reward function gets it: its messages, and the end of what a chat template made of them."""

    end = ""


def rendered(tokenizer: PreTrainedTokenizerBase, prompts: list, prompt_tokens: list[list[int]]) -> list:
    """Prompts for reward functions, where conversations know the end of the text that their tokens are."""
    if not isinstance(prompts[0], list):
        return prompts
    conversations = [RenderedPrompt(prompt) for prompt in prompts]
    ends = tokenizer.batch_decode([tokens[-_TOKENS_OF_END:] for tokens in prompt_tokens])
    for conversation, end in zip(conversations, ends, strict=True):
        conversation.end = end
    return conversations


def with_prefilled_think(prompt: str | list[dict] | None, completion: str | list[dict] | None) -> str:
    """The text of a completion, behind the <think> that its prompt ends with, if it does.

    That is the end of a plain prompt, of a message of the assistant's that the completion goes on with, or, in our own
    trainer, of what the chat template made of the prompt.
    """
    end = ""
    if isinstance(prompt, str):
        end = prompt
    elif isinstance(prompt, RenderedPrompt) and prompt.end:
        end = prompt.end
    elif prompt and prompt[-1].get("role") == "assistant":
        end = _content(prompt[-1])
    prefilled = TAGS[0] if end.rstrip().endswith(TAGS[0]) else ""
    return prefilled + completion_text(completion)


def reasoning(text: str) -> str:
    """From the first <think> to the last </think>; from the start or to the end where one of them is missing, since
    templates often put the <think> into the prompt, and long reasoning is cut off before the </think>.
    """
    before, closed, _ = text.rpartition("</think>")
    inside = before if closed else text
    return inside.partition("<think>")[2] if "<think>" in inside else inside


def final_answer(text: str) -> str | None:
    r"""What stands in the last complete <answer>…</answer> after the reasoning, or in the last \boxed{…} of it.

    Without any answer tag after the reasoning, the last \boxed{…} there. None where there is no answer: a tag left
    open, or reasoning that never ends.
    """
    rest = text.rpartition("</think>")[2].partition("<think>")[0]
    start = rest.rfind("<answer>", 0, max(rest.rfind("</answer>"), 0))
    if start < 0:
        return None if "<answer>" in rest or "</answer>" in rest else last_boxed(rest)
    start += len("<answer>")
    answer = rest[start : rest.find("</answer>", start)]
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    r"""The content of the \boxed{…}, \fbox{…} or \framebox{…} that closes last, braces within it in balance; None
    without one. Of a box that holds nothing but a box, the content of the inner one.

    Without braces, as in "$\boxed 42$", the content reaches to the end of the formula. Where that has words in it or
    does not end on its line, the content is one word with a digit, or one capital letter; or this is no box.
    """
    content = _last_box(text)
    for _ in range(_MAX_NESTED):
        if content is None or not _BOX.match(content.lstrip()):
            break
        content = _last_box(content)
    return content


def _last_box(text: str) -> str | None:
    first = _BOX.search(text)
    if first is None:
        return None
    open_braces: list[int | None] = []  # where the content of a box starts; None for any other brace
    boxed = None
    for match in _BOX_OR_BRACE.finditer(text, first.start()):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            boxed = boxed if start is None else slice(start, match.start())
        elif match["braced"]:
            open_braces.append(match.end())
        elif token == "{":
            open_braces.append(None)
        elif match["box"]:
            boxed = _unbraced(text, match.end()) or boxed
    return None if boxed is None else text[boxed]


def _unbraced(text: str, start: int) -> slice | None:
    rest = text[start : start + _MAX_UNBRACED]
    match = _UNBRACED.match(rest)
    if match and (match["formula"] or "").strip() and not _PROSE.search(match["formula"]):
        return slice(start, start + match.end("formula"))
    word = rest.split(None, 1)[0].split("$")[0].rstrip(".,;:!") if rest.strip() else ""
    is_answer = any(c.isdigit() for c in word) or len(word) == 1 and word.isupper()
    return slice(start, start + len(word)) if is_answer else None
