"""The loss and its gradient from logits."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fastgrpo import grpo_loss
from fastgrpo.bench.inputs import from_logits
from fastgrpo.bench.operation import DTYPES, EPSILON, Case, Inputs, Operation, Results, Target, leaf_of
from fastgrpo.bench.sides import add_copy, add_eager, add_fastgrpo, eager_loss, fastgrpo_options, liger_cannot
from fastgrpo.bench.targets import accuracy, both, ratio
from fastgrpo.bench.truth import exact_loss


def _truth(inputs: Inputs) -> Results:
    """The gradient is kept as fp32, which is exact enough here."""
    rows = inputs.logits.flatten(0, 1)
    gradient = torch.empty_like(rows, dtype=torch.float32)

    def each(part: slice):
        return rows[part].double(), lambda d_logits: gradient[part].copy_(d_logits)

    return {"loss": exact_loss(inputs, each), "d_logits": gradient.view_as(inputs.logits)}


_IN_PLACE = "in place"
loss = Operation(
    "loss",
    title="loss and gradient from logits",
    place=3,
    inputs=from_logits,
    truth=_truth,
    bytes=lambda case: 2 * case.B * case.T * case.V * DTYPES[case.dtype].itemsize,
    beta=0.04,
    quick=tuple(Case("loss", 8, 16, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
    full=tuple(Case("loss", 8, 64, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
    growth=(
        *(Case("loss", 4, 128, V) for V in (16_384, 65_536, 131_072, 262_144)),
        *(Case("loss", N // 128, 128, 32_768) for N in (512, 1024, 2048, 4096, 8192)),
    ),
    targets=(
        *both("from logits, in place: eager's time over ours", ratio("eager", under_mode=_IN_PLACE), 10, 7),
        *accuracy("loss"),
        Target("GPU, one pass in place: our time over a copy's", "bf16", ratio("fastgrpo", "copy", _IN_PLACE), 1.15,
               at_most=True, on="cuda", of_device=(("H100", 1.10),)),
        Target("GPU, one pass in place: Liger's time over ours", "bf16", ratio("liger", under_mode=_IN_PLACE), 2,
               on="cuda"),
        Target("GPU, one pass in place: eager's time over ours", "bf16", ratio("eager", under_mode=_IN_PLACE), 8,
               on="cuda"),
    ),
    page=0,
    short="from logits",
)  # fmt: skip


def _restore(inputs: Inputs) -> None:
    """The last step in place left its gradient there."""
    if not hasattr(inputs, "work"):
        inputs.work = torch.empty_like(inputs.logits)
    inputs.work.copy_(inputs.logits)


def _fastgrpo(inputs: Inputs, backend: str, inplace: bool) -> Results:
    leaf, options = leaf_of(inputs.work if inplace else inputs.logits), fastgrpo_options(inputs, backend)
    value = grpo_loss(leaf, inputs.ids, inputs.advantages, inplace=inplace, return_stats=False, **options).loss
    value.backward()
    return {"loss": value.detach(), "d_logits": leaf.grad}


def _in_place_cannot(case: Case) -> str | None:
    return "fp16 gradients wait for the upstream factor" if case.dtype == "fp16" else None


def _eager(inputs: Inputs, made) -> Results:
    leaf = leaf_of(inputs.logits)
    value = made(eager_loss)(leaf, inputs)
    value.backward()
    return {"loss": value.detach(), "d_logits": leaf.grad}


add_fastgrpo(
    loss,
    {_IN_PLACE: functools.partial(_fastgrpo, inplace=True), "": functools.partial(_fastgrpo, inplace=False)},
    prepare={_IN_PLACE: _restore},
    why_not={_IN_PLACE: _in_place_cannot},
)
add_eager(loss, _eager)


def _liger_cannot(case: Case) -> str | None:
    on_gpu = torch.device(case.device).type == "cuda"
    return liger_cannot(case) or (None if on_gpu else "its Triton kernels need a GPU")


def _one_more(inputs: Inputs) -> None:
    """Its logits have a position after the last, which it leaves out; and its gradient goes where they are."""
    if not hasattr(inputs, "one_more"):
        inputs.one_more = F.pad(inputs.logits, (0, 0, 0, 1))
    inputs.one_more[:, :-1].copy_(inputs.logits)


@loss.add("liger", mode=_IN_PLACE, why_not=_liger_cannot, prepare=_one_more)
def _liger(inputs: Inputs) -> Results:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    leaf = leaf_of(inputs.one_more)
    options = dict(temperature=1.0, beta=inputs.case.objective.beta, eps_low=EPSILON, eps_high=EPSILON,
                   loss_type="dapo", reduce=True, use_bias_correction_kl=True)  # fmt: skip
    value, *_ = triton_grpo_loss(leaf, inputs.old, inputs.ref, inputs.ids, inputs.advantages, **options)
    value.backward()
    return {"loss": value.detach(), "d_logits": leaf.grad[:, :-1]}


add_copy(loss)
