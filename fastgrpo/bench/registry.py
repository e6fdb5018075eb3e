"""All operations and implementations, read from the files of ops/."""

from __future__ import annotations

import importlib
import pkgutil

from fastgrpo.bench import ops
from fastgrpo.bench.operation import OPERATIONS, Operation

_modules = [importlib.import_module(f"{ops.__name__}.{found.name}") for found in pkgutil.iter_modules(ops.__path__)]
_found = [each for module in _modules for each in vars(module).values() if isinstance(each, Operation)]
OPERATIONS.update({op.name: op for op in sorted(_found, key=lambda op: op.place)})

REGISTRY = [each for op in OPERATIONS.values() for each in op.implementations]
FLOORS = {each.name for each in REGISTRY if each.is_floor}
GROWING = next(op for op in OPERATIONS.values() if op.gradient_bytes is not None)  # whose growth is drawn

__all__ = ["FLOORS", "GROWING", "OPERATIONS", "REGISTRY"]
