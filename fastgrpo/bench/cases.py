"""What is measured: a case's size and costs, its inputs, and the truth in float64 that all are held against."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from fastgrpo.engine.plan import cut
from fastgrpo.logps import linear_logps, selective_logps
from fastgrpo.objective import Objective
from fastgrpo.reference import grpo_loss_reference

OPS = {
    "advantages": "group-normalised advantages",
    "logps": "log-probabilities and entropies from logits",
    "forward": "loss from logits, without a gradient",
    "loss": "loss and gradient from logits",
    "linear": "loss and gradients from hidden states",
    "step": "loss and backward pass of TRL's trainer, on a model of two layers",
}
MODELS = {  # H, V, softcap
    "qwen2.5-0.5b": (896, 151_936, None),
    "qwen2.5-7b": (3584, 152_064, None),
    "llama3-8b": (4096, 128_256, None),
    "gemma2-9b": (3584, 256_000, 30.0),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 5e-2, "fp16": 2e-2, "fp32": 1e-4}  # of the worst result, relative by norm; beyond, no time
EPSILON, GROUP = 0.2, 8


@dataclass(frozen=True)
class Case:
    """One size of one operation: B completions of T tokens, hidden width H, vocabulary V."""

    op: str
    B: int
    T: int
    V: int
    H: int = 896
    dtype: str = "bf16"
    device: str = "cpu"
    inactive: float = 0.0  # share of completions with advantage 0
    softcap: float | None = None
    model: str | None = None

    @property
    def objective(self) -> Objective:
        """From logits with a reference policy; from hidden states without, as TRL's default is."""
        return Objective(epsilon=EPSILON, beta=0.04 if self.op in ("forward", "loss") else 0.0)

    @property
    def shape(self) -> dict[str, int]:
        if self.op == "advantages":
            return {"B": self.B}
        names = "BTV" if self.op in ("logps", "forward", "loss") else "BTVH"
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        words = [self.op, " ".join(f"{name}={size}" for name, size in self.shape.items()), self.dtype]
        words += [f"{self.inactive:.0%} inactive"] * (self.inactive > 0) + [f"softcap {self.softcap}"] * bool(
            self.softcap
        )
        return ", ".join(words)

    @property
    def bytes(self) -> int:
        """What has to move, once each: inputs of a row and, with a gradient, its output."""
        size, rows = DTYPES[self.dtype].itemsize, self.B * self.T
        if self.op == "advantages":
            return 2 * 4 * self.B
        if self.op in ("logps", "forward"):
            return rows * self.V * size
        if self.op == "loss":
            return 2 * rows * self.V * size
        return 2 * (rows * self.H + self.V * self.H) * size

    @property
    def flops(self) -> int:
        """Of the GEMMs that cannot be done without: 2NHV, and 4NHV for the tokens that learn."""
        if self.op not in ("linear", "step"):
            return 0
        rows = self.B * self.T
        learn = rows - round(self.inactive * self.B) * self.T
        return 2 * rows * self.H * self.V + 4 * learn * self.H * self.V


def parse_shape(text: str) -> dict[str, int]:
    """ "B=8,T=64,V=151936,H=896", any of them, as numbers.

    Raises:
        ValueError: anything else.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"\s*([BTVH])=([1-9][0-9_]*)\s*", part)
        if not found:
            raise ValueError(f"shape: expected B=8,T=64,V=151936,H=896 or some of them, got {text!r}")
        sizes[found[1]] = int(found[2])
    return sizes


def make_inputs(case: Case) -> SimpleNamespace:
    """Random inputs of a case. Every number has a bf16 value, so that one truth serves all dtypes.

    Old log-probabilities are the policy's own with noise of 0.1, as after an update, and no ratio lies within 0.05 of
    a clip edge: there, rounding alone would decide about a gradient.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        out = torch.empty(shape, dtype=torch.bfloat16, device=case.device)
        for part in out.split(max(1, (1 << 26) // max(out[0].numel(), 1))):
            part.copy_(torch.randn(part.shape, generator=generator, device=case.device) * scale)
        return out.to(dtype)

    inputs = SimpleNamespace(case=case)
    if case.op == "advantages":
        inputs.rewards = torch.rand(case.B, generator=generator, device=case.device)
        return inputs
    if case.op == "linear":
        inputs.weight = normal(case.V, case.H, scale=2 / case.H**0.5)
        inputs.hidden = normal(case.B, case.T, case.H)
    elif case.op != "step":
        inputs.logits = normal(case.B, case.T, case.V, scale=2.0)
    shape = (case.B, case.T)
    inputs.ids = torch.randint(case.V, shape, generator=generator, device=case.device)
    inputs.mask = torch.ones(shape, dtype=torch.int64, device=case.device)
    inputs.advantages = torch.randn(case.B, generator=generator, device=case.device)
    inputs.advantages[: round(case.inactive * case.B)] = 0.0
    if case.op == "step":
        return inputs
    if case.op == "linear":
        logps = linear_logps(inputs.hidden.float(), inputs.weight.float(), inputs.ids, softcap=case.softcap)
    else:
        logps = torch.cat([selective_logps(inputs.logits[[i]].float(), inputs.ids[[i]]) for i in range(case.B)])

    def noise() -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator, device=case.device)

    log_ratio = noise()
    for edge in (1 - EPSILON, 1 + EPSILON):
        away = log_ratio.exp() - edge
        log_ratio = torch.where(away.abs() < 0.05, (edge + 0.05 * away.sign()).log(), log_ratio)
    inputs.old, inputs.ref = logps - log_ratio, logps + noise()
    return inputs


def truth(inputs: SimpleNamespace) -> dict[str, Tensor]:
    """The results in float64, a few rows at a time; large ones are kept as fp32, which is exact enough here."""
    case = inputs.case
    if case.op == "advantages":
        groups = inputs.rewards.double().view(-1, GROUP)
        centred = groups - groups.mean(-1, keepdim=True)
        return {"advantages": (centred / (groups.std(-1, keepdim=True) + 1e-4)).view(-1)}
    if case.op == "logps":
        rows = [_exact_logps(inputs, i) for i in range(case.B)]
        return {name: torch.cat([row[name] for row in rows]) for name in ("logps", "entropies")}
    # every token is for itself in these objectives, so that a few can be taken at a time
    linear, learn = case.op == "linear", case.op != "forward"
    rows = (inputs.hidden if linear else inputs.logits).flatten(0, 1)
    advantages = inputs.advantages[:, None].expand(case.B, case.T)
    ids, advantages, old, ref = (x.flatten()[:, None] for x in (inputs.ids, advantages, inputs.old, inputs.ref))
    results = {"loss": torch.zeros((), dtype=torch.float64, device=case.device)}
    if learn:
        gradient = torch.empty_like(rows, dtype=torch.float32)
    if linear:
        weight = inputs.weight.double()
        d_weight = torch.zeros_like(weight)
    # on a CPU, what the C library takes from the system afresh each time would cost more than the arithmetic
    few = max(1, (1 << (24 if rows.device.type == "cpu" else 30)) // (8 * case.V))
    for part in cut(0, len(rows), few):
        leaf = (rows[part].double() @ weight.T if linear else rows[part].double()).requires_grad_(learn)
        logits = leaf if not case.softcap else torch.tanh(leaf / case.softcap) * case.softcap
        loss = grpo_loss_reference(
            logits[:, None], ids[part], advantages[part], old_per_token_logps=old[part], ref_per_token_logps=ref[part],
            objective=case.objective, num_items_in_batch=len(rows), return_stats=False,
        ).loss  # fmt: skip
        results["loss"] += loss.detach()
        if learn:
            loss.backward()
            gradient[part] = leaf.grad @ weight if linear else leaf.grad
        if linear:
            d_weight.addmm_(leaf.grad.T, rows[part].double())
    if learn:
        results["d_hidden" if linear else "d_logits"] = gradient.view(case.B, case.T, -1)
    if linear:
        results["d_weight"] = d_weight.float()
    return results


def _exact_logps(inputs: SimpleNamespace, i: int) -> dict[str, Tensor]:
    every = inputs.logits[i : i + 1].double().log_softmax(-1)
    return {
        "logps": every.gather(-1, inputs.ids[i : i + 1, :, None])[..., 0],
        "entropies": -(every.exp() * every).sum(-1),
    }


def error(results: dict[str, Tensor], want: dict[str, Tensor], advantages: Tensor | None = None) -> float:
    """The worst result's error, relative by norm; a loss's relative to the mean size of its terms, which cancel."""
    worst = 0.0
    for name, exact in want.items():
        if name not in results:
            continue
        got = results[name]
        if got.shape != exact.shape:
            return float("inf")
        difference, size = 0.0, 0.0
        for a, b in zip(_pieces(got), _pieces(exact), strict=True):
            difference += float(torch.linalg.vector_norm(a - b, dtype=torch.float64)) ** 2
            size += float(torch.linalg.vector_norm(b, dtype=torch.float64)) ** 2
        if name == "loss" and advantages is not None:
            size = max(size, float(advantages.abs().mean()) ** 2)
        relative = (difference / size) ** 0.5 if size else difference
        if math.isnan(relative):
            return relative
        worst = max(worst, relative)
    return worst


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    flat = x.detach().reshape(-1)
    return flat.split(1 << 26)
