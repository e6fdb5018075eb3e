"""The CUDA backend: libfastgrpo_cuda (csrc/cuda), for NVIDIA GPUs of compute capability 8.0 and later, through ctypes.

From 9.0 on, token_loss and row_stats hold each row in the shared memory of a cluster of blocks: one read of the logits
and, in place, one write. Before, and for rows that no cluster holds, they sweep the row twice. From fp32 logits the
gradient may be written in bf16 or fp16, also in the second half of each row's own memory. A softcap is not for these
kernels. Calls enqueue work on torch's current stream and wait for nothing, so that CUDA graphs can capture them.
The driver is asked once what the device can do and how many clusters fit for a vocabulary; where it fails, the next
call asks again.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .choices import Choices
from .contract import Call
from .native import DTYPES, Args, RowCalls, load, make_args

CLUSTERS = (1, 2, 4, 8, 16)
_DEVICE_TYPE = "cuda"
_REFUSED = -1  # FASTGRPO_REFUSED in csrc/cuda/api.h
_INT, _POINTER = ctypes.c_int32, ctypes.c_void_p
_HALVES = (torch.bfloat16, torch.float16)
# (dtype of the logits, of the gradient)
_PAIRS = (*((dtype, dtype) for dtype in (*_HALVES, torch.float32)), *((torch.float32, dtype) for dtype in _HALVES))


@dataclasses.dataclass(frozen=True)
class OnePass:
    """How token_loss and row_stats hold a row in shared memory; 0: chosen by the row's length.

    Args:
        cluster: blocks that hold a row together: 1, 2, 4, 8 or 16; -1: none, the row is read twice.
        buffers: rows on their way through a block at once, 1 to 4.
        blocks: blocks that share a multiprocessor, 1 or 2.
        evict_first: the L2 cache gives up the lines of logits and gradients before others.
        multiprocessors: no more blocks at once than so many hold, and one cluster at least; 0: all. The others are
            left to another stream (`engine.overlap`). Two passes take all.

    Raises:
        ValueError: a number that is none of these.
    """

    cluster: int = 0
    buffers: int = 0
    blocks: int = 0
    evict_first: bool = True
    multiprocessors: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.multiprocessors, int) or self.multiprocessors < 0:
            raise ValueError(f"multiprocessors: expected an integer from 0 on, got {self.multiprocessors!r}")
        allowed = dict(cluster=(-1, 0, *CLUSTERS), buffers=range(5), blocks=range(3), evict_first=(False, True))
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}, got {value!r}")


class _Choice(ctypes.Structure):
    """FastgrpoOnePass in csrc/cuda/api.h."""

    _fields_ = [(field.name, _INT) for field in dataclasses.fields(OnePass)]


class _Shape(ctypes.Structure):
    """FastgrpoOnePassShape in csrc/cuda/api.h."""

    _names = ("cluster", "slice", "buffers", "buffer_bytes", "shared_bytes", "blocks", "evict_first", "clusters")
    _fields_ = [*((name, _INT) for name in _names), ("why", ctypes.c_char_p)]


class Shape(NamedTuple):
    """How rows lie in clusters: blocks of one, elements of a row in a block, rows in a block, bytes of it, ..."""

    cluster: int  # 0: they take two passes, for `why`
    slice: int
    buffers: int
    buffer_bytes: int
    shared_bytes: int
    blocks: int  # of a multiprocessor
    clusters: int  # of the device, at once
    why: str | None


@functools.cache
def _as_choice(one_pass: OnePass) -> _Choice:
    """The same, as the library takes it."""
    return _Choice(*map(int, dataclasses.astuple(one_pass)))


# A call whose rows cannot be held as chosen raises a ValueError, which says what fits. Backend "auto" does not look at
# these choices when it chooses a backend.
_choices = Choices(OnePass())
using = _choices.using


_ROWS = (_INT, ctypes.POINTER(Args), _INT, _POINTER, ctypes.POINTER(_Choice))  # args, device, stream, choice -> error


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    return load(
        "fastgrpo_cuda",
        "nvcc 12.1 or later",
        error=(ctypes.c_char_p, _INT),
        unavailable=(ctypes.c_char_p,),
        one_pass=(_INT, ctypes.POINTER(Args), _INT, ctypes.POINTER(_Choice), ctypes.POINTER(_Shape)),
        row_stats=_ROWS,
        row_grad=_ROWS,
        token_loss=_ROWS,
        scale=_ROWS,
    )


def _library() -> ctypes.CDLL:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"backend 'cuda' cannot run here: {why}")
    return library


_works = False  # once this backend could run, it can


def unavailable() -> str | None:
    """None, or why this backend cannot run on this machine."""
    global _works
    if _works:
        return None
    library, why = _load()
    if library is None:
        return why
    why = library.fastgrpo_cuda_unavailable()
    if why is None and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    _works = why is None
    return None if why is None else why.decode()


def refuses(call: Call) -> str | None:
    """None, or why this backend cannot take such a call."""
    if call.device_type != _DEVICE_TYPE:
        return f"they are on {call.device_type}, not on an NVIDIA GPU"
    if call.dtype not in DTYPES:
        return f"{call.dtype} is not one of float32, bfloat16, float16"
    if call.softcap is not None:
        return "softcap: expected None with backend 'cuda'; backend 'triton' takes one"
    if call.one_pass:
        return _no_one_pass(call.vocab, call.dtype, call.device_index or 0)
    return None


def _ask(args: Args, device: int, choice: _Choice) -> Shape:
    library, found = _library(), _Shape()
    if error := library.fastgrpo_cuda_one_pass(args, device, choice, found):
        why = library.fastgrpo_cuda_error(error).decode()
        raise RuntimeError(f"backend 'cuda': asking cuda:{device} for clusters: {why}")
    numbers = (getattr(found, name) for name in Shape._fields[:-1])
    return Shape._make((*numbers, None if found.why is None else found.why.decode()))


@functools.cache  # of answers; what is raised is not kept
def shape(
    vocab: int,
    dtype: torch.dtype,
    device: int,
    one_pass: OnePass = OnePass(),
    out_dtype: torch.dtype | None = None,
) -> Shape:
    """How rows of `vocab` logits are held, with that choice; its cluster is 0 where they cannot be.

    The cut is the same with and without the entropy, and for a gradient of any dtype (None: that of the logits).
    `clusters` are those of such a gradient, without the entropy.

    Raises:
        RuntimeError: the driver failed to answer.
    """
    args = Args(vocab=vocab, dtype=DTYPES[dtype], out_dtype=DTYPES[out_dtype or dtype])
    return _ask(args, device, _as_choice(one_pass))


def _no_one_pass(vocab: int, dtype: torch.dtype, device: int) -> str | None:
    """None, or why this device takes two passes over rows of `vocab` logits."""
    try:
        return shape(vocab, dtype, device).why
    except RuntimeError as error:
        warnings.warn(f"fastgrpo: {error}; asked again at the next call", RuntimeWarning, stacklevel=3)
        return str(error)


def active_clusters(
    dtype: torch.dtype, device: int, blocks: int, out_dtype: torch.dtype | None = None
) -> dict[int, int]:
    """{blocks of a cluster: such clusters at once}, where each block has three rows of 36 KiB, `blocks` of these on a
    multiprocessor."""
    vocab = 36 * 1024 // dtype.itemsize
    return {
        size: shape(size * vocab, dtype, device, OnePass(cluster=size, buffers=3, blocks=blocks), out_dtype).clusters
        for size in CLUSTERS
    }


def describe(device: int) -> Iterator[str]:
    """Lines on how rows are held on this device: clusters at once by their blocks, and the shapes of usual rows."""
    for dtype, out_dtype in _PAIRS:
        written = "" if out_dtype == dtype else f", gradients in {_name(out_dtype)}"
        name = f"cuda:{device} {_name(dtype)}{written}"
        try:
            for blocks in (2, 1):
                counts = active_clusters(dtype, device, blocks, out_dtype)
                at_once = ", ".join(f"{count} of {size}" for size, count in counts.items())
                yield f"{name}, {blocks} a multiprocessor: clusters at once by their blocks: {at_once}"
            for vocab in (32_000, 128_256, 151_936, 262_144):
                found = shape(vocab, dtype, device, out_dtype=out_dtype)
                held = f"{found.clusters} clusters of {found.cluster}, {found.blocks} a multiprocessor, "
                held += f"{found.buffers} buffers"
                yield f"{name}, rows of {vocab}: {held if found.cluster else f'two passes: {found.why}'}"
        except RuntimeError as error:
            yield f"{name}: {error}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(number: int) -> torch.dtype:
    return next(dtype for dtype, known in DTYPES.items() if known == number)


def _place(device: torch.device) -> tuple[int, int]:
    """(device, stream) as the library takes them."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _refusal(args: Args, device: int) -> str:
    """Why the library refused the choice, and what it would take in its place."""
    dtype = _dtype(args.dtype)
    why, fits = _ask(args, device, _as_choice(_choices.get())).why, []
    for size in CLUSTERS:
        for blocks in (1, 2):
            for buffers in (4, 3, 2, 1):
                if _ask(args, device, _as_choice(OnePass(size, buffers, blocks))).cluster:
                    fits.append(f"cluster={size}, blocks={blocks} with up to {buffers} buffers")
                    break
    fit = "; ".join(fits) or "none"
    return f"{_choices.get()}: expected a choice that can hold rows of {args.vocab} {dtype} logits ({fit}), but {why}"


def _call(function: str, args: Args, device: torch.device) -> None:
    if args.softcap < math.inf:
        raise ValueError("softcap: expected None with backend 'cuda'; backend 'triton' takes one")
    if args.out and args.dtype not in (args.out_dtype, DTYPES[torch.float32]):
        dtype, got = _dtype(args.dtype), _dtype(args.out_dtype)
        raise ValueError(f"out: expected the dtype of the logits, {dtype}, got {got}; fp32 alone may be narrowed")
    if args.batch * args.tokens == 0:
        return
    library = _library()
    index, stream = _place(device)
    error = getattr(library, f"fastgrpo_cuda_{function}")(args, index, stream, _as_choice(_choices.get()))
    if error == _REFUSED:
        raise ValueError(_refusal(args, index))
    if error:
        logits = (args.batch, args.tokens, args.vocab)
        why = library.fastgrpo_cuda_error(error).decode()
        raise RuntimeError(f"backend 'cuda': {function} of logits of shape {logits} on {device}: {why}")


_calls = RowCalls(_call)
row_stats, row_grad, token_loss = _calls.row_stats, _calls.row_grad, _calls.token_loss


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, which is not read on the host; x is not touched when it is 1."""
    _call("scale", make_args(x, weight=factor.float()), x.device)
