"""What the backends in C share: their arguments, their library, and the calls on rows of torch tensors."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Rows, Scores, TokenLoss, TokenRows, TokenSpec

_ABI = 10
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Spec(ctypes.Structure):
    """ObjectiveSpec in csrc/objective.h."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("numbers", ctypes.c_float * 4),
        ("beta", ctypes.c_float),
        ("bias_correction", ctypes.c_int32),
        ("log_ratio_clamp", ctypes.c_float),
    ]


class Args(ctypes.Structure):
    """FastgrpoArgs in csrc/args.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "vocab")),
        ("logits_stride", ctypes.c_int64 * 2),
        ("out_stride", ctypes.c_int64 * 2),
        *((name, ctypes.c_int32) for name in ("dtype", "out_dtype", "scale_by_std", "skip_zero")),
        ("softcap", ctypes.c_float),
        ("spec", Spec),
        *((name, ctypes.c_int64) for name in ("group_size", "sequences")),
        *((name, ctypes.c_void_p) for name in ("logits", "out", "ids", "mask", "inv_temperature")),
        *((name, ctypes.c_void_p) for name in ("weight", "advantages", "rewards", "seq")),
        *((name, ctypes.c_void_p) for name in ("old", "ref", "policy_scale", "h")),
        *((name, ctypes.c_void_p) for name in ("loss", "logp", "lse", "entropy", "kl", "ratio", "g")),
    ]


class _Field(ctypes.Structure):
    """FastgrpoField in csrc/args.h: a field as the library has it."""

    _fields_ = [("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64)]


def _fields(structure: type[ctypes.Structure], prefix: str = "") -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of the fields of a structure, followed by those of structures in it."""
    members = {name: getattr(structure, name) for name, *_ in structure._fields_}
    found = {prefix + name: (at.offset, at.size) for name, at in members.items()}
    for name, kind, *_ in structure._fields_:
        if issubclass(kind, ctypes.Structure):
            start, _ = found[prefix + name]
            inside = _fields(kind, f"{prefix}{name}.")
            found |= {field: (start + offset, size) for field, (offset, size) in inside.items()}
    return found


def _unlike(library: ctypes.CDLL, name: str) -> str | None:
    """None, or the first field of Args that is not where the library has it."""
    table = getattr(library, f"{name}_fields")
    table.restype = ctypes.POINTER(_Field)
    theirs = {at.name.decode(): (at.offset, at.size) for at in itertools.takewhile(lambda at: at.name, table())}
    ours = _fields(Args)
    for field in [*theirs, *ours]:
        if theirs.get(field) != ours.get(field):
            there, here = (
                "{1} bytes at {0}".format(*at[field]) if field in at else "nothing" for at in (theirs, ours)
            )
            return f"the library has {there} for the field {field}, this package {here}"
    return None


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
        why = f"interface {found}, this package needs {_ABI}" if found != _ABI else _unlike(library, name)
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if why is not None:
        return None, f"{path} is of another version ({why}): reinstall fastgrpo"
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
        installed = Path(str(importlib.metadata.distribution("fastgrpo").locate_file(path.relative_to(sources))))
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


def make_args(
    logits: Tensor,
    out: Tensor | None = None,
    softcap: float | None = None,
    *records: NamedTuple,
    **vectors: Tensor | None,
) -> Args:
    """The arguments of a call, whose fields point into the tensors: those of records by their names there."""
    batch, tokens, vocab = logits.shape
    args = Args(
        batch=batch,
        tokens=tokens,
        vocab=vocab,
        logits_stride=logits.stride()[:2],
        dtype=DTYPES[logits.dtype],
        softcap=math.inf if softcap is None else softcap,
        logits=_pointer(logits),
    )
    if out is not None:
        args.out, args.out_stride, args.out_dtype = _pointer(out), out.stride()[:2], DTYPES[out.dtype]
    for names, values in ((vectors, vectors.values()), *((record._fields, record) for record in records)):
        for name, value in zip(names, values, strict=True):
            if value is not None:
                setattr(args, name, _pointer(value))
    return args


def _new(logits: Tensor, count: int, rows: int) -> list[Tensor]:
    return [logits.new_empty(rows, dtype=torch.float32) for _ in range(count)]


class RowCalls:
    """A backend's functions on rows of logits, given call(function, args, device), which calls the library."""

    def __init__(self, call: Callable[[str, Args, torch.device], None]):
        self._call = call

    def row_stats(self, logits: Tensor, rows: Rows, *, want_entropy: bool, softcap: float | None = None) -> Scores:
        logp, lse = _new(logits, 2, rows.ids.numel())
        scores = Scores(logp, lse, torch.empty_like(logp) if want_entropy else None)
        args = make_args(logits, None, softcap, rows, scores)
        self._call("row_stats", args, logits.device)
        return scores

    def row_grad(
        self,
        logits: Tensor,
        rows: Rows,
        scores: Scores,
        g: Tensor,
        h: Tensor | None,
        out: Tensor,
        *,
        softcap: float | None = None,
    ) -> None:
        read = scores if h is not None else scores._replace(entropy=None)
        args = make_args(logits, out, softcap, rows._replace(mask=None), read, g=g, h=h)
        self._call("row_grad", args, logits.device)

    def token_loss(
        self,
        logits: Tensor,
        rows: Rows,
        token: TokenRows,
        spec: TokenSpec,
        out: Tensor | None,
        *,
        want_entropy: bool,
        softcap: float | None = None,
    ) -> TokenLoss:
        loss, logp, lse, kl, ratio, g = _new(logits, 6, rows.ids.numel())
        entropy = torch.empty_like(logp) if want_entropy or token.h is not None else None
        results = TokenLoss(loss, logp, lse, entropy, kl, ratio, g)
        args = make_args(logits, out, softcap, rows, token, results)
        args.spec = Spec(*(getattr(spec, field[0]) for field in Spec._fields_))
        args.group_size, args.scale_by_std, args.skip_zero = spec.group_size, spec.scale_by_std, spec.skip_zero
        if token.advantages is None:  # the library works them out
            assert token.rewards is not None
            advantages = torch.empty_like(token.rewards)
            args.advantages, args.sequences = _pointer(advantages), advantages.numel()
        else:
            args.rewards = None
        self._call("token_loss", args, logits.device)
        return results if want_entropy else results._replace(entropy=None)
