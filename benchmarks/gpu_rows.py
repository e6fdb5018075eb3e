"""Rows of logits, the truth about them in float64, and what is run on them: for the stages in gpu.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.backends import Rows, Scores, TokenRows, TokenSpec
from fastgrpo.bench import turns
from fastgrpo.bench.operation import DTYPES, Case, Implementation
from fastgrpo.engine import overlap

ROUNDING = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-11}  # of a gradient's element


def make_rows(n: int, V: int, dtype: str, device: str, holes: bool) -> SimpleNamespace:
    """n rows of logits (1, n, V), what the kernels read with them, and the truth; `holes`: some rows are masked, and
    hold NaN, temperatures differ.

    The gradient is that of `weight · advantage · logp + h · entropy`, which the fused objective is at ratio 1.
    """
    generator = torch.Generator(device).manual_seed(V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    p = SimpleNamespace(V=V, dtype=dtype)
    p.logits = torch.empty(1, n, V, dtype=DTYPES[dtype], device=device)
    for part in p.logits[0].split(512):
        part.copy_(2 * normal(*part.shape))
    p.ids = torch.randint(V, (n,), generator=generator, device=device)
    p.mask = normal(n) < 1.5 if holes else torch.ones(n, dtype=torch.bool, device=device)
    p.inv_temperature = normal(n).clamp(-1, 1) / 4 + 1 if holes else torch.ones(n, device=device)
    p.weight, p.advantages, p.h = 0.25 * p.mask.float(), normal(n), 0.1 * normal(n) * p.mask
    p.g = -p.weight * p.advantages
    p.logits[0][~p.mask] = torch.nan
    p.work = torch.empty_like(p.logits)

    p.logp, p.lse, p.entropy = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(3))
    p.gradients = [torch.zeros(n, V, device=device) for _ in range(2)]  # without and with h
    for rows in torch.arange(n, device=device).split(512):
        rows = rows[p.mask[rows]]
        z = p.logits[0][rows].double() * p.inv_temperature[rows, None]
        log_p, ids = z.log_softmax(-1), p.ids[rows, None]
        probability = log_p.exp()
        p.lse[rows], p.logp[rows] = z.logsumexp(-1), log_p.gather(1, ids)[:, 0]
        p.entropy[rows] = -(probability * log_p).sum(-1)
        of_entropy = -p.h[rows, None] * probability * (log_p + p.entropy[rows, None])
        of_logp = (-probability).scatter_add(1, ids, torch.ones_like(z[:, :1])) * p.g[rows, None]
        p.gradients[0][rows] = (of_logp * p.inv_temperature[rows, None]).float()
        p.gradients[1][rows] = ((of_logp + of_entropy) * p.inv_temperature[rows, None]).float()
    return p


def share_of_tolerance(got: Tensor, want: Tensor, relative: float, absolute: float) -> float:
    """The worst element's error over what it may be; infinite where something is not a number."""
    worst = 0.0
    for a, b in zip(got.split(512), want.split(512), strict=True):
        share = (a.to(b.dtype) - b).abs() / (relative * b.abs() + absolute)
        worst = max(worst, float(share.nan_to_num(nan=torch.inf).amax()))
    return worst


def problem_of(p: SimpleNamespace, results: dict[str, Tensor], entropy: bool) -> tuple[float, str | None]:
    """(the worst error of the results as a share of what it may be, what is wrong with them)."""
    worst = 0.0
    for name, got in results.items():
        if name == "gradient":
            size = float(p.g.abs().amax() + entropy * p.h.abs().amax())
            share = share_of_tolerance(got.flatten(0, -2), p.gradients[entropy], ROUNDING[p.dtype], 2e-6 * size)
        elif name == "scaled":
            share = 0.0 if torch.equal(got[0][p.mask], 0.5 * p.logits[0][p.mask]) else torch.inf
        else:
            share = share_of_tolerance(got, getattr(p, name), 1e-6, 2e-6)
        if not share <= 1:
            return share, f"wrong: {name}: {share:.3g} times the error that it may have"
        worst = max(worst, share)
    return worst, None


# ---- what is run on them


class Kernel(NamedTuple):
    """One call of a backend; `passes`: reads and writes of the logits that it needs."""

    name: str
    run: Callable  # (rows, backend, entropy) -> results
    prepare: Callable[[SimpleNamespace], None] = lambda p: None
    passes: int = 2


def restore(p: SimpleNamespace) -> None:
    p.work.copy_(p.logits)


def poison(p: SimpleNamespace) -> None:
    p.work.fill_(torch.nan)


def _token_loss(p: SimpleNamespace, backend, entropy: bool) -> dict[str, Tensor]:
    rows = Rows(p.ids, p.mask, p.inv_temperature)
    token = TokenRows(p.weight, p.advantages, None, None, None, None, None, p.h if entropy else None)
    logits = p.work
    found = backend.token_loss(logits, rows, token, TokenSpec(), logits, want_entropy=entropy)
    return dict(gradient=logits, logp=found[1], lse=found[2]) | ({"entropy": found[3]} if entropy else {})


def _statistics(p: SimpleNamespace, backend, entropy: bool) -> dict[str, Tensor]:
    logp, lse, found = backend.row_stats(p.logits, Rows(p.ids, p.mask, p.inv_temperature), want_entropy=entropy)
    return dict(logp=logp, lse=lse) | ({"entropy": found} if entropy else {})


def _gradient(p: SimpleNamespace, backend, entropy: bool, *, inplace: bool) -> dict[str, Tensor]:
    rows, scores = Rows(p.ids, p.mask, p.inv_temperature), Scores(p.logp.float(), p.lse.float(), p.entropy.float())
    backend.row_grad(p.work if inplace else p.logits, rows, scores, p.g, p.h if entropy else None, p.work)
    return dict(gradient=p.work)


def _scale(p: SimpleNamespace, backend, entropy: bool) -> dict[str, Tensor]:
    backend.scale_(p.work, torch.full((), 0.5, device=p.work.device))
    return dict(scaled=p.work)


TOKEN_LOSS = Kernel("loss and gradient in place", _token_loss, restore)
STATISTICS = Kernel("statistics", _statistics, passes=1)
GRADIENT = Kernel("gradient", lambda *x: _gradient(*x, inplace=False), poison)
GRADIENT_IN_PLACE = Kernel("gradient in place", lambda *x: _gradient(*x, inplace=True), restore)
SCALE = Kernel("scale", _scale, restore)
KERNELS = (TOKEN_LOSS, STATISTICS, GRADIENT, GRADIENT_IN_PLACE, SCALE)


def choices(backend: str, every_nth: int) -> list[dict]:
    """What `using` of a backend is given; the first is what it chooses for itself. 0: only its clusters besides."""
    if backend == "cuda":
        some = [{}, *({"cluster": cluster} for cluster in (-1, 1, 2, 4, 8, 16))]
        every = itertools.product((4, 8, 16), (2, 3, 4), (1, 2), (1, 0))
        names = ("cluster", "buffers", "blocks", "evict_first")
    else:
        some = [{}]
        every = itertools.product((512, 1024), (66, 99, 132, 198, 264))
        names = ("lanes", "programs")
    taken = list(every)[::every_nth] if every_nth else []
    return some + [dict(zip(names, choice, strict=True)) for choice in taken]


# Parts of a chunk from hidden states on two streams, and the multiprocessors that CUDA's sweep of one may take.
OVERLAPS = [
    dict(parts=1),
    *(dict(parts=parts, multiprocessors=limit) for parts, limit in itertools.product((2, 4), (0, 16, 32, 64))),
]


@contextlib.contextmanager
def overlapping(choice: dict) -> Iterator[None]:
    """Calls inside run as one of `OVERLAPS` says."""
    with (
        overlap.using(parts=choice.get("parts", 1)),
        using("cuda", {name: value for name, value in choice.items() if name == "multiprocessors"}),
    ):
        yield


def told(choice: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in choice.items())


def parse_choice(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (part.split("=") for part in text.split(",") if part)}


def using(backend: str, choice: dict):
    return backends.get(backend).using(**choice) if choice else contextlib.nullcontext()


class Side(NamedTuple):
    backend: str
    kernel: Kernel
    choice: dict
    entropy: bool

    def __str__(self) -> str:
        words = [self.kernel.name, "with entropy" * self.entropy, told(self.choice)]
        return f"{self.backend}: " + ", ".join(filter(None, words))

    def run(self, p: SimpleNamespace) -> dict[str, Tensor]:
        return self.kernel.run(p, backends.get(self.backend), self.entropy)

    def row(self, op: str, p: SimpleNamespace) -> dict:
        case = Case("loss", 1, p.logits.shape[1], p.V, dtype=p.dtype, device=p.logits.device.type)
        mode = str(self).partition(": ")[2]
        made = turns.new_row(case, Implementation("loss", "fastgrpo", self.run, self.backend, mode))
        return made | dict(op=op, kernel=self.kernel.name, choice=told(self.choice), entropy=self.entropy)
