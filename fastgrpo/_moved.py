"""Modules that have moved keep their old name for one version."""

from __future__ import annotations

import importlib
import sys
import warnings


def stand_in(old: str, new: str) -> None:
    """Let the name `old` stand for the module `new`, and warn of it where it is imported."""
    message = f"{old} has moved: import from {new}; the old name goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=3)  # at the line that imports the old module
    sys.modules[old] = importlib.import_module(new)  # by name, because the new place may lie above the old one
