"""The CUDA backend: libfastgrpo_cuda (csrc/cuda), for NVIDIA GPUs of compute capability 8.0 and later, through ctypes.

From 9.0 on, token_loss and row_stats hold each row in the shared memory of a cluster of blocks: one read of the logits
and, in place, one write. Before, and for rows that no cluster holds, they sweep the row twice. A softcap is not for
these kernels. Calls enqueue work on torch's current stream and wait for nothing, so that CUDA graphs can capture them;
the first call for a vocabulary asks the driver how many clusters fit, once.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ._native import DTYPES, Args, Rows, load, make_args

_CLUSTER = 0  # blocks that hold a row together; 0: by its length, -1: none
_DEVICE_TYPE = "cuda"
_INT, _POINTER = ctypes.c_int32, ctypes.c_void_p
_ROWS = (_INT, ctypes.POINTER(Args), _INT, _POINTER, _INT)  # args, device, stream, cluster -> error


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    return load(
        "fastgrpo_cuda",
        "nvcc 12 or later",
        error=(ctypes.c_char_p, _INT),
        unavailable=(ctypes.c_char_p,),
        device_unavailable=(ctypes.c_char_p, _INT),
        cluster=(_INT, _INT, ctypes.c_int64, _INT),
        row_stats=_ROWS,
        row_grad=_ROWS,
        token_loss=_ROWS,
        scale=_ROWS,
    )


def unavailable() -> str | None:
    """None, or why this backend cannot run on this machine."""
    library, why = _load()
    if library is None:
        return why
    why = library.fastgrpo_cuda_unavailable()
    if why is None and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return None if why is None else why.decode()


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None, or why this backend cannot take logits of this kind."""
    if device_type != _DEVICE_TYPE:
        return f"they are on {device_type}, not on an NVIDIA GPU"
    if dtype not in DTYPES:
        return f"{dtype} is not one of float32, bfloat16, float16"
    return None


@functools.cache
def cluster(vocab: int, dtype: torch.dtype, device: int) -> int:
    """The number of blocks that hold a row of `vocab` logits together; 0: this device does it in two passes."""
    library, _ = _load()
    return library.fastgrpo_cuda_cluster(DTYPES[dtype], vocab, device)


def _place(device: torch.device) -> tuple[int, int]:
    """(device, stream) as the library takes them."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _call(function: str, args: Args, device: torch.device) -> None:
    if args.softcap:
        raise ValueError("softcap: expected None with backend 'cuda'; backend 'triton' takes one")
    if args.batch * args.tokens == 0:
        return
    library = _load()[0]
    error = getattr(library, f"fastgrpo_cuda_{function}")(args, *_place(device), _CLUSTER)
    if error:
        shape = (args.batch, args.tokens, args.vocab)
        why = library.fastgrpo_cuda_error(error).decode()
        raise RuntimeError(f"backend 'cuda': {function} of logits of shape {shape} on {device}: {why}")


_rows = Rows(_call)
row_stats, row_grad, token_loss = _rows.row_stats, _rows.row_grad, _rows.token_loss


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, which is not read on the host; x is not touched when it is 1."""
    _call("scale", make_args(x, weight=factor.float()), x.device)
