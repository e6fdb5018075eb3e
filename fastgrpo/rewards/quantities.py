r"""Numbers in text, by one grammar: "1,234.0", "-.5", "−$3", "6e3", "2.5 \times 10^{-3}", "3/4", "2½", "75%", "12 km".

Every repetition is bounded or hands on what it took, so that a megabyte of any character takes linear time.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_MAX_NUMBER = 100  # characters; what is longer has no value here
_MINUS = "\\-\N{MINUS SIGN}\N{EN DASH}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}"
_SIGN = f"[+{_MINUS}]"
_CURRENCY = r"\\?[$€£¥₹]"
_SPACE = r"(?:[^\S\n]|~|\\[,;:! ])"
_GAP = f"{_SPACE}{{0,4}}"
# in threes, in India's twos and threes, or without separators
_COMMA = "(?:\\{,\\}|,(?:\\\\!)?|\\\\[,! ]|[\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}])"
_INTEGER = rf"(?:\d{{1,3}}(?:{_COMMA}\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d\d){{1,6}},\d{{3}}(?!\d)|\d+)"
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_VULGAR = "[\u00bc-\u00be\u2150-\u215e\u2189]"
_UP_TO_LAST_DIGIT = re.compile(rf".*(?:\d|{_VULGAR})", re.DOTALL)
# 12/17/2024 is no fraction, nor is 1/2.5
_FRACTION = (
    rf"(?:(?P<whole>{_INTEGER}){_SPACE}{{1,4}})?"
    rf"(?<![/⁄])(?P<over>{_INTEGER}){_GAP}[/⁄]{_GAP}(?P<under>{_INTEGER})(?!\d|\.\d|{_GAP}[/⁄]{_GAP}\d)"
)
_LATEX_FRACTION = (
    rf"(?:(?P<latex_whole>{_INTEGER}){_GAP})?\\[dtc]?frac"
    rf"(?:{_GAP}\{{{_GAP}(?P<latex_over>{_INTEGER}){_GAP}\}}|{_GAP}(?P<digit_over>\d))"
    rf"(?:{_GAP}\{{{_GAP}(?P<latex_under>{_INTEGER}){_GAP}\}}|{_GAP}(?P<digit_under>\d))"
)
_DECIMAL = (
    rf"(?P<decimal>{_INTEGER}(?:\.\d*)?|(?<![\d.])\.\d+)"
    rf"(?:[eE](?P<e>{_SIGN}?\d{{1,3}})(?!\d)"
    rf"|{_GAP}(?:\\times|\\cdot|[×·xX]|\*){_GAP}10{_GAP}(?:(?P<superscript>[⁺⁻]?[{_SUPERSCRIPTS}]{{1,3}})"
    rf"|(?:\^|\*\*){_GAP}(?:\{{{_GAP}(?P<braced>{_SIGN}?\d{{1,3}}){_GAP}\}}|(?P<bare>{_SIGN}?\d{{1,3}})(?!\d))))?"
)
_VALUE = (
    rf"(?:{_LATEX_FRACTION}|{_FRACTION}|(?:(?P<vulgar_whole>{_INTEGER}){_GAP})?(?P<vulgar>{_VULGAR})|{_DECIMAL})"
    rf"(?:{_GAP}(?P<percent>\\?[%％]))?"
)
# Within a text, a sign stands before its number without a space, and not after what it could be subtracted from or
# joined to: "10-15", "2024-05-17", "COVID-19" and "(2)-3" have no negative numbers.
_IN_TEXT = re.compile(rf"(?P<sign>(?<![^\W_])(?<![)\]}}%°'’]){_SIGN})?(?:{_CURRENCY})?{_VALUE}")
_WHOLE_TEXT = re.compile(rf"(?P<sign>{_SIGN})?{_GAP}(?:{_CURRENCY}{_GAP})?{_VALUE}")


class Number(NamedTuple):
    """A number as it is written: 75 with percent for "75%"."""

    value: Fraction
    is_percent: bool = False
    unit: str = ""

    def equals(self, other: Number) -> bool:
        """The same value, where 75% is both 75 and 0.75; and not with two different units."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.is_percent == other.is_percent:
            return self.value == other.value
        percent, plain = (self, other) if self.is_percent else (other, self)
        return plain.value in (percent.value, percent.value / 100)


def last_number(text: str) -> float | None:
    """The last number in a text, as `find_last_number` reads it; of "75%", 75."""
    number = find_last_number(text)
    if number is None:
        return None
    try:
        return float(number.value)
    except OverflowError:
        return float("inf") if number.value > 0 else float("-inf")


def find_last_number(text: str) -> Number | None:
    """The last number in a text; None without one, and where that is longer than a hundred characters or divides by 0.

    A "-" that joins two numbers or words is no sign: the last number of "10-15" is 15, that of "2024-05-17" is 17.
    """
    last_digit = _UP_TO_LAST_DIGIT.match(text)
    if last_digit is None:
        return None
    end = last_digit.end()
    *_, match = _IN_TEXT.finditer(text[max(0, end - 10 * _MAX_NUMBER) : end + _MAX_NUMBER])
    return _read(match)


def parse_number(text: str) -> Number | None:
    """The number that a text is, with a unit in words after it or without; None for another text."""
    if len(text) > _MAX_NUMBER:
        return None
    text = text.replace("\\$", "").replace("$", "").strip()
    match = _WHOLE_TEXT.match(text)
    if match is None or (number := _read(match)) is None:
        return None
    rest = text[match.end() :]
    if not rest.strip(" ."):
        return number
    if re.fullmatch(rf"{_GAP}per ?cent\.?", rest):
        return number._replace(is_percent=True)
    unit = _unit(rest)
    return number._replace(unit=unit) if unit else None


def _read(match: re.Match) -> Number | None:
    if len(match.group()) > _MAX_NUMBER:
        return None
    part = match.groupdict(default="")
    over, under = part["over"] or part["latex_over"] or part["digit_over"], "1"
    if over:
        under = part["under"] or part["latex_under"] or part["digit_under"]
    elif part["vulgar"]:  # "½" is "1⁄2" after the compatibility decomposition
        over, under = unicodedata.normalize("NFKC", part["vulgar"]).split("\N{FRACTION SLASH}")
    if over:
        if _integer(under) == 0:
            return None
        value = Fraction(_integer(over), _integer(under))
        value += _integer(part["whole"] or part["latex_whole"] or part["vulgar_whole"] or "0")
    else:
        whole, _, decimals = part["decimal"].partition(".")
        value = Fraction(f"{_integer(whole or '0')}.{decimals or '0'}")
        power = part["e"] or part["braced"] or part["bare"] or unicodedata.normalize("NFKC", part["superscript"])
        value *= Fraction(10) ** _signed(power or "0")
    return Number(-value if re.match(f"[{_MINUS}]", part["sign"]) else value, bool(part["percent"]))


def _integer(text: str) -> int:
    return int(re.sub(r"\D", "", text))


def _signed(text: str) -> int:
    return -_integer(text) if re.match(f"[{_MINUS}]", text) else _integer(text)


# What is no unit: it makes another value, or another sentence, of the number.
_NO_UNIT = frozenset(
    "a an and are as at billion billions but by choose cos cubed divided dozen equals even exp factorial fewer gross "
    "half halves hundred hundreds if in is less log max million millions minus mod modulo more nor not odd of off or "
    "over percent pi plus quarter quarters root roots score sin sqrt squared tan than third thirds thousand thousands "
    "through till times to trillion trillions until up versus vs was with without".split()
)
_SHORT_UNITS = frozenset("cm dm ft g gb h hr in kb kg km kw lb lbs m mb mg mi ml mm mph oz s yd".split())
_POWER = r"(?:\^?(?:\{?\d\}?)|[²³])?"
_UNIT = re.compile(
    rf"(?P<gap>{_GAP})(?:(?P<degree>°|\^{_GAP}\{{?{_GAP}\\circ{_GAP}\}}?){_GAP}[CFK]?"
    rf"|(?P<words>[^\W\d_]+{_POWER}(?:(?: | ?/ ?)[^\W\d_]+{_POWER}){{0,3}})\.?)"
)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


def _unit(text: str) -> str | None:
    """The unit that a text after a number is, in the singular; None for what is none.

    A word of three letters or more, a short one from a list, or any letters in \\text{…}. Without a space, "12ab" is a
    product.
    """
    set_as_text = _TEXT_COMMAND.sub(r" \1", text)
    match = _UNIT.fullmatch(" ".join(set_as_text.replace("~", " ").replace("\\ ", " ").replace("\\,", " ").split()))
    if match is None:
        return None
    if match["degree"]:
        return "degree"
    words = re.split(r" ?/ ?| ", match["words"])
    in_list = [word if word in _SHORT_UNITS else word.lower() for word in words]
    if set_as_text == text:
        if not re.match(rf"{_SPACE}", text):
            return None
        if not all(len(word) > 2 or re.split(r"[\d^{²³]", word)[0] in _SHORT_UNITS for word in in_list):
            return None
    if any(word in _NO_UNIT and not (word == "in" and len(words) == 1) for word in in_list):
        return None
    return " ".join(re.sub(r"(?<=[a-z]{2})s$", "", word) for word in in_list)
