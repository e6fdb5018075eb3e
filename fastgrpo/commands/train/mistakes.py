"""Mistakes in the options of `fastgrpo train`, and in what they name, as UsageErrors."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fastgrpo.commands.errors import UsageError
from fastgrpo.trainer.checkpoints import DiskFull, ResumeError, raise_if_full

T = TypeVar("T")

OF_R1 = ("cold_start", "general", "reward_model")  # options that --recipe r1 alone reads
# what the system says about a disk, not about a program
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)


def refuse(options: argparse.Namespace, names: Iterable[str], needed: str) -> None:
    """Raise a UsageError for the first of the options that is given, although it needs something that is not."""
    for name in names:
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs {needed}")


def checked(function: Callable[..., T], *args: Any) -> T:
    """function(*args), with its complaints about what it was given turned into a UsageError."""
    try:
        return function(*args)
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def mistakes_are_shown(folder: str | Path) -> Iterator[None]:
    """Turn a checkpoint of another run into a UsageError, and what cannot be written in the output folder.

    Any other error keeps its traceback: the files are then a reward function's, or nobody knows whose.
    """
    try:
        yield
    except ResumeError as error:
        raise UsageError(f"--resume: {error}") from error
    except DiskFull as error:  # of what we write there
        raise UsageError(f"--output-dir: {error.strerror}") from error
    except OSError as error:
        if error.errno not in _OF_THE_DISK or not _is_below(error.filename, folder):
            raise
        file = os.fsdecode(error.filename)
        message = f"{file}: {error.strerror}"
        try:
            raise_if_full(error, file)
        except DiskFull as full:  # says what is free
            message = full.strerror
        raise UsageError(f"--output-dir: {message}") from error


def _is_below(name: Any, folder: str | Path) -> bool:
    """Whether a file, as an OSError names it, is `folder` or lies in it."""
    if not isinstance(name, str | bytes | os.PathLike):
        return False
    return Path(os.path.abspath(os.fsdecode(name))).is_relative_to(os.path.abspath(folder))
