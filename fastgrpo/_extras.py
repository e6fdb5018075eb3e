"""The error for a package that an extra brings and that is not installed."""

from __future__ import annotations

import importlib.util
import sys


class MissingPackage(ModuleNotFoundError):
    """A package is not installed; the message says which, and what to install."""


def require(by: str, extra: str, *packages: str) -> None:
    """Check that `packages` are installed, before any of them is imported.

    Args:
        by: what needs them, such as "fastgrpo.trainer".
        extra: the extra of fastgrpo that brings them.

    Raises:
        MissingPackage: some are not installed; it names all of them.
    """
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise MissingPackage(
            f"{by} needs {', '.join(missing)}, not installed here: pip install 'fastgrpo[{extra}]'", name=missing[0]
        )


def _is_installed(package: str) -> bool:
    if sys.modules.get(package) is not None:
        return True
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:
        return False
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin
