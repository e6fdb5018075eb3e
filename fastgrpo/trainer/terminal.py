"""The one progress bar of a run.

On a terminal it is a single line, which the stages of a run share one after the other. What others print meanwhile
(warnings, logs, a reward function's prints) appears above it, and transformers and datasets show no bars of their own.
Elsewhere (a pipe, a file) it is plain lines: where a stage begins and ends, and between that now and then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO, TypeVar

import datasets
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

T = TypeVar("T")

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_SECONDS, _SHARE = 10.0, 0.02  # between two plain lines, at least: so long, and so much of the time until then

_run: Progress | None = None  # that of the run, inside one_bar()


def start(name: str, total: int, initial: int = 0) -> Progress:
    """Begin the stage `name` of `total` steps, of which `initial` are done; its `update` and `finish` follow."""
    bar = Progress() if _run is None else _run
    bar.start(name, total, initial)
    return bar


def track(name: str, items: Sequence[T]) -> Iterator[T]:
    """The items, as a stage of the run unless it is in one already; without a run, nothing is shown."""
    if _run is None or _run.is_busy:
        yield from items
        return
    bar = start(name, len(items))
    for item in items:
        yield item
        bar.update()
    bar.finish()


def close() -> None:
    """Leave the run's bar as it is; what is printed from now on goes below it."""
    if _run is not None:
        _run.close()


@contextlib.contextmanager
def one_bar() -> Iterator[None]:
    """Inside, all stages share one bar, and nothing breaks its line."""
    global _run
    bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    _run = Progress()
    try:
        with _above(_run) if _run.is_terminal else contextlib.nullcontext():
            try:
                yield
            finally:
                _run.close()
    finally:
        _run = None
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()


class Progress:
    """A line that says how far a stage is; of several processes, only the first has one."""

    def __init__(self) -> None:
        self.stream = sys.stderr
        self.is_shown = int(os.environ.get("RANK", 0)) == 0
        self.is_terminal = self.is_shown and self.stream.isatty()
        self.is_busy = False
        self.bar: tqdm | None = None
        self._begun = self._printed = time.monotonic()

    def start(self, name: str, total: int, initial: int) -> None:
        self.is_busy = True
        self._name, self._n, self._total = name, initial, total
        self._values: dict[str, str] = {}
        if not self.is_terminal:
            self._print()
        elif self.bar is None:
            # a terminal that does not know its size says 0
            width = dict(dynamic_ncols=True) if os.get_terminal_size(self.stream.fileno()).columns else dict(ncols=80)
            self.bar = tqdm(desc=name, total=total, initial=initial, file=self.stream, bar_format=_FORMAT, **width)
        else:
            self.bar.reset(total)
            self.bar.n = self.bar.initial = initial
            self.bar.set_description_str(name, refresh=False)
            self.bar.set_postfix_str("", refresh=False)
            self.bar.refresh()

    def set_postfix(self, values: Mapping[str, str], refresh: bool = False) -> None:
        """What is shown beside the number of steps, from the next update on."""
        self._values = dict(values)
        if self.bar is not None:
            self.bar.set_postfix(self._values, refresh=refresh)

    def update(self) -> None:
        """One more step is done."""
        self._n += 1
        if self.bar is not None:
            self.bar.update()
        elif time.monotonic() - self._printed > max(_SECONDS, _SHARE * (time.monotonic() - self._begun)):
            self._print()

    def finish(self) -> None:
        """The stage has ended, perhaps before all its steps; the bar then says that these were all."""
        if not self.is_busy:
            return
        self.is_busy, self._total = False, self._n
        if self.bar is not None:
            self.bar.total = self._n
            self.bar.refresh()
            if self is not _run:
                self.close()
        elif not self.is_terminal:
            self._print()

    def close(self) -> None:
        """Leave the bar as it is; what is printed from now on goes below it."""
        if self.bar is not None:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, _Above):
                    stream.end()
            self.bar.close()
            self.bar = None

    def _print(self) -> None:
        self._printed = time.monotonic()
        if self.is_shown:
            values = "".join(f", {name} {value}" for name, value in self._values.items())
            print(f"{self._name}: {self._n}/{self._total}{values}", file=self.stream, flush=True)


class _Above:
    """A stream to the terminal of a bar, whose lines appear above the bar when they are whole."""

    def __init__(self, stream: TextIO, progress: Progress):
        self._stream, self._progress, self._rest = stream, progress, ""

    def write(self, text: str) -> int:
        if self._progress.bar is None:
            return self._stream.write(text)
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._put(lines + newline)
        return len(text)

    def end(self) -> None:
        """Write what no newline followed."""
        if self._rest:
            self._put(self._rest + "\n")
            self._rest = ""

    def _put(self, text: str) -> None:
        bar = self._progress.bar
        if bar is not None:
            bar.clear()
        self._stream.write(text)
        self._stream.flush()
        if bar is not None:
            bar.refresh()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _above(progress: Progress) -> Iterator[None]:
    """Put `_Above` in the place of stdout and stderr, and in that of handlers of logs that hold stderr."""
    before = sys.stdout, sys.stderr
    out = _Above(sys.stdout, progress) if sys.stdout.isatty() else sys.stdout
    err = _Above(sys.stderr, progress)
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {
        id(handler): handler
        for logger in loggers
        for handler in getattr(logger, "handlers", ())
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    }
    sys.stdout, sys.stderr = out, err
    for handler in handlers.values():
        handler.setStream(err)
    try:
        yield
    finally:
        for stream in (out, err):
            if isinstance(stream, _Above):
                stream.end()
        sys.stdout, sys.stderr = before
        for handler in handlers.values():
            handler.setStream(before[1])
