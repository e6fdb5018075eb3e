"""Mistakes of the user: one line on stderr and exit status 2. Any other error keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fastgrpo._extras import MissingPackage


class UsageError(ValueError):
    """A mistake in the command's arguments or files: shown without a traceback."""


def run(name: str, function: Callable[[], object]) -> int:
    """Call `function` for the command `name`; returns the exit status."""
    try:
        status = function() or 0
        sys.stdout.flush()  # what cannot be written is found out now
        return status
    except (MissingPackage, UsageError) as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory; smaller sizes need less: {error}"
    except BrokenPipeError:  # the reader of stdout has gone, as in `fastgrpo env | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # what the machine lacks, whoever asks for it
            raise
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    except KeyboardInterrupt:
        print(f"fastgrpo {name}: interrupted", file=sys.stderr)
        return 130
    print(f"fastgrpo {name}: error: {' '.join(message.split())}", file=sys.stderr)  # libraries write several lines
    return 2


def check_folder(option: str, folder: Path) -> None:
    """Make a folder to write to.

    Raises:
        UsageError: it cannot be made, or not written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option}: {folder} cannot be written to")


def check_new_file(option: str, path: Path) -> None:
    """Check that a file can be written.

    Raises:
        UsageError: its folder does not exist, it is a folder itself, or the system forbids it.
    """
    try:
        if not path.resolve().parent.is_dir():
            raise UsageError(f"{option}: no such folder: {path.parent}")
        if path.is_dir():
            raise UsageError(f"{option}: expected a file, got the folder {path}")
        if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            raise UsageError(f"{option}: {path} cannot be written")
    except OSError as error:
        raise UsageError(f"{option}: {path} cannot be written: {error.strerror}") from error
