"""Who is measured: fastgrpo on each backend, and its peers, each as a step from a case's inputs to its results.

Results are named as in `cases.truth`, and checked against it before anything is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo import backends
from fastgrpo.advantages import group_advantages
from fastgrpo.bench.cases import DTYPES, EPSILON, GROUP, Case
from fastgrpo.linear import linear_grpo_loss
from fastgrpo.logps import selective_logps
from fastgrpo.loss import grpo_loss
from fastgrpo.projection import cut, default_chunk

Inputs = SimpleNamespace
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Args:
        op: of `cases.OPS`.
        step: inputs to results, the gradient included where the operation has one.
        why_not: why a case cannot run here, or None.
        mode: what its user chooses, such as "in place".
        prepare: what is put in place before each step, and not timed.
        truth: where the results are those of another function than the operation.
        compiles: what it runs is compiled at its first call for a size.
        is_floor: computes less than the operation, and is not checked: copies and GEMMs, the roofs.
    """

    op: str
    name: str
    step: Callable[[Inputs], Results]
    backend: str = "torch"
    mode: str = ""
    prepare: Callable[[Inputs], None] = lambda inputs: None
    why_not: Callable[[Case], str | None] = lambda case: None
    truth: Callable[[Inputs], Results] | None = None
    is_floor: bool = False
    compiles: bool = False

    def __str__(self) -> str:
        return label({"impl": self.name, "backend": self.backend, "mode": self.mode})


def label(row: dict) -> str:
    """What an implementation is called in tables, by its row."""
    details = [x for x in (row["backend"] if row["impl"] == "fastgrpo" else "", row["mode"]) if x]
    return row["impl"] + (f" ({', '.join(details)})" if details else "")


REGISTRY: list[Implementation] = []


def register(op: str, name: str, **options):
    """Adds the decorated step to the registry."""

    def add(step):
        REGISTRY.append(Implementation(op, name, step, **options))
        return step

    return add


def leaf_of(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def needs(package: str, extra: str = "bench"):
    """Why a case cannot run without a package."""
    missing = importlib.util.find_spec(package) is None
    return lambda case: f"{package} is not installed (pip install 'fastgrpo[{extra}]')" if missing else None


# ---- fastgrpo, on each backend


def _backend_cannot(name: str, mode: str, case: Case) -> str | None:
    module = backends.get(name)
    device = torch.device(case.device)
    call = backends.Call(device.type, device.index, DTYPES[case.dtype], case.V, case.softcap or None)
    why = module.unavailable() or module.refuses(call)
    if why is None and mode == "in place" and case.dtype == "fp16":
        why = "fp16 gradients wait for the upstream factor"
    return why


def _fused_logps(inputs: Inputs, backend: str) -> Results:
    logps, entropies = selective_logps(inputs.logits, inputs.ids, return_entropy=True, backend=backend)
    return {"logps": logps, "entropies": entropies}


def _fused_call(inputs: Inputs, backend: str) -> dict:
    return dict(
        old_per_token_logps=inputs.old, ref_per_token_logps=inputs.ref, objective=inputs.case.objective,
        backend=backend,
    )  # fmt: skip


def _fused_forward(inputs: Inputs, backend: str) -> Results:
    with torch.no_grad():
        return {"loss": grpo_loss(inputs.logits, inputs.ids, inputs.advantages, **_fused_call(inputs, backend)).loss}


def _restore(inputs: Inputs) -> None:
    """The last step in place left its gradient there."""
    if not hasattr(inputs, "work"):
        inputs.work = torch.empty_like(inputs.logits)
    inputs.work.copy_(inputs.logits)


def _fused_loss(inputs: Inputs, backend: str, inplace: bool = False) -> Results:
    leaf, call = leaf_of(inputs.work if inplace else inputs.logits), _fused_call(inputs, backend)
    loss = grpo_loss(leaf, inputs.ids, inputs.advantages, inplace=inplace, return_stats=False, **call).loss
    loss.backward()
    return {"loss": loss.detach(), "d_logits": leaf.grad}


def _fused_linear(inputs: Inputs, backend: str) -> Results:
    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    call = dict(_fused_call(inputs, backend), softcap=inputs.case.softcap)
    loss = linear_grpo_loss(hidden, weight, inputs.ids, inputs.advantages, **call).loss
    loss.backward()
    return {"loss": loss.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}


def _add_fastgrpo() -> None:
    for backend in backends.NAMES:
        for op, mode, step in (
            ("logps", "", _fused_logps),
            ("forward", "", _fused_forward),
            ("loss", "in place", functools.partial(_fused_loss, inplace=True)),
            ("loss", "", _fused_loss),
            ("linear", "", _fused_linear),
        ):
            options = dict(backend=backend, mode=mode, why_not=functools.partial(_backend_cannot, backend, mode))
            if mode == "in place":
                options["prepare"] = _restore
            REGISTRY.append(Implementation(op, "fastgrpo", functools.partial(step, backend=backend), **options))


_add_fastgrpo()


@register("advantages", "fastgrpo")
def _advantages(inputs: Inputs) -> Results:
    return {"advantages": group_advantages(inputs.rewards, GROUP)}


# ---- eager torch, and the same compiled


@register("advantages", "eager")
def _eager_advantages(inputs: Inputs) -> Results:
    groups = inputs.rewards.view(-1, GROUP)
    mean, std = (x.repeat_interleave(GROUP) for x in (groups.mean(1), groups.std(1)))
    return {"advantages": (inputs.rewards - mean) / (std + 1e-4)}


def eager_logps(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """In the logits' own dtype: the fewest passes, and the least memory."""
    every = logits.log_softmax(-1)
    return every.gather(-1, ids[..., None])[..., 0].float(), -(every.exp() * every).sum(-1).float()


def eager_objective(logps: Tensor, inputs: Inputs) -> Tensor:
    """The clipped objective with the k3 KL, as a training script writes it."""
    ratio, a, beta = (logps - inputs.old).exp(), inputs.advantages[:, None], inputs.case.objective.beta
    loss = -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)
    if beta:
        difference = inputs.ref - logps
        loss = loss + beta * (difference.exp() - difference - 1) * ratio
    return loss.mean()


def _logps_only(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].float()


def _loss_of_logits(logits: Tensor, inputs: Inputs) -> Tensor:
    return eager_objective(_logps_only(logits, inputs.ids), inputs)


def _loss_of_hidden(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    logits, softcap = hidden @ weight.T, inputs.case.softcap
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return eager_objective(_logps_only(logits, inputs.ids), inputs)


def _too_large(case: Case) -> str | None:
    """On a CPU, where the system would end this process. Logits, log-probabilities, their gradients."""
    if torch.device(case.device).type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) << 10
    needed = 4 * case.B * case.T * case.V * DTYPES[case.dtype].itemsize
    return None if needed < free else f"takes about {needed >> 30} GiB, {free >> 30} are free"


def _add_eager() -> None:
    @functools.cache
    def compiled(function):
        return torch.compile(function)

    for name, made in (("eager", lambda function: function), ("torch.compile", compiled)):

        def logps(inputs: Inputs, made=made) -> Results:
            return dict(zip(("logps", "entropies"), made(eager_logps)(inputs.logits, inputs.ids), strict=True))

        def forward(inputs: Inputs, made=made) -> Results:
            with torch.no_grad():
                return {"loss": made(_loss_of_logits)(inputs.logits, inputs)}

        def loss(inputs: Inputs, made=made) -> Results:
            leaf = leaf_of(inputs.logits)
            value = made(_loss_of_logits)(leaf, inputs)
            value.backward()
            return {"loss": value.detach(), "d_logits": leaf.grad}

        def linear(inputs: Inputs, made=made) -> Results:
            hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
            value = made(_loss_of_hidden)(hidden, weight, inputs)
            value.backward()
            return {"loss": value.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}

        for op, step in (("logps", logps), ("forward", forward), ("loss", loss), ("linear", linear)):
            REGISTRY.append(Implementation(op, name, step, why_not=_too_large, compiles=made is compiled))


_add_eager()


# ---- TRL


@register("logps", "trl", why_not=needs("trl"))
def _trl_logps(inputs: Inputs) -> Results:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return {
        "logps": selective_log_softmax(inputs.logits, inputs.ids),
        "entropies": entropy_from_logits(inputs.logits),
    }


@register("linear", "trl", why_not=needs("trl"))
def _trl_linear(inputs: Inputs) -> Results:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    from fastgrpo.bench.trl_loss import trl_loss

    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    logps, entropies, *_ = _ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1), weight, None, inputs.ids.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE,
        inputs.case.softcap, 1.0, ("entropy",),
    )  # fmt: skip
    logps, entropies = (x.view(inputs.ids.shape) for x in (logps, entropies))
    loss, _ = trl_loss(
        inputs.case.objective, logps, entropies, completion_mask=inputs.mask, advantages=inputs.advantages,
        old_per_token_logps=inputs.old,
    )  # fmt: skip
    loss.backward()
    return {"loss": loss.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}


# ---- Liger


def _liger_cannot(case: Case) -> str | None:
    if (why := needs("liger_kernel")(case)) is not None:
        return why
    if case.op == "loss" and torch.device(case.device).type != "cuda":
        return "its Triton kernels need a GPU"
    return "no softcap" if case.softcap else None


def _one_more(inputs: Inputs) -> None:
    """Its logits have a position after the last, which it leaves out; and its gradient goes where they are."""
    if not hasattr(inputs, "one_more"):
        inputs.one_more = F.pad(inputs.logits, (0, 0, 0, 1))
    inputs.one_more[:, :-1].copy_(inputs.logits)


@register("loss", "liger", mode="in place", why_not=_liger_cannot, prepare=_one_more)
def _liger_loss(inputs: Inputs) -> Results:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    leaf = leaf_of(inputs.one_more)
    options = dict(temperature=1.0, beta=inputs.case.objective.beta, eps_low=EPSILON, eps_high=EPSILON,
                   loss_type="dapo", reduce=True, use_bias_correction_kl=True)  # fmt: skip
    loss, *_ = triton_grpo_loss(leaf, inputs.old, inputs.ref, inputs.ids, inputs.advantages, **options)
    loss.backward()
    return {"loss": loss.detach(), "d_logits": leaf.grad[:, :-1]}


def _liger_linear(inputs: Inputs, compiled: bool) -> Results:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="dapo")
    loss, *_ = function(hidden, weight, inputs.ids, inputs.mask, inputs.advantages, old_per_token_logps=inputs.old)
    loss.backward()
    return {"loss": loss.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}


for _mode, _compiled in (("", True), ("not compiled", False)):  # its default is the first
    register("linear", "liger", mode=_mode, why_not=_liger_cannot, compiles=_compiled)(
        functools.partial(_liger_linear, compiled=_compiled)
    )


# ---- floors: less than the operation


def _cross_entropy_truth(inputs: Inputs) -> Results:
    hidden, weight = inputs.hidden.double(), inputs.weight.double()
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows, ids, gradient in zip(hidden, inputs.ids, d_hidden, strict=True):
        d_logits = ((rows @ weight.T).softmax(-1) - F.one_hot(ids, len(weight))) / inputs.ids.numel()
        gradient.copy_(d_logits @ weight)
        d_weight += d_logits.T @ rows
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def _cross_entropy_cannot(case: Case) -> str | None:
    if case.softcap:
        return "no softcap"
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no F.linear_cross_entropy"


@register(
    "linear", "F.linear_cross_entropy", mode="cross-entropy", why_not=_cross_entropy_cannot, truth=_cross_entropy_truth
)
def _linear_cross_entropy(inputs: Inputs) -> Results:
    hidden, weight = leaf_of(inputs.hidden), leaf_of(inputs.weight)
    rows = hidden.flatten(0, 1)
    chunk = min(
        default_chunk(len(weight), rows.dtype, rows.device), len(rows)
    )  # its own choice is far slower on a CPU
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    F.linear_cross_entropy(rows, weight, inputs.ids.flatten(), options=options).backward()
    return {"d_hidden": hidden.grad, "d_weight": weight.grad}


@register("linear", "GEMMs alone", is_floor=True)
def _gemms(inputs: Inputs) -> Results:
    """`h @ Wᵀ`, `dL @ W` and `dLᵀ @ h` into buffers that are there already, in fastgrpo's chunks."""
    rows, weight = inputs.hidden.flatten(0, 1), inputs.weight
    parts = cut(0, len(rows), default_chunk(len(weight), rows.dtype, rows.device))
    if not hasattr(inputs, "gemm_buffers"):
        logits = torch.randn(parts[0].stop, len(weight), device=rows.device).to(rows.dtype)
        inputs.gemm_buffers = logits, torch.zeros_like(rows), torch.zeros_like(weight)
    logits, d_hidden, d_weight = inputs.gemm_buffers
    for part in parts:
        chunk = logits[: part.stop - part.start]
        torch.mm(rows[part], weight.T, out=chunk)
        torch.mm(chunk, weight, out=d_hidden[part])
        torch.mm(chunk.T, rows[part], out=d_weight)
    return {}


@register("loss", "copy", is_floor=True)
@register("logps", "copy", is_floor=True)
@register("forward", "copy", is_floor=True)
def _copy(inputs: Inputs) -> Results:
    """One read and one write of the logits."""
    if not hasattr(inputs, "copied"):
        inputs.copied = torch.empty_like(inputs.logits)
    inputs.copied.copy_(inputs.logits)
    return {}
