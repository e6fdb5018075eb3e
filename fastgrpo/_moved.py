"""Modules that have moved keep their old name for one version."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def public_names(old: str, new: str) -> dict[str, Any]:
    """The public names of the module `new`, for the module `old`, which warns of its name where it is imported."""
    module = importlib.import_module(new)  # by name, because the new place may lie above the old one
    message = f"{old} has moved: import from {new}; the old name goes with the next version"
    warnings.warn(message, DeprecationWarning, stacklevel=3)  # at the line that imports the old module
    return {name: getattr(module, name) for name in module.__all__}
