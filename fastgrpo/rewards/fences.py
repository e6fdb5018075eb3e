"""Fenced code blocks, by the rules of CommonMark 0.31 for fences, list items and block quotes.

One thing is not CommonMark's: tags open no HTML block, so that <answer> may stand on the line before a fence. And a
fence that never closes, or that its list item or quotation ends, makes no block, since the code may be cut off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_FENCE = re.compile(r"(?P<fence>`{3,}(?=[^`]*$)|~{3,})[ \t]*(?P<info>.*)")
_PYTHON = re.compile(r"\{?[ \t]*\.?(?:python(?:[23](?:\.\d+)?)?|py3?)(?![\w+-])", re.IGNORECASE)
_BULLET = re.compile(r"(?:[-+*]|(?P<number>\d{1,9})[.)])(?=[ \t]|$)")
_BREAK_OR_HEADING = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*){2,}$|#{1,6}(?:[ \t]|$)")
_TAB = 4
_QUOTE = 0  # in a list of containers, beside the widths of list items
_MAX_DEPTH = 12  # containers within one another; deeper markers are text


class _Line(NamedTuple):
    """The rest of a line from a column on, which tabs need to know."""

    text: str
    column: int = 0

    @property
    def mark(self) -> str:
        return self.text.strip(" \t")

    @property
    def indent(self) -> int:
        """Columns of white space at the start."""
        return self._column_after(len(self.text) - len(self.text.lstrip(" \t"))) - self.column

    def skip(self, characters: int) -> _Line:
        return _Line(self.text[characters:], self._column_after(characters))

    def cut(self, columns: int) -> _Line:
        """Without as many columns of the white space at the start, or all of that; half a tab becomes spaces."""
        end, taken = self.column + min(columns, self.indent), 0
        while self._column_after(taken) < end:
            taken += 1
        rest = self.skip(taken)
        return _Line(" " * (rest.column - end) + rest.text, end)

    def _column_after(self, characters: int) -> int:
        taken = self.text[:characters]
        if "\t" not in taken:
            return self.column + characters
        return len((" " * (self.column % _TAB) + taken).expandtabs(_TAB)) + self.column - self.column % _TAB


@dataclass
class _Block:
    """A block whose fence is open."""

    fence: str
    indent: int
    is_python: bool
    lines: list[str] = field(default_factory=list)

    def is_closed_by(self, line: _Line) -> bool:
        mark = line.mark
        return mark.startswith(self.fence) and not mark.strip(self.fence[0]) and line.indent < _TAB


def last_python_block(text: str) -> str | None:
    """The code of the last closed block whose info string starts with the name of Python.

    ```` ```python ````, ```` ``` py ````, ```` ```{python} ````, ```` ```Python title="a" ````, with more backticks or
    with tildes. A fence of the other kind, a shorter one, one with an info string, and one that is indented by four
    spaces or more, such as in a docstring, do not end the block.
    """
    code: list[str] | None = None
    containers: list[int] = []
    block: _Block | None = None
    in_paragraph = False
    for whole in re.split(r"\r\n|\n|\r", text) if "```" in text or "~~~" in text else ():
        if not whole and _QUOTE not in containers:  # goes on with everything but a paragraph; there may be many
            in_paragraph = False
            if block is not None:
                block.lines.append(whole)
            continue
        line, depth = _enter(_Line(whole), containers)
        goes_on = depth == len(containers)
        if block is not None and goes_on:
            if not block.is_closed_by(line):
                block.lines.append(line.cut(block.indent).text)
                continue
            code = block.lines if block.is_python else code
            block = None
            continue
        block = None  # its container has ended, and it with it
        line, opened = _open(line, _MAX_DEPTH - depth, in_paragraph and goes_on)
        mark, is_code = line.mark, line.indent >= _TAB
        fence = None if is_code else _FENCE.match(mark)
        is_text = bool(mark) and not fence and (is_code or not _BREAK_OR_HEADING.match(mark))
        continues_paragraph = in_paragraph and is_text and not opened
        if continues_paragraph and not goes_on:
            continue  # a lazy continuation, whose containers go on without their markers
        containers[depth:] = opened
        in_paragraph = continues_paragraph or is_text and not is_code
        if fence:
            block = _Block(fence["fence"], line.indent, bool(_PYTHON.match(fence["info"])))
    return None if code is None else "\n".join(code)


def _enter(line: _Line, containers: list[int]) -> tuple[_Line, int]:
    """What the line holds within the containers, and how many of them go on in it."""
    for depth, width in enumerate(containers):
        if width == _QUOTE:
            quoted = _quoted(line)
            if quoted is None:
                return line, depth
            line = quoted
        elif line.mark:
            if line.indent < width:
                return line, depth
            line = line.cut(width)
    return line, len(containers)


def _open(line: _Line, most: int, in_paragraph: bool) -> tuple[_Line, list[int]]:
    """What the line holds within the containers that it opens, and these."""
    opened: list[int] = []
    while len(opened) < most and (indent := line.indent) < _TAB:
        quoted = _quoted(line)
        if quoted is not None:
            line = quoted
            opened.append(_QUOTE)
            continue
        mark = line.mark
        bullet = _BULLET.match(mark)
        if bullet is None or _BREAK_OR_HEADING.match(mark):
            break
        content = line.cut(indent).skip(bullet.end())
        if in_paragraph and not opened and (not content.mark or int(bullet["number"] or 1) != 1):
            break  # would not interrupt it
        gap = content.indent if content.mark and content.indent <= _TAB else 1
        opened.append(indent + bullet.end() + gap)
        line = content.cut(gap)
    return line, opened


def _quoted(line: _Line) -> _Line | None:
    """What stands behind a quotation's mark."""
    indent = line.indent
    return line.cut(indent).skip(1).cut(1) if indent < _TAB and line.mark.startswith(">") else None
