"""Who computes more than one operation: fastgrpo on each of its backends, eager torch alone and compiled, a copy."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.bench.operation import DTYPES, EPSILON, Case, Inputs, Operation, Results, needs
from fastgrpo.engine.head import choose_logits_dtype, default_chunk
from fastgrpo.engine.plan import cut

Step = Callable[..., Results]


# ---- fastgrpo


def add_fastgrpo(operation: Operation, steps: dict[str, Step], **options: dict) -> None:
    """Adds fastgrpo on each backend.

    Args:
        steps: {mode: step(inputs, backend)}.
        options: {option of `Implementation`: {mode: its value}}; `why_not` is asked after the backend.
    """
    for backend in backends.NAMES:
        for mode, step in steps.items():
            more = {name: values[mode] for name, values in options.items() if mode in values}
            why_not = functools.partial(_why_not, backend, more.pop("why_not", lambda case: None))
            operation.add("fastgrpo", backend=backend, mode=mode, why_not=why_not, **more)(
                functools.partial(step, backend=backend)
            )


def _why_not(backend: str, more: Callable[[Case], str | None], case: Case) -> str | None:
    module = backends.get(backend)
    device = torch.device(case.device)
    call = backends.Call(device.type, device.index, DTYPES[case.dtype], case.V, case.softcap or None)
    why = module.unavailable() or module.refuses(call)
    return why or more(case)


def fastgrpo_options(inputs: Inputs, backend: str) -> dict:
    """Keywords of `grpo_loss` and `linear_grpo_loss` for a case."""
    return dict(
        old_per_token_logps=inputs.old, ref_per_token_logps=inputs.ref, objective=inputs.case.objective,
        backend=backend,
    )  # fmt: skip


def chunk_rows(case: Case, device: torch.device) -> int:
    """The most rows that fastgrpo projects at a time."""
    return default_chunk(case.V, choose_logits_dtype("auto", DTYPES[case.dtype], device), device)


def chunks(case: Case, device: torch.device) -> list[slice]:
    """The rows of each chunk."""
    return cut(0, case.B * case.T, chunk_rows(case, device))


# ---- eager torch, and the same compiled


def add_eager(operation: Operation, step: Callable[[Inputs, Callable], Results]) -> None:
    """Adds eager torch, and torch.compile.

    Args:
        step: of (inputs, made), where `made` is to be called on each function of tensors before it is called.
    """
    for name, made in (("eager", lambda function: function), ("torch.compile", _compiled)):
        operation.add(name, why_not=_too_large, compiles=made is _compiled)(functools.partial(step, made=made))


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def _too_large(case: Case) -> str | None:
    """On a CPU, where the system would end this process. Logits, log-probabilities, their gradients."""
    if torch.device(case.device).type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) << 10
    needed = 4 * case.B * case.T * case.V * DTYPES[case.dtype].itemsize
    return None if needed < free else f"takes about {needed >> 30} GiB, {free >> 30} are free"


def eager_loss(logits: Tensor, inputs: Inputs) -> Tensor:
    """The clipped objective with the k3 KL, as a training script writes it.

    The log-probabilities are in the logits' own dtype: the fewest passes, and the least memory.
    """
    logps = logits.log_softmax(-1).gather(-1, inputs.ids[..., None])[..., 0].float()
    ratio, a, beta = (logps - inputs.old).exp(), inputs.advantages[:, None], inputs.case.objective.beta
    loss = -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)
    if beta:
        difference = inputs.ref - logps
        loss = loss + beta * (difference.exp() - difference - 1) * ratio
    return loss.mean()


# ---- Liger


def liger_cannot(case: Case) -> str | None:
    return needs("liger_kernel")(case) or ("no softcap" if case.softcap else None)


# ---- a floor: less than the operation


def add_copy(operation: Operation) -> None:
    """Adds one read and one write of the logits."""
    operation.add("copy", is_floor=True, work=lambda case: 2 * case.B * case.T * case.V * DTYPES[case.dtype].itemsize)(
        _copy
    )


def _copy(inputs: Inputs) -> Results:
    if not hasattr(inputs, "copied"):
        inputs.copied = torch.empty_like(inputs.logits)
    inputs.copied.copy_(inputs.logits)
    return {}
