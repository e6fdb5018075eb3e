"""The CPU backend: libfastgrpo_cpu (csrc/cpu) on torch tensors, through ctypes.

The library is loaded at the first use. Calls release the GIL and use up to `torch.get_num_threads()` threads of their
own; results depend neither on that number nor on how rows are batched. The instruction set is the best that the CPU
has; the environment variable FASTGRPO_CPU_ISA (amx, avx512bf16, avx512, avx2, neonbf16, neon, portable) names another.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from .contract import Call, Columns, Rows, Scores
from .native import DTYPES, Args, RowCalls, load, make_args


class _Matmul(ctypes.Structure):
    """FastgrpoMatmul in csrc/cpu/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("M", "N", "K")),
        *((name, ctypes.c_int64 * 2) for name in ("a_stride", "b_stride")),
        ("out_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dtype", "out_dtype", "add")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "bias", "out")),
    ]


class _Columns(ctypes.Structure):
    """FastgrpoColumns in csrc/cpu/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "width", "H", "V")),
        *((name, ctypes.c_int64) for name in ("hidden_stride", "weight_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("dtype", "out_dtype")),
        ("tolerance", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "ids", "rows")),
        *((name, ctypes.c_void_p) for name in ("values", "out", "d_bias", "found", "count")),
    ]


_NO_MEMORY = 1  # FASTGRPO_NO_MEMORY in csrc/cpu/api.h
_INT = ctypes.c_int32
_ROWS = (_INT, ctypes.POINTER(Args), _INT, _INT)  # args, isa, threads -> error


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    return load(
        "fastgrpo_cpu",
        "a C++ compiler",
        error=(ctypes.c_char_p, _INT),
        isa=(_INT, ctypes.c_char_p),
        isa_names=(ctypes.c_char_p,),
        row_stats=_ROWS,
        row_grad=_ROWS,
        token_loss=_ROWS,
        matmul=(_INT, ctypes.POINTER(_Matmul), _INT, _INT),
        head_stats=(_INT, ctypes.POINTER(_Matmul), *_ROWS[1:]),
        **{
            f"column_{name}": (_INT, ctypes.POINTER(_Columns), _INT, _INT)
            for name in ("logits", "d_hidden", "d_weight")
        },
        select_columns=(_INT, ctypes.POINTER(_Columns), *_ROWS[1:]),
        prefer_large_pages=(None, ctypes.c_void_p, ctypes.c_int64),
    )


def _library() -> ctypes.CDLL:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"backend 'cpu' cannot run here: {why}")
    return library


@functools.cache
def _isa(name: str) -> int:
    isa = _library().fastgrpo_cpu_isa(name.encode())
    if isa < 0:
        problem = "is unknown" if isa == -1 else "cannot run on this CPU"
        raise ValueError(f"FASTGRPO_CPU_ISA: expected one of {', '.join(instruction_sets())}; {name!r} {problem}")
    return isa


def instruction_sets() -> list[str]:
    """What FASTGRPO_CPU_ISA may name on this machine, best first."""
    return _library().fastgrpo_cpu_isa_names().decode().split(",")


def unavailable() -> str | None:
    """None, or why this backend cannot run on this machine."""
    return _load()[1]


def refuses(call: Call) -> str | None:
    """None, or why this backend cannot take such a call."""
    if call.device_type != "cpu":
        return f"they are on {call.device_type}, not on the CPU"
    if call.dtype not in DTYPES:
        return f"{call.dtype} is not one of float32, bfloat16, float16"
    if call.one_pass:
        return "it reads a row twice"
    return None


def _call(function: str, *args: ctypes.Structure) -> None:
    isa, library = _isa(os.environ.get("FASTGRPO_CPU_ISA", "")), _library()
    error = getattr(library, f"fastgrpo_cpu_{function}")(*args, isa, torch.get_num_threads())
    if error:
        why = f"backend 'cpu': {function}: {library.fastgrpo_cpu_error(error).decode()}; its results are unfinished"
        raise MemoryError(why) if error == _NO_MEMORY else RuntimeError(why)


_calls = RowCalls(lambda function, args, _: _call(function, args))
row_stats, row_grad, token_loss = _calls.row_stats, _calls.row_grad, _calls.token_loss


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, bias: Tensor | None = None) -> None:
    """out = a @ b (+ bias), or out += a @ b with `add`, summed in fp32.

    An element has the same bits whatever the other rows and columns and the number of threads are.

    Args:
        a (M, K), b (K, N): fp32, bf16 or fp16, both of one dtype; any strides, but quickest with a unit stride.
        out (M, N): fp32, or of the dtype of a and b; unit stride in N. It overlaps neither.
        bias (N,) fp32, contiguous.
    """
    _call("matmul", _product(a, b, bias, out, add))


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None = None, add: bool = False) -> _Matmul:
    like = a if out is None else out
    return _Matmul(
        *(a.shape[0], b.shape[1], a.shape[1]),
        *(a.stride(), b.stride(), like.stride(0)),
        *(DTYPES[a.dtype], DTYPES[like.dtype], add),
        *(a.data_ptr(), b.data_ptr(), None if bias is None else bias.data_ptr(), like.data_ptr()),
    )


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    *,
    want_entropy: bool,
    softcap: float | None = None,
) -> Scores:
    """`row_stats` of the fp32 logits hidden @ weightᵀ (+ bias), which are not written to memory.

    The same bits as from logits made by `matmul`.

    Args:
        hidden (N, H), weight (V, H), bias (V,) fp32: as in `matmul`.
    """
    logp, lse = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
    scores = Scores(logp, lse, torch.empty_like(logp) if want_entropy else None)
    logits = logp.new_empty(()).expand(1, hidden.shape[0], weight.shape[0])  # of their shape
    args = make_args(logits, None, softcap, rows, scores)
    _call("head_stats", _product(hidden, weight.t(), bias), args)
    return scores


def column_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """The logits of a few columns of each row; `contract.ColumnBackend` says more."""
    n, width = ids.shape
    out = hidden.new_empty(n, width, dtype=torch.float32)
    args = _Columns(
        N=n, width=width, H=hidden.shape[1], V=weight.shape[0], dtype=DTYPES[hidden.dtype],
        hidden_stride=hidden.stride(0), weight_stride=weight.stride(0), hidden=hidden.data_ptr(),
        weight=weight.data_ptr(), bias=None if bias is None else bias.data_ptr(), ids=ids.data_ptr(),
        values=out.data_ptr(),
    )  # fmt: skip
    _call("column_logits", args)
    return out


def column_d_hidden(dz: Tensor, ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """The gradient of hidden states from that of a few logits of each row; `contract.ColumnBackend` says more."""
    n, width = ids.shape
    args = _Columns(
        N=n, width=width, H=weight.shape[1], V=weight.shape[0], dtype=DTYPES[weight.dtype],
        weight_stride=weight.stride(0), out_stride=out.stride(0), out_dtype=DTYPES[out.dtype],
        weight=weight.data_ptr(), ids=ids.data_ptr(), values=dz.data_ptr(), out=out.data_ptr(),
    )  # fmt: skip
    _call("column_d_hidden", args)


def column_d_weight(dz: Tensor, ids: Tensor, rows: Tensor, hidden: Tensor, out: Tensor, d_bias: Tensor | None) -> None:
    """Adds the gradient of the weight from that of single logits; `contract.ColumnBackend` says more."""
    args = _Columns(
        N=ids.numel(), H=hidden.shape[1], V=out.shape[0], dtype=DTYPES[hidden.dtype],
        hidden_stride=hidden.stride(0), out_stride=out.stride(0), out_dtype=DTYPES[out.dtype],
        hidden=hidden.data_ptr(), ids=ids.data_ptr(), rows=rows.data_ptr(), values=dz.data_ptr(), out=out.data_ptr(),
        d_bias=None if d_bias is None else d_bias.data_ptr(),
    )  # fmt: skip
    _call("column_d_weight", args)


def select_columns(
    logits: Tensor,
    rows: Rows,
    scores: Scores,
    g: Tensor,
    h: Tensor | None,
    tolerance: float,
    room: int,
    *,
    softcap: float | None = None,
) -> Columns:
    """The columns of each row that carry its gradient; `contract.ColumnBackend` says more."""
    n = rows.ids.numel()
    ids, sizes = (logits.new_empty(shape, dtype=torch.int32) for shape in ((n, room), n))
    dz = logits.new_empty(n, room, dtype=torch.float32)  # of both, memory that no row needs is not touched
    per_row = dict(ids=rows.ids, inv_temperature=rows.inv_temperature, g=g, h=h)
    columns = _Columns(
        width=room, tolerance=tolerance, found=ids.data_ptr(), values=dz.data_ptr(), count=sizes.data_ptr()
    )
    args = make_args(logits, None, softcap, scores._replace(entropy=None if h is None else scores.entropy), **per_row)
    _call("select_columns", columns, args)
    width = int(sizes.masked_fill(sizes > room, 0).amax()) if n > 0 else 0
    return Columns(ids[:, :width], dz[:, :width], sizes)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor; x is not touched when the factor is 1."""
    if (number := factor.item()) != 1:
        x.mul_(number)


def prefer_large_pages(x: Tensor) -> None:
    """Let a new, contiguous tensor be mapped in large pages as it is first written, where the system offers them."""
    library, _ = _load()
    if library is not None:
        library.fastgrpo_cpu_prefer_large_pages(x.data_ptr(), x.numel() * x.element_size())
