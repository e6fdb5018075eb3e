"""How the bench writes its numbers and which colour a side has, in what it prints, draws and reports."""

from __future__ import annotations

from fastgrpo.bench.registry import FLOORS

LINE = 100  # columns that what is printed has at most
PLOT = "fastgrpo-bench.png"  # where a run draws

_COLOURS = {"fastgrpo": "tab:blue", "eager": "tab:gray", "trl": "tab:orange", "liger": "tab:green",
            "F.linear_cross_entropy": "tab:purple", "torch.compile": "tab:brown"}  # fmt: skip


def colour(impl: str) -> str:
    """Of the lines and bars of an implementation."""
    return "black" if impl in FLOORS else _COLOURS.get(impl, "tab:pink")


def short(ms: float) -> str:
    """Three digits, without an exponent."""
    return f"{ms:.3f}" if ms < 0.1 else f"{ms:.3g}" if ms < 999 else f"{ms:.0f}"


def duration(ms: float) -> str:
    """Milliseconds with their unit, from a second on in seconds."""
    return f"{ms / 1e3:.2f} s" if ms >= 999.5 else f"{short(ms)} ms"


def multiple(ratio: float) -> str:
    """Three digits or more, and at most seven characters up to a million."""
    return f"{ratio:.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}x"
