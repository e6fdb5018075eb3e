"""`Head`: what makes logits of hidden states."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.batch.batch import wide
from fastgrpo.batch.checks import FLOATS, check, check_tensor, wrong
from fastgrpo.engine.gemm import writes_fp32
from fastgrpo.engine.logits import Sweeps

CPU_BYTES = 512 << 20  # of a chunk's logits; chunks are few and large, because each adds its dW to a sum in memory
GPU_SHARE = 32  # a chunk takes at most 1/32 of a GPU's memory
GPU_ROWS = 8192  # more rows make the GEMMs no faster
LEAST_ROWS = 256


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale · (hidden @ weightᵀ + bias)), `chunk` rows at a time.

    Their GEMM gives logits / scale. The kernels read those with the scale in the temperature, and the softcap divided
    by it: c·tanh(s·x/c) = s · (c/s)·tanh(x / (c/s)).
    """

    weight: Tensor  # (V', H)
    bias: Tensor | None  # (V',)
    vocab: int  # V: the first rows of the weight are tokens, the others padding
    scale: float
    softcap: float | None  # of logits / scale
    dtype: torch.dtype  # of hidden states, weight and dL/dlogits in the GEMMs
    logits_dtype: torch.dtype  # fp32, or that of the GEMMs
    chunk: int
    backend: str  # whose kernels sweep the logits
    column_tolerance: float = 0.0  # the share of a row's |dL/dlogits| that its gradients may leave out

    @property
    def sweeps(self) -> Sweeps:
        return Sweeps(self.backend, self.softcap)

    def without_tensors(self) -> Head:
        """For a graph, which holds weight and bias by itself."""
        return dataclasses.replace(self, weight=self.weight.new_empty(0), bias=None)

    def of(self, weight: Tensor, bias: Tensor | None) -> Head:
        return dataclasses.replace(self, weight=weight, bias=bias)

    def scaled(self, inv_temperature: Tensor) -> Tensor:
        """(N,) what the kernels multiply the GEMM's logits by."""
        return inv_temperature if self.scale == 1 else inv_temperature * self.scale


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    logits_dtype: torch.dtype | Literal["auto"] = "auto",
    column_tolerance: float = 0.0,
) -> Head:
    """The head of hidden states that have been checked; the arguments are those of `linear_grpo_loss`.

    Raises:
        ValueError: names the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here.
    """
    width, device = hidden.shape[-1], hidden.device
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != width:
        raise wrong("weight", f"a tensor of shape (V, {width})", weight)
    check_tensor("weight", weight, weight.shape, device, *FLOATS)
    rows = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, (rows,), device, *FLOATS)
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
        check(number or (name == "softcap" and value is None), name, "a number > 0", value)
    cap = None if softcap is None else softcap / logit_scale
    check(cap is None or 1e-30 <= cap <= 1e30, "softcap", "softcap / logit_scale between 1e-30 and 1e30", softcap)
    if not _is_count(vocab_size) or (vocab_size or 0) > rows:
        raise wrong("vocab_size", f"None or an integer from 1 to {rows}", vocab_size)
    check(_is_count(chunk_size), "chunk_size", "None or an integer > 0", chunk_size)
    check_tolerance(column_tolerance)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    elif weight.dtype != dtype:
        raise wrong("weight", f"hidden's dtype, {dtype}, outside autocast", weight)
    of_logits = choose_logits_dtype(logits_dtype, dtype, device)
    vocab = rows if vocab_size is None else vocab_size
    return Head(
        weight=weight,
        bias=bias,
        vocab=vocab,
        scale=logit_scale,
        softcap=cap,
        dtype=dtype,
        logits_dtype=of_logits,
        chunk=chunk_size or default_chunk(vocab, of_logits, device),
        backend=backends.select(hidden, backend, of_logits, vocab=vocab, softcap=cap),
        column_tolerance=column_tolerance,
    )


def check_tolerance(value: float) -> None:
    """Raise a ValueError unless it is one for columns."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    check(number and 0 <= value < 1, "column_tolerance", "a number in [0, 1)", value)


def choose_logits_dtype(
    logits_dtype: torch.dtype | Literal["auto"], dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype of the logits of a head whose GEMMs take operands of `dtype`.

    Raises:
        ValueError: it is none of "auto", the operands' dtype and torch.float32.
    """
    if isinstance(logits_dtype, str) and logits_dtype == "auto":
        return wide(dtype) if writes_fp32(device.type) else dtype
    possible = dict.fromkeys((wide(dtype), dtype))
    if not isinstance(logits_dtype, torch.dtype) or logits_dtype not in possible:
        raise wrong("logits_dtype", " or ".join(["'auto'", *map(str, possible)]), logits_dtype)
    return logits_dtype


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


@torch.compiler.assume_constant_result
def default_chunk(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """The number of rows in a chunk, by the memory that their logits of this dtype take."""
    row = vocab * dtype.itemsize
    if device.type == "cpu":
        return max(LEAST_ROWS, CPU_BYTES // row)
    memory = torch.get_device_module(device).get_device_properties(device).total_memory
    return min(GPU_ROWS, max(LEAST_ROWS, memory // GPU_SHARE // row))
