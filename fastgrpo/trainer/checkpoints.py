"""Checkpoints whole or not at all: written beside their place and renamed; what was cut short is passed over."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

_UNFINISHED = "unfinished"  # beside a run's checkpoints
_REPLACED = "replaced"  # in there, what a new folder takes the place of
_STATE = "trainer_state.json"
_WEIGHTS = re.compile(r"\.(safetensors|distcp)$|^(pytorch_model|adapter_model)|model_states\.pt$")
# what torch and safetensors say, in errors without a number, when a write has failed
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|inline_container|No space left|os error (28|122)\b")


class DiskFull(OSError):
    """Something could not be written; the message names it and says what is free."""


class ResumeError(ValueError):
    """A checkpoint that a run cannot go on from."""


def why_incomplete(checkpoint: str | Path, needed: Sequence[str] = ()) -> str | None:
    """What is wrong with the files of a checkpoint, None where nothing is.

    Args:
        needed: files beside the Trainer's own.
    """
    folder = Path(checkpoint)
    for name in (_STATE, *needed):
        if not (folder / name).is_file():
            return f"{name} is missing"
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        if not is_whole(path):
            return f"{path.relative_to(folder)} is cut short"
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_bytes())
        parts = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(parts, dict):
            return f"{path.name} has no weight_map"
        for name in set(map(str, parts.values())):
            if not (folder / name).is_file():
                return f"{name} is missing"
    if not any(_WEIGHTS.search(path.name) for path in files):
        return "the weights are missing"
    return None


def is_whole(path: Path) -> bool:
    """Whether a file ends where its format says; other formats are not looked at."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix in (".pt", ".pth", ".bin"):  # torch.save's, with the directory at the end
            return zipfile.is_zipfile(path)
        elif path.suffix == ".safetensors":
            return _is_whole_safetensors(path)
    except (ValueError, RecursionError):
        return False
    return True


def _is_whole_safetensors(path: Path) -> bool:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:  # of a pointer to a file elsewhere, or of any other text, it is beyond all memory
            return False
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        return False
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            match entry:
                case {"data_offsets": [int(), int(last)]}:
                    end = max(end, last)
                case _:
                    return False
    return size == 8 + length + end


def last_whole_checkpoint(
    folder: str | Path, needed: Callable[[str], Sequence[str]] = lambda checkpoint: ()
) -> str | None:
    """The newest checkpoint in `folder` that is whole on every process; warns of newer ones that are not.

    Args:
        needed: of a checkpoint's path, the files that this process needs beside the Trainer's own.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    names = [sorted((path.name for path in found if path.is_dir()), key=_number, reverse=True)]
    broadcast_object_list(names)
    for name in names[0]:
        path = os.path.join(folder, name)
        problems = [why for why in gather_object([why_incomplete(path, needed(path))]) if why is not None]
        if not problems:
            return path
        warnings.warn(f"{path} is passed over, since it is incomplete: {problems[0]}", stacklevel=3)
    return None


def _number(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))


def remove_old(run: str, keep: int | None, protected: Sequence[str | None]) -> None:
    """Leave `keep` checkpoints in a run's folder, `protected` ones among them; incomplete and old ones go first."""
    if not keep or keep < 0:
        return
    names = {os.path.basename(path) for path in protected if path is not None}
    found = [path for path in Path(run).glob("checkpoint-*") if path.is_dir() and path.name not in names]
    found.sort(key=lambda path: (why_incomplete(path) is None, path.stat().st_mtime_ns))
    for path in found[: max(0, len(found) - max(0, keep - len(names)))]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(
    path: str | Path, wait: Callable[[], None] = lambda: None, is_main: bool = True, is_local_main: bool = True
) -> Iterator[str]:
    """A folder to write to, which becomes `path` when all that it shall hold is there.

    Args:
        wait: until every process is here.
        is_main, is_local_main: whether this is the first process of all, and the first of its machine, which may
            have a disk of its own.

    Raises:
        DiskFull: something could not be written; then nothing is left of it, and `path` is what it was.
    """
    path = os.fspath(path)
    parent = os.path.join(os.path.dirname(path), _UNFINISHED)
    part = os.path.join(parent, os.path.basename(path))
    replaced = os.path.join(parent, _REPLACED, os.path.basename(path))
    if is_local_main:
        _tidy(parent)
    wait()
    try:
        os.makedirs(part, exist_ok=True)
        yield part
    except Exception as error:
        shutil.rmtree(parent, ignore_errors=True)
        raise_if_full(error, path)
        raise
    for my_turn in (is_main, is_local_main):
        wait()
        if my_turn and os.path.isdir(part):
            if os.path.isdir(path):
                os.makedirs(os.path.dirname(replaced), exist_ok=True)
                os.replace(path, replaced)
            os.replace(part, path)
            shutil.rmtree(parent)
    wait()


def _tidy(unfinished: str) -> None:
    """Remove what a run that was killed left, and put back what it had moved away and not replaced yet."""
    for old in Path(unfinished, _REPLACED).glob("*"):
        place = Path(unfinished).parent / old.name
        if not place.exists():
            with contextlib.suppress(FileNotFoundError):  # another machine with the same disk was first
                old.replace(place)
    shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; DiskFull if there is no space for it."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
    except OSError as error:
        part.unlink(missing_ok=True)
        raise_if_full(error, path)
        raise
    part.replace(path)


def append_whole(path: Path, text: str) -> None:
    """Append to a file; if there is no space for it, the file ends where it did, and DiskFull is raised."""
    with path.open("ab", buffering=0) as file:
        end, rest = file.seek(0, os.SEEK_END), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            file.truncate(end)
            raise_if_full(error, path)
            raise


def raise_if_full(error: Exception, path: str | Path) -> None:
    """Raise DiskFull for `path` if that is what the error comes from."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _WRITE_FAILED.search(str(cause)):
            break
        cause = cause.__cause__ or cause.__context__
    else:
        return
    if isinstance(error, DiskFull):
        raise error
    folder = Path(path).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free / 1e6
    raise DiskFull(errno.ENOSPC, f"{path}: no space to write it, {free:,.1f} MB are free on the disk") from error
