"""selective_logps, and the traps that rows of logits have held for others."""

import pytest
import torch
from cases import assert_close, loss_and_grad, make_inputs, make_linear_inputs, softcap_on, truth

from fastgrpo import Objective, grpo_loss, linear_logps, selective_logps
from fastgrpo.backends import Rows
from fastgrpo.engine import gemm, projection
from fastgrpo.engine.head import choose_logits_dtype
from fastgrpo.engine.logits import Sweeps
from fastgrpo.reference import project

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(logits, ids, temperature=1.0):
    """(logps, entropies) in float64."""
    logps = (logits.double().cpu() / temperature).log_softmax(-1)
    p = logps.exp()
    return logps.gather(-1, ids.cpu()[..., None])[..., 0], -(p * torch.where(p == 0, 0.0, logps)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 257, 1000, 4099])
def test_values_and_gradients(vocab, dtype, backend, device):
    logits, ids, _ = make_inputs(batch=2, length=3, vocab=vocab, dtype=dtype, device=device, backend=backend)
    leaf = logits.clone().requires_grad_()
    logps, entropies = selective_logps(leaf, ids, temperature=0.8, return_entropy=True, backend=backend)
    want_logps, want_entropies = exact(logits, ids, 0.8)
    assert logps.dtype == torch.float32
    assert_close(logps, want_logps, 2e-6, "logps")
    assert_close(entropies, want_entropies, 5e-6, "entropies")
    (logps.sum() + 0.3 * entropies.sum()).backward()
    double = logits.double().cpu().requires_grad_()
    all_logps = (double / 0.8).log_softmax(-1)
    picked = all_logps.gather(-1, ids.cpu()[..., None]).sum()
    (picked - 0.3 * (all_logps.exp() * all_logps).sum()).backward()
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    if vocab > 1:  # at V = 1 the gradient is 0
        assert_close(leaf.grad, double.grad, unit, "gradient")


@pytest.mark.parametrize("vocab", [32001, 50257, 151937])
def test_odd_vocabularies(vocab, backend, device):
    logits, ids, kwargs = make_inputs(
        ("old",), batch=1, length=2, vocab=vocab, dtype=torch.bfloat16, device=device, backend=backend
    )
    want, want_grad = truth(logits, ids, **kwargs)
    got, grad = loss_and_grad(grpo_loss, logits, ids, backend=backend, inplace=True, **kwargs)
    assert_close(got.loss, want.loss, 1e-5)
    assert_close(got.per_token_logps, want.per_token_logps, 1e-6)
    assert_close(grad, want_grad, 2**-8)


def test_minus_infinity(backend, device):
    """Vocabulary entries that are ruled out, whole blocks of them first, and a target among them."""
    logits, ids, _ = make_inputs(batch=2, length=3, vocab=3001, device=device, backend=backend)
    logits[0, :, :2900] = -torch.inf
    ids[0] = 2950
    logits[1, :, ::2] = -torch.inf
    ids[1] = torch.tensor([1, 3, 4], device=device)  # the last one is ruled out
    logps, entropies = selective_logps(logits, ids, return_entropy=True, backend=backend)
    want_logps, want_entropies = exact(logits, ids)
    assert logps[1, 2] == -torch.inf
    assert_close(logps[:, :2], want_logps[:, :2], 1e-6)
    assert_close(entropies, want_entropies, 1e-5)
    kwargs = dict(advantages=torch.tensor([1.0, -1.0], device=device), objective=Objective(entropy_coef=0.1))
    kwargs["completion_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)
    want, want_grad = truth(logits, ids, **kwargs)
    for inplace in (False, True):
        got, grad = loss_and_grad(grpo_loss, logits, ids, backend=backend, inplace=inplace, **kwargs)
        assert_close(got.loss, want.loss, 1e-5)
        assert (grad[logits == -torch.inf] == 0).all()
        assert_close(grad, want_grad, 1e-5)


@pytest.mark.parametrize("offset", [-1e4, 1e4, -3e4, 1e30])
def test_huge_logits(offset, backend, device):
    logits, ids, _ = make_inputs(batch=2, length=3, vocab=1500, device=device, backend=backend)
    logits = logits.round() + offset if abs(offset) < 1e5 else logits * offset
    logps, entropies = selective_logps(logits, ids, return_entropy=True, backend=backend)
    want_logps, want_entropies = exact(logits, ids)
    assert_close(logps, want_logps, 1e-5)
    assert_close(entropies, want_entropies, 1e-5)


def test_nan_in_a_scored_row_stays_there(backend, device):
    logits, ids, kwargs = make_inputs(("old",), batch=2, length=3, vocab=100, device=device, backend=backend)
    logits[0, 1, 17] = torch.nan
    logps = selective_logps(logits, ids, backend=backend)
    assert logps[0, 1].isnan() and logps.isnan().sum() == 1


def test_nan_in_masked_rows_reaches_nothing(backend, device):
    logits, ids, kwargs = make_inputs(("old", "ref"), device=device, backend=backend)
    objective = Objective(beta=0.1, entropy_coef=0.1)
    masked = kwargs["completion_mask"] == 0
    poisoned = logits.clone()
    poisoned[masked] = torch.nan
    dirty = {k: torch.where(masked, torch.nan, v) if "logps" in k else v for k, v in kwargs.items()}
    for inplace in (False, True):
        call = dict(objective=objective, backend=backend, inplace=inplace)
        want, want_grad = loss_and_grad(grpo_loss, logits, ids, **call, **kwargs)
        got, grad = loss_and_grad(grpo_loss, poisoned, ids, **call, **dirty)
        assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)
        assert (grad[masked] == 0).all() and (got.per_token_logps[masked] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(shape, backend, device):
    for loss_type in ("dapo", "grpo", "vespo"):
        for inplace in (False, True):
            leaf = torch.zeros(*shape, 11, device=device, requires_grad=True)
            advantages = torch.zeros(shape[0], device=device)
            ids = torch.zeros(shape, dtype=torch.int64, device=device)
            objective = Objective(loss_type=loss_type)
            output = grpo_loss(leaf, ids, advantages, objective=objective, backend=backend, inplace=inplace)
            output.loss.backward()
            assert output.loss == 0 and leaf.grad.shape == leaf.shape


def test_all_masked_batch(backend, device):
    for loss_type in ("dapo", "grpo", "bnpo", "luspo", "cispo", "sapo", "vespo"):
        logits, ids, kwargs = make_inputs(("old",), device=device, backend=backend)
        kwargs["completion_mask"] = torch.zeros_like(ids)
        objective = Objective(loss_type=loss_type)
        output, grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, **kwargs)
        assert output.loss == 0 and (grad == 0).all()
        assert all(value == 0 or value.isnan() or "phi" in name for name, value in output.metrics.items())


def test_slices_and_strides(backend, device):
    """logits[:, :-1], every other token, transposed batches: same numbers, nothing outside the slice is written."""
    full, ids, kwargs = make_inputs(("old",), vocab=67, device=device, backend=backend)
    b, t = ids.shape
    want, want_grad = loss_and_grad(grpo_loss, full, ids, backend=backend, **kwargs)
    ways = {
        "shifted": (torch.randn(b, t + 1, 67, device=device), lambda x: x[:, :-1]),
        "every-other": (torch.randn(b, 2 * t, 67, device=device), lambda x: x[:, ::2]),
        "time-first": (torch.randn(t, b, 67, device=device), lambda x: x.transpose(0, 1)),
        "inside-a-wider-vocabulary": (torch.randn(b, t, 80, device=device), lambda x: x[..., 5:72]),
        "vocabulary-strided": (torch.randn(b, t, 134, device=device), lambda x: x[..., ::2]),
    }
    for name, (storage, view) in ways.items():
        for inplace in (False, True):
            if inplace and name == "vocabulary-strided":
                continue  # refused, see test_errors
            base = storage.clone()
            view(base).copy_(full)
            leaf = base.clone().requires_grad_()
            x = leaf * 1
            got = grpo_loss(view(x), ids, backend=backend, inplace=inplace, **kwargs)
            got.loss.backward()
            assert torch.equal(got.per_token_logps, want.per_token_logps), name
            assert_close(view(leaf.grad), want_grad, 1e-6, name)
            outside = torch.ones_like(base)
            view(outside).zero_()
            assert (leaf.grad[outside.bool()] == 0).all(), name
            assert torch.equal(x.detach()[outside.bool()], base[outside.bool()]), name


def test_advantages_in_every_memory_layout(backend, device):
    logits, ids, kwargs = make_inputs(("old", "token_advantages"), device=device, backend=backend)
    want, want_grad = truth(logits, ids, **kwargs)
    b, t = ids.shape
    wide = torch.randn(b, 2 * t, device=device)
    wide[:, ::2] = kwargs["advantages"]
    for advantages in (wide[:, ::2], kwargs["advantages"].T.contiguous().T, kwargs["advantages"].double()):
        kwargs["advantages"] = advantages
        got, grad = loss_and_grad(grpo_loss, logits, ids, backend=backend, **kwargs)
        assert_close(got.loss, want.loss, 1e-5)
        assert_close(grad, want_grad, 1e-5)
    kwargs["advantages"] = torch.arange(1.0, b + 1, device=device)[:, None].expand(b, t)  # stride 0
    want, _ = truth(logits, ids, **kwargs)
    assert_close(grpo_loss(logits, ids, backend=backend, **kwargs).loss, want.loss, 1e-5)


def test_batch_invariance(backend, device):
    """The same completion scored in another batch, at another place or alone has bitwise the same logps."""
    for dtype in DTYPES:
        logits, ids, _ = make_inputs(batch=3, vocab=2053, dtype=dtype, device=device, backend=backend)
        want, want_entropies = selective_logps(logits, ids, return_entropy=True, backend=backend)
        for b in range(3):
            alone, entropies = selective_logps(
                logits[b : b + 1, :2].clone(), ids[b : b + 1, :2], return_entropy=True, backend=backend
            )
            assert torch.equal(alone[0], want[b, :2]) and torch.equal(entropies[0], want_entropies[b, :2])
        order = torch.tensor([2, 0, 1], device=device)
        assert torch.equal(selective_logps(logits[order], ids[order], backend=backend), want[order])


def test_batch_invariance_at_a_real_vocabulary(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("seconds a row in the interpreter; the smaller vocabulary crosses tiles and alignments too")
    logits, ids = torch.randn(1, 8, 151_937, device=device) * 3, torch.randint(0, 151_937, (1, 8), device=device)
    together = selective_logps(logits, ids, backend=backend)
    for t in range(8):
        alone = selective_logps(logits[:, t : t + 1], ids[:, t : t + 1], backend=backend)
        assert torch.equal(alone[:, 0], together[:, t])


def test_a_masked_temperature_may_be_anything(backend, device):
    logits, ids, kwargs = make_inputs(("old",), device=device, backend=backend)
    mask = kwargs["completion_mask"].float()
    want, want_grad = loss_and_grad(grpo_loss, logits, ids, backend=backend, **kwargs)
    got, grad = loss_and_grad(grpo_loss, logits, ids, temperature=mask, backend=backend, **kwargs)
    assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)


def test_an_id_out_of_range_touches_only_its_own_row(backend, device):
    """Where ids are not checked (a GPU, a compiled graph): NaN for that row and no read outside it."""
    logits, ids, _ = make_inputs(batch=1, length=5, vocab=40, device=device, backend=backend)
    flat = ids.view(-1).clone()
    flat[1], flat[3] = 40, -1
    mask, inv_temperature = torch.ones(5, dtype=torch.bool, device=device), torch.ones(5, device=device)
    logps, lse, entropies = Sweeps(backend).stats(logits, Rows(flat, mask, inv_temperature), True)
    want, want_entropies = exact(logits, ids)
    good = torch.tensor([0, 2, 4])
    assert logps[[1, 3]].isnan().all() and lse.isfinite().all() and entropies.isfinite().all()
    assert_close(logps[good], want[0, good], 1e-5)


def test_more_than_2_to_the_16_rows(backend, device):
    """Kernels that put tokens on a grid's second axis stop at 65535."""
    rows = 66_000 if backend != "triton" or device == "cuda" else 64
    if rows == 64:
        pytest.skip("the interpreter takes minutes for 66,000 programs; the grid is one-dimensional, up to 2^31 - 1")
    logits = torch.randn(rows, 3, device=device)
    ids = torch.randint(0, 3, (rows,), device=device)
    assert_close(selective_logps(logits, ids, backend=backend), exact(logits, ids)[0], 1e-5)


def test_addresses_beyond_2_to_the_31(backend, device):
    """Rows 2^31 elements apart: a view of memory that is reserved but never touched in between."""
    vocab, apart = 50, 2**31 + 24
    storage = torch.empty(apart + vocab, dtype=torch.bfloat16, device=device)  # 4.3 GB of address space, two pages
    values = torch.randn(2, 1, vocab).to(torch.bfloat16).to(device)
    logits = storage.as_strided((2, 1, vocab), (apart, apart, 1))
    logits.copy_(values)
    ids = torch.tensor([[3], [49]], device=device)
    assert_close(selective_logps(logits, ids, backend=backend), exact(values, ids)[0], 1e-5)
    advantages = torch.tensor([1.0, -1.0], device=device)
    want, want_grad = truth(values, ids, advantages=advantages)
    got, grad = grpo_loss(logits.requires_grad_(), ids, advantages, backend=backend, inplace=True), logits.detach()
    assert_close(got.loss, want.loss, 1e-5)
    assert_close(grad, want_grad, 2**-8)


# The same from hidden states


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_logps(masked, chunk_size, backend, device):
    """Values and gradients, with every option of the head, from upstream gradients of both results."""
    hidden, weight, ids, kwargs = make_linear_inputs(batch=3, length=3, device=device, backend=backend)
    ids, bias = ids.clamp(max=49), torch.randn(len(weight), device=device)
    mask = kwargs["completion_mask"] if masked else torch.ones_like(ids)
    temperature = torch.rand(ids.shape, device=device) + 0.5
    ups = torch.randn(2, *ids.shape, device=device, dtype=torch.float64)

    def run(call, inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = call(*leaves)
        sum((up * x).sum() for up, x in zip(ups.to(results[0].device), results, strict=True)).backward()
        return *results, *(leaf.grad for leaf in leaves)

    def plain(hidden, weight, bias):
        logits = project(hidden, weight[:50], bias[:50], 0.7, head["softcap"]) / temperature.cpu()[..., None]
        return [x * mask.cpu() for x in exact(logits, ids)]

    head = dict(logit_scale=0.7, softcap=softcap_on(backend, 6.0), vocab_size=50)
    call = dict(mask=mask if masked else None, temperature=temperature, chunk_size=chunk_size, backend=backend, **head)
    inputs = (hidden, weight, bias)
    got = run(lambda h, w, b: linear_logps(h, w, ids, bias=b, return_entropy=True, **call), inputs)
    want = run(plain, [x.cpu().double() for x in inputs])
    for name, a, b in zip(("logps", "entropies", "dhidden", "dweight", "dbias"), got, want, strict=True):
        assert_close(a, b, 1e-5, name)
    assert torch.equal(linear_logps(*inputs[:2], ids, bias=bias, **call), got[0])


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
def test_softcap_keeps_its_digits(softcap, backend, device):
    """From a cap that all logits reach to one that none comes near; infinite logits end at the cap."""
    if backend == "triton" and softcap > 100:
        pytest.skip("the Triton kernels cap logits to 1e-7 of the cap, which is no model's when it is that large")
    if softcap_on(backend, softcap) is None:
        with pytest.raises(ValueError, match="softcap: expected None with backend 'cuda'"):
            linear_logps(
                torch.ones(1, 1, 4), torch.ones(9, 4), torch.ones(1, 1).long(), softcap=softcap, backend="cuda"
            )
        return
    hidden, weight, ids, _ = make_linear_inputs(batch=1, length=3, width=32, vocab=700, device=device, backend=backend)
    bias = torch.zeros(len(weight), device=device)
    bias[3], bias[5] = torch.inf, -torch.inf
    logps = linear_logps(hidden, weight, ids, bias=bias, softcap=softcap, backend=backend)
    raw = hidden.cpu() @ weight.cpu().T + bias.cpu()  # as the kernels get them
    want, _ = exact(torch.tanh(raw.double() / softcap) * softcap, ids)
    assert (logps.cpu() - want).abs().max() <= 4e-7 * (1 + want.abs().max())


def test_linear_logps_equal_trls(device):
    """TRL's own chunked head: the same logps, entropies and gradients, softcap and all."""
    pytest.importorskip("trl", reason="TRL is the oracle (pip install '.[test]')")
    from trl.trainer.utils import _ChunkedLogProbFunction

    hidden, weight, ids, _ = make_linear_inputs(width=32, vocab=300, device=device)
    ups = torch.randn(2, *ids.shape)
    results = []
    for trl in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        if trl:
            rows = leaves[0].flatten(0, 1)
            logps, entropies, *_ = _ChunkedLogProbFunction.apply(
                rows, leaves[1], None, ids.view(-1), 0.8, 64, 6.0, 0.7, ("entropy",)
            )
        else:
            call = dict(temperature=0.8, softcap=6.0, logit_scale=0.7, chunk_size=5, return_entropy=True)
            logps, entropies = linear_logps(*leaves, ids, **call)
        (logps.view(ids.shape) * ups[0] + entropies.view(ids.shape) * ups[1]).sum().backward()
        results.append((logps.view(-1), entropies.view(-1), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*reversed(results), strict=True):
        assert_close(ours, theirs, 1e-5)


def test_linear_logps_do_only_the_work_that_is_asked_for(monkeypatch, backend, device):
    """No entropy unless wanted, no gradients without grad mode, and none for rows without an upstream gradient."""
    from fastgrpo import backends

    hidden, weight, ids, _ = make_linear_inputs(batch=3, length=3, device=device, backend=backend)
    seen, kernels = [], backends.get(backend)
    stats, grad, logits = kernels.row_stats, kernels.row_grad, projection.Projection.logits
    monkeypatch.setattr(
        kernels, "row_stats", lambda *a, **k: seen.append(("stats", k["want_entropy"])) or stats(*a, **k)
    )
    monkeypatch.setattr(kernels, "row_grad", lambda *a, **k: seen.append(("grad", a[4] is not None)) or grad(*a, **k))
    monkeypatch.setattr(
        projection.Projection, "logits", lambda s, rows: seen.append(len(s._take(rows))) or logits(s, rows)
    )
    with torch.no_grad():
        linear_logps(hidden, weight, ids, backend=backend)
    assert seen == [9, ("stats", False)]
    seen.clear()
    leaf = hidden.clone().requires_grad_()
    logps, entropies = linear_logps(leaf, weight, ids, return_entropy=True, backend=backend)
    assert seen == [9, ("stats", True)]
    seen.clear()
    upstream = torch.zeros_like(logps)
    upstream[1, :2] = torch.tensor([2.0, -1.0])
    logps.backward(upstream)
    assert seen == [2, ("grad", False)]
    assert (leaf.grad.abs().sum(-1) > 0).sum() == 2
    seen.clear()
    logps, entropies = linear_logps(leaf, weight, ids, return_entropy=True, backend=backend)
    logps.sum().mul(0).backward()
    assert seen[2:] == []


def test_linear_logps_may_be_differentiated_again(backend, device):
    hidden, weight, ids, _ = make_linear_inputs(batch=3, length=3, device=device, backend=backend)
    leaf = hidden.clone().requires_grad_()
    total = linear_logps(leaf, weight, ids, backend=backend).sum()
    first = torch.autograd.grad(total, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(total, leaf)[0], first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logps_agree_with_selective_logps(dtype, backend, device):
    """To the last bit where the GEMM's shape is the same, in both dtypes of logits; so a first update's ratio is 1."""
    hidden, weight, ids, kwargs = make_linear_inputs(dtype=dtype, device=device, backend=backend)
    found = {}
    for logits_dtype in (torch.float32, dtype):
        logits = torch.empty(ids.numel(), len(weight), dtype=logits_dtype, device=device)
        gemm.product(hidden.flatten(0, 1), weight.t(), logits)
        want = selective_logps(logits, ids.flatten(), backend=backend)
        found[logits_dtype] = linear_logps(hidden, weight, ids, backend=backend, logits_dtype=logits_dtype).flatten()
        assert torch.equal(found[logits_dtype], want)
    chosen = choose_logits_dtype("auto", dtype, hidden.device)
    assert chosen == (torch.float32 if gemm.writes_fp32(hidden.device.type) else dtype)
    assert torch.equal(linear_logps(hidden, weight, ids, backend=backend).flatten(), found[chosen])
