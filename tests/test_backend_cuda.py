"""The CUDA backend's own corners: on a GPU where there is one, else its kernels on the machine of cuda_host, which
finds what a GPU would punish. Truth is float64. What all backends share is tested with them, under backend "cuda"."""

from __future__ import annotations

import contextlib
import ctypes
import math

import pytest
import torch
from cases import assert_close, loss_and_grad, make_inputs, objective_for, rel_norm, truth
from cuda_rows import DTYPES, exact, exact_grad, make, rows_of

from fastgrpo import backends, grpo_loss, selective_logps
from fastgrpo.backends import Call, Rows, Scores, TokenSpec, cuda
from fastgrpo.backends.select import _select

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a gradient's element
CLUSTERS = (-1, 1, 2, 4, 8, 16)  # -1: two passes
TOKEN_FAMILY = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")


@pytest.fixture
def device(cuda_anywhere):
    return cuda_anywhere


@pytest.fixture
def use(device):
    """use(cluster, ...): fields of OnePass from now on; use(seed=n): the order of threads and copies."""
    with contextlib.ExitStack() as stack:

        def choose(cluster=None, seed=0, **choices):
            if cluster is not None:
                stack.close()
                stack.enter_context(cuda.using(cluster=cluster, **choices))
            if device == "cpu":
                cuda._load()[0].fastgrpo_host_seed(ctypes.c_uint64(seed))

        yield choose
        choose()


# 1, 5: nothing but edges; 61: slices without an element; 1000: whole vectors alone; 4099: odd.
@pytest.mark.parametrize(
    "V, offset, extra", [(1, 1, 0), (5, 3, 2), (61, 0, 0), (1000, 0, 0), (1000, 1, 0), (4099, 2, 5)]
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_statistics_and_gradients(cluster, dtype, V, offset, extra, use, device):
    """Any length, address and stride; with and without the entropy and its gradient; nothing around the rows moves."""
    use(cluster, seed=cluster + 1)
    logits, ids, mask, inv_t = make(2, 2, V, dtype, offset=offset, stride=V + extra, device=device)
    outside = torch.ones_like(logits._base, dtype=torch.bool)
    outside.as_strided(logits.shape, logits.stride(), offset).fill_(False)
    want = exact(logits, ids, inv_t)
    logp, lse, entropy = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    for got, true in zip((logp, lse, entropy), want[:3], strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=2e-6)
    assert torch.equal(cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=False)[0], logp)

    g, h = torch.randn(2, 4, generator=torch.Generator().manual_seed(V)).to(device)
    for slope in (None, h):
        grad = exact_grad(ids, g, slope, inv_t, want[2], *want[3:])
        atol = 2e-6 * float(g.abs().max() + h.abs().max())  # p from an lse in fp32
        for out in (
            torch.full_like(logits, math.nan),
            torch.full_like(logits._base, math.nan)[1 : 1 + logits.numel()],
        ):
            out = out.view(logits.shape)  # the second one at another address modulo 16
            cuda.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, slope, out)
            torch.testing.assert_close(out.flatten(0, 1).double(), grad, rtol=ROUNDING[dtype], atol=atol)
        rows = rows_of(4, device, advantages=-4 * g, h=slope)  # the loss is advantage/4 at ratio 1
        results = cuda.token_loss(logits, Rows(ids, mask, inv_t), rows, TokenSpec(), None, want_entropy=False)
        into = torch.full_like(logits._base, math.nan).as_strided(logits.shape, logits.stride(), offset)
        fused = cuda.token_loss(logits, Rows(ids, mask, inv_t), rows, TokenSpec(), into, want_entropy=False)
        for a, b in zip(results, fused, strict=True):
            assert a is b is None or torch.equal(a, b)
        assert torch.equal(fused[1], logp) and torch.equal(fused[6], g) and fused[3] is None
        torch.testing.assert_close(into.flatten(0, 1).double(), grad, rtol=ROUNDING[dtype], atol=atol)
        same = logits._base.clone().as_strided(logits.shape, logits.stride(), offset)
        cuda.token_loss(same, Rows(ids, mask, inv_t), rows, TokenSpec(), same, want_entropy=False)
        assert torch.equal(same, into)
        assert into._base[outside].isnan().all() and same._base[outside].isnan().all()


@pytest.mark.parametrize("loss_type", TOKEN_FAMILY)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_token_family(loss_type, dtype, use, device):
    """Every option of the fused objective, in one pass over clusters of 1 to 16 blocks and in two."""
    objective = objective_for(loss_type, "token", dict(beta=0.1, entropy_coef=0.02, delta=1.5))
    logits, ids, kwargs = make_inputs(("old", "ref", "is_token"), vocab=517, dtype=dtype, device=device)
    want, want_grad = truth(logits, ids, objective=objective, **kwargs)
    assert want_grad.norm() > 1e-3
    for cluster in CLUSTERS:
        use(cluster, seed=cluster + 2)
        got, grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend="cuda", inplace=True, **kwargs)
        assert_close(got.loss, want.loss, 1e-5, "loss")
        assert_close(got.per_token_logps, want.per_token_logps, 1e-5, "logps")
        assert_close(got.entropies, want.entropies, 1e-5, "entropies")
        assert_close(got.kl, want.kl, 2e-5, "kl")
        if dtype == torch.float32:
            assert_close(grad, want_grad, 1e-5, "gradient")
        else:
            once_rounded = rel_norm(want_grad.to(dtype), want_grad)
            assert rel_norm(grad, want_grad) <= 1.1 * once_rounded


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_rows_that_do_not_count(cluster, use, device):
    """More rows than a cluster holds at once, some of which are masked, or cannot learn, or have no gradient."""
    B, T, V = 9, 3, 300
    logits, ids, mask, inv_t = make(B, T, V, torch.bfloat16, offset=3, device=device)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(B * T, generator=generator) > 0.4).to(device)
    mask[:4] = False
    advantages = torch.randn(B * T, generator=generator).to(device)
    advantages[5:9] = 0
    h = torch.ones(B * T, device=device)  # also where the mask is off: it must not matter there
    logits.view(-1, V)[~mask] = math.nan
    ref = torch.randn(B * T, generator=generator).to(device)
    for skip, slope, beta in ((0, None, 0.0), (1, None, 0.0), (0, h, 0.0), (1, h, 0.0), (1, None, 0.1)):
        rows = rows_of(B * T, device, advantages=advantages, h=slope, ref=ref if beta else None)
        spec = TokenSpec(skip_zero=skip, beta=beta)
        skips = skip and slope is None and beta == 0  # else a row without advantage still has a gradient
        scored = mask & ((advantages != 0) | (not skips))
        x = torch.where(mask[:, None], logits.flatten(0, 1), 0.0).view(logits.shape)
        logp, _, entropy, p, log_p = exact(x, ids, inv_t)
        dkl = -torch.expm1(ref.double() - logp) if beta else 0.0
        want = exact_grad(ids, 0.25 * (beta * dkl - advantages), slope, inv_t, entropy, p, log_p) * mask[:, None]
        for seed in (1, 2, 3):
            use(cluster, seed=seed)
            out = logits._base.clone().as_strided(logits.shape, logits.stride(), 3)
            out.flatten(0, 1)[~scored] = math.nan  # not read
            results = cuda.token_loss(out, Rows(ids, mask, inv_t), rows, spec, out, want_entropy=False)
            loss, got, lse, _, kl, ratio, g = results
            for result in (loss, got, lse, kl, ratio, g):
                assert (result[~scored] == 0).all() and result.isfinite().all()
            torch.testing.assert_close(got[scored].double(), logp[scored], rtol=1e-6, atol=2e-6)
            assert (ratio[scored] == 1).all()
            torch.testing.assert_close(out.flatten(0, 1).double(), want, rtol=2**-8, atol=1e-6)
            idle = ~mask if slope is not None or beta else ~mask | (advantages == 0)
            assert (out.flatten(0, 1)[idle] == 0).all()


@pytest.mark.parametrize("cluster", [-1, 1, 4])
def test_advantages_from_rewards(cluster, use, device):
    groups = torch.tensor([[1.0, 2.0, 4.0], [0.1, 0.1, 0.1], [math.nan, 1.0, 3.0], [5.0, *[math.nan] * 2]])
    n, size = groups.numel(), groups.shape[1]
    logits, ids, mask, inv_t = make(n, 1, 40, device=device)
    use(cluster)
    for scale_by_std in (0, 1):
        seq = torch.arange(n, dtype=torch.int32, device=device)
        rows = rows_of(n, device, rewards=groups.flatten().to(device), seq=seq)
        spec = TokenSpec(group_size=size, scale_by_std=scale_by_std, skip_zero=1)
        loss, logp, *_ = cuda.token_loss(logits, Rows(ids, mask, inv_t), rows, spec, None, want_entropy=False)
        want = groups.double() - groups.double().nanmean(1, keepdim=True)
        if scale_by_std:
            std = [row[~row.isnan()].std(correction=min(1, len(row[~row.isnan()]) - 1)) for row in groups.double()]
            want = want / (torch.stack(std)[:, None] + 1e-4)
        want = torch.nan_to_num(want)
        want[1], want[3] = 0, 0
        assert_close(loss, -0.25 * want.flatten(), 1e-6)
        assert torch.equal(logp == 0, (want.flatten() == 0).to(device))


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_minus_infinity_and_huge_logits(dtype, cluster, use, device):
    use(cluster)
    logits, ids, mask, _ = make(1, 10, 3000, dtype, device=device)
    inv_t = torch.ones(10, device=device)
    lowest = torch.finfo(dtype).min
    x = logits[0]
    x[0, :2600] = -math.inf  # most slices have nothing else
    x[1, ::2] = -math.inf
    x[2] -= 1e4
    x[3] += 1e4
    x[4, :2600] = lowest
    x[5] *= 1e30
    x[6] = -1e30
    x[7, :2999] = lowest
    x[8, :] = -math.inf
    x[9, 100:] -= 4000
    ids[:2], ids[5], ids[7], ids[8] = 2999, x[5].argmax(), 2999, 2999
    x[8, 2999] = 1.0
    logp, lse, entropy = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    want = exact(logits, ids, inv_t)
    for got, true in zip((logp, lse, entropy), want, strict=False):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=2e-6)
    g, h = torch.ones(10, device=device), torch.full((10,), 0.5, device=device)
    rows = rows_of(10, device, advantages=-4 * g, h=h)
    for slope in (None, h):
        true = exact_grad(ids, g, slope, inv_t, want[2], *want[3:])
        out = logits.clone()
        cuda.token_loss(out, Rows(ids, mask, inv_t), rows._replace(h=slope), TokenSpec(), out, want_entropy=True)
        if cluster > 0:
            assert_close(out[0], true, ROUNDING[dtype], "one pass")
        apart = torch.full_like(logits, math.nan)
        cuda.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, slope, apart)
        for row in range(10):  # p = exp(z - lse) knows an lse of 1e4 to three digits
            tolerance = ROUNDING[dtype] + 2.0**-23 * abs(float(lse[row]))
            for got in (out, apart) if tolerance < 0.1 else ():
                error = (got[0, row].double() - true[row]).norm() / true[row].norm().clamp(min=1e-6)
                assert error <= tolerance, f"row {row}"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_not_a_number(cluster, use, device):
    use(cluster)
    logits, ids, mask, inv_t = make(1, 9, 1500, torch.bfloat16, device=device)
    logits[0, 0, 700] = math.nan
    logits[0, 1, 3] = math.inf
    logits[0, 2] = -math.inf
    logits[0, 3] = math.nan
    logits[0, 4, int(ids[4])] = -math.inf
    logits[0, 5, int(ids[5])] = math.nan
    mask[3] = False
    ids[6], ids[7] = -100, 2**40
    logp, lse, entropy = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    assert logp.isnan().tolist() == [True, True, True, False, False, True, True, True, False]
    assert lse[0].isnan() and lse[1].isnan() and lse[2] == -math.inf and entropy[:3].isnan().all()
    assert logp[3] == lse[3] == entropy[3] == 0
    assert logp[4] == -math.inf and lse[4].isfinite() and entropy[4].isfinite()
    assert lse[6:].isfinite().all() and entropy[6:].isfinite().all()
    out = logits.clone()
    rows = rows_of(9, device, advantages=torch.ones(9, device=device), old=torch.zeros(9, device=device))
    results = cuda.token_loss(out, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=True)
    assert torch.equal(results[0].isnan(), logp.isnan()) and all(r[3] == 0 for r in results)
    assert torch.equal(out[0].isnan().all(-1), logp.isnan()) and (out[0, 3:5] == 0).all()
    g = torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan, 1.0, 0.0, 1.0, 1.0], device=device)
    cuda.row_grad(logits, Rows(ids, None, inv_t), Scores(logp, lse, entropy), g, None, out)
    assert out[0].isnan().all(-1).tolist() == [True, True, True, False, True, True, False, False, False]


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_has_the_same_bits_everywhere(dtype, cluster, use, device):
    """At every address modulo 16, in any company, whatever else is asked for, and in any order of threads."""
    V, found = 2051, []
    row, ids, _, inv_t = make(1, 1, V, dtype, device=device)
    for offset in range(0, 8, 3):
        for n in (1, 5):
            use(cluster, seed=offset + n)
            logits, *_ = make(1, n, V, dtype, seed=7, offset=offset, device=device)
            logits[0, n - 1] = row[0, 0]
            vectors = [ids.expand(n).contiguous(), torch.ones(n, dtype=torch.bool, device=device), inv_t.expand(n)]
            vectors[2] = vectors[2].contiguous()
            found.append([x[n - 1] for x in cuda.row_stats(logits, Rows(*vectors), want_entropy=True)])
            rows = rows_of(n, device, advantages=torch.ones(n, device=device))
            results = cuda.token_loss(logits, Rows(*vectors), rows, TokenSpec(), logits, want_entropy=False)
            found.append([results[1][n - 1], results[2][n - 1], found[-1][2]])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_confident_tokens_keep_their_digits(use, device):
    """logp of a token whose p is 1 - 1e-9, and its gradient g (1 - p)."""
    logits, ids, mask, inv_t = make(1, 2, 5000, device=device)
    inv_t[:] = 1
    logits[0, 0, ids[0]] = 31.0
    logits[0, 1, ids[1]] = 25.0
    want = exact(logits, ids, inv_t)
    for cluster in CLUSTERS:
        use(cluster)
        logp, _, entropy = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
        torch.testing.assert_close(logp.double(), want[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(entropy.double(), want[2], rtol=1e-5, atol=0)
        out = logits.clone()
        rows = rows_of(2, device, advantages=torch.full((2,), -4.0, device=device))
        cuda.token_loss(out, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=False)
        true = exact_grad(ids, torch.ones(2, device=device), None, inv_t, want[2], *want[3:])
        true[torch.arange(2), ids] = -torch.expm1(want[0])  # 1 - p
        torch.testing.assert_close(out[0].double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("V", [128256, 151936])
def test_a_real_vocabulary(V, use, device):
    """In the shape that is chosen for it, and in two passes."""
    logits, ids, mask, inv_t = make(1, 2, V, torch.bfloat16, device=device)
    want = exact(logits, ids, inv_t)
    rows = rows_of(2, device, advantages=torch.tensor([1.0, -2.0], device=device))
    grad = exact_grad(ids, -0.25 * rows.advantages, None, inv_t, want[2], *want[3:])
    for cluster in (0, -1):
        use(cluster)
        out = logits.clone()
        results = cuda.token_loss(out, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=True)
        torch.testing.assert_close(results[1].double(), want[0], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(results[3].double(), want[2], rtol=1e-6, atol=2e-6)
        assert_close(out[0], grad, 2**-8)


def test_another_stride_for_the_gradient(use, device):
    """Base addresses agree modulo 16, rows do not: no bulk copy can move such a row from one to the other."""
    logits, ids, mask, inv_t = make(1, 3, 1003, torch.bfloat16, stride=1008, device=device)
    out = torch.full((1, 3, 1003), math.nan, dtype=torch.bfloat16, device=device)
    rows = rows_of(3, device, advantages=torch.tensor([1.0, -2.0, 3.0], device=device))
    want = exact(logits, ids, inv_t)
    cuda.token_loss(logits, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=False)
    assert_close(out[0], exact_grad(ids, -0.25 * rows.advantages, None, inv_t, want[2], *want[3:]), 2**-8)
    use(2)
    with pytest.raises(ValueError, match=r"OnePass\(cluster=2, .*the gradient lies otherwise modulo 16 bytes"):
        cuda.token_loss(logits, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=False)


@pytest.mark.parametrize("evict_first", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("buffers", [0, 1, 2, 3, 4])
def test_every_choice(buffers, blocks, evict_first, use, device):
    """Other numbers of buffers and blocks give the same bits, in place and into a tensor that is elsewhere modulo 128
    bytes; more rows than are on their way at once."""
    V, offset = 1999, 3
    logits, ids, mask, inv_t = make(13, 1, V, torch.bfloat16, offset=offset, stride=2003, device=device)
    rows = rows_of(13, device, advantages=torch.linspace(-2, 2, 13, device=device))
    want, want_grad = None, None
    for cluster in (2, 4):
        for chosen in (dict(), dict(buffers=buffers, blocks=blocks, evict_first=evict_first)):
            use(cluster, seed=buffers + 5 * blocks, **chosen)
            same = logits._base.clone().as_strided(logits.shape, logits.stride(), offset)
            apart = torch.zeros_like(logits._base.repeat(2)).as_strided(logits.shape, logits.stride(), offset + 8)
            for out in (same, apart):
                got = cuda.token_loss(
                    logits if out is apart else out, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=True
                )
                want, want_grad = (want, want_grad) if chosen or out is apart else (got, out)
                assert torch.equal(out, want_grad) and all(map(torch.equal, got, want))
    true = exact(logits, ids, inv_t)
    assert_close(want[1], true[0], 1e-6)
    assert_close(want_grad.flatten(0, 1), exact_grad(ids, -0.25 * rows.advantages, None, inv_t, *true[2:]), 2**-8)


def test_shapes_are_remembered_apart(use, device):
    """The same vocabulary in another dtype has another shape, whichever comes first."""
    use(2)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        logits, ids, mask, inv_t = make(24, 1, 5003, dtype, device=device)
        for want_entropy in (False, True):
            logp, *_ = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=want_entropy)
            torch.testing.assert_close(logp.double(), exact(logits, ids, inv_t)[0], rtol=1e-6, atol=2e-6)


def test_rows_that_no_cluster_holds(use, device):
    V = 2_000_003
    assert cuda.shape(V, torch.bfloat16, 0).cluster == 0 and cuda.shape(151936, torch.bfloat16, 0).cluster == 8
    for vocab, why in ((V, "no room for such a row"), (151936, None)):
        assert cuda.refuses(Call(device, 0, torch.bfloat16, vocab)) is None
        refusal = cuda.refuses(Call(device, 0, torch.bfloat16, vocab, one_pass=True))
        assert refusal is why or why in refusal
    logits, ids, mask, inv_t = make(1, 1, V, torch.bfloat16, device=device)
    want = exact(logits, ids, inv_t)
    logp, _, entropy = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    torch.testing.assert_close(logp.double(), want[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), want[2], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rows", [3, 50])  # fewer and more than the machine of cuda_host has blocks for
def test_scale(rows, dtype, device):
    logits, *_ = make(1, rows, 1003, dtype, offset=1, device=device)
    before = logits.clone()
    for factor in (1.0, 0.3):
        cuda.scale_(logits, torch.tensor(factor, device=device))
        assert torch.equal(logits, (before.float() * torch.tensor(factor, device=device)).to(dtype))
    assert logits._base[:1].isnan().all() and logits._base[1 + rows * 1003 :].isnan().all()


def test_first_update_has_ratio_one_exactly(use, device):
    """The logps of a forward pass and those of the pass in place are the same, bit for bit."""
    logits, ids, kwargs = make_inputs(vocab=1003, dtype=torch.bfloat16, device=device)
    for cluster in (0, 4):
        use(cluster)
        old = selective_logps(logits, ids, backend="cuda")
        leaf = logits.clone().requires_grad_()
        out = grpo_loss(leaf, ids, old_per_token_logps=old, backend="cuda", inplace=True, **kwargs)
        assert torch.equal(out.per_token_logps, old * kwargs["completion_mask"])


def test_auto_takes_it_where_a_cluster_holds_a_row(monkeypatch):
    """By device, dtype, V and softcap alone."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(backends.get(name), "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "_no_one_pass", lambda vocab, dtype, device: None if vocab < 10**6 else "no room")

    def auto(vocab, device="cuda", dtype=torch.bfloat16, softcap=None):
        return _select("auto", device, 0, dtype, vocab, softcap)

    assert auto(151936) == auto(151936, dtype=torch.float16) == "cuda"
    assert auto(10**6) == auto(151936, "xpu") == auto(151936, softcap=30.0) == "triton"
    assert auto(151936, dtype=torch.float64) == "torch"
    monkeypatch.setattr(cuda, "unavailable", lambda: "not built")
    assert auto(151936) == "triton"


# ---- on a GPU


def needs_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


@needs_a_gpu
@pytest.mark.parametrize("cluster", [0, -1])
def test_bits_over_20_runs(cluster, use):
    use(cluster)
    logits, ids, mask, inv_t = make(1, 64, 151936, torch.bfloat16, device="cuda")
    rows = rows_of(64, "cuda", advantages=torch.randn(64, device="cuda"))
    first = None
    for _ in range(20):
        out = logits.clone()
        results = [*cuda.token_loss(out, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=True), out]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@needs_a_gpu
def test_a_cuda_graph_holds_the_pass():
    logits, ids, kwargs = make_inputs(("old",), vocab=32000, dtype=torch.bfloat16, device="cuda")
    rows = Rows(ids.view(-1), kwargs["completion_mask"].view(-1) != 0, torch.ones(ids.numel(), device="cuda"))
    objective = rows_of(ids.numel(), "cuda", advantages=torch.ones(ids.numel(), device="cuda"))
    eager = logits.clone()
    want = cuda.token_loss(eager, rows, objective, TokenSpec(), eager, want_entropy=True)
    static = logits.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cuda.token_loss(static, rows, objective, TokenSpec(), static, want_entropy=True)
    static.copy_(logits)
    graph.replay()
    assert torch.equal(static, eager) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_a_gpu
def test_auto_on_this_gpu_waits_for_nothing():
    logits, ids, kwargs = make_inputs(("old",), vocab=32000, dtype=torch.bfloat16, device="cuda")
    leaf = logits.requires_grad_()
    kwargs["num_items_in_batch"] = torch.tensor(37.0, device="cuda")
    grpo_loss(leaf * 1, ids, inplace=True, **kwargs).loss.backward()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        grpo_loss(leaf * 1, ids, inplace=True, **kwargs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_tensors_are():
    logits, ids, mask, inv_t = make(1, 4, 1000, device="cuda:1")
    logp, *_ = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    torch.testing.assert_close(logp.double(), exact(logits, ids, inv_t)[0], rtol=1e-6, atol=2e-6)
    assert torch.cuda.current_device() == 0
