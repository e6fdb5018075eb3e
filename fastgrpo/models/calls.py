"""How a model is called: rows of ids as padded tensors, and evaluation without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# a transformers model, or what PEFT, torch.compile or accelerate has made of one, with its attributes
AnyModel = Any


def pad(rows: list[list[int]], value: int, side: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Lists of ids to (B, T) int64 ids and (B, T) int64 mask."""
    width = max(map(len, rows))
    left = side == "left"
    gaps = [width - len(row) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    ids = [[value] * gap + row if left else row + [value] * gap for row, gap in pairs]
    mask = [[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in pairs]
    # empty lists alone would make floats
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(mask, dtype=torch.long, device=device)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients: no dropout, no gradient checkpointing, a key-value cache in `generate`."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
