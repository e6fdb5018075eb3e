"""Parts of a chunk on two streams of a GPU, so that the sweep of one part runs beside the GEMMs of another.

Off, until a measurement says otherwise: `with overlap.using(parts=2):` turns it on for the calls inside. The sweeps
need multiprocessors that the GEMMs leave to them: `backends.cuda.using(multiprocessors=...)`, or the `programs` of
`backends.triton.using`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.backends.choices import Choices

PARTS = (1, 2, 4)


@dataclass(frozen=True)
class Overlap:
    """How the chunks of a loss from hidden states run, where the kernels hold its objective (that of single tokens).

    Args:
        parts: of a chunk, projected, swept and multiplied to dL/dhidden on two streams in turn; the gradient of the
            weight is one GEMM of the whole chunk. 1: all on the current stream.

    Raises:
        ValueError: another number of parts.
    """

    parts: int = 1

    def __post_init__(self) -> None:
        if self.parts not in PARTS:
            raise ValueError(f"parts: expected one of {', '.join(map(str, PARTS))}, got {self.parts!r}")


_choices = Choices(Overlap())
using = _choices.using


class Streams(NamedTuple):
    """The current stream of a GPU, and two beside it."""

    main: torch.cuda.Stream
    beside: tuple[torch.cuda.Stream, torch.cuda.Stream]

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    def keep(self, x: Tensor) -> None:
        """The memory of x, made beside, stays with it until what reads it on the main stream is done."""
        x.record_stream(self.main)


@functools.cache
def _beside(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def streams(device: torch.device) -> Streams | None:
    """Those of a GPU; None: this device has no such streams, and parts run one after another."""
    if device.type != "cuda":
        return None
    return Streams(torch.cuda.current_stream(device), _beside(device))


class Lanes:
    """Where the parts of chunks run.

    A part begins after what was enqueued before its chunk, and what is enqueued after `join` waits for all parts. So a
    chunk's weight gradient, and the next chunk in the same buffer, race with nothing.
    """

    def __init__(self, device: torch.device, *, alone: bool):
        """`alone`: chunks are not to be cut."""
        self._parts = 1 if alone else _choices.get().parts
        self._streams = streams(device) if self._parts > 1 else None

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_: object) -> None:
        self.join()  # also where a part failed: the memory that the others use is free from then on

    def cut(self, chunk: slice) -> Iterator[tuple[slice, slice, AbstractContextManager]]:
        """The parts of a chunk: (their rows, the same counted from the chunk's first, where they run)."""
        if self._streams is None:
            yield chunk, slice(0, chunk.stop - chunk.start), nullcontext()
            return
        for stream in self._streams.beside:
            stream.wait_stream(self._streams.main)  # inputs are there, and nobody uses the buffer any more
        n = chunk.stop - chunk.start
        for number in range(count := min(n, self._parts)):
            part = slice(n * number // count, n * (number + 1) // count)
            rows = slice(chunk.start + part.start, chunk.start + part.stop)
            yield rows, part, self._streams.on(self._streams.beside[number % 2])

    def join(self, *made: Tensor) -> None:
        """What comes next on the current stream waits for the parts; `made` by them, it may be read there."""
        if self._streams is None:
            return
        for stream in self._streams.beside:
            self._streams.main.wait_stream(stream)
        for x in made:
            self._streams.keep(x)
