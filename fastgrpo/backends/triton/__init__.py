"""The Triton backend: NVIDIA, AMD and Intel GPUs from one source, and CPU tensors under Triton's interpreter.

Here are the functions of `contract.Backend`: which kernels, over which grid. How a launch looks is in `launch`, what a
program does in `kernels`, and how it walks a row in `memory`, `statistics` and `gradient`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from ..contract import Call, Rows, Scores, TokenLoss, TokenRows, TokenSpec
from . import launch
from .columns import column_d_hidden, column_d_weight, column_logits, select_columns
from .launch import InPlace, using

try:
    import triton

    from . import kernels
    from .gradient import Backward
except ImportError as error:
    kernels = None  # type: ignore[assignment]  # what `unavailable` goes by
    _missing = f"Triton cannot be imported ({error})"

__all__ = [
    "InPlace",
    "column_d_hidden",
    "column_d_weight",
    "column_logits",
    "refuses",
    "row_grad",
    "row_stats",
    "scale_",
    "select_columns",
    "token_loss",
    "unavailable",
    "using",
]

# The interpreter is chosen when Triton is imported, by TRITON_INTERPRET; what became of the kernels is the evidence.
_INTERPRETED = kernels is not None and not isinstance(kernels.stats_kernel, triton.JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUP_LANES = 512  # of a program that adds up the rewards of a group: the order of more than 512 depends on it


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
        return "its second reading of a row is from the L2 cache, which may have lost it"
    return None


def row_stats(logits: Tensor, rows: Rows, *, want_entropy: bool, softcap: float | None = None) -> Scores:
    rows = launch.aligned(rows)
    n, V = rows.ids.numel(), logits.shape[2]
    logp = logits.new_empty(n, dtype=torch.float32)
    scores = Scores(logp, torch.empty_like(logp), torch.empty_like(logp) if want_entropy else None)
    if n > 0:
        cut = launch.geometry(V, logits.dtype)
        partial = None
        if launch.split(n, V, cut, logits.device):
            partial = _partial(logits, rows, None, None, 0.0, want_entropy, softcap, cut)
        launch.sweep(kernels.stats_kernel, n, cut, logits.device, logits, partial, rows, scores, softcap,
                     *launch.layout(logits), PART=cut.PART)  # fmt: skip
    return scores


def _partial(
    logits: Tensor,
    rows: Rows,
    advantages: Tensor | None,
    seq: Tensor | None,
    skip_zero: float,
    want_entropy: bool,
    softcap: float | None,
    cut: launch.Geometry,
) -> Tensor:
    """The partial sums of all parts of all rows, (N, parts, 2)."""
    n, parts = rows.ids.numel(), cut.parts(logits.shape[2])
    partial = logits.new_empty((n, parts, 2), dtype=torch.float32)
    launch.sweep(kernels.part_kernel, n * parts, cut, logits.device, logits, rows, advantages, seq, skip_zero, partial,
                 softcap, *launch.layout(logits), PART=cut.PART, ENTROPY=want_entropy)  # fmt: skip
    return partial


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
    _row_grad(logits, launch.aligned(Rows(rows.ids, None, rows.inv_temperature)), scores, g, h, out, softcap)


def _row_grad(
    logits: Tensor,
    rows: Rows,
    scores: Scores | TokenLoss,
    g: Tensor,
    h: Tensor | None,
    out: Tensor,
    softcap: float | None,
) -> None:
    """`row_grad`, where only the rows of a mask count, if there is one."""
    n, V = rows.ids.numel(), logits.shape[2]
    if n > 0:
        cut = launch.geometry(V, logits.dtype)
        backward = launch.aligned(Backward(g, h, scores.logp, scores.lse, None if h is None else scores.entropy))
        inplace = launch.inplace(logits, out)
        programs, span = n * cut.parts(V), cut.PART
        if inplace and out.dtype != logits.dtype:  # a whole row, because part of it lands on what others read
            programs, span = n, -(-V // cut.K)
        launch.sweep(kernels.grad_kernel, programs, cut, logits.device, logits, out, rows, backward, softcap,
                     *launch.layout(logits), out.stride(0), out.stride(1), span,
                     SAME_PHASE=launch.same_phase(logits, out), INPLACE=inplace)  # fmt: skip


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
    rows = launch.aligned(rows)
    n, V, device = rows.ids.numel(), logits.shape[2], logits.device
    loss = logits.new_empty(n, dtype=torch.float32)
    logp, lse, kl, ratio, g = (torch.empty_like(loss) for _ in range(5))
    entropy = torch.empty_like(logp) if want_entropy or token.h is not None else None
    result = TokenLoss(loss, logp, lse, entropy, kl, ratio, g)
    if n > 0:
        token, numbers = launch.aligned(_with_advantages(token, spec)), _floats(spec)
        cut = launch.geometry(V, logits.dtype)
        split = launch.split(n, V, cut, device)
        partial = None
        if split:
            partial = _partial(logits, rows, token.advantages, token.seq, numbers.skip_zero, entropy is not None,
                               softcap, cut)  # fmt: skip
        grad = None if split else out
        programs, grad_strides, same_phase, inplace = n, (0, 0), False, False
        if grad is not None:
            same_phase, inplace = launch.same_phase(logits, grad), launch.inplace(logits, grad)
            grad_strides = grad.stride(0), grad.stride(1)
            choice = launch.choices.get()
            cut = launch.wide(cut, V, choice.lanes)
            in_flight = launch.rows_in_flight(n, V * logits.element_size(), device)
            programs = min(n, choice.programs) if choice.programs else in_flight
        launch.sweep(kernels.token_kernel, programs, cut, device, logits, partial, (rows, token, numbers),
                     (result, grad), softcap, *launch.layout(logits), *grad_strides, n, PART=cut.PART, PARTS=cut.PARTS,
                     SAME_PHASE=same_phase, INPLACE=inplace)  # fmt: skip
        if split and out is not None:
            _row_grad(logits, rows, result, g, token.h, out, softcap)
    return result if want_entropy else result._replace(entropy=None)


def _with_advantages(token: TokenRows, spec: TokenSpec) -> TokenRows:
    """What the kernels read of `token`: an advantage per row, or from rewards one per sequence (S,) and `seq`."""
    weight, advantages, rewards, seq, old, ref, policy_scale, h = token
    ref = ref if spec.beta else None
    if advantages is not None:
        return TokenRows(weight, advantages, None, None, old, ref, policy_scale, h)
    assert rewards is not None
    size, advantages = int(spec.group_size), torch.empty_like(rewards)
    launch.run(kernels.group_kernel, rewards.numel(), _GROUP_LANES, rewards.device, rewards, advantages, size,
               float(spec.scale_by_std), GROUP=triton.next_power_of_2(max(2, size)))  # fmt: skip
    return TokenRows(weight, advantages, None, seq, old, ref, policy_scale, h)


@functools.lru_cache
def _floats(spec: TokenSpec) -> TokenSpec:
    """What the token kernel reads of `spec`, as floats, because Triton specialises upon integers; 4 numbers."""
    unread, numbers = ("group_size", "scale_by_std"), (*spec.numbers, *(0.0,) * (4 - len(spec.numbers)))
    floats: dict[str, Any] = {
        name: None if name in unread else float(x) for name, x in spec._asdict().items() if name != "numbers"
    }
    return spec._replace(numbers=tuple(map(float, numbers)), **floats)


def scale_(x: Tensor, factor: Tensor) -> None:
    n, V = x.shape[0] * x.shape[1], x.shape[2]
    if n > 0:
        cut = launch.geometry(V, x.dtype)
        launch.sweep(kernels.scale_kernel, n * cut.parts(V), cut, x.device, x, factor, *launch.layout(x), cut.PART)
