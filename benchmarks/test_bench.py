"""Every implementation on small cases: `pytest benchmarks`, a group for each case, sides beside each other.

Across commits: `pytest benchmarks --benchmark-autosave`, and after the change `pytest benchmarks --benchmark-compare`.
`fastgrpo bench` has the sizes that count, memory, and the project's targets.
"""

import functools

import pytest
import torch

from fastgrpo.bench import turns
from fastgrpo.bench.operation import Case
from fastgrpo.bench.registry import REGISTRY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    Case("advantages", 8192, 1, 1, dtype="fp32", device=DEVICE),
    *(
        Case(op, 8, 16, 32_768, 256, dtype, DEVICE)
        for op in ("logps", "forward", "loss", "linear")
        for dtype in ("bf16", "fp32")
    ),
    Case("linear", 8, 16, 32_768, 256, device=DEVICE, inactive=0.5),
    Case("step", 8, 16, 4096, 256, device=DEVICE),
]


@functools.lru_cache(maxsize=1)  # the cases come one after the other
def inputs_of(case):
    return case.operation.inputs(case)


@pytest.mark.parametrize(
    "case, each", [pytest.param(c, e, id=f"{c}: {e}") for c in CASES for e in REGISTRY if e.op == c.op]
)
def test_speed(benchmark, case, each):
    if (why := each.why_not(case)) is not None:
        pytest.skip(f"{each}: {why}")
    inputs, row = inputs_of(case), {}
    assert turns.check(each, inputs, row) is None
    benchmark.group = str(case)
    benchmark.extra_info.update(row, bytes=case.bytes, flops=case.flops)

    def step():
        each.step(inputs)
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=lambda: each.prepare(inputs), rounds=5, warmup_rounds=1)
