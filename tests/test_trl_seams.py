"""Where fastgrpo stands in for TRL: errors against float64 of both, on the same inputs."""

import contextlib
import math
from typing import NamedTuple

import pytest
import torch

trl_utils = pytest.importorskip("trl.trainer.utils", reason="TRL is what is replaced (pip install '.[test]')")
pytest.importorskip("fastgrpo.integrations.trl")
if not hasattr(trl_utils, "_ChunkedLogProbFunction"):
    pytest.skip("TRL scores through full logits before 1.15", allow_module_level=True)

from fastgrpo import Objective  # noqa: E402
from fastgrpo.integrations.trl import chunked  # noqa: E402
from fastgrpo.integrations.trl.at_head import LossAtHead  # noqa: E402
from fastgrpo.integrations.trl.chunked import ChunkedLogProb  # noqa: E402

OURS, THEIRS = ChunkedLogProb.apply, trl_utils._ChunkedLogProbFunction.apply
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BATCH, LENGTH, VOCAB, WIDTH = 6, 32, 1999, 96


class Mode(NamedTuple):
    """What TRL hands over: hidden states and a head of these dtypes, under autocast to a third, or outside."""

    hidden: torch.dtype
    weight: torch.dtype
    autocast: torch.dtype | None = None
    of_hidden: torch.dtype | None = None  # the values that hidden states have, where they were widened

    @property
    def operands(self):
        return self.autocast or self.hidden


MODES = {
    "fp32": Mode(FP32, FP32),
    "bf16 autocast": Mode(FP32, FP32, BF16),
    "bf16 autocast, bf16 hidden": Mode(BF16, FP32, BF16),
    "bf16 weights": Mode(BF16, BF16),
    "bf16 weights but of the head": Mode(BF16, FP32),
    "fp16 autocast": Mode(FP32, FP32, FP16),
    "fp16 weights": Mode(FP16, FP16),
    "cast_lm_head_to_fp32": Mode(FP32, FP32, None, BF16),
}


class Kind(NamedTuple):
    size: float  # of the logits' spread
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0


HEADS = {
    "flat": Kind(1.0),
    "peaked": Kind(10.0, temperature=0.6),  # logits to about 40, most of the mass in few columns
    "bias, cap, scale": Kind(6.0, bias=True, softcap=20.0, scale=0.7, temperature=0.8),
}


class Inputs(NamedTuple):
    hidden: torch.Tensor  # (N, H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None
    ids: torch.Tensor  # (N,) sampled from the head
    g: torch.Tensor  # (N,)
    h: torch.Tensor  # (N,)


def make_inputs(mode, kind):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    n = BATCH * LENGTH
    hidden, weight = normal(n, WIDTH), normal(VOCAB, WIDTH) * kind.size / WIDTH**0.5
    hidden = hidden.to(mode.of_hidden or mode.hidden).to(mode.hidden)
    bias = normal(VOCAB).to(mode.weight) if kind.bias else None
    made = Inputs(hidden, weight.to(mode.weight), bias, None, normal(n), 0.1 * normal(n))
    p = logits_of(made, mode, kind).softmax(-1).float()
    return made._replace(ids=torch.multinomial(p, 1, generator=generator)[:, 0])


def logits_of(inputs, mode, kind):
    """In float64, of the operands as the GEMM takes them; differentiable."""
    hidden, weight, bias = (None if x is None else x.to(mode.operands).double() for x in inputs[:3])
    logits = hidden @ weight.t()
    logits = kind.scale * (logits if bias is None else logits + bias)
    if kind.softcap is not None:
        logits = kind.softcap * torch.tanh(logits / kind.softcap)
    return logits / kind.temperature


def in_float64(hidden, weight, bias, ids, mode, kind):
    """What `apply` gives, with gradients of the operands."""
    every = logits_of(Inputs(hidden, weight, bias, ids, None, None), mode, kind).log_softmax(-1)
    return every.gather(-1, ids[:, None])[:, 0], -(every.exp() * every).sum(-1)


def scored(apply, inputs, mode, kind, loss_of):
    """{name: value} of logp, entropy, loss and the gradients of a loss."""
    wide = apply is in_float64
    leaves = [None if x is None else (x.double() if wide else x).detach().requires_grad_() for x in inputs[:3]]
    under = torch.autocast("cpu", dtype=mode.autocast) if mode.autocast and not wide else contextlib.nullcontext()
    with under:
        if wide:
            logp, entropy = in_float64(*leaves, inputs.ids, mode._replace(hidden=torch.float64, autocast=None), kind)
        else:
            arguments = (kind.temperature, 32_768, kind.softcap, kind.scale, ("entropy",))
            logp, entropy, *_ = apply(*leaves, inputs.ids, *arguments)
    loss = loss_of(logp, entropy)
    loss.backward()
    gradients = {f"d_{n}": x.grad for n, x in zip(("hidden", "weight", "bias"), leaves, strict=True) if x is not None}
    return dict(logp=logp, entropy=entropy, **gradients)


def truth(inputs, mode, kind, loss_of):
    operands = [None if x is None else x.to(mode.operands).double() for x in inputs[:3]]
    return scored(in_float64, Inputs(*operands, *inputs[3:]), mode, kind, loss_of)


def errors(got, want):
    return {
        name: float((got[name].detach().double() - exact).norm() / exact.norm())
        for name, exact in want.items()
    }
