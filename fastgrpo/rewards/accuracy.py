"""Is the answer right? As text, as a number, and through math-verify as a formula."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from fastgrpo.rewards.quantities import parse_number
from fastgrpo.rewards.sandbox import Limits, run_python
from fastgrpo.rewards.supervisor import STOPPED
from fastgrpo.rewards.text import completion_text, final_answer, last_boxed

_MAX_FORMULA = 1000  # characters; what is longer is compared as text only
_WRAPPERS = (
    re.compile(r"\$\$(.*)\$\$", re.DOTALL),
    re.compile(r"\$([^$]*)\$"),
    re.compile(r"\\\((.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(.*)\\\]", re.DOTALL),
    re.compile(r"\*\*([^*]*)\*\*"),
    re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|boldsymbol)\s*\{([^{}]*)\}"),
)
# The choice of a question with several: "E", "(E)", "E: text", "Option E", "\textbf{(E)}\ 5"; A:B is a ratio.
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?"
    r"(?:\((?P<in_brackets>[A-Z])\)|(?P<label>[A-Z])(?:\)|[.:](?=[\s}]|$)|(?=\}|$)))(?P<more>.*)",
    re.IGNORECASE | re.DOTALL,
)
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '’-][^\W\d_]+)*[.!]?")
# A second for each formula, and nine for a call in all: the rest is not judged then.
_FORMULA_SECONDS = 1.0
_FORMULA_LIMITS = Limits(seconds=9.0, memory=2 << 30)


def accuracy_reward(completions: list, answer: list, **_: Any) -> list[float | None]:
    r"""1 when the answer in R1's template is the right one, else 0; None where the column `answer` is None.

    The answer is what stands in the last complete <answer>…</answer> after the reasoning, or in the last \boxed{…} in
    there; without any answer tag, in the last \boxed{…} after the reasoning. No answer: 0. Of the column `answer`, a
    \boxed{…} counts if there is one, or else what follows GSM8K's "####". A box may also be \fbox or \framebox, and
    without braces: "$\boxed 42$".

    The two are equal

    - as text, but for white space and enclosing $…$, **…** or \text{…}; text that is words, also but for case;
    - as exact numbers, where "1,234.0" is "1234", and "3/4", "¾", "0.75" and "\frac{3}{4}" are one; "75%" is both 75
      and 0.75, and a unit counts where both have one: "12 apples" is 12, but not "12 pears";
    - as choices, where one of them is a letter alone: "E: the text", "(E)" and "Option E" are "E".

    Formulas are compared by Hugging Face's math-verify where that package is installed, on Linux: in a process of
    their own, so that it needs no signals here and any thread may call, a second for each, and None for those that
    nine seconds do not reach. Without the package, formulas are equal as text or not at all.
    """
    pairs: list[tuple[str, str] | None] = []
    for completion, truth in zip(completions, answer, strict=True):
        given = final_answer(completion_text(completion))
        pairs.append(None if truth is None else (_tidy(given or ""), _tidy(_truth(str(truth)))))
    verdicts = {pair: _is_equal(*pair) for pair in pairs if pair is not None}
    undecided = [pair for pair, verdict in verdicts.items() if verdict is None]
    if undecided:
        verdicts.update(_compare_formulas(undecided))
    judged = (None if pair is None else verdicts[pair] for pair in pairs)
    return [None if verdict is None else float(verdict) for verdict in judged]


def _truth(answer: str) -> str:
    boxed = last_boxed(answer)
    return answer.rpartition("####")[2] if boxed is None else boxed


def _tidy(text: str) -> str:
    """Single spaces, and nothing around the answer that only sets it in type."""
    text = " ".join(text.split())
    for _ in range(4 if len(text) <= _MAX_FORMULA else 0):
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1].strip()
    return text


def _is_equal(given: str, truth: str) -> bool | None:
    """Equal as text, numbers or choices; None when only the formulas can tell, and something can compare them."""
    if not given or not truth or given == truth:
        return bool(given) and given == truth
    if len(given) <= _MAX_FORMULA and _WORDS.fullmatch(given) and _WORDS.fullmatch(truth):
        return given.rstrip(".!").casefold() == truth.rstrip(".!").casefold()
    number, other = parse_number(given), parse_number(truth)
    if number is not None and other is not None:
        return number.equals(other)
    if _is_same_choice(given, truth):
        return True
    return None if _are_formulas(given, truth) and _can_compare_formulas() else False


def _is_same_choice(given: str, truth: str) -> bool:
    if max(len(given), len(truth)) > _MAX_FORMULA:
        return False
    choices = [match for text in (given, truth) if (match := _CHOICE.fullmatch(text))]
    if len(choices) < 2:
        return False
    letters = [match["in_brackets"] or match["label"] for match in choices]
    is_alone = [not match["more"].strip(" .}") for match in choices]
    return letters[0] == letters[1] and letters[0].isupper() and any(is_alone)


def _are_formulas(given: str, truth: str) -> bool:
    """No words, which would be read as products of their letters: "listen" would equal "silent"."""
    for text in (given, truth):
        if len(text) > _MAX_FORMULA or re.search(r"[^\W\d_]{3}", re.sub(r"\\[A-Za-z]+", " ", text)):
            return False
    return not (given + truth).replace(" ", "").isalpha()


def _can_compare_formulas() -> bool:
    return sys.platform == "linux" and importlib.util.find_spec("math_verify") is not None


def _compare_formulas(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
    task = {"path": [str(folder) for folder in sys.path], "seconds": _FORMULA_SECONDS, "pairs": pairs}
    source = Path(__file__).with_name("formulas.py").read_text()
    status, output = run_python(source, json.dumps(task), _FORMULA_LIMITS)
    known: list[bool | None] = [verdict == "True" for verdict in output.splitlines()]
    if len(known) < len(pairs):
        if status != STOPPED:
            raise RuntimeError("accuracy_reward: math-verify is installed, but cannot be imported or has crashed")
        warnings.warn(
            f"accuracy_reward: {len(pairs) - len(known)} of {len(pairs)} formulas were not compared within "
            f"{_FORMULA_LIMITS.seconds} s",
            RuntimeWarning,
            stacklevel=3,
        )
    return dict(zip(pairs, known + [None] * (len(pairs) - len(known)), strict=True))
