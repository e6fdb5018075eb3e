"""The Triton backend's own corners, run by Triton's interpreter where there is no GPU (tests/conftest.py turns it on).

Truth is float64 in this file. A small geometry lets small rows cross several tiles and parts.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastgrpo.backends import Call, Rows, Scores, TokenRows, TokenSpec
from fastgrpo.backends import triton as backend
from fastgrpo.backends.triton import launch

if (_why := backend.unavailable()) is not None:
    pytest.skip(_why, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a gradient's largest


@pytest.fixture(autouse=True)
def small_geometry(monkeypatch):
    """Tiles of 128 vectors and parts of 256: 4099 elements in bf16 are 3 parts, the last of one full tile or none."""
    monkeypatch.setattr(launch, "geometry", lambda V, dtype: launch.Geometry(16 // dtype.itemsize, 64, 2, 256))


@pytest.fixture(params=["rows", "parts"])
def path(request, monkeypatch):
    """Both ways through a row: one program, or one program per part."""
    monkeypatch.setattr(launch, "split", lambda n, V, geometry, device: request.param == "parts")
    return request.param


def make(B, T, V, dtype=torch.float32, *, seed=0, stride_t=None, offset=0, scale=3.0):
    """Logits (B, T, V), with rows `stride_t` apart and the first one `offset` elements from an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    stride_t = V if stride_t is None else stride_t
    store = torch.full((offset + B * T * stride_t + V,), float("nan"), dtype=dtype, device=DEVICE)
    logits = store.as_strided((B, T, V), (T * stride_t, stride_t, 1), offset)
    logits.copy_(torch.randn(B, T, V, generator=generator) * scale)
    ids = torch.randint(0, V, (B * T,), generator=generator)
    inv_temperature = 0.5 + torch.rand(B * T, generator=generator)
    return logits, ids.to(DEVICE), torch.ones(B * T, dtype=torch.bool, device=DEVICE), inv_temperature.to(DEVICE)


def truth(logits, ids, inv_temperature):
    """(logp, lse, entropy, log p) in float64."""
    z = logits.double().flatten(0, 1) * inv_temperature.double()[:, None]
    log_p = z.log_softmax(-1)
    p_log_p = torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p)
    return log_p.gather(1, ids[:, None])[:, 0], z.logsumexp(-1), -p_log_p.sum(-1), log_p


def true_grad(log_p, ids, entropy, g, h, inv_temperature):
    p = log_p.exp()
    grad = g.double()[:, None] * (F.one_hot(ids, p.shape[1]).double() - p)
    if h is not None:
        grad -= h.double()[:, None] * torch.where(p == 0, 0.0, p * (log_p + entropy.double()[:, None]))
    return grad * inv_temperature.double()[:, None]


def close(got, want, tolerance, name=""):
    error = (got.double() - want).abs() / max(1e-30, float(want.abs().max()))
    worst = int(error.argmax())
    pair = f"{got.flatten()[worst]} for {want.flatten()[worst]}"
    assert float(error.max()) <= tolerance, f"{name}: worst at {worst}: {pair}"


def near(got, want, name="", atol=2e-6, rtol=1e-5):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}")


# 1 and 7: only ends; 130: no full tile; 1000: V % 8 == 0; 2049: a part without a vector; 4099: odd, several parts.
@pytest.mark.parametrize("V", [1, 7, 130, 1000, 2049, 4099])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_stats_and_gradient(V, dtype):
    logits, ids, mask, inv_t = make(1, 2, V, dtype)
    logp, lse, entropy = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    want_logp, want_lse, want_entropy, log_p = truth(logits, ids, inv_t)
    near(logp, want_logp, "logp")
    near(lse, want_lse, "lse")
    near(entropy, want_entropy, "entropy")
    g, h = torch.tensor([1.5, -0.7], device=DEVICE), torch.tensor([0.2, -0.4], device=DEVICE)
    for weight in (None, h):
        out = torch.full_like(logits, float("nan"))
        backend.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, weight, out)
        want = true_grad(log_p, ids, want_entropy, g, weight, inv_t)
        if V > 1:
            close(out.flatten(0, 1), want, TOLERANCE[dtype], f"gradient, h {weight}")
        else:
            assert float(out.abs().max()) < 1e-6


# 2050: behind a head of 7 elements the second part holds no vector, and the first is one short.
@pytest.mark.parametrize("V, stride_t", [(4099, 4099), (4099, 4104), (4099, 5000), (2050, 2056)])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_base_and_stride(offset, V, stride_t, path):
    # Rows at odd addresses, in strided slices: nothing around a row is written, and what lies there (NaN) is not used.
    logits, ids, mask, inv_t = make(1, 2, V, torch.bfloat16, offset=offset, stride_t=stride_t)
    logp, lse, entropy = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    want_logp, want_lse, want_entropy, log_p = truth(logits, ids, inv_t)
    near(logp, want_logp)
    near(entropy, want_entropy)
    g = torch.tensor([1.0, -2.0], device=DEVICE)
    want = true_grad(log_p, ids, None, g, None, inv_t)
    fresh = torch.empty(1, 2, V, dtype=torch.bfloat16, device=DEVICE)  # mostly of another phase than the logits
    backend.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, None, fresh)
    close(fresh.flatten(0, 1), want, 2**-8)
    base = logits._base if logits._base is not None else logits
    backend.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, None, logits)
    assert torch.equal(logits, fresh)
    outside = torch.ones_like(base, dtype=torch.bool)
    outside.as_strided(logits.shape, logits.stride(), offset).fill_(False)
    assert base[outside].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_give_the_bits_of_whole_rows(dtype, monkeypatch):
    logits, ids, mask, inv_t = make(2, 2, 6000 if dtype == torch.bfloat16 else 3000, dtype)
    logits[0, 0, :2500] = -math.inf  # an entropy that takes the second, careful sweep
    results = []
    for split in (False, True):
        monkeypatch.setattr(launch, "split", lambda *_, split=split: split)
        for rows in (slice(0, 4), slice(2, 4)):  # and of fewer rows
            part = logits.view(4, 1, -1)[rows]
            for want_entropy in (True, False):
                results.append([torch.full((4,), float("nan"), device=DEVICE) for _ in range(3)])
                got = backend.row_stats(part, Rows(ids[rows], mask[rows], inv_t[rows]), want_entropy=want_entropy)
                for into, x in zip(results[-1], got, strict=True):
                    into[rows] = float("nan") if x is None else x
    logp, lse, entropy = results[0]
    for other in results[1:]:
        for a, b in zip((logp, lse, entropy), other, strict=True):
            assert torch.equal(a[~b.isnan()], b[~b.isnan()])
    assert torch.equal(logp, results[1][0]) and torch.equal(lse, results[1][1])


@pytest.mark.parametrize("shift", [0.0, 5000.0])  # by which a row takes the careful sweep
@pytest.mark.parametrize("offset", [0, 3])
def test_a_target_takes_no_digits_from_the_others(offset, shift, path):
    """1 - p of 1e-6, for targets at both sides of tiles (256) and parts (1024), and in the row's ends."""
    V, n = 3000, 9
    logits, ids, mask, _ = make(1, n, V, offset=offset, stride_t=V + 5)
    ids = torch.tensor([0, 1, 255, 256, 1023, 1024, 2047, 2999, 2049], device=DEVICE)
    logits[0, torch.arange(n), ids] = 25.0
    logits += shift
    logits[0, 8, :2048] = -math.inf
    inv_t = torch.ones(n, device=DEVICE)
    z = logits[0].double() - logits[0].double().gather(1, ids[:, None])
    log_p = z.log_softmax(-1)
    want_logp, want_entropy = log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).nan_to_num(0).sum(-1)
    assert (want_logp > -1e-4).all() and (want_logp < -1e-7).all()
    logp, _, entropy = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    near(logp, want_logp, "logp", atol=0, rtol=2e-6)
    near(entropy, want_entropy, "entropy", atol=0, rtol=2e-6)
    rows = rows_of(n, advantages=torch.ones(n, device=DEVICE))
    for lanes in (512, 1024):
        got = logits.clone()
        with backend.using(lanes=lanes):
            result = backend.token_loss(got, Rows(ids, mask, inv_t), rows, TokenSpec(), got, want_entropy=True)
        for a, b in zip((result.logp, result.entropy), (logp, entropy), strict=True):
            assert torch.equal(a, b)
        near(got[0].gather(1, ids[:, None])[:, 0], -0.25 * -torch.expm1(want_logp), "gradient", atol=0, rtol=2e-6)


def test_minus_infinity_and_huge_logits(path):
    logits, ids, mask, inv_t = make(1, 8, 1500, torch.float32)
    logits[0, 0, :1300] = -math.inf  # whole tiles and a whole part
    logits[0, 1, ::2] = -math.inf
    logits[0, 2] -= 1e4
    logits[0, 3] += 1e4
    logits[0, 4, :1300] = -1e30
    logits[0, 5] *= 1e30
    logits[0, 6] = -1e30
    logits[0, 7, :1499] = torch.finfo(torch.float32).min
    ids[:2], ids[5], ids[7] = 1499, logits[0, 5].argmax(), 1499
    logp, lse, entropy = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    want_logp, want_lse, want_entropy, log_p = truth(logits, ids, inv_t)
    exact = torch.tensor([0, 1, 4, 5, 6])
    near(logp[exact], want_logp[exact], "logp")
    near(logp[2:4], want_logp[2:4], "logp", atol=2e-3)  # the interpreter's fma rounds z, about 1e4, first
    near(lse[:7], want_lse[:7], "lse", rtol=1e-6)
    near(entropy[exact], want_entropy[exact], "entropy")
    near(entropy[2:4], want_entropy[2:4], "entropy", atol=2e-3)
    near(logp[7], torch.zeros_like(logp[7]), "logp")
    g, h = torch.ones(8, device=DEVICE), torch.full((8,), 0.5, device=DEVICE)
    out = torch.full_like(logits, float("nan"))
    backend.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, h, out)
    want = true_grad(log_p, ids, want_entropy, g, h, inv_t)
    assert float(out[0, 7].abs().max()) < 1e-6
    for row in (0, 1, 4, 5):
        close(out[0, row], want[row], 1e-5, f"row {row}")
    for row in (2, 3):  # p = exp(z - lse) knows lse to the last bit of 1e4
        close(out[0, row], want[row], 2e-3, f"row {row}")


def test_not_a_number(path):
    logits, ids, mask, inv_t = make(1, 6, 1500, torch.bfloat16)
    logits[0, 0, 700] = float("nan")
    logits[0, 1, 3] = math.inf
    logits[0, 2] = -math.inf
    logits[0, 3] = float("nan")
    logits[0, 4, int(ids[4])] = -math.inf
    mask[3] = False
    logp, lse, entropy = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    assert logp[:3].isnan().all() and entropy[:3].isnan().all()
    assert lse[0].isnan() and lse[1].isnan() and lse[2] == -math.inf
    assert logp[3] == 0 and lse[3] == 0 and entropy[3] == 0
    assert logp[4] == -math.inf and lse[4].isfinite() and entropy[4].isfinite()
    assert logp[5].isfinite()
    g = torch.tensor([1.0, 1.0, 1.0, 0.0, float("nan"), 1.0], device=DEVICE)
    out = torch.full_like(logits, 7.0)
    backend.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, torch.zeros_like(g), out)
    assert (out[0, 3] == 0).all() and out[0, 4].isnan().all() and out[0, 5].isfinite().all()
    assert out[0, 0].isnan().all()


def test_an_id_out_of_range_reads_nothing(path):
    logits, ids, mask, inv_t = make(1, 4, 1500)
    ids[0], ids[1], ids[2] = -100, 1500, 2**40
    logp, lse, entropy = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    assert logp[:3].isnan().all() and logp[3].isfinite() and lse.isfinite().all() and entropy.isfinite().all()


def rows_of(n, **given):
    empty = dict.fromkeys(TokenRows._fields)
    return TokenRows(**{**empty, "weight": torch.full((n,), 0.25, device=DEVICE), **given})


def objective(logp, entropy, rows, spec, advantages):
    """The clipped objective of TokenSpec in torch float64, as (loss, kl, ratio)."""
    log_ratio = logp - (logp.detach() if rows.old is None else rows.old.double())
    ratio = log_ratio.clamp(-spec.log_ratio_clamp, spec.log_ratio_clamp).exp()
    if spec.kind == 0:
        low, high, delta, dual = spec.numbers
        loss = -torch.min(ratio.clamp(max=delta) * advantages, ratio.clamp(low, high) * advantages)
        loss = torch.where(advantages < 0, torch.min(loss, -dual * advantages), loss)
    elif spec.kind == 1:
        loss = -ratio.clamp(*spec.numbers).detach() * advantages * logp
    else:
        tau = torch.where(advantages > 0, *spec.numbers)
        loss = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    if rows.policy_scale is not None:
        loss = loss * rows.policy_scale.double()
    kl = torch.zeros_like(loss)
    if spec.beta:
        q = rows.ref.double() - logp
        kl = (torch.expm1(q) - q) * (ratio if spec.bias_correction else 1)
    loss = rows.weight.double() * (loss + spec.beta * kl)
    if rows.h is not None:
        loss = loss + rows.h.double() * entropy
    return loss, kl, ratio


SPECS = {
    "clip": TokenSpec(),
    "clip, delta, k3": TokenSpec(numbers=(0.8, 1.2, 1.1, math.inf), beta=0.04),
    "clip, dual": TokenSpec(numbers=(0.8, 1.2, math.inf, 1.1)),
    "clip, clamped, corrected k3": TokenSpec(beta=0.04, bias_correction=1, log_ratio_clamp=0.26),
    "clip, corrected k3": TokenSpec(beta=0.04, bias_correction=1),
    "cispo": TokenSpec(kind=1, numbers=(0.8, 1.05)),
    "sapo": TokenSpec(kind=2, numbers=(1.0, 1.05), beta=0.1),
}


@pytest.mark.parametrize("name, split", [*((name, False) for name in SPECS), ("clip, corrected k3", True)])
def test_token_loss(name, split, monkeypatch):
    monkeypatch.setattr(launch, "split", lambda *_: split)
    spec = SPECS[name]
    logits, ids, mask, inv_t = make(3, 2, 1100, torch.float32)
    n = 6
    mask[5] = False
    logits[2, 1] = float("nan")
    want_logp = truth(logits, ids, inv_t)[0]
    shift = torch.tensor([0.3, -0.3, 0.05, 1e-4, 0.25, 0.0], device=DEVICE)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.3, -2.0, 1.0], device=DEVICE)
    old = (want_logp + shift).float()
    ref = (want_logp - 0.5 * shift + 1e-3).float()
    rows = rows_of(n, advantages=advantages, old=old, ref=ref if spec.beta else None, policy_scale=1 + shift,
                   h=0.01 * shift)  # fmt: skip
    x = logits.double().requires_grad_()
    log_p = (x.flatten(0, 1) * inv_t.double()[:, None]).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss, kl, ratio = objective(log_p.gather(1, ids[:, None])[:, 0], entropy, rows, spec, advantages.double())
    loss[mask].sum().backward()
    want = torch.where(mask[:, None], x.grad.flatten(0, 1), 0.0)
    stats = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    plain = backend.token_loss(logits, Rows(ids, mask, inv_t), rows, spec, None, want_entropy=True)
    got = backend.token_loss(logits, Rows(ids, mask, inv_t), rows, spec, logits, want_entropy=True)
    for a, b in zip(plain, got, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(stats, got[1:4], strict=True):
        assert torch.equal(a, b)
    for field, value, truth_of in (("loss", got[0], loss), ("kl", got[4], kl), ("ratio", got[5], ratio)):
        near(value[mask], truth_of.detach()[mask], field, atol=1e-6)
        assert value[5] == 0
    assert (logits[2, 1] == 0).all()
    close(logits.flatten(0, 1), want, 2e-5, "gradient")


def test_on_policy_rows_and_rows_without_advantage(path):
    logits, ids, mask, inv_t = make(1, 4, 1500, torch.bfloat16)
    advantages = torch.tensor([1.0, 0.0, -2.0, 0.0], device=DEVICE)
    rows, spec = rows_of(4, advantages=advantages), TokenSpec(skip_zero=1)
    logp = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=False)[0]
    want = true_grad(truth(logits, ids, inv_t)[3], ids, None, -0.25 * advantages, None, inv_t)
    got = backend.token_loss(logits, Rows(ids, mask, inv_t), rows, spec, logits, want_entropy=False)
    loss, got_logp, lse, entropy, kl, ratio, g = got
    idle = advantages == 0
    assert torch.equal(got_logp[~idle], logp[~idle]) and (got_logp[idle] == 0).all() and (ratio[idle] == 0).all()
    assert entropy is None and (kl == 0).all() and (ratio[~idle] == 1).all()
    assert torch.equal(g, -0.25 * advantages) and torch.equal(loss, -0.25 * advantages)
    close(logits.flatten(0, 1), want, 2**-8)


def test_ties_split_the_derivative(path):
    # ratio 1 on the edge of [1, 1.2] and of delta 1: both branches equal, so each counts half where it moves at all.
    logits, ids, mask, inv_t = make(1, 2, 64)
    rows = rows_of(2, advantages=torch.tensor([1.0, -1.0], device=DEVICE))
    for low, high, delta, share in ((1.0, 1.2, math.inf, 1.0), (0.5, 1.0, 1.0, 1.0), (0.5, 0.9, math.inf, 0.0)):
        spec = TokenSpec(numbers=(low, high, delta, math.inf))
        g = backend.token_loss(logits, Rows(ids, mask, inv_t), rows, spec, None, want_entropy=False)[6]
        assert g[0] == -0.25 * share
        assert g[1] == 0.25


@pytest.mark.parametrize("scale_by_std", [False, True])
@pytest.mark.parametrize("skip_zero", [False, True])
def test_advantages_from_rewards(skip_zero, scale_by_std, path, monkeypatch):
    groups = torch.tensor([[1.0, 2.0, 4.0], [0.1, 0.1, 0.1], [float("nan"), 1.0, 3.0], [5.0, *[float("nan")] * 2],
                           [4096.0, 4096.0005, 4096.002]])  # fmt: skip
    S, size = groups.numel(), groups.shape[1]
    want = groups.double() - groups.double().nanmean(1, keepdim=True)
    if scale_by_std:
        valid = [row[~row.isnan()] for row in groups.double()]
        want = want / (torch.stack([row.std(correction=min(1, len(row) - 1)) for row in valid])[:, None] + 1e-4)
    want = torch.nan_to_num(want)
    want[1], want[3] = 0, 0
    seq = torch.repeat_interleave(torch.arange(S, dtype=torch.int32), 1 + torch.arange(S) % 3)  # of 1 to 3 tokens
    n = seq.numel()
    logits, ids, mask, inv_t = make(n, 1, 20)
    launched = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, programs, *rest, **more: (
        launched.append((kernel, programs)), run(kernel, programs, *rest, **more)))  # fmt: skip
    rows = rows_of(n, rewards=groups.flatten().to(DEVICE), seq=seq.to(DEVICE))
    spec = TokenSpec(group_size=size, scale_by_std=scale_by_std, skip_zero=skip_zero)
    got = backend.token_loss(logits, Rows(ids, mask, inv_t), rows, spec, None, want_entropy=False)
    want = want.flatten()[seq.long()]
    near(got.loss.cpu(), -0.25 * want, atol=1e-7)
    idle = want == 0
    assert (got.loss.cpu()[idle] == 0).all() and ((got.lse.cpu()[idle] == 0) == skip_zero).all()
    once = [programs for kernel, programs in launched if kernel is backend.kernels.group_kernel]
    assert once == [S]


def test_parts_of_rows_without_advantage_are_not_read():
    logits, ids, mask, inv_t = make(4, 1, 3000)
    advantages, cut = torch.tensor([0.5, 0.0], device=DEVICE), launch.geometry(3000, torch.float32)
    for given, seq in ((advantages[[0, 1, 1, 0]], None), (advantages, torch.tensor([0, 1, 1, 0], dtype=torch.int32))):
        partial = torch.full((4, cut.parts(3000), 2), float("nan"), device=DEVICE)
        launch.sweep(backend.kernels.part_kernel, 4 * cut.parts(3000), cut, logits.device, logits,
                     Rows(ids, mask, inv_t), given, seq if seq is None else seq.to(DEVICE), 1.0, partial, None,
                     *launch.layout(logits), PART=cut.PART, ENTROPY=True)  # fmt: skip
        assert partial[1:3].isnan().all() and partial[[0, 3]].isfinite().all()


# In bf16 parts are 2048 elements: one part; a pair, the second short; a pair; a pair and a short part.
@pytest.mark.parametrize("V", [1500, 3000, 4096, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset, softcap", [(0, None), (3, 20.0)])
def test_launch_choices_change_no_bit(offset, softcap, V, dtype):
    advantages = torch.tensor([1.0, -1.0, 0.0, -2.0, 1.0], device=DEVICE)
    first = None
    for choice in ({}, dict(programs=2), dict(lanes=1024), dict(lanes=1024, programs=1)):
        logits, ids, mask, inv_t = make(5, 1, V, dtype, offset=offset, stride_t=V + 9)
        mask[4] = False
        logits[0, 0, : V - 200] = -math.inf  # an entropy that takes the second, careful sweep
        logits[1, 0] += 1e4  # a row that takes it whole
        rows = rows_of(5, advantages=advantages, h=0.1 * advantages)
        with backend.using(**choice):
            got = backend.token_loss(
                logits,
                Rows(ids, mask, inv_t),
                rows,
                TokenSpec(skip_zero=1),
                logits,
                want_entropy=True,
                softcap=softcap,
            )
        got = [x.view(torch.int32) for x in (*got, logits.float())]
        first = first or got
        for i, (a, b) in enumerate(zip(first, got, strict=True)):
            assert torch.equal(a, b), f"result {i} with {choice}"


def test_choices_hold_inside_and_reach_the_launch(monkeypatch):
    launched = []
    sweep = launch.sweep
    monkeypatch.setattr(
        launch,
        "sweep",
        lambda kernel, programs, geometry, *args, **constants: (
            launched.append((programs, geometry.LANES, geometry.PARTS)),
            sweep(kernel, programs, geometry, *args, **constants),
        ),
    )

    def call(V):
        logits, ids, mask, inv_t = make(5, 1, V, torch.bfloat16)
        rows = rows_of(5, advantages=torch.ones(5, device=DEVICE))
        backend.token_loss(logits, Rows(ids, mask, inv_t), rows, TokenSpec(), logits, want_entropy=False)
        return launched.pop()

    outside = call(3000)
    with backend.using(programs=2) as choice:
        assert choice == backend.InPlace(512, 2) and call(3000) == (2, 64, 1)
        with backend.using(lanes=1024):
            assert call(3000) == (2, 128, 2)
            assert call(1500) == (2, 64, 1)  # one part: nothing to hold beside it
        with pytest.raises(KeyError), backend.using(programs=4):
            raise KeyError
        assert call(3000) == (2, 64, 1)
    assert call(3000) == outside


@pytest.mark.parametrize("choice, value", [("lanes", 256), ("lanes", None), ("programs", -1), ("programs", 1.5),
                                           ("warps", 8)])  # fmt: skip
def test_a_choice_that_does_not_exist(choice, value):
    with pytest.raises(ValueError, match=f"^{choice}: expected .*"), backend.using(**{choice: value}):
        pass


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_scale(dtype):
    logits, *_ = make(1, 3, 1003, dtype, offset=1)
    before = logits.clone()
    backend.scale_(logits, torch.tensor(1.0, device=DEVICE))
    assert torch.equal(logits, before)
    backend.scale_(logits, torch.tensor(0.3, device=DEVICE))
    assert torch.equal(logits, (before.float() * torch.tensor(0.3, device=DEVICE)).to(dtype))


def test_nothing_to_do():
    logits = torch.empty(2, 0, 50, device=DEVICE)
    none = torch.empty(0, device=DEVICE)
    ids, mask = none.long(), none.bool()
    assert [x.shape for x in backend.row_stats(logits, Rows(ids, mask, none), want_entropy=True)] == [(0,)] * 3
    backend.row_grad(logits, Rows(ids, None, none), Scores(none, none, none), none, None, logits)
    rows = rows_of(0, advantages=none)
    got = backend.token_loss(logits, Rows(ids, mask, none), rows, TokenSpec(), logits, want_entropy=True)
    assert [x.shape for x in got] == [(0,)] * 7
    backend.scale_(logits, torch.tensor(2.0, device=DEVICE))


def test_versions_whose_interpreter_fails():
    assert backend._interpreter_unavailable("3.6.0", "2.3.5") is None
    assert backend._interpreter_unavailable("3.7.1", "2.5.2") is None
    assert "numpy < 2.4, and 2.4.0" in backend._interpreter_unavailable("3.6.0", "2.4.0")


def test_what_it_takes():
    for device, dtype, taken in ((DEVICE, torch.float64, False), (DEVICE, torch.float32, True),
                                 ("meta", torch.float32, False)):  # fmt: skip
        assert (backend.refuses(Call(device, None, dtype, 100)) is None) == taken
