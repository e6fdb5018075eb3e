"""Rewards that read the text or count tokens; those of R1 follow DeepSeek-R1 (arXiv:2501.12948)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

from fastgrpo.rewards.quantities import find_last_number
from fastgrpo.rewards.scoring import RewardFunc, reward_name
from fastgrpo.rewards.text import TAGS, RenderedPrompt, completion_text, reasoning, with_prefilled_think


def exact(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 when the completion is the answer, but for surrounding white space."""
    return _judge(completions, answer, lambda text, truth: text.strip() == truth.strip())


def contains(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 when the answer stands somewhere in the completion."""
    return _judge(completions, answer, lambda text, truth: truth.strip() in text)


def numeric(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 when the last number of the completion equals the last number of the answer (so GSM8K's `#### 42` works).

    Numbers are compared exactly, as `accuracy_reward` does: "3/4" is 0.75, "1e3" is 1000, "75%" is both 75 and 0.75.
    """

    def is_right(text: str, truth: str) -> bool:
        wanted, given = find_last_number(truth), find_last_number(text)
        return wanted is not None and given is not None and given.equals(wanted)

    return _judge(completions, answer, is_right)


def _judge(completions: list, answer: list, is_right: Callable[[str, str], bool]) -> list[float | None]:
    return [
        None if truth is None else float(is_right(completion_text(completion), str(truth)))
        for completion, truth in zip(completions, answer, strict=True)
    ]


def format_reward(completions: list, prompts: list | None = None, **_: Any) -> list[float]:
    """1 when the completion is `<think>…</think><answer>…</answer>`, each tag once, with only white space around and
    between the two; else 0.

    A prompt that ends with <think> has written the first tag already: the completion is judged behind it, and one more
    <think> is one too many. This sees the end of a plain prompt and of an assistant's message that the completion goes
    on with. What a chat template adds, this package's trainer and evaluation tell; TRL's do not: there
    `prefilled("<think>", format_reward)` does it.
    """
    return [float(_has_format(text)) for text in _whole_texts(completions, prompts)]


def _whole_texts(completions: list, prompts: list | None) -> list[str]:
    prompts = [None] * len(completions) if prompts is None else prompts
    return [with_prefilled_think(*pair) for pair in zip(prompts, completions, strict=True)]


def _has_format(text: str) -> bool:
    text = text.strip()
    if any(text.count(tag) != 1 for tag in TAGS) or not (text.startswith(TAGS[0]) and text.endswith(TAGS[3])):
        return False
    # the outer two tags stand at the ends, so this is all that the order of the inner two needs
    end, start = text.index(TAGS[1]) + len(TAGS[1]), text.index(TAGS[2])
    return end <= start and not text[end:start].strip()


def tag_count_reward(completions: list, prompts: list | None = None, **_: Any) -> list[float]:
    """A quarter for each of <think>, </think>, <answer> and </answer> that occurs exactly once; a <think> that the
    prompt ends with counts, as in `format_reward`.
    """
    return [0.25 * sum(text.count(tag) == 1 for tag in TAGS) for text in _whole_texts(completions, prompts)]


def prefilled(text: str, function: RewardFunc) -> RewardFunc:
    """The reward function, of completions that begin with `text`: with what a chat template puts in front of them.

    Such as `prefilled("<think>", format_reward)` for TRL's trainers, whose reward functions do not see the template.
    """

    def with_text(completions: list, **columns: Any) -> Any:
        whole = [
            text + completion
            if isinstance(completion, str)
            else [{"role": "assistant", "content": text}, *(completion or [])]
            for completion in completions
        ]
        if "prompts" in columns:  # which know the template in our own trainer
            columns["prompts"] = [list(p) if isinstance(p, RenderedPrompt) else p for p in columns["prompts"]]
        return function(completions=whole, **columns)

    with_text.__name__ = reward_name(function)
    return with_text


# Letters by script, as the inside of a character class. Combining accents belong to the word that they stand in.
_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HANGUL = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"
_CYRILLIC = "\u0400-\u052f\u1c80-\u1c8a\u2de0-\u2dff\ua640-\ua69f"
_ARABIC = "\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc"
_LATIN = (
    "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0300-\u036f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a"
)

# What one word of a script is: a character where no spaces are written, elsewhere a run of letters. A lone letter of
# an alphabet that formulas use is taken for a variable.
_WORDS = {
    "han": re.compile(f"[{_HAN}]"),
    "kana": re.compile(f"[{_KANA}]"),
    "hangul": re.compile(f"[{_HANGUL}]+"),
    "cyrillic": re.compile(f"[{_CYRILLIC}]+"),
    "arabic": re.compile(f"[{_ARABIC}]+"),
    "latin": re.compile(f"[{_LATIN}]{{2,}}"),
    "other": re.compile(rf"[^\W\d_{_HAN}{_KANA}{_HANGUL}{_CYRILLIC}{_ARABIC}{_LATIN}]{{2,}}"),
}
_SCRIPTS = {
    "ar": ("arabic",),
    "en": ("latin",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "ru": ("cyrillic",),
    "zh": ("han",),
}
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")


def language_consistency_reward(target: str) -> RewardFunc:
    """The share of the reasoning's words that are in the target language (arXiv:2501.12948v1, section 2.3.2).

    The reasoning is what stands within <think>…</think>, or all of the text without these tags. For zh, ja, ko, en, ru
    and ar a word belongs to the language when it is in its script; so "en" counts French as English, "ja" Chinese as
    Japanese. Chinese characters and kana are a word each, others as they are written, in runs of letters. Numbers,
    punctuation, LaTeX commands and lone Latin letters are no words. Another target needs the package py3langid, which
    then classifies each line, by all words of the line. No words at all: None.

    Args:
        target: code of the language, such as "zh".

    Raises:
        ValueError: a target that is neither one of the six nor known to an installed py3langid.
    """
    counter = _script_counter(target) if target in _SCRIPTS else _line_counter(target)

    def share(completion: Any) -> float | None:
        text = reasoning(completion_text(completion))
        for tag in TAGS:
            text = text.replace(tag, " ")
        ours, total = counter(_LATEX_COMMAND.sub(" ", text))
        return ours / total if total else None

    def language_consistency(completions: list, **_: Any) -> list[float | None]:
        return [share(completion) for completion in completions]

    return language_consistency


def _count_words(text: str) -> dict[str, int]:
    return {script: len(pattern.findall(text)) for script, pattern in _WORDS.items()}


def _script_counter(target: str) -> Callable[[str], tuple[int, int]]:
    def count(text: str) -> tuple[int, int]:
        words = _count_words(text)
        return sum(words[script] for script in _SCRIPTS[target]), sum(words.values())

    return count


def _line_counter(target: str) -> Callable[[str], tuple[int, int]]:
    installed = importlib.util.find_spec("py3langid") is not None
    known = list(_SCRIPTS)
    if installed:
        import py3langid

        known = sorted({*known, *(label for label, _ in py3langid.rank(""))})
    if target not in known:
        more = "" if installed else " (others need py3langid: pip install 'fastgrpo[rewards]')"
        raise ValueError(f"target: expected one of {', '.join(known)}{more}, got {target!r}")

    def count(text: str) -> tuple[int, int]:
        ours = total = 0
        for line in text.split("\n"):
            words = sum(_count_words(line).values())
            total += words
            ours += words if words and py3langid.classify(line)[0] == target else 0
        return ours, total

    return count


_UNITS = re.compile(f"[{_HAN}{_KANA}]|[^\\s{_HAN}{_KANA}]+")


def repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunc:
    """max_penalty · (1 - distinct n-grams / n-grams): 0 without repetition, towards max_penalty the more there is.

    n-grams of words, without regard to case; Chinese characters and kana count as a word each. A text of fewer than
    `ngram_size` words gets 0. The penalty for repeated n-grams is from "Demystifying Long Chain-of-Thought Reasoning"
    (arXiv:2502.03373), there for each token, here for the whole completion.

    Raises:
        ValueError: ngram_size below 1, max_penalty above 0 or not finite.
    """
    _check_integer("ngram_size", ngram_size, 1)
    if not -float("inf") < max_penalty <= 0:
        raise ValueError(f"max_penalty: expected a finite number <= 0, got {max_penalty!r}")

    def penalty(completion: Any) -> float:
        units = _UNITS.findall(completion_text(completion).lower())
        total = len(units) - ngram_size + 1
        if total <= 0:
            return 0.0
        distinct = len(set(zip(*(units[i:] for i in range(ngram_size)), strict=False)))
        return max_penalty * (1 - distinct / total)

    def repetition_penalty(completions: list, **_: Any) -> list[float]:
        return [penalty(completion) for completion in completions]

    return repetition_penalty


def soft_overlong_reward(max_completion_length: int, soft_cache: int) -> RewardFunc:
    """DAPO's penalty for length in tokens (arXiv:2503.14476, equation 13): with L the length of completion_ids,

        0                                                   L <= max_completion_length - soft_cache
        (max_completion_length - soft_cache - L) / soft_cache          up to max_completion_length
        -1                                                                                  beyond

    Raises:
        ValueError: max_completion_length below 1, soft_cache not in [0, max_completion_length].
    """
    _check_integer("max_completion_length", max_completion_length, 1)
    _check_integer("soft_cache", soft_cache, 0, max_completion_length)
    free = max_completion_length - soft_cache

    def penalty(length: int) -> float:
        if length <= free:
            return 0.0
        return (free - length) / soft_cache if length <= max_completion_length else -1.0

    def soft_overlong(completion_ids: list, **_: Any) -> list[float]:
        return [penalty(len(ids)) for ids in completion_ids]

    return soft_overlong


def _check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value!r}")
