"""The backends: one module each (torch, cpu, triton, cuda) with the same functions, and the place that chooses.

A backend works on rows of logits and knows neither loss types nor layouts beyond `TokenRows` and `TokenSpec`:

    row_stats(logits, ids, mask, inv_temperature, want_entropy, softcap=0.0) -> (logp, lse, entropy)
    row_grad(logits, ids, lse, entropy, g, h, inv_temperature, out, softcap=0.0)
    token_loss(logits, ids, mask, inv_temperature, want_entropy, rows, spec, out, softcap=0.0)
        -> (loss, logp, lse, entropy, kl, ratio, g)
    scale_(x, factor)
    unavailable() -> None, or why this backend cannot run on this machine
    supports(device_type, dtype) -> None, or why it cannot take such logits

logits (B, T, V) have unit stride in V and any other strides; everything per row is (N,) with N = B*T, contiguous.
With a softcap c > 0 the logits are c·tanh(logit/c), and gradients those of the raw ones.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

import torch as _torch  # plain `torch` is a submodule of this package
from torch import Tensor

NAMES = ("cpu", "cuda", "triton", "torch")


class TokenRows(NamedTuple):
    """What the fused objective reads per row; (N,) fp32 unless said otherwise."""

    weight: Tensor  # factor of the row's loss: mask and normaliser
    advantages: Tensor | None  # or None, and then the next two
    rewards: Tensor | None  # (S,) fp32, one per sequence, in contiguous groups of spec.group_size
    seq: Tensor | None  # (N,) int32: the sequence of each row
    old: Tensor | None  # logps of the policy that sampled; None: the current ones, detached
    ref: Tensor | None  # logps of the reference policy; None when beta is 0
    policy_scale: Tensor | None  # factor of the policy term alone (importance sampling); None: 1
    h: Tensor | None  # dL/dentropy; None: 0


class TokenSpec(NamedTuple):
    """The scalars of the fused objective. Numbers only: it travels through the operator schema as a list of floats."""

    kind: float = 0  # 0: clip (grpo, bnpo, dr_grpo, dapo, luspo), 1: cispo, 2: sapo
    clip_low: float = 0.8
    clip_high: float = 1.2
    delta: float = float("inf")
    beta: float = 0.0
    bias_correction: float = 0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    group_size: float = 0
    scale_by_std: float = 0
    skip_zero: float = 0


@functools.cache
def get(name: str) -> ModuleType:
    """The backend module called `name`."""
    if name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def select(tensor: Tensor, backend: str = "auto", dtype: _torch.dtype | None = None, *, one_pass: int = 0) -> str:
    """The name of the backend that sweeps logits on the device of `tensor`.

    "auto" takes the first of these that fits: torch for float64; cpu for CPU tensors; cuda for one pass over rows that
    a cluster of thread blocks can hold (NVIDIA GPUs of compute capability 9.0 and later); triton. If the kernels of
    that one are missing, it is torch, and a RuntimeWarning says why, once.

    Args:
        backend: "auto", or one of `NAMES`, which is then checked and returned.
        dtype: of the logits; None: that of `tensor`.
        one_pass: V if the objective is of single tokens and the gradient is written over the logits, else 0.

    Raises:
        ValueError: unknown backend, or a named one that cannot take this tensor.
        RuntimeError: a named backend that cannot run on this machine.
    """
    return _select(tensor.device.type, tensor.device.index, dtype or tensor.dtype, backend, one_pass)


@_torch.compiler.assume_constant_result
def _select(device_type: str, index: int | None, dtype: _torch.dtype, backend: str, one_pass: int) -> str:
    if backend != "auto":
        module = get(backend)
        if (why := module.unavailable()) is not None:
            raise RuntimeError(f"backend {backend!r} cannot run here: {why}")
        if (why := module.supports(device_type, dtype)) is not None:
            raise ValueError(f"backend {backend!r} cannot take these logits: {why}")
        return backend
    if dtype == _torch.float64:
        return "torch"
    if one_pass and device_type == "cuda":
        cuda = get("cuda")
        usable = cuda.unavailable() is None and cuda.supports(device_type, dtype) is None
        if usable and cuda.cluster(one_pass, dtype, index) > 0:
            return "cuda"
    name = "cpu" if device_type == "cpu" else "triton"
    module = get(name)
    why = module.unavailable() or module.supports(device_type, dtype)
    if why is None:
        return name
    _warn_once(f"fastgrpo: the {name} kernels are not used, torch stands in (slower, same numbers): {why}")
    return "torch"
