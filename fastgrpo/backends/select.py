"""Which backend takes a call."""

from __future__ import annotations

import functools
import importlib
import operator
import warnings
from typing import cast

import torch
from torch import Tensor

from .contract import Backend, Call, ColumnBackend

NAMES = ("cpu", "cuda", "triton", "torch")


@functools.cache
def get(name: str) -> Backend:
    """The backend called `name`."""
    if name not in NAMES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return cast(Backend, importlib.import_module(f"{__package__}.{'eager' if name == 'torch' else name}"))


def columns(name: str) -> ColumnBackend:
    """What works on a few columns of each row where the backend is `name`: cuda has no such kernels, and takes
    triton's."""
    return cast(ColumnBackend, get("triton" if name == "cuda" else name))


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def select(
    tensor: Tensor,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    *,
    vocab: int | None = None,
    softcap: float | None = None,
) -> str:
    """The name of the backend that sweeps logits on the device of `tensor`.

    "auto" takes the first of these that fits: torch for float64; cpu for CPU tensors; cuda, without a softcap, for
    rows that a cluster of thread blocks can hold (NVIDIA GPUs of compute capability 9.0 and later); triton. If the
    kernels of that one are missing, it is torch, and a RuntimeWarning says why, once. Nothing but the device, the
    dtype, V and the softcap counts, so that old log-probabilities and the loss come from the same kernels.

    Args:
        backend: "auto", or one of `NAMES`, which is then checked and returned.
        dtype: of the logits; None: that of `tensor`.
        vocab: the length V of a row; None: the last size of `tensor`.
        softcap: of the logits, or None.

    Raises:
        ValueError: unknown backend, or a named one that cannot take these logits.
        RuntimeError: a named backend that cannot run on this machine.
    """
    device = tensor.device
    vocab = tensor.size(-1) if vocab is None else vocab
    if torch.compiler.is_compiling():  # a graph is made for one V only where the choice depends on it
        vocab = operator.index(vocab) if device.type == "cuda" else 1
    return _select(backend, device.type, device.index, dtype or tensor.dtype, vocab, softcap)


@torch.compiler.assume_constant_result
def _select(
    backend: str, device_type: str, index: int | None, dtype: torch.dtype, vocab: int, softcap: float | None
) -> str:
    call = Call(device_type, index, dtype, vocab, softcap)
    if backend != "auto":
        module = get(backend)
        if (why := module.unavailable()) is not None:
            raise RuntimeError(f"backend {backend!r} cannot run here: {why}")
        if (why := module.refuses(call)) is not None:
            raise ValueError(f"backend {backend!r} cannot take these logits: {why}")
        return backend
    if dtype == torch.float64:
        return "torch"
    if device_type == "cuda" and _why_not("cuda", call._replace(one_pass=True)) is None:
        return "cuda"
    name = "cpu" if device_type == "cpu" else "triton"
    if (why := _why_not(name, call)) is None:
        return name
    _warn_once(f"fastgrpo: the {name} kernels are not used, torch stands in (slower, same numbers): {why}")
    return "torch"


def _why_not(name: str, call: Call) -> str | None:
    return get(name).unavailable() or get(name).refuses(call)
