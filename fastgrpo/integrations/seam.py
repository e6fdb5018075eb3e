"""How fastgrpo gets into another package: put something in place of a name, take it back, refuse what does not fit.

An integration is a file of its own beside this one, or a folder:

    THEIRS = Package("theirs", title="Theirs", versions="2.0 to 2.3")

    def _places() -> list[Place]:
        module = THEIRS.module("theirs.losses", takes={"token_logps": ["logits", "ids"]})
        return held_in("theirs", "token_logps", module.token_logps, ours)

    _patch = Patch(_places)

and its `patch()` and `unpatch()` are `_patch.put` and `_patch.take_back`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from fastgrpo import __version__

_lock = threading.RLock()  # one for all packages: what one thread has put is not what another finds


class NotHonoured(Exception):
    """Why another package's option, method or model cannot be honoured here; the message begins with its name."""


@dataclass(frozen=True)
class Package:
    """Another package, and which of its versions an integration fits.

    Args:
        name: of its distribution.
        title: as messages call it.
        versions: as messages say it; whether a version fits is decided by what `module` finds.
    """

    name: str
    title: str
    versions: str

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.name)

    def is_at_least(self, *release: int) -> bool:
        """Whether the installed version is `release`, such as (1, 15), or a later one."""
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[: len(release)]) >= release

    def module(self, name: str, *, takes: Mapping[str, list[str]], has: Iterable[str] = ()) -> ModuleType:
        """One of the package's modules, after a look at what it has.

        Args:
            takes: {function: the parameters that it has to have}; of an autograd function, those behind ctx.
            has: other names that it has to have.

        Raises:
            RuntimeError: the module is not there, has not all names, or its functions take other arguments.
        """
        try:
            module = importlib.import_module(name)
            found = {function: _parameters(getattr(module, function)) for function in takes}
            for other in has:
                getattr(module, other)
        except (ImportError, AttributeError) as error:
            self.refuse(str(error))
        for function, expected in takes.items():
            if found[function] != expected:
                self.refuse(f"{function} takes {', '.join(found[function])}, expected {', '.join(expected)}")
        return module

    def refuse(self, problem: str) -> NoReturn:
        """Raise the RuntimeError about a version that this integration does not fit."""
        try:
            here = f"{self.title} {self.version} differs"
        except importlib.metadata.PackageNotFoundError:
            here = "no version is installed here"
        raise RuntimeError(
            f"fastgrpo {__version__} fits {self.title} {self.versions}; {here}, and nothing is changed: {problem}"
        )

    def leave(self, who: object, why: NotHonoured) -> None:
        """Warn that something is left to the package; once for each reason of an object `who`."""
        said = vars(who).setdefault("_fastgrpo_said", set())
        if str(why) not in said:
            said.add(str(why))
            warnings.warn(f"fastgrpo leaves this to {self.title}: {why}", RuntimeWarning, stacklevel=3)


def _parameters(function: Any) -> list[str]:
    forward = getattr(function, "forward", None)
    return list(inspect.signature(forward or function).parameters)[forward is not None :]


class Place(NamedTuple):
    """A name of a module or of a class, and what is to be, or was, under it."""

    owner: Any
    name: str
    value: Any

    def __str__(self) -> str:
        module = isinstance(self.owner, ModuleType)
        owner = self.owner.__name__ if module else f"{self.owner.__module__}.{self.owner.__qualname__}"
        return f"{owner}.{self.name}"


def held_in(package: str, name: str, theirs: object, ours: object) -> list[Place]:
    """All loaded modules of a package that have `theirs` under a name, as `from … import …` leaves it, for `ours`.

    A module that imports the name while it is replaced keeps `ours`; so load those that matter first.
    """
    return [
        Place(module, name, ours)
        for key, module in list(sys.modules.items())
        if key.partition(".")[0] == package and vars(module).get(name) is theirs
    ]


def _put(places: Iterable[Place]) -> list[Place]:
    """Fill the places, all or none; returns what was there."""
    before: list[Place] = []
    try:
        for owner, name, value in places:
            before.append(Place(owner, name, vars(owner)[name]))
            setattr(owner, name, value)
    except BaseException:
        _put_back(before)
        raise
    return before


def _put_back(before: list[Place]) -> None:
    while before:
        setattr(*before.pop())


@contextlib.contextmanager
def in_place(places: Iterable[Place]) -> Iterator[None]:
    """While this lasts, the places hold their values; then what they held before."""
    with _lock:
        before = _put(places)
        try:
            yield
        finally:
            _put_back(before)


class Patch(contextlib.AbstractContextManager):
    """Places that hold their values from `put` until `take_back`, or as a context manager until its end.

    Args:
        places: finds them, when they are to be filled; if it raises, nothing is changed.
    """

    def __init__(self, places: Callable[[], Iterable[Place]]):
        self._places = places
        self._before: list[Any] = []

    def put(self) -> Patch:
        """Fill the places, unless they are filled; returns this patch."""
        with _lock:
            if not self._before:
                self._before = _put(self._places())
        return self

    def take_back(self) -> None:
        """Put back what the places held before; does nothing if they hold it."""
        with _lock:
            _put_back(self._before)

    def __exit__(self, *_: Any) -> None:
        self.take_back()

    def __str__(self) -> str:
        return ", ".join(map(str, self._before))
