"""Where fastgrpo stands in for TRL: errors against float64 of both, on the same inputs."""

import contextlib
import functools
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch

trl_utils = pytest.importorskip("trl.trainer.utils", reason="TRL is what is replaced (pip install '.[test]')")
pytest.importorskip("fastgrpo.integrations.trl")
if not hasattr(trl_utils, "add_fused_lm_head"):
    pytest.skip("TRL scores through full logits before 1.15", allow_module_level=True)

from fastgrpo import Objective, policy_loss  # noqa: E402
from fastgrpo.engine import head  # noqa: E402
from fastgrpo.engine.gemm import writes_fp32  # noqa: E402
from fastgrpo.integrations.trl import chunked  # noqa: E402
from fastgrpo.integrations.trl.at_head import LossAtHead  # noqa: E402
from fastgrpo.integrations.trl.chunked import ChunkedLogProb  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BATCH, LENGTH, VOCAB, WIDTH, SEEDS = 6, 32, 1999, 576, 3
NOISE = 1.02  # where both round alike (gradients that are kept in bf16), a ratio of errors is 1 to a few thousandths
OBJECTIVE = Objective(entropy_coef=0.1)


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
    advantages: torch.Tensor  # (B,)


def make_inputs(mode, kind, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden = normal(BATCH * LENGTH, WIDTH).to(mode.of_hidden or mode.hidden).to(mode.hidden)
    weight = (normal(VOCAB, WIDTH) * kind.size / WIDTH**0.5).to(mode.weight)
    bias = normal(VOCAB).to(mode.weight) if kind.bias else None
    p = logits_of(*operands(hidden, weight, bias, mode), kind).softmax(-1)
    ids = torch.multinomial(p, 1, generator=generator)[:, 0]
    return Inputs(hidden, weight, bias, ids, normal(BATCH))


def operands(hidden, weight, bias, mode):
    """In float64, after the casts that the GEMM needs."""
    hidden, weight = (x.to(mode.operands).double() for x in (hidden, weight))
    return hidden, weight, None if bias is None else bias.double()


def logits_of(hidden, weight, bias, kind):
    logits = hidden @ weight.t()
    logits = kind.scale * (logits if bias is None else logits + bias)
    if kind.softcap is not None:
        logits = kind.softcap * torch.tanh(logits / kind.softcap)
    return logits / kind.temperature


# ---- the sides: (leaves, inputs, mode, kind) to logp (N,), entropy (N,) and loss


def exact(leaves, inputs, mode, kind):
    every = logits_of(*leaves, kind).log_softmax(-1)
    logp, entropy = every.gather(-1, inputs.ids[:, None])[:, 0], -(every.exp() * every).sum(-1)
    return logp, entropy, loss_of(logp, entropy, inputs)


def at_seam(apply):
    def scored(leaves, inputs, mode, kind):
        with under(mode):
            logp, entropy, *_ = apply(
                *leaves, inputs.ids, kind.temperature, 32_768, kind.softcap, kind.scale, ("entropy",)
            )
        return logp, entropy, loss_of(logp, entropy, inputs)

    return scored


def subclass(leaves, inputs, mode, kind):
    """What our GRPOTrainer has at the same seam."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    ids = inputs.ids.view(BATCH, LENGTH)
    call = dict(completion_ids=ids, completion_mask=mask, advantages=inputs.advantages, objective=OBJECTIVE)
    at_head = LossAtHead(mask, call)
    with under(mode):
        logp, entropy, *_ = at_head.apply(*leaves, inputs.ids, kind.temperature, 32_768, kind.softcap, kind.scale)
    return logp, entropy, at_head.output.loss


def under(mode):
    return torch.autocast("cpu", dtype=mode.autocast) if mode.autocast else contextlib.nullcontext()


def loss_of(logp, entropy, inputs):
    logp, entropy = (x.view(BATCH, LENGTH) for x in (logp, entropy))
    return policy_loss(logp, inputs.advantages.to(logp.dtype), entropies=entropy, objective=OBJECTIVE).loss


SIDES = {"patch": at_seam(ChunkedLogProb.apply), "subclass": subclass}
THEIRS = at_seam(trl_utils._ChunkedLogProbFunction.apply)


def results(side, inputs, mode, kind):
    """{name: values} of logp, entropy and the gradients of the loss."""
    given = inputs[:3]
    if side is exact:
        given = operands(*given, mode)
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    logp, entropy, loss = side(leaves, inputs, mode, kind)
    loss.backward()
    found = dict(logp=logp.detach(), entropy=entropy.detach())
    return found | {name: x.grad for name, x in zip(("dH", "dW", "db"), leaves, strict=True) if x is not None}


def errors(side, mode, kind):
    """{name: error relative by norm}, over some seeds; logp in nats: its largest."""
    squares, norms, largest = defaultdict(float), defaultdict(float), 0.0
    for seed in range(SEEDS):
        inputs = make_inputs(mode, kind, seed)
        got, want = results(side, inputs, mode, kind), results(exact, inputs, mode, kind)
        for name, truth in want.items():
            squares[name] += float((got[name].double() - truth).square().sum())
            norms[name] += float(truth.square().sum())
        largest = max(largest, float((got["logp"].double() - want["logp"]).abs().max()))
    return {name: (squares[name] / norms[name]) ** 0.5 for name in norms}, largest


@pytest.fixture(params=["auto", "fp32, in chunks"])
def wide_logits(request, monkeypatch):
    """Whether logits are fp32 whatever the operands are: where "auto" says so, and where all are made to be."""
    if request.param == "auto":
        return writes_fp32("cpu")
    for module in (chunked, head):
        monkeypatch.setattr(module, "choose_logits_dtype", lambda *_: FP32)
    for name, value in dict(CPU_BYTES=1, LEAST_ROWS=80).items():
        monkeypatch.setattr(head, name, value)
    return True


@functools.cache
def of_trl(mode, kind):
    return errors(THEIRS, mode, kind)


@pytest.mark.parametrize("head_kind", HEADS)
@pytest.mark.parametrize("mode_name", MODES)
@pytest.mark.parametrize("side", SIDES)
def test_errors_are_not_above_those_of_trl(side, mode_name, head_kind, wide_logits):
    mode, kind = MODES[mode_name], HEADS[head_kind]
    theirs, _ = of_trl(mode, kind)
    ours, largest = errors(SIDES[side], mode, kind)
    for name, error in theirs.items():
        assert ours[name] <= NOISE * error, (name, ours, theirs)
    if wide_logits or mode.operands == FP32:
        assert largest < 4e-5, "in nats, of logits to 70"
        for name, kept in (("dH", mode.hidden), ("dW", mode.weight)):
            limit = 1e-5 if mode.operands == FP32 else 2.5e-3 if kept == FP32 else 3e-3
            assert ours[name] < limit, (name, ours)


ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("n", [0, 7, 200])
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("mean_logits",), ("is_top1", "entropy"), ALL], ids=str)
def test_every_output_is_that_of_trl(outputs, n, wide_logits):
    """In fp32; without rows, too, as a micro-batch without labels has none on a GPU."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((n, 16), (50, 16)))
    ids = torch.where(torch.arange(n) % 3 == 0, 0, (hidden @ weight.t()).argmax(-1))
    found = []
    for apply in (ChunkedLogProb.apply, trl_utils._ChunkedLogProbFunction.apply):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        results = apply(*leaves, None, ids, 0.7, 32_768, 9.0, 1.3, outputs)
        results[0].sum().backward()
        found.append([*results, *(x.grad for x in leaves)])
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_squares_of_sure_rows_are_not_worse_than_trls():
    """Where p is 1 - 1e-5 and nearer, log Σp² is smaller than a rounding of the logits."""
    generator = torch.Generator().manual_seed(0)
    n, vocab = 256, 2000
    weight = torch.randn(vocab, 64, generator=generator) * 0.1
    ids = torch.randint(0, vocab, (n,), generator=generator)
    hidden = torch.randn(n, 64, generator=generator) + 50 * weight[ids]
    want = (2 * (hidden.double() @ weight.double().t()).log_softmax(-1)).logsumexp(-1)
    errors = []
    for apply in (ChunkedLogProb.apply, trl_utils._ChunkedLogProbFunction.apply):
        found = apply(hidden, weight, None, ids, 1.0, 32_768, None, 1.0, ("log_sum_sq_probs",))[2]
        errors.append(float((found - want).abs().max()))
    assert errors[0] <= NOISE * errors[1] < 1e-6
