"""The vocabulary projection a few rows at a time: the library's GEMMs around one reused buffer of logits.

A chunk of rows is projected into the buffer (2NHV FLOPs), a row sweep writes dL/dlogits over the logits, and two more
GEMMs make the gradients of hidden states and weight from them (4NHV). This file does not know what the sweeps compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgrpo.backends import cpu
from fastgrpo.batch.batch import wide
from fastgrpo.engine.gemm import product
from fastgrpo.engine.head import Head
from fastgrpo.engine.plan import Plan

LARGE = 4 << 20  # bytes; less lies in small pages


def _large(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (rows, width); on a CPU in large pages, because page faults on small ones can take as long as
    a GEMM."""
    x = torch.empty(rows, width, dtype=dtype, device=device)
    if device.type == "cpu" and x.nbytes >= LARGE:
        cpu.prefer_large_pages(x)
    return x


class Projection:
    """The logits of some rows at a time.

    Args:
        hidden (B, T, H): any strides; row r is token r % T of sequence r // T.
        head: its weight is cast to its dtype once, hidden chunk by chunk.
        rows: the most at a time.
    """

    def __init__(self, hidden: Tensor, head: Head, rows: int):
        device, vocab, dtype = hidden.device, head.vocab, head.dtype
        self.hidden, self.dtype = hidden, dtype
        self.weight = head.weight[:vocab]
        if head.weight.dtype != dtype:
            self.weight = _large(vocab, head.weight.shape[1], dtype, device).copy_(self.weight)
        self.bias = None if head.bias is None else head.bias[:vocab].to(wide(dtype)).contiguous()
        self._rows, self._logits_dtype = rows, head.logits_dtype

    @functools.cached_property
    def _buffer(self) -> Tensor:
        # rows begin at multiples of 128 bytes, as the fast GEMMs of a GPU require, whatever V is
        stride = -(-self.weight.shape[0] // 64) * 64
        return _large(self._rows, stride, self._logits_dtype, self.hidden.device)

    def logits(self, rows: slice | Tensor) -> Tensor:
        """(1, n, V), valid until the next call; the caller writes their gradient to `d_logits`, over them."""
        self.take(rows)
        return self.project()

    def take(self, rows: slice | Tensor, buffer: bool = True) -> None:
        """These rows are the chunk; without a `buffer` they are not projected."""
        if buffer:
            _ = self._buffer  # made here, where the chunk begins: a stream beside this one must not own it
        self.h = self.gather(rows)

    def project(self, part: slice = slice(None)) -> Tensor:
        """(1, n, V) of some rows of the chunk, each in its own place of the buffer."""
        logits = self._buffer[: self.h.shape[0], : self.weight.shape[0]][part]
        product(self.h[part], self.weight.t(), logits, bias=self.bias)
        return logits[None]

    def d_logits(self, part: slice = slice(None)) -> Tensor:
        """(1, n, V): the gradient of the logits, in the GEMMs' dtype and in the memory of the logits.

        Under fp32 logits it is the second half of each row, so that a sweep from the end of a row to its start
        overwrites nothing that it still has to read.
        """
        stride = self._buffer.shape[1]
        memory = self._buffer.view(self.dtype)  # (rows, stride), or twice that width
        start = memory.shape[1] - stride
        return memory[: self.h.shape[0], start : start + self.weight.shape[0]][None, part]

    def gather(self, rows: slice | Tensor) -> Tensor:
        """The hidden states of these rows, (n, H), in the GEMMs' dtype."""
        tokens = self.hidden.shape[1]
        if self.hidden.is_contiguous():
            return self.hidden.view(-1, self.hidden.shape[-1])[rows].to(self.dtype)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.hidden.device)
        return self.hidden[rows // tokens, rows % tokens].to(self.dtype)


class Gradients:
    """Collects dL/dhidden, dL/dweight and dL/dbias over the chunks of a `Projection`.

    Args:
        needs: which of the three are wanted; the others are None.
        plan: its chunks that learn. dL/dweight adds up in fp32 over more than one, whatever the weight is.
        hold: gives the dtype of a gradient from that of its tensor.
        more: how often others add to dL/dweight, beside the chunks that learn.
    """

    def __init__(
        self,
        projection: Projection,
        head: Head,
        needs: Sequence[bool],
        plan: Plan,
        hold: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
        more: int = 0,
    ):
        self.projection, self.needs, self.started = projection, needs, False
        hidden, weight, bias, chunks = projection.hidden, head.weight, head.bias, len(plan.learn) + more
        device, sums = weight.device, wide(projection.dtype)
        shape = hidden.shape if needs[0] else (0, 0, 0)
        self.d_hidden = torch.empty(shape, dtype=hold(hidden.dtype), device=device)
        if plan.learners < hidden.shape[0] * hidden.shape[1]:
            self.d_hidden.zero_()
        # dW of more than one chunk adds up in fp32, and is cast when the buffer of logits is free
        self.shape, self.dtype = weight.shape if needs[1] else torch.Size([0, 0]), hold(weight.dtype)
        direct = self.dtype == sums or (chunks == 1 and self.dtype == projection.dtype)
        self.sum = _large(self.shape[0], self.shape[1], self.dtype if direct else sums, device)
        self.vocab = projection.weight.shape[0]
        # zeros where no GEMM writes; on a CPU in all of a large one, because page faults inside a GEMM cost more
        small = device.type != "cpu" or self.sum.nbytes < LARGE
        self._zero = more > 0 or not (chunks and small)  # whether all of it is
        self.sum[0 if self._zero else self.vocab :].zero_()
        self.d_bias = torch.zeros(len(bias), dtype=sums, device=device) if needs[2] and bias is not None else None
        self.bias_dtype = hold(weight.dtype if bias is None else bias.dtype)

    def add(self, rows: slice | Tensor, dz: Tensor, h: Tensor) -> None:
        """Add the gradients of some rows from those of their logits, (n, V), and their hidden states, (n, H)."""
        self.add_hidden(rows, dz, h)
        self.add_weight(dz, h)

    def add_hidden(self, rows: slice | Tensor, dz: Tensor, h: Tensor) -> None:
        """That of hidden alone."""
        if self.needs[0]:
            self.put_d_hidden(rows, len(h), lambda out: product(dz, self.projection.weight, out))

    def add_weight(self, dz: Tensor, h: Tensor) -> None:
        """Those of weight and bias."""
        if self.needs[1]:
            product(dz.t(), h, self.sum[: self.vocab], add=self.started)
        if self.d_bias is not None:
            self.d_bias[: dz.shape[1]] += dz.sum(0, dtype=self.d_bias.dtype)
        self.started = True

    def put_d_hidden(self, rows: slice | Tensor, n: int, write: Callable[[Tensor], None]) -> None:
        """Let `write` fill dL/dhidden of these n rows: (n, H), of the dtype of the GEMMs, or wider."""
        flat, dtype = self.d_hidden.view(-1, self.d_hidden.shape[-1]), self.projection.dtype
        written = flat.dtype if flat.dtype in (dtype, wide(dtype)) else wide(dtype)
        if isinstance(rows, slice) and flat.dtype == written:
            write(flat[rows])
        else:
            d_h = flat.new_empty(n, flat.shape[1], dtype=written)
            write(d_h)
            flat[rows] = d_h.to(flat.dtype)

    def started_sum(self) -> Tensor:
        """dL/dweight of tokens as far as it is known, (V, H), to be added to."""
        if not (self.started or self._zero):
            self.sum[: self.vocab].zero_()
        self.started = True
        return self.sum[: self.vocab]

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dL/dhidden (B, T, H), dL/dweight (V', H), dL/dbias (V')), None where it is not wanted."""
        del self.projection
        d_weight = self.sum
        if d_weight.dtype != self.dtype:
            d_weight = _large(self.shape[0], self.shape[1], self.dtype, d_weight.device).copy_(d_weight)
        of_hidden, of_weight, _ = self.needs
        return (
            self.d_hidden if of_hidden else None,
            d_weight if of_weight else None,
            None if self.d_bias is None else self.d_bias.to(self.bias_dtype),
        )
