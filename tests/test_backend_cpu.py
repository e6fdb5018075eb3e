"""What is particular to the CPU backend: its instruction sets, its threads, its rounding, and the rows that leave the
fast path. The objective and the gradients of all backends are held against each other in test_backends.py."""

import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastgrpo.backends import Call, Rows, Scores, TokenRows, TokenSpec, cpu, native

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")

ISAS = cpu.instruction_sets() if cpu.unavailable() is None else []
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# 1: nothing but the target; 7: less than a vector; 4097: one more than a block; the rest are real vocabularies,
# two of them odd, so that rows are unaligned.
SIZES = [1, 7, 4097, 32001, 50257, 151936]
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTGRPO_CPU_ISA", request.param)
    return request.param


def everything(rows):
    return torch.ones(rows, dtype=torch.bool)


def reference(logits, ids, inv_temperature):
    """logp, lse, entropy, p and log p in float64, (N,) and (N, V)."""
    z = logits.reshape(-1, logits.shape[-1]).double() * inv_temperature[:, None].double()
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0], z.logsumexp(-1), entropy, p, log_p


def reference_grad(ids, g, h, inv_temperature, entropy, p, log_p):
    one_hot = torch.zeros_like(p).scatter_(1, ids[:, None], 1.0)
    grad = g[:, None].double() * (one_hot - p)
    if h is not None:
        grad -= h[:, None].double() * torch.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
    return inv_temperature[:, None].double() * grad


def poisoned(logits):
    return torch.full_like(logits, math.nan)


def clip_rows(n, generator, old=None, h=None):
    return TokenRows(
        weight=torch.rand(n, generator=generator),
        advantages=torch.randn(n, generator=generator),
        rewards=None,
        seq=None,
        old=old,
        ref=None,
        policy_scale=None,
        h=h,
    )


@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_accuracy(isa, dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    # A slice of a longer buffer, NaN in what must not be read, scales from flat to peaked.
    full = torch.randn(2, 3, vocab, generator=generator).mul_(torch.tensor([[[1.0]], [[6.0]]])).to(dtype)
    full[:, -1] = math.nan
    logits, out = full[:, :-1], poisoned(full)[:, :-1]
    ids = torch.randint(vocab, (4,), generator=generator)
    ids[3] = logits[1, 1].argmax()  # a confident token
    inv_temperature = torch.tensor([1.0, 1 / 0.7, 0.9, 1.0])
    g, h = torch.randn(4, generator=generator), torch.randn(4, generator=generator)

    logp, lse, entropy = cpu.row_stats(logits, Rows(ids, everything(4), inv_temperature), want_entropy=True)
    want_logp, want_lse, want_entropy, p, log_p = reference(logits, ids, inv_temperature)
    torch.testing.assert_close(logp.double(), want_logp, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=2e-6, atol=1e-6)

    for gradient_of_entropy in (None, h):
        cpu.row_grad(logits, Rows(ids, None, inv_temperature), Scores(logp, lse, entropy), g, gradient_of_entropy, out)
        want = reference_grad(ids, g, gradient_of_entropy, inv_temperature, want_entropy, p, log_p)
        # One rounding to the dtype; and the lse that came in was itself rounded to fp32.
        rtol = 1e-5 + HALF_ULP[dtype]
        atol = 1e-6 * (g.abs().max() + (0 if gradient_of_entropy is None else 10 * h.abs().max()))
        torch.testing.assert_close(out.reshape(4, vocab).double(), want, rtol=rtol, atol=float(atol))
        assert full[:, -1].isnan().all()


def special_rows(dtype):
    """name -> row; targets are element 5. Two and a half blocks long."""
    vocab = 10001
    base = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    names = ("first_block", "masked", "low", "late_peak", "late_cliff", "filled", "flat")
    rows = {name: base.clone() for name in names}
    rows["first_block"][:5000] = -math.inf  # the target among them
    rows["masked"][torch.arange(vocab) % 3 == 0] = -math.inf
    rows["low"] -= 1e4
    rows["late_peak"][-3] += 4000
    rows["late_cliff"][9000:] -= 4000
    rows["filled"][:5000] = -6e4
    rows["flat"][:] = 0.5
    rows["only_target"] = torch.full((vocab,), -math.inf).index_fill_(0, torch.tensor([5]), 1.0)
    rows["zeros"] = torch.full((vocab,), -60000.0)
    if dtype != torch.float16:
        rows["huge"] = base * 1e30
        rows["hugely_low"] = base - 1e30
        rows["wide"] = base * 1e4
    return {name: row.to(dtype) for name, row in rows.items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_special_rows(isa, dtype):
    rows = special_rows(dtype)
    logits = torch.stack(list(rows.values()))[None]
    n = len(rows)
    ids, ones = torch.full((n,), 5), torch.ones(n)
    logp, lse, entropy = cpu.row_stats(logits, Rows(ids, everything(n), ones), want_entropy=True)
    want_logp, want_lse, want_entropy, p, log_p = reference(logits, ids, ones)
    out = poisoned(logits)
    g = torch.full((n,), 0.7)
    cpu.row_grad(logits, Rows(ids, None, ones), Scores(logp, lse, entropy), g, ones, out)
    want = reference_grad(ids, g, ones, ones, want_entropy, p, log_p)
    for i, name in enumerate(rows):
        assert logp[i].item() == pytest.approx(want_logp[i].item(), rel=1e-5, abs=1e-7), name
        assert lse[i].item() == pytest.approx(want_lse[i].item(), rel=1e-6), name
        assert entropy[i].item() == pytest.approx(want_entropy[i].item(), rel=1e-5, abs=1e-6), name
        # An lse of -1e4 in fp32 leaves p with three digits.
        tolerance = 1e-5 + HALF_ULP[dtype] + 2.0**-23 * abs(lse[i].item())
        if tolerance < 0.1:
            error = (out[0, i].double() - want[i]).norm() / want[i].norm().clamp_min(1e-30)
            assert error <= tolerance, name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_not_a_number(isa, dtype):
    logits = torch.randn(1, 7, 9001, generator=torch.Generator().manual_seed(4)).to(dtype)
    logits[0, 0] = -math.inf
    logits[0, 1, 8500] = math.inf
    logits[0, 2, 8500] = math.nan
    logits[0, 3, 5] = math.nan  # the target
    logits[0, 4] = math.nan  # masked
    ids, ones = torch.full((7,), 5), torch.ones(7)
    ids[5], ids[6] = 9001, -100
    mask = everything(7)
    mask[4] = False
    logp, lse, entropy = cpu.row_stats(logits, Rows(ids, mask, ones), want_entropy=True)
    assert logp.isnan().tolist() == [True, True, True, True, False, True, True]
    assert logp[4] == lse[4] == entropy[4] == 0
    _, want_lse, want_entropy, _, _ = reference(logits[:, 5:], torch.zeros(2, dtype=torch.int64), torch.ones(2))
    torch.testing.assert_close(lse[5:].double(), want_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy[5:].double(), want_entropy, rtol=1e-6, atol=0)

    out = poisoned(logits)
    rows = clip_rows(7, torch.Generator().manual_seed(5))
    results = cpu.token_loss(logits, Rows(ids, mask, ones), rows, TokenSpec(), logits.clone(), want_entropy=True)
    assert torch.equal(results[0].isnan(), logp.isnan())
    assert all(result[4] == 0 for result in results)
    g = results[-1].clone()
    g[6] = 0.0
    cpu.row_grad(logits, Rows(ids, None, ones), Scores(logp, lse, entropy), g, None, out)
    assert out.isnan().all(-1).tolist() == [[True, True, True, True, False, True, False]]
    assert not out[0, 4].any() and not out[0, 6].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_instruction_sets_agree(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 4, 32001, generator=generator).mul_(4).to(dtype)
    ids, ones = torch.randint(32001, (8,), generator=generator), torch.ones(8)
    g, h = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    found = {}
    for name in ISAS:
        monkeypatch.setenv("FASTGRPO_CPU_ISA", name)
        logp, lse, entropy = cpu.row_stats(logits, Rows(ids, everything(8), ones), want_entropy=True)
        out = poisoned(logits)
        cpu.row_grad(logits, Rows(ids, None, ones), Scores(logp, lse, entropy), g, h, out)
        found[name] = (logp, lse, entropy, out)
    for name in ISAS[1:]:
        for a, b in zip(found[name][:3], found[ISAS[0]][:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        a, b = found[name][3], found[ISAS[0]][3]
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5 + 2 * HALF_ULP[dtype], atol=1e-6)
        if dtype != torch.float32:
            assert (a == b).double().mean() > 0.99  # the same rounding; a near tie may fall either way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_rounds_to_nearest(isa, dtype):
    # All of the row's weight stands on one element, so that its gradient is g itself, rounded: by quarter steps here.
    step = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    g = (1 + step * torch.arange(0, 60) / 4).float()
    n, vocab = g.numel(), 130
    logits = torch.full((1, n, vocab), -math.inf, dtype=dtype)
    logits[:, :, 64] = 0.0
    ids, zeros, ones = torch.zeros(n, dtype=torch.int64), torch.zeros(n), torch.ones(n)
    out = poisoned(logits)
    cpu.row_grad(logits, Rows(ids, None, ones), Scores(zeros - math.inf, zeros, None), -g, None, out)
    # The polynomial gives 1 - 7e-7 for p = 1: ties are out of its reach.
    clear = torch.arange(0, 60) % 4 != 2
    assert torch.equal(out[0, clear, 64], g[clear].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bitwise_independence(isa, dtype):
    """A row gives the same bits whatever the threads, its neighbours, its address and what else is asked for."""
    generator = torch.Generator().manual_seed(7)
    n, vocab = 48, 50257  # enough work for four threads, and odd: every row has another alignment
    logits = torch.randn(1, n, vocab, generator=generator).mul_(3).to(dtype)
    ids, ones = torch.randint(vocab, (n,), generator=generator), torch.ones(n)
    mask = torch.rand(n, generator=generator) > 0.3
    h = torch.randn(n, generator=generator)
    rows = clip_rows(n, generator, h=h)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = logits.clone()
            found.append((*cpu.token_loss(out, Rows(ids, mask, ones), rows, TokenSpec(), out, want_entropy=True), out))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

    logp, lse, entropy = cpu.row_stats(logits, Rows(ids, mask, ones), want_entropy=False)
    assert torch.equal(logp, found[0][1]) and torch.equal(lse, found[0][2]) and entropy is None
    for r in mask.nonzero()[:4, 0].tolist():
        alone = logits[0, r].clone()[None, None]
        one = everything(1)
        single = cpu.row_stats(alone, Rows(ids[r : r + 1], one, ones[:1]), want_entropy=True)
        assert [s.item() for s in single] == [found[0][k][r].item() for k in (1, 2, 3)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_in_place(isa, dtype, with_entropy):
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(3, 2, 4099, generator=generator).to(dtype)
    ids, ones = torch.randint(4099, (6,), generator=generator), torch.ones(6)
    g, h = torch.randn(6, generator=generator), torch.randn(6, generator=generator) if with_entropy else None
    scores = cpu.row_stats(logits, Rows(ids, everything(6), ones), want_entropy=with_entropy)
    # Another layout than that of the logits: every second row of a larger buffer.
    out = poisoned(torch.empty(3, 4, 4099, dtype=dtype))
    same, rows = logits.clone(), clip_rows(6, generator, h=h)
    cpu.token_loss(logits, Rows(ids, everything(6), ones), rows, TokenSpec(), out[:, ::2], want_entropy=with_entropy)
    cpu.token_loss(same, Rows(ids, everything(6), ones), rows, TokenSpec(), same, want_entropy=with_entropy)
    assert torch.equal(out[:, ::2], same)
    cpu.row_grad(logits, Rows(ids, None, ones), scores, g, h, out[:, ::2])
    assert out[:, 1::2].isnan().all()
    cpu.row_grad(logits, Rows(ids, None, ones), scores, g, h, logits)
    assert torch.equal(out[:, ::2], logits)


def second_half(logits, stride, dtype):
    """fp32 logits (B, T, V) in a buffer of rows of `stride`, and the place of their narrower gradient there."""
    batch, tokens, vocab = logits.shape
    buffer = torch.full((batch, tokens, 2 * stride), math.nan, dtype=dtype)
    wide = buffer.view(torch.float32)[..., :vocab]
    wide.copy_(logits)
    return wide, buffer[..., stride : stride + vocab], buffer[..., stride + vocab :]


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("vocab", [1, 7, 4097, 32001])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_gradients_of_fp32_logits(isa, narrow, vocab, softcap):
    generator = torch.Generator().manual_seed(vocab)
    raw = torch.randn(2, 3, vocab, generator=generator).mul_(torch.tensor([1.0, 6.0, 3e6])[:, None])
    raw[1, 1] = math.nan  # a row without a gradient is not read
    ids = torch.randint(vocab, (6,), generator=generator)
    ids[3] = raw[1, 0].argmax()
    scale = 1e-6 if softcap is None else 1.0
    inv_temperature = torch.tensor([1.0, 1 / 0.7, scale, 1.0, 1.0, scale])
    mask = torch.tensor([True, True, True, True, False, True])
    rows = Rows(ids, mask, inv_temperature)
    g, h = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    g[4], h[4] = 0.0, 0.0
    z = raw.double().reshape(6, -1)
    z[4] = 0.0
    slope = 1.0
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap).square()
        z = softcap * torch.tanh(z / softcap)
    _, _, entropy, p, log_p = reference(z, ids, inv_temperature)
    stats = cpu.row_stats(raw, rows, want_entropy=True, softcap=softcap)
    for bonus in (None, h):
        want = slope * reference_grad(ids, g, bonus, inv_temperature, entropy, p, log_p)
        apart = torch.full(raw.shape, math.nan, dtype=narrow)
        cpu.row_grad(raw, rows, stats, g, bonus, apart, softcap=softcap)
        error = (apart.double().reshape(6, -1) - want).abs()
        slack = HALF_ULP[narrow] * want.abs() + 1e-5 * want.abs().amax(1, keepdim=True) + 2.0**-25
        assert (error <= slack).all(), (error / slack).max()
        assert (apart.view(6, -1)[4] == 0).all()
        logits, out, behind = second_half(raw, vocab + 5, narrow)
        cpu.row_grad(logits, rows, stats, g, bonus, out, softcap=softcap)
        assert torch.equal(out, apart) and behind.isnan().all()
        large = torch.nan_to_num(raw) * 1e4  # which no fast sweep takes
        cpu.row_grad(large, rows, stats, g, bonus, apart, softcap=softcap)
        logits, out, _ = second_half(large, vocab, narrow)
        cpu.row_grad(logits, rows, stats, g, bonus, out, softcap=softcap)
        assert torch.equal(out.nan_to_num(), apart.nan_to_num())

    token = clip_rows(6, generator, h=h * mask)
    fused = torch.full(raw.shape, math.nan, dtype=narrow)
    made = cpu.token_loss(raw, rows, token, TokenSpec(), fused, want_entropy=True, softcap=softcap)
    cpu.row_grad(raw, rows, stats, made.g, token.h, apart, softcap=softcap)
    assert torch.allclose(fused.float(), apart.float(), rtol=2 * HALF_ULP[narrow], atol=1e-6)
    logits, out, _ = second_half(raw, vocab + 63, narrow)
    cpu.token_loss(logits, rows, token, TokenSpec(), out, want_entropy=True, softcap=softcap)
    assert torch.equal(out, fused)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("bias_correction", [0, 1])
def test_objective(kind, bias_correction):
    """csrc/objective.h against autograd, with ratios on both sides of every bound."""
    n, vocab = 64, 33
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(1, n, vocab, generator=generator)
    ids, ones = torch.randint(vocab, (n,), generator=generator), torch.ones(n)
    current = cpu.row_stats(logits, Rows(ids, everything(n), ones), want_entropy=False)[0]
    numbers = [(0.8, 1.3, 1.5, 1.4), (0.9, 1.1), (1.0, 1.05)][kind]
    spec = TokenSpec(kind, numbers, beta=0.1, bias_correction=bias_correction, log_ratio_clamp=0.5)
    rows = clip_rows(n, generator, h=torch.randn(n, generator=generator) * 0.1)._replace(
        old=current + torch.randn(n, generator=generator) * 0.4,
        ref=current + torch.randn(n, generator=generator) * 0.4,
        policy_scale=torch.rand(n, generator=generator),
    )
    out = logits.clone()
    loss, logp, _, entropy, kl, ratio, _ = cpu.token_loss(
        out, Rows(ids, everything(n), ones), rows, spec, out, want_entropy=True
    )

    x = logits[0].double().requires_grad_()
    log_p = x.log_softmax(-1)
    lp, ent = log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    A, c1 = rows.advantages.double(), (lp - rows.old).clamp(-0.5, 0.5).exp()
    if kind == 0:
        low, high, delta, dual = numbers
        ell = -torch.min(c1.clamp(max=delta) * A, c1.clamp(low, high) * A)
        ell = torch.where(A < 0, torch.min(ell, -dual * A), ell)
    elif kind == 1:
        ell = -c1.clamp(*numbers).detach() * A * lp
    else:
        tau = torch.where(A > 0, *numbers).double()
        ell = -A * 4 / tau * torch.sigmoid(tau * (c1 - 1))
    k3 = (rows.ref - lp).exp() - (rows.ref - lp) - 1
    k3 = k3 * c1 if bias_correction else k3
    want = rows.weight * (ell * rows.policy_scale + spec.beta * k3) + rows.h * ent
    want.sum().backward()
    for got, expected in ((loss, want), (logp, lp), (entropy, ent), (kl, k3), (ratio, c1), (out[0], x.grad)):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-5, atol=2e-7)


def test_group_advantages_and_skipped_rows():
    rewards = torch.tensor([1.0, 0.0, math.nan, 3.0, 0.1, 0.1, 0.1, math.nan])  # the second group has no spread
    seq = torch.arange(8, dtype=torch.int32)
    logits = torch.randn(8, 1, 50, generator=torch.Generator().manual_seed(10))
    logits[4:] = math.nan  # must not be read: nothing can be learnt there
    ids, ones = torch.zeros(8, dtype=torch.int64), torch.ones(8)
    for scale_by_std in (0, 1):
        rows = TokenRows(ones, None, rewards, seq, None, None, None, None)
        spec = TokenSpec(group_size=4, scale_by_std=scale_by_std, skip_zero=1)
        out = logits.clone()
        loss, logp, _, _, _, ratio, g = cpu.token_loss(
            out, Rows(ids, everything(8), ones), rows, spec, out, want_entropy=False
        )
        valid = rewards[[0, 1, 3]].double()
        want = torch.zeros(8, dtype=torch.float64)
        want[[0, 1, 3]] = (valid - valid.mean()) / (valid.std() + 1e-4 if scale_by_std else 1.0)
        torch.testing.assert_close(-loss.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(-g.double(), want, rtol=1e-6, atol=0)
        assert not out[[2, 4, 5, 6, 7]].any()
        assert not logp[[2, 4, 5, 6, 7]].any() and torch.equal(ratio, (want != 0).float())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale(dtype):
    full = torch.randn(2, 3, 101).to(dtype)
    x = full.clone()
    cpu.scale_(x[:, :-1], torch.tensor(0.3))
    assert torch.equal(x[:, :-1], (full[:, :-1].float() * 0.3).to(dtype)) and torch.equal(x[:, -1], full[:, -1])


def test_empty():
    for shape in ((0, 3, 8), (2, 0, 8)):
        nothing = torch.empty(0)
        results = cpu.row_stats(torch.empty(shape), Rows(nothing.long(), nothing.bool(), nothing), want_entropy=True)
        assert [r.shape for r in results] == [(0,)] * 3


def test_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGRPO_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="FASTGRPO_CPU_ISA.*'mmx' is unknown"):
        cpu.row_stats(
            torch.zeros(1, 1, 4),
            Rows(torch.zeros(1, dtype=torch.int64), everything(1), torch.ones(1)),
            want_entropy=False,
        )
    assert "float64" in cpu.refuses(Call("cpu", None, torch.float64, 4))
    assert "cuda" in cpu.refuses(Call("cuda", 0, torch.float32, 4))
    cpu._load.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "fastgrpo" / "backends" / "native.py"))
    assert "does not exist" in cpu.unavailable()
    cpu._load.cache_clear()
    monkeypatch.undo()
    assert cpu.unavailable() is None


def test_sources_beside_an_installed_package(tmp_path, monkeypatch):
    """Python in a checkout finds its sources first: not a compiler is missing there, but another folder."""
    sources, site = tmp_path / "sources", tmp_path / "site"
    monkeypatch.setattr(native, "library_path", lambda name: sources / "fastgrpo" / "lib" / f"lib{name}.so")
    made = SimpleNamespace(locate_file=lambda path: site / path)
    monkeypatch.setattr(native.importlib.metadata, "distribution", lambda name: made)
    assert "built without a C++ compiler" in native.load("fastgrpo_cpu", "a C++ compiler")[1]
    (site / "fastgrpo" / "lib").mkdir(parents=True)
    (site / "fastgrpo" / "lib" / "libfastgrpo_cpu.so").touch()
    why = native.load("fastgrpo_cpu", "a C++ compiler")[1]
    assert f"the sources in {sources}" in why and f"in {site}, has them: run Python in another folder" in why


# Every call has its tensors before the limit. What two threads take besides is mapped block by block, and so counts.
WITHOUT_MEMORY = """
import math, resource, sys
import torch
from fastgrpo.backends import Rows, Scores, TokenRows, TokenSpec, cpu

torch.set_num_threads(2)
torch.manual_seed(0)


def calls():
    n, V = 4, 1 << 21
    x, out = torch.randn(1, n, V).bfloat16(), torch.empty(1, n, V, dtype=torch.bfloat16)
    rows = Rows(torch.arange(n), torch.ones(n, dtype=torch.bool), torch.ones(n))
    g, h = torch.ones(n), torch.full((n,), 0.1)
    token = TokenRows(torch.ones(n), torch.ones(n), None, None, None, None, None, None)
    scores = cpu.row_stats(x, rows, want_entropy=True, softcap=9.0)
    yield "row_stats", lambda: cpu.row_stats(x, rows, want_entropy=True, softcap=9.0)
    yield "row_grad", lambda: cpu.row_grad(x, rows, scores, g, h, out, softcap=9.0) or out
    yield "token_loss", lambda: cpu.token_loss(x, rows, token, TokenSpec(), out, want_entropy=False, softcap=9.0)
    yield "select_columns", lambda: cpu.select_columns(x, rows, scores, g, h, 0.9, V // 64, softcap=9.0).sizes
    del x, out
    weight, dz, ids = torch.randn(1, V).bfloat16(), torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int32)
    out = torch.empty(n, V, dtype=torch.bfloat16)
    yield "column_d_hidden", lambda: cpu.column_d_hidden(dz, ids, weight, out) or out
    pairs = 17
    wide = torch.empty(pairs, V, dtype=torch.bfloat16)

    def d_weight():
        flat = torch.arange(pairs, dtype=torch.int32)
        cpu.column_d_weight(torch.ones(pairs), flat, flat * 0, weight, wide.zero_(), None)
        return wide

    yield "column_d_weight", d_weight
    del weight, out, wide
    a, b, c = torch.randn(120, 40000), torch.randn(40000, 96), torch.empty(120, 96)  # by segments
    yield "matmul", lambda: cpu.matmul(a, b, c) or c
    left = torch.randn(40000, 120).t()  # which is packed, on every instruction set
    yield "matmul", lambda: cpu.matmul(left, b, c) or c
    d = torch.empty(96, 120)
    yield "matmul", lambda: cpu.matmul(b[:9000].t(), left[:, :9000].t(), d) or d
    hidden, head = torch.randn(96, 9000), torch.randn(300, 9000)
    rows = Rows(torch.arange(96), torch.ones(96, dtype=torch.bool), torch.ones(96))
    yield "head_stats", lambda: cpu.head_stats(hidden, head, None, rows, want_entropy=True)


def bits(result):
    return [x.clone() for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


for name, call in calls():
    want, refused, done = bits(call()), 0, 0
    for spare in range(0, 40 << 20, 1 << 20):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        made = None
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
        try:
            made = call()
        except MemoryError as error:
            message = str(error)
        except RuntimeError as error:
            assert "allocate memory" in str(error), error  # torch's own, of a result
            message = ""
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        if made is None:
            refused += message == f"backend 'cpu': {name}: not enough memory; its results are unfinished"
        else:
            done += 1
            assert all(map(torch.equal, bits(made), want)), name
    again = bits(call())
    assert all(map(torch.equal, again, want)), name
    print(name, refused, done, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit and the use of addresses are read as Linux has them")
def test_a_call_without_memory_is_an_error(tmp_path):
    """On a thread of its own, too, and wherever it ends: nothing waits for it, and the next call is as any other."""
    here = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="1")
    command = ["bash", "-c", 'ulimit -s 256; exec "$@"', "-", sys.executable, "-c", WITHOUT_MEMORY]
    done = subprocess.run(command, env=os.environ | here, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr[-2000:]}"
    counts = re.findall(r"^(\w+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    assert len(counts) == 10 and all(int(made) > 0 for *_, made in counts), counts
    # some take so little that what the process has freed before may do
    assert sum(int(refused) > 0 for _, refused, _ in counts) >= 7, counts
