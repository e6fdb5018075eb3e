"""Log-probabilities and entropies from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import selective_logps
from fastgrpo.bench.inputs import from_logits
from fastgrpo.bench.operation import DTYPES, Case, Inputs, Operation, Results, Target, needs
from fastgrpo.bench.sides import add_copy, add_eager, add_fastgrpo
from fastgrpo.bench.targets import accuracy, best_share


def _truth(inputs: Inputs) -> Results:
    results: dict[str, list[Tensor]] = {"logps": [], "entropies": []}
    for logits, ids in zip(inputs.logits, inputs.ids, strict=True):
        every = logits.double().log_softmax(-1)
        results["logps"].append(every.gather(-1, ids[:, None])[:, 0])
        results["entropies"].append(-(every.exp() * every).sum(-1))
    return {name: torch.stack(rows) for name, rows in results.items()}


logps = Operation(
    "logps",
    title="log-probabilities and entropies from logits",
    place=1,
    inputs=from_logits,
    truth=_truth,
    bytes=lambda case: case.B * case.T * case.V * DTYPES[case.dtype].itemsize,
    quick=(Case("logps", 8, 16, 151_936),),
    full=tuple(Case("logps", 8, 64, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
    targets=(
        *accuracy("logps"),
        Target("GPU, logps: share of the copy's bandwidth", "bf16", best_share, 0.92, on="cuda"),
    ),
    page=7,
)


def _fastgrpo(inputs: Inputs, backend: str) -> Results:
    found = selective_logps(inputs.logits, inputs.ids, return_entropy=True, backend=backend)
    return dict(zip(("logps", "entropies"), found, strict=True))


def _eager(inputs: Inputs, made) -> Results:
    return dict(zip(("logps", "entropies"), made(_logps)(inputs.logits, inputs.ids), strict=True))


def _logps(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In the logits' own dtype: the fewest passes, and the least memory."""
    every = logits.log_softmax(-1)
    return every.gather(-1, ids[..., None])[..., 0].float(), -(every.exp() * every).sum(-1).float()


add_fastgrpo(logps, {"": _fastgrpo})
add_eager(logps, _eager)


@logps.add("trl", why_not=needs("trl"))
def _trl(inputs: Inputs) -> Results:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return {
        "logps": selective_log_softmax(inputs.logits, inputs.ids),
        "entropies": entropy_from_logits(inputs.logits),
    }


add_copy(logps)
