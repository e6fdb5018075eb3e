"""The loss from logits, without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import grpo_loss
from fastgrpo.bench.inputs import from_logits
from fastgrpo.bench.operation import DTYPES, Case, Inputs, Operation, Results
from fastgrpo.bench.sides import add_copy, add_eager, add_fastgrpo, eager_loss, fastgrpo_options
from fastgrpo.bench.truth import exact_loss


def _truth(inputs: Inputs) -> Results:
    rows = inputs.logits.flatten(0, 1)

    def each(part: slice) -> tuple[Tensor, None]:
        return rows[part].double(), None

    return {"loss": exact_loss(inputs, each)}


forward = Operation(
    "forward",
    title="loss from logits, without a gradient",
    place=2,
    inputs=from_logits,
    truth=_truth,
    bytes=lambda case: case.B * case.T * case.V * DTYPES[case.dtype].itemsize,
    beta=0.04,
    full=tuple(Case("forward", 8, 64, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
)


@torch.no_grad()
def _fastgrpo(inputs: Inputs, backend: str) -> Results:
    options = fastgrpo_options(inputs, backend)
    return {"loss": grpo_loss(inputs.logits, inputs.ids, inputs.advantages, **options).loss}


@torch.no_grad()
def _eager(inputs: Inputs, made) -> Results:
    return {"loss": made(eager_loss)(inputs.logits, inputs)}


add_fastgrpo(forward, {"": _fastgrpo})
add_eager(forward, _eager)
add_copy(forward)
