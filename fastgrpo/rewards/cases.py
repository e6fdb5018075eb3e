"""The test cases of code, from the shapes that datasets have them in."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SHAPES = (
    'statements such as "assert f(2) == 4"; {"input": text or None, "output": text}; a list of these; '
    '{"inputs": [...], "outputs": [...]}, with "fn_name" for calls; JSON text of any of them; or nothing'
)
_MAX_SHOWN = 5  # elements of a shape in an error message
_BY_CALL = """\
def _as_lists(value):
    return [_as_lists(one) for one in value] if isinstance(value, (list, tuple)) else value
_expected = {expected!r}
_got = _as_lists((Solution().{name} if "Solution" in globals() else {name})(*{arguments!r}))
assert _got == _expected or isinstance(_expected, list) and _expected and _got == _expected[0]
"""


@dataclass(frozen=True)
class Run:
    """A program's input and its expected output."""

    stdin: str
    output: str


Case = Run | str  # or statements that pass when they raise nothing


class _Unknown(Exception):
    pass


def read_cases(value: Any, row: int) -> list[Case]:
    """The test cases of a row.

    Raises:
        ValueError: another shape than these: the row, and the shape that came.
    """
    try:
        return _read(value, depth=0)
    except _Unknown as reason:
        detail = f" ({reason})" if str(reason) else ""
        raise ValueError(f"test_cases: row {row}: expected {_SHAPES}; got {_shape(value)}{detail}") from None


def _read(value: Any, depth: int, is_element: bool = False) -> list[Case]:
    if hasattr(value, "as_py"):  # of PyArrow
        value = value.as_py()
    if value is None:
        return []
    if depth > 4:
        raise _Unknown("nested too deeply")
    if isinstance(value, str):
        return _from_text(value, depth, is_element)
    if isinstance(value, Mapping):
        return _from_mapping({name: part for name, part in value.items() if part is not None}, is_element)
    if not _is_list(value):
        raise _Unknown
    return [case for one in value for case in _read(one, depth + 1, is_element=True)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping, set, frozenset))


def _from_text(text: str, depth: int, is_element: bool) -> list[Case]:
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _from_statements(text, is_element)
    if isinstance(value, (bool, int, float)):
        raise _Unknown("JSON text of a number")
    return _read(value, depth + 1, is_element)


def _from_statements(text: str, is_element: bool) -> list[Case]:
    """One case, or for a text on its own one for each assertion, after the statements in front of it that are none."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _Unknown("text that is neither JSON nor Python") from None
    if not body:
        return []  # comments
    if not _can_fail(body[-1]):
        raise _Unknown("statements that end without an assertion or a call, and check nothing")
    if is_element or len(body) == 1:
        return [text]
    cases: list[Case] = []
    setup: list[str] = []
    for statement in body:
        if isinstance(statement, ast.Assert):
            cases.append("\n".join([*setup, ast.unparse(statement)]))
        else:
            setup.append(ast.unparse(statement))
    return cases if isinstance(body[-1], ast.Assert) else [*cases, "\n".join(setup)]


def _can_fail(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)  # "f(2) == 4" passes whatever f(2) is
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False  # such as a check that nobody calls
    return any(isinstance(node, (ast.Assert, ast.Call, ast.Raise)) for node in ast.walk(statement))


def _from_mapping(part: dict, is_element: bool) -> list[Case]:
    if not part:
        return []
    output_keys = [name for name in ("output", "outputs") if name in part]
    if len(output_keys) != 1 or "input" in part and "inputs" in part:
        raise _Unknown
    outputs, inputs = part[output_keys[0]], part.get("input", part.get("inputs"))
    function = part.get("fn_name") or None
    kinds = {str(part[name]).lower() for name in ("type", "testtype") if name in part}
    if function is None and not kinds <= {"stdin", "stdin_stdout"}:
        raise _Unknown(f"{', '.join(kinds)} without fn_name")
    if function is not None and output_keys == ["output"]:  # one call
        inputs, outputs = [inputs], [outputs]
    elif function is None and not _is_list(outputs):
        inputs, outputs = [inputs], [outputs]
    elif is_element and output_keys == ["output"]:
        raise _Unknown("cases, or the lines of one?")
    if not _is_list(outputs) or not (inputs is None or _is_list(inputs)):
        raise _Unknown("one is a list, the other is not")
    outputs = list(outputs)
    inputs = [None] * len(outputs) if inputs is None else list(inputs)
    if len(inputs) != len(outputs):
        raise _Unknown(f"{len(inputs)} inputs for {len(outputs)} outputs")
    pairs = zip(inputs, outputs, strict=True)
    if function is None:
        return [Run("" if stdin is None else _lines(stdin), _lines(output)) for stdin, output in pairs]
    if not isinstance(function, str) or not function.isidentifier():
        raise _Unknown("fn_name")
    return [_call(function, arguments, expected) for arguments, expected in pairs]


def _call(function: str, arguments: Any, expected: Any) -> str:
    """As APPS compares: tuples are lists, and the expected value may be within a list."""
    arguments = [] if arguments is None else _plain(arguments)
    if not isinstance(arguments, list):
        raise _Unknown("the input of a call is a list of arguments")
    return _BY_CALL.format(name=function, arguments=arguments, expected=_plain(expected))


def _plain(value: Any) -> Any:
    """A value that its repr makes again."""
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if _is_list(value):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (str, int)) or isinstance(value, float) and math.isfinite(value):
        return value
    raise _Unknown(f"a value of type {type(value).__name__}")


def _lines(text: Any) -> str:
    """A text, or its lines in a list."""
    lines = list(text) if _is_list(text) else [text]
    if not all(isinstance(line, str) for line in lines):
        raise _Unknown("inputs and outputs are text")
    return "\n".join(lines)


def _shape(value: Any, depth: int = 2) -> str:
    """The types of a value, not its contents."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        parts = [f"{name}: {_shape(part, depth - 1)}" for name, part in list(value.items())[:_MAX_SHOWN]]
    elif _is_list(value) and hasattr(value, "__len__"):
        parts = list(dict.fromkeys(_shape(one, depth - 1) for one in list(value)[:_MAX_SHOWN]))
        kind += f" of {len(value)}"
    elif isinstance(value, str):
        return f"str {value[:40]!r}{'…' if len(value) > 40 else ''}"
    else:
        return kind
    return f"{kind} ({', '.join(parts)})" if parts and depth else kind
