"""What the rewards read in a completion: its text, the parts of R1's template, boxes, numbers, code blocks.

Completions are whatever a model wrote, a megabyte of one character included: everything here scans its text a fixed
number of times.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# an escaped character is one step, so that \{ and \\ are not taken for what follows the backslash
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_FENCE = "```"
_PYTHON_FENCES = ("```python", "```python3", "```py")

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?:(?P<whole>{_INTEGER})\s+)?(?P<over>{_INTEGER})\s*/\s*(?P<under>{_INTEGER})"
    rf"|(?P<decimal>{_INTEGER}(?:\.\d*)?|\.\d+)(?:[eE](?P<exponent>[+-]?\d{{1,3}}))?)\s*(?P<percent>%?)"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MAX_NUMBER = 100  # characters; what is longer is compared as text


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
    r"""The content of the \boxed{…} that closes last, braces within it in balance; None without one."""
    first = text.find("\\boxed")
    if first < 0:
        return None
    open_braces: list[int | None] = []  # where the content of a box starts; None for any other brace
    boxed = None
    for match in _BOX_OR_BRACE.finditer(text, first):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            boxed = boxed if start is None else slice(start, match.start())
        elif token == "{":
            open_braces.append(None)
        elif token.startswith("\\boxed"):
            open_braces.append(match.end())
    return None if boxed is None else text[boxed]


def last_number(text: str) -> float | None:
    """The last number in a text, with thousands' commas, a sign or decimals."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return float(found[-1].replace(",", "")) if found else None


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number, None for another text.

    "1,234.0", "-.5", "6e3", "3/4", "2 1/2", "2½", "75%" (0.75), "$5", "\frac{3}{4}", "1{,}234".
    """
    if len(text) > _MAX_NUMBER:
        return None
    for latex, plain in (("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\$", ""), ("$", ""), ("\\%", "%")):
        text = text.replace(latex, plain)
    text = _LATEX_FRACTION.sub(r" \1/\2", text)
    # ½ is "1⁄2" after the compatibility decomposition; the space keeps 2½ from becoming 21⁄2
    text = "".join(
        " " + unicodedata.normalize("NFKC", c) if unicodedata.decomposition(c).startswith("<fraction>") else c
        for c in text
    )
    match = _NUMBER.fullmatch(text.replace("\N{FRACTION SLASH}", "/").replace("\N{MINUS SIGN}", "-").strip())
    if match is None:
        return None
    part = {name: value.replace(",", "") for name, value in match.groupdict(default="").items()}
    if part["decimal"]:
        value = Fraction(part["decimal"].rstrip(".")) * Fraction(10) ** int(part["exponent"] or 0)
    elif int(part["under"]) == 0:
        return None
    else:
        value = int(part["whole"] or 0) + Fraction(int(part["over"]), int(part["under"]))
    return value * (-1 if part["sign"] == "-" else 1) / (100 if part["percent"] else 1)


def last_python_block(text: str) -> str | None:
    """The code of the last ```python block that is closed."""
    code, start = None, None
    lines = text.split("\n")
    for i, line in enumerate(lines):
        line = line.strip()
        if start is None:
            start = i + 1 if line.lower() in _PYTHON_FENCES else None
        elif line == _FENCE:
            code, start = lines[start:i], None
    return None if code is None else "\n".join(code)
