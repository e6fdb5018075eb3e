"""The CPU backend: libfastgrpo_cpu (csrc/cpu) on torch tensors, through ctypes.

The library is loaded at the first use. Calls release the GIL and use up to `torch.get_num_threads()` threads of their
own; results depend neither on that number nor on how rows are batched. The instruction set is the best that the CPU
has; the environment variable FASTGRPO_CPU_ISA (avx512, avx2, neon, portable) names another.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import TokenRows, TokenSpec

_ABI = 2
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Spec(ctypes.Structure):
    """ObjectiveSpec in csrc/objective.h."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("clip_low", ctypes.c_float),
        ("clip_high", ctypes.c_float),
        ("delta", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("bias_correction", ctypes.c_int32),
        ("tau_pos", ctypes.c_float),
        ("tau_neg", ctypes.c_float),
    ]


class _Args(ctypes.Structure):
    """FastgrpoCpuArgs in csrc/cpu/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "vocab")),
        ("logits_stride", ctypes.c_int64 * 2),
        ("out_stride", ctypes.c_int64 * 2),
        *((name, ctypes.c_int32) for name in ("isa", "dtype", "threads", "scale_by_std", "skip_zero")),
        ("softcap", ctypes.c_float),
        ("spec", _Spec),
        ("group_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logits", "out", "ids", "mask", "inv_temperature")),
        *((name, ctypes.c_void_p) for name in ("weight", "advantages", "rewards", "seq")),
        *((name, ctypes.c_void_p) for name in ("old_logps", "ref_logps", "policy_scale", "h")),
        *((name, ctypes.c_void_p) for name in ("loss", "logp", "lse", "entropy", "kl", "ratio", "g")),
    ]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    name = ("" if sys.platform == "win32" else "lib") + "fastgrpo_cpu" + suffix
    path = Path(__file__).parents[1] / "lib" / name
    if not path.exists():
        return None, f"{path} does not exist: fastgrpo was built without a C++ compiler (install one, then reinstall)"
    try:
        library = ctypes.CDLL(str(path))
        found = library.fastgrpo_cpu_abi()
        library.fastgrpo_cpu_args_size.restype = ctypes.c_int64
        size = library.fastgrpo_cpu_args_size()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if (found, size) != (_ABI, ctypes.sizeof(_Args)):
        return None, f"{path} has interface {found}, this package needs {_ABI}: reinstall fastgrpo"
    library.fastgrpo_cpu_isa.argtypes = [ctypes.c_char_p]
    library.fastgrpo_cpu_isa_names.restype = ctypes.c_char_p
    for function in (library.fastgrpo_cpu_row_stats, library.fastgrpo_cpu_row_grad, library.fastgrpo_cpu_token_loss):
        function.argtypes = [ctypes.POINTER(_Args)]
        function.restype = None
    library.fastgrpo_cpu_prefer_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.fastgrpo_cpu_prefer_large_pages.restype = None
    return library, None


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


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """None, or why this backend cannot take logits of this kind."""
    if device_type != "cpu":
        return f"they are on {device_type}, not on the CPU"
    if dtype not in _DTYPES:
        return f"{dtype} is not one of float32, bfloat16, float16"
    return None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _args(
    logits: Tensor, ids: Tensor, inv_temperature: Tensor, out: Tensor | None, softcap: float, **vectors: Tensor | None
) -> _Args:
    batch, tokens, vocab = logits.shape
    return _Args(
        batch=batch,
        tokens=tokens,
        vocab=vocab,
        logits_stride=logits.stride()[:2],
        out_stride=(0, 0) if out is None else out.stride()[:2],
        isa=_isa(os.environ.get("FASTGRPO_CPU_ISA", "")),
        dtype=_DTYPES[logits.dtype],
        threads=torch.get_num_threads(),
        softcap=softcap,
        logits=_pointer(logits),
        out=_pointer(out),
        ids=_pointer(ids),
        inv_temperature=_pointer(inv_temperature),
        **{name: _pointer(vector) for name, vector in vectors.items()},
    )


def _new(count: int, rows: int) -> list[Tensor]:
    return [torch.empty(rows, dtype=torch.float32) for _ in range(count)]


def row_stats(
    logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, lse, entropy) of every row; 0 where mask is False, and there nothing is read."""
    logp, lse = _new(2, ids.numel())
    entropy = torch.empty(ids.numel() if want_entropy else 0, dtype=torch.float32)
    wanted = entropy if want_entropy else None
    args = _args(logits, ids, inv_temperature, None, softcap, mask=mask, logp=logp, lse=lse, entropy=wanted)
    _library().fastgrpo_cpu_row_stats(args)
    return logp, lse, entropy


def row_grad(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    inv_temperature: Tensor,
    out: Tensor,
    softcap: float = 0.0,
) -> None:
    """Writes dL/dlogits, given g = dL/dlogp and h = dL/dentropy, into `out`, which may be `logits` itself."""
    entropy = None if h is None else entropy
    args = _args(logits, ids, inv_temperature, out, softcap, lse=lse, entropy=entropy, g=g, h=h)
    _library().fastgrpo_cpu_row_grad(args)


def token_loss(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    inv_temperature: Tensor,
    want_entropy: bool,
    rows: TokenRows,
    spec: TokenSpec,
    out: Tensor | None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, lse, entropy, kl, ratio, g) of every row, and the gradient into `out` if given, in one pass.

    `out` may be `logits` itself, or another tensor of that shape and dtype.
    """
    loss, logp, lse, kl, ratio, g = _new(6, ids.numel())
    entropy = torch.empty(ids.numel() if want_entropy else 0, dtype=torch.float32)
    args = _args(
        logits,
        ids,
        inv_temperature,
        out,
        softcap,
        mask=mask,
        weight=rows.weight,
        advantages=rows.advantages,
        rewards=rows.rewards,
        seq=rows.seq,
        old_logps=rows.old,
        ref_logps=rows.ref,
        policy_scale=rows.policy_scale,
        h=rows.h,
        loss=loss,
        logp=logp,
        lse=lse,
        entropy=entropy if want_entropy else None,
        kl=kl,
        ratio=ratio,
        g=g,
    )
    args.spec = _Spec(
        kind=int(spec.kind),
        clip_low=spec.clip_low,
        clip_high=spec.clip_high,
        delta=spec.delta,
        beta=spec.beta,
        bias_correction=int(spec.bias_correction),
        tau_pos=spec.tau_pos,
        tau_neg=spec.tau_neg,
    )
    args.group_size = int(spec.group_size)
    args.scale_by_std = int(spec.scale_by_std)
    args.skip_zero = int(spec.skip_zero)
    _library().fastgrpo_cpu_token_loss(args)
    return loss, logp, lse, entropy, kl, ratio, g


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor; x is not touched when the factor is 1."""
    if (number := factor.item()) != 1:
        x.mul_(number)


def prefer_large_pages(x: Tensor) -> None:
    """Let a new, contiguous tensor be mapped in large pages as it is first written, where the system offers them."""
    library, _ = _load()
    if library is not None:
        library.fastgrpo_cpu_prefer_large_pages(x.data_ptr(), x.numel() * x.element_size())
