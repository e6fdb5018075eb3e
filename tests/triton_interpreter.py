"""Whether Triton's interpreter, which runs kernels on CPU tensors, works with the versions that are here."""

import importlib.metadata
import os


def unavailable() -> str | None:
    """Why it does not. Before 3.7 it makes Python numbers of arrays of one element, which numpy 2.4 refuses."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError as error:
        return str(error)
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return f"the interpreter of triton {triton} needs numpy < 2.4, got {numpy}"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def use() -> None:
    """Turns it on where it works; Triton looks when it is imported."""
    if unavailable() is None:
        os.environ.setdefault("TRITON_INTERPRET", "1")
