"""Launch choices: what only a speed depends on, set for a block of code, so that it can be measured."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # noqa: F401 (in the string)

T = TypeVar("T", bound="DataclassInstance")


class Choices(Generic[T]):
    """The choices in force, a frozen dataclass, which `using` changes for the calls inside its `with`.

    They are those of a thread. The backward pass on a GPU runs in another one and does not see them.
    """

    def __init__(self, default: T):
        self._current = contextvars.ContextVar(type(default).__name__, default=default)

    def get(self) -> T:
        return self._current.get()

    @contextlib.contextmanager
    def using(self, **choices: Any) -> Iterator[T]:
        """Calls inside the `with` are launched by these choices; the others stay as they were outside.

        Raises:
            ValueError: a choice that does not exist, or a value that it cannot take.
        """
        names = [field.name for field in dataclasses.fields(self.get())]
        for name in choices:
            if name not in names:
                raise ValueError(f"{name}: expected one of the choices {', '.join(names)}")
        token = self._current.set(dataclasses.replace(self.get(), **choices))
        try:
            yield self.get()
        finally:
            self._current.reset(token)
