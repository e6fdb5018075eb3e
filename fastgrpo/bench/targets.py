"""The numbers that targets are about, as ratios of rows of one run."""

from __future__ import annotations

from fastgrpo.bench.operation import Rows, Target


def both(what: str, value, bf16: float, fp32: float, **options) -> tuple[Target, Target]:
    """One target for both dtypes, each with its bound."""
    return Target(what, "bf16", value, bf16, **options), Target(what, "fp32", value, fp32, **options)


def accuracy(op: str) -> tuple[Target, ...]:
    """Errors that fastgrpo may have: in fp32 of 1e-5, in bf16 twice that of eager torch."""
    return tuple(
        Target(f"{gpu}accuracy, {op}: our error{than}", dtype, value, bound, at_most=True, accuracy=True, on=on)
        for dtype, than, value, bound in (("fp32", "", _worst_error, 1e-5), ("bf16", " over eager's", _over_eager, 2))
        for gpu, on in (("", "cpu"), ("GPU, ", "cuda"))
    )


def _ms(rows: Rows, impl: str, mode: str | None = None) -> float | None:
    """The time of the fastest of an implementation."""
    found = [r["ms_p50"] for r in rows if r["impl"] == impl and mode in (None, r["mode"]) and r["ms_p50"] is not None]
    return min(found, default=None)


def ratio(over: str, under: str = "fastgrpo", over_mode: str | None = None, under_mode: str | None = None):
    def value(rows: Rows) -> float | None:
        a, b = _ms(rows, over, over_mode), _ms(rows, under, under_mode)
        return None if a is None or b is None else a / b

    return value


def best_share(rows: Rows) -> float | None:
    return max((r["roof_share"] for r in rows if r["impl"] == "fastgrpo" and r["roof_share"]), default=None)


def _worst_error(rows: Rows) -> float | None:
    return max((r["rel_err"] for r in rows if r["impl"] == "fastgrpo" and r["rel_err"] is not None), default=None)


def _over_eager(rows: Rows) -> float | None:
    eager = [r["rel_err"] for r in rows if r["impl"] == "eager" and r["rel_err"]]
    worst = _worst_error(rows)
    return None if worst is None or not eager else worst / min(eager)
