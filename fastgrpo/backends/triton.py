"""The Triton backend: NVIDIA, AMD and Intel GPUs from one source, and CPU tensors under Triton's interpreter.

Here are the launchers: which geometry, which grid, which kernels. The kernels are in `_triton_kernels.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .choices import Choices
from .contract import Call, Kind, Rows, Scores, TokenLoss, TokenRows, TokenSpec

try:
    import triton

    from . import _triton_kernels as kernels
except ImportError as error:
    kernels = None
    _missing = f"Triton cannot be imported ({error})"

# The interpreter is chosen when Triton is imported, by TRITON_INTERPRET; what became of the kernels is the evidence.
_INTERPRETED = kernels is not None and not isinstance(kernels.stats_kernel, triton.JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REGISTERS = 64  # a thread, on NVIDIA: 1024 threads per multiprocessor; left alone, ptxas takes up to 110


def unavailable() -> str | None:
    """None when this backend can run on this machine, else why not."""
    if kernels is None:
        return _missing
    if _INTERPRETED and (why := _interpreter_unavailable(triton.__version__, importlib.metadata.version("numpy"))):
        return why
    if _INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "there is no GPU (Triton's interpreter runs the kernels on a CPU when TRITON_INTERPRET=1 is set first)"


def _interpreter_unavailable(of_triton: str, of_numpy: str) -> str | None:
    older, newer = (tuple(int(n) for n in version.split(".")[:2]) for version in (of_triton, of_numpy))
    if older < (3, 7) and newer >= (2, 4):
        return f"the interpreter of Triton {of_triton} needs numpy < 2.4, and {of_numpy} is installed"
    return None


def refuses(call: Call) -> str | None:
    """None, or why this backend cannot take such a call."""
    if call.device_type not in (("cpu", "cuda", "xpu") if _INTERPRETED else ("cuda", "xpu")):
        return f"expected a GPU tensor, got one on {call.device_type}"
    if call.dtype not in _DTYPES:
        return f"expected float32, bfloat16 or float16, got {call.dtype}"
    if call.one_pass:
        return "its second reading of a row is from the cache, which may have lost it"
    return None


# ---- launch choices: what only a speed depends on


@dataclasses.dataclass(frozen=True)
class InPlace:
    """How the token kernel is launched where it writes the gradient over the logits; no choice changes a bit.

    (A GPU adds up the rewards of a group of more than 512 in an order that depends on lanes.)

    lanes: threads of a program, 512, or 1024, which hold two parts of a row side by side (a row of one part, of at
    most 128 KB, keeps the threads that it has). programs: how many there are at most; 0 leaves it to the device.
    On AMD 1024 lanes leave a thread 128 registers, and some of its values wait in memory.
    """

    lanes: int = 512
    programs: int = 0

    def __post_init__(self):
        if self.lanes not in (512, 1024):
            raise ValueError(f"lanes: expected 512 or 1024, got {self.lanes!r}")
        if type(self.programs) is not int or self.programs < 0:
            raise ValueError(f"programs: expected a whole number, 0 for the device's own, got {self.programs!r}")


_choices = Choices(InPlace())
using = _choices.using


# ---- geometry: what a row's bits may depend on comes from V and the dtype alone


class Geometry(NamedTuple):
    K: int  # elements in 16 bytes
    LANES: int  # threads of a program
    UNROLL: int  # half the vectors of K elements that a thread has on their way at once
    PART: int  # vectors in a part, a multiple of LANES * UNROLL
    PARTS: int = 1  # that a program holds side by side

    def parts(self, V: int) -> int:
        return -(-V // (self.K * self.PART))


def _geometry(V: int, dtype: torch.dtype) -> Geometry:
    """512 threads for a long row, so that the few rows which fit into the L2 cache keep the memory busy."""
    size = dtype.itemsize
    lanes = 512 if V * size >= 65536 else 256 if V * size >= 16384 else 128
    return Geometry(16 // size, lanes, 2, lanes * 16)


@functools.cache
def _device(device: torch.device) -> tuple[int, int, int]:
    """(multiprocessors, bytes of L2 cache, threads of a warp) of a device."""
    if device.type == "cpu":
        return 1, 1 << 22, 32
    module = getattr(torch, device.type)
    with module.device(device):
        warp = triton.runtime.driver.active.get_current_target().warp_size
    properties = module.get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", None) or getattr(properties, "gpu_subslice_count", 64)
    return processors, getattr(properties, "L2_cache_size", 0) or 1 << 25, warp


def _split(n_rows: int, V: int, geometry: Geometry, device: torch.device) -> bool:
    """Whether to cut rows into parts: when there are too few of them to keep every multiprocessor busy."""
    return geometry.parts(V) > 1 and n_rows < _device(device)[0]


def _rows_in_flight(n_rows: int, row_bytes: int, device: torch.device) -> int:
    """Programs for a pass that reads its row twice, so that the second reading finds the L2 cache.

    On average half of a row waits there for its second reading: 1.5 times the cache leaves a quarter to spare.
    """
    processors, cache, _ = _device(device)
    return min(n_rows, processors * max(1, round(1.5 * cache / row_bytes / processors)))


def _launch(kernel, programs: int, geometry: Geometry, device: torch.device, *args, **constants) -> None:
    on = contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
    options = {"num_warps": max(1, geometry.LANES // _device(device)[2])}
    if device.type == "cuda" and torch.version.hip is None:
        options["maxnreg"] = REGISTERS
    with on:
        kernel[(programs,)](*args, K=geometry.K, LANES=geometry.LANES, UNROLL=geometry.UNROLL, **constants, **options)


def _wide(geometry: Geometry, V: int, lanes: int) -> Geometry:
    """The geometry of `InPlace.lanes`: as many parts of a row side by side as the lanes are of 512."""
    beside = lanes // 512 if geometry.parts(V) > 1 else 1
    return geometry._replace(LANES=geometry.LANES * beside, PARTS=beside)


def _layout(x: Tensor) -> tuple[int, int, int, int]:
    """(V, T, stride_b, stride_t)."""
    return x.shape[2], x.shape[1], x.stride(0), x.stride(1)


def _same_phase(a: Tensor, b: Tensor) -> bool:
    """Whether every row of b starts at the address of a's row modulo 16."""
    apart = [b.data_ptr() - a.data_ptr()]
    apart += [(b.stride(d) - a.stride(d)) * a.element_size() for d in (0, 1) if a.shape[d] > 1]
    return all(n % 16 == 0 for n in apart)


# ---- the backend's functions, as `contract.Backend` describes them


def row_stats(logits: Tensor, rows: Rows, *, want_entropy: bool, softcap: float | None = None) -> Scores:
    ids, mask, inv_temperature = rows
    n, V = ids.numel(), logits.shape[2]
    logp, lse = logits.new_empty(n, dtype=torch.float32), logits.new_empty(n, dtype=torch.float32)
    entropy = torch.empty_like(logp) if want_entropy else None
    scores = Scores(logp, lse, entropy)
    if n == 0:
        return scores
    geometry = _geometry(V, logits.dtype)
    partial, parts = None, 1
    if _split(n, V, geometry, logits.device):
        partial, parts = _partial(logits, ids, mask, inv_temperature, softcap, None, 0.0, want_entropy, geometry)
    _launch(kernels.stats_kernel, n, geometry, logits.device, logits, partial, ids, mask, inv_temperature,
            softcap, logp, lse, entropy, *_layout(logits), parts, PART=geometry.PART,
            ENTROPY=want_entropy)  # fmt: skip
    return scores


def _partial(
    logits, ids, mask, inv_temperature, softcap, advantages, skip_zero, want_entropy, geometry
) -> tuple[Tensor, int]:
    """The partial sums of all parts of all rows, and the number of parts."""
    n, parts = mask.numel(), geometry.parts(logits.shape[2])
    partial = logits.new_empty((n, parts, 2), dtype=torch.float32)
    _launch(kernels.part_kernel, n * parts, geometry, logits.device, logits, ids, mask, inv_temperature,
            softcap, advantages, partial, *_layout(logits), parts, float(skip_zero), PART=geometry.PART,
            ENTROPY=want_entropy)  # fmt: skip
    return partial, parts


def row_grad(
    logits: Tensor,
    rows: Rows,
    scores: Scores,
    g: Tensor,
    h: Tensor | None,
    out: Tensor,
    *,
    softcap: float | None = None,
) -> None:
    _row_grad(logits, rows.ids, None, scores.lse, scores.entropy, g, h, rows.inv_temperature, out, softcap)


def _row_grad(logits, ids, mask, lse, entropy, g, h, inv_temperature, out, softcap) -> None:
    """`row_grad`, with a mask of the rows where h counts."""
    if ids.numel() == 0:
        return
    geometry = _geometry(logits.shape[2], logits.dtype)
    parts = geometry.parts(logits.shape[2])
    _launch(kernels.grad_kernel, ids.numel() * parts, geometry, logits.device, logits, out, ids, mask, lse,
            None if h is None else entropy, g, h, inv_temperature, softcap, *_layout(logits), out.stride(0),
            out.stride(1), parts, geometry.PART, SAME_PHASE=_same_phase(logits, out),
            INPLACE=out.data_ptr() == logits.data_ptr())  # fmt: skip


def token_loss(
    logits: Tensor,
    rows: Rows,
    token: TokenRows,
    spec: TokenSpec,
    out: Tensor | None,
    *,
    want_entropy: bool,
    softcap: float | None = None,
) -> TokenLoss:
    ids, mask, inv_temperature = rows
    n, V = ids.numel(), logits.shape[2]
    device = logits.device
    with_entropy = want_entropy or token.h is not None
    loss, logp, lse, kl, ratio, g = (logits.new_empty(n, dtype=torch.float32) for _ in range(6))
    entropy = torch.empty_like(logp) if with_entropy else None
    if n > 0:
        geometry = _geometry(V, logits.dtype)
        split = _split(n, V, geometry, device)
        partial, parts = None, 1
        if split:
            partial, parts = _partial(
                logits, ids, mask, inv_temperature, softcap, token.advantages, spec.skip_zero, with_entropy, geometry
            )
        inplace = out is not None and not split
        programs = n
        if inplace:
            choice = _choices.get()
            geometry = _wide(geometry, V, choice.lanes)
            in_flight = _rows_in_flight(n, V * logits.element_size(), device)
            programs = min(n, choice.programs) if choice.programs else in_flight
        named = dict(clip_low=0.0, clip_high=0.0, delta=math.inf, tau_pos=1.0, tau_neg=1.0)
        names = {Kind.CLIP: ("clip_low", "clip_high", "delta"), Kind.CISPO: ("clip_high",)}
        named |= zip(names.get(spec.kind, ("tau_pos", "tau_neg")), spec.numbers, strict=True)
        numbers = [float(x) for x in (spec.kind, named["clip_low"], named["clip_high"], named["delta"], spec.beta,
                   spec.bias_correction, named["tau_pos"], named["tau_neg"])]  # fmt: skip
        by_group = token.advantages is None
        _launch(
            kernels.token_kernel, programs, geometry, device, logits, partial, ids, mask, inv_temperature,
            softcap, token.advantages, token.rewards if by_group else None, token.seq if by_group else None,
            token.weight, token.old, token.ref if spec.beta else None, token.policy_scale, token.h, loss, logp, lse,
            entropy, kl, ratio, g, *_layout(logits), parts, n, *numbers,
            int(spec.group_size), float(spec.scale_by_std), float(spec.skip_zero), PART=geometry.PART,
            PARTS=geometry.PARTS, ENTROPY=with_entropy, INPLACE=inplace,
            GROUP=triton.next_power_of_2(max(2, int(spec.group_size))) if by_group else 1,
        )  # fmt: skip
        if split and out is not None:
            _row_grad(logits, ids, mask, lse, entropy, g, token.h, inv_temperature, out, softcap)
    return TokenLoss(loss, logp, lse, entropy if want_entropy else None, kl, ratio, g)


def scale_(x: Tensor, factor: Tensor) -> None:
    n = x.shape[0] * x.shape[1]
    if n == 0:
        return
    geometry = _geometry(x.shape[2], x.dtype)
    parts = geometry.parts(x.shape[2])
    _launch(kernels.scale_kernel, n * parts, geometry, x.device, x, factor, *_layout(x), parts, geometry.PART)
