"""What the backends in C share: their arguments, their library, and the calls on rows of torch tensors."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import TokenRows, TokenSpec

_ABI = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Spec(ctypes.Structure):
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


class Args(ctypes.Structure):
    """FastgrpoArgs in csrc/args.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "vocab")),
        ("logits_stride", ctypes.c_int64 * 2),
        ("out_stride", ctypes.c_int64 * 2),
        *((name, ctypes.c_int32) for name in ("dtype", "scale_by_std", "skip_zero")),
        ("softcap", ctypes.c_float),
        ("spec", Spec),
        ("group_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logits", "out", "ids", "mask", "inv_temperature")),
        *((name, ctypes.c_void_p) for name in ("weight", "advantages", "rewards", "seq")),
        *((name, ctypes.c_void_p) for name in ("old_logps", "ref_logps", "policy_scale", "h")),
        *((name, ctypes.c_void_p) for name in ("loss", "logp", "lse", "entropy", "kl", "ratio", "g")),
    ]


def library_path(name: str) -> Path:
    """Where the build puts the library `name`."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return Path(__file__).parents[1] / "lib" / (("" if sys.platform == "win32" else "lib") + name + suffix)


def load(name: str, tool: str, **functions: tuple) -> tuple[ctypes.CDLL | None, str | None]:
    """The library `name`, or why there is none; `tool` is what it takes to build it, "a C++ compiler" for one.

    The functions to be called are given as name=(result type, *argument types), without the library's name in theirs.
    """
    path = library_path(name)
    if not path.exists():
        return None, f"{path} does not exist: {_built_elsewhere(path) or _not_built(tool)}"
    try:
        library = ctypes.CDLL(str(path))
        found = getattr(library, f"{name}_abi")()
        args_size = getattr(library, f"{name}_args_size")
        args_size.restype = ctypes.c_int64
        size = args_size()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if (found, size) != (_ABI, ctypes.sizeof(Args)):
        return None, f"{path} has interface {found}, this package needs {_ABI}: reinstall fastgrpo"
    for function, (result, *arguments) in functions.items():
        declared = getattr(library, f"{name}_{function}")
        declared.restype, declared.argtypes = result, arguments
    return library, None


def _not_built(tool: str) -> str:
    return f"fastgrpo was built without {tool} (install one, then reinstall)"


def _built_elsewhere(path: Path) -> str | None:
    """What to say where Python imports the sources, and a copy with compiled libraries is installed beside them."""
    sources = path.parents[2]
    try:
        installed = Path(importlib.metadata.distribution("fastgrpo").locate_file(path.relative_to(sources)))
    except importlib.metadata.PackageNotFoundError:
        return None
    if not installed.exists() or installed == path:
        return None
    return (
        f"Python imports the sources in {sources}, which hold no compiled kernels. The installed package, in "
        f"{installed.parents[2]}, has them: run Python in another folder"
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def make_args(logits: Tensor, out: Tensor | None = None, softcap: float = 0.0, **vectors: Tensor | None) -> Args:
    """The arguments of a call, whose fields point into the tensors."""
    batch, tokens, vocab = logits.shape
    return Args(
        batch=batch,
        tokens=tokens,
        vocab=vocab,
        logits_stride=logits.stride()[:2],
        out_stride=(0, 0) if out is None else out.stride()[:2],
        dtype=DTYPES[logits.dtype],
        softcap=softcap,
        logits=_pointer(logits),
        out=_pointer(out),
        **{name: _pointer(vector) for name, vector in vectors.items()},
    )


def _new(logits: Tensor, count: int, rows: int) -> list[Tensor]:
    return [logits.new_empty(rows, dtype=torch.float32) for _ in range(count)]


class Rows:
    """The functions of a backend on rows of logits, given call(function, args, device), which calls the library."""

    def __init__(self, call: Callable[[str, Args, torch.device], None]):
        self._call = call

    def row_stats(
        self,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor,
        inv_temperature: Tensor,
        want_entropy: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp, lse, entropy) of every row; 0 where mask is False, and there nothing is read."""
        logp, lse = _new(logits, 2, ids.numel())
        (entropy,) = _new(logits, 1, ids.numel() if want_entropy else 0)
        wanted = entropy if want_entropy else None
        rows = dict(ids=ids, mask=mask, inv_temperature=inv_temperature)
        args = make_args(logits, None, softcap, **rows, logp=logp, lse=lse, entropy=wanted)
        self._call("row_stats", args, logits.device)
        return logp, lse, entropy

    def row_grad(
        self,
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
        rows = dict(ids=ids, lse=lse, entropy=entropy, g=g, h=h, inv_temperature=inv_temperature)
        args = make_args(logits, out, softcap, **rows)
        self._call("row_grad", args, logits.device)

    def token_loss(
        self,
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
        loss, logp, lse, kl, ratio, g = _new(logits, 6, ids.numel())
        with_entropy = want_entropy or rows.h is not None
        (entropy,) = _new(logits, 1, ids.numel() if with_entropy else 0)
        args = make_args(
            logits,
            out,
            softcap,
            ids=ids,
            mask=mask,
            inv_temperature=inv_temperature,
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
            entropy=entropy if with_entropy else None,
            kl=kl,
            ratio=ratio,
            g=g,
        )
        args.spec = Spec(
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
        self._call("token_loss", args, logits.device)
        return loss, logp, lse, entropy if want_entropy else entropy.new_empty(0), kl, ratio, g
