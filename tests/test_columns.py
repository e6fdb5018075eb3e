"""A few columns of each row: their logits, the products of their gradients, and which columns carry a gradient.

Truth is float64. What no table names is NaN, in the weight, in dz and around the rows, so that reading it shows.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from fastgrpo import backends
from fastgrpo.backends import ColumnBackend, Rows, Scores

BACKENDS = ["torch", "cpu", "triton"]
FUNCTIONS = [name for name, value in vars(ColumnBackend).items() if inspect.isfunction(value) and name[0] != "_"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=BACKENDS)
def name(request):
    if (why := backends.get(request.param).unavailable()) is not None:
        pytest.skip(f"backend {request.param}: {why}")
    return request.param


@pytest.fixture
def kernels(name):
    return backends.columns(name)


@pytest.fixture
def device(name):
    return "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"


def test_which_backend_takes_columns():
    assert backends.columns("cuda") is backends.get("triton")
    for name in BACKENDS:
        module = backends.columns(name)
        assert module is backends.get(name) and isinstance(module, ColumnBackend) and len(FUNCTIONS) == 4
        for function in FUNCTIONS:
            _, *parameters = inspect.signature(getattr(ColumnBackend, function)).parameters.values()  # but self
            assert list(inspect.signature(getattr(module, function)).parameters.values()) == parameters, function


# ---- products


def close(got, want, size, dtype=torch.float32, steps=8.0, what=""):
    """Within a few roundings of sums of that size in fp32, and of the result in `dtype`."""
    error, bound = (got.double() - want).abs().cpu(), (steps * 2**-24 * size + ROUNDING[dtype] * want.abs()).cpu()
    assert got.isfinite().all(), what
    worst = (error - bound).flatten().argmax() if error.numel() else None
    assert worst is None or (error <= bound).all(), f"{what}, at {int(worst)}: {got.flatten()[worst]}"


# (n, w, kept ids of a row at most, H, V, further elements between rows)
TABLES = {
    "pads anywhere": (5, 16, 9, 64, 50, 0),
    "one place": (3, 1, 1, 40, 50, 0),
    "one place, one row": (1, 1, 1, 2000, 50, 0),
    "one id a row": (4, 16, 1, 24, 50, 0),
    "doubled ids": (4, 16, 16, 40, 5, 0),
    "H odd": (3, 32, 20, 33, 50, 0),
    "H of one": (3, 16, 7, 1, 50, 0),
    "more than a block": (2, 20, 18, 1100, 50, 0),
    "rows apart": (3, 16, 9, 40, 50, 3),
    "no rows": (0, 16, 9, 40, 50, 0),
    "no places": (2, 0, 0, 40, 50, 0),
}


def apart(x, gap):
    """The same matrix, whose rows lie further apart."""
    store = torch.full((x.shape[0], x.shape[1] + gap), math.nan, dtype=x.dtype, device=x.device)
    store[:, : x.shape[1]] = x
    return store[:, : x.shape[1]]


def table(case, dtype, device, seed=0):
    """(hidden, weight, bias, ids, dz): rows of the weight, and dz, that no place names are NaN."""
    n, w, most, H, V, gap = TABLES[case]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((n, w), -1, dtype=torch.int32)
    for i in range(n):
        k = most if i == 0 else int(torch.randint(0, most + 1, (), generator=generator))
        ids[i, torch.randperm(w, generator=generator)[:k]] = torch.randint(V, (k,), generator=generator).int()
    hidden, weight = (torch.randn(rows, H, generator=generator).to(dtype) for rows in (n, V))
    weight[~torch.isin(torch.arange(V), ids)] = math.nan
    bias, dz = torch.randn(V, generator=generator), torch.randn(n, w, generator=generator)
    dz[ids < 0] = math.nan
    hidden, weight, bias, ids, dz = (x.to(device) for x in (hidden, weight, bias, ids, dz))
    return apart(hidden, gap), apart(weight, gap), bias, ids, dz


def gathered(weight, ids):
    """Rows of the weight (n, w, H) in float64, 0 at places without an id."""
    return torch.where(ids[..., None] < 0, 0.0, weight.double()[ids.clamp(min=0).long()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLES)
def test_column_logits(case, dtype, kernels, device):
    hidden, weight, bias, ids, _ = table(case, dtype, device)
    products = gathered(weight, ids) * hidden.double()[:, None]
    there = ids >= 0
    for given in (None, bias):
        want = products.sum(-1) + (0 if given is None else given.double()[ids.clamp(min=0).long()])
        got = kernels.column_logits(hidden, weight, given, ids)
        assert got.dtype == torch.float32 and got.shape == ids.shape and (got[~there] == -math.inf).all()
        close(got[there], want[there], (products.abs().sum(-1) + 4)[there], what=f"bias {given is not None}")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLES)
def test_column_d_hidden(case, dtype, narrow, kernels, device):
    hidden, weight, _, ids, dz = table(case, dtype, device)
    products = gathered(weight, ids) * dz.double().nan_to_num()[..., None]
    out = torch.full_like(hidden, math.nan, dtype=dtype if narrow else torch.float32)
    kernels.column_d_hidden(dz, ids, weight, out)
    close(out, products.sum(1), products.abs().sum(1), out.dtype)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLES)
def test_column_d_weight(case, dtype, narrow, kernels, device):
    hidden, weight, bias, ids, dz = table(case, dtype, device)
    n, w = ids.shape
    rows = torch.arange(n, dtype=torch.int32, device=device).repeat_interleave(w)
    rows[ids.flatten() < 0] = 2**30
    out = weight.clone() if narrow else weight.float()
    was, was_bias = out.clone(), bias.clone()
    pairs = (dz.flatten(), ids.flatten(), rows, hidden)
    kernels.column_d_weight(*pairs, out, bias)
    there = ids >= 0
    named = torch.isin(torch.arange(len(weight), device=device), ids)
    assert out[~named].isnan().all() and torch.equal(bias[~named], was_bias[~named])
    which = torch.zeros(len(weight), n, dtype=torch.float64, device=device)  # the sum of dz of each id and row
    size = torch.zeros_like(which)
    at = ids[there].long(), rows.view(n, w)[there].long()
    which.index_put_(at, dz[there].double(), accumulate=True)
    size.index_put_(at, dz[there].double().abs(), accumulate=True)
    want, sizes = was.double() + which @ hidden.double(), was.double().abs() + size @ hidden.double().abs()
    close(out[named], want[named], sizes[named], out.dtype)
    close(bias[named], (was_bias.double() + which.sum(1))[named], (was_bias.abs() + size.sum(1))[named])
    if was.dtype == torch.float32 and not narrow:
        again = was.clone()
        kernels.column_d_weight(*pairs, again, None)
        assert torch.equal(again[named], out[named])


def shared_pairs(count, share, device):
    """(dz, ids, rows, hidden) of pairs of which id 3 has its share."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 8, (count,), generator=generator)
    ids = ids.masked_fill(torch.rand(count, generator=generator) < share, 3)
    rows, dz = torch.randint(64, (count,), generator=generator), torch.randn(count, generator=generator)
    hidden = torch.randn(64, 40, generator=generator).bfloat16()
    return dz.to(device), ids.int().to(device), rows.int().to(device), hidden.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_id_that_thousands_of_pairs_share(dtype, kernels, device):
    """In bf16 most pairs would vanish beside the sum, were they added to it one by one."""
    dz, ids, rows, hidden = shared_pairs(2200, 0.95, device)
    want, size = (torch.zeros(8, 40, dtype=torch.float64, device=device) for _ in range(2))
    products = (dz.double()[:, None] * hidden.double()[rows]).masked_fill(ids[:, None] < 0, 0)
    want.index_add_(0, ids.clamp(min=0), products)
    size.index_add_(0, ids.clamp(min=0), products.abs())
    out = torch.zeros(8, 40, dtype=dtype, device=device)
    kernels.column_d_weight(dz, ids, rows, hidden, out, None)
    close(out, want, size, dtype)


def test_bits_of_an_id_alone_in_company_and_among_others_in_another_order(kernels, device):
    dz, ids, rows, hidden = shared_pairs(120, 0.3, device)
    first = torch.zeros(8, 40, device=device)
    kernels.column_d_weight(dz, ids, rows, hidden, first, None)
    for some in ((ids == 3).nonzero()[:, 0], ((ids - 3).abs() % 5).argsort(stable=True)):
        again = torch.zeros(8, 40, device=device)
        kernels.column_d_weight(dz[some], ids[some], rows[some], hidden, again, None)
        assert torch.equal(again[3], first[3])


@pytest.mark.parametrize("values, want", [((2.0**25, 1.0, -(2.0**25)), 0.0), ((2.0**25, -(2.0**25), 1.0), 1.0)])
def test_sums_go_in_order(values, want, kernels, device):
    ids, rows = torch.tensor([4, 4, 1, 4]), torch.tensor([0, 0, 0, 0])
    dz, hidden = torch.tensor([*values[:2], 9.0, values[2]]), torch.ones(1, 70)
    dz, ids, rows, hidden = dz.to(device), ids.int().to(device), rows.int().to(device), hidden.to(device)
    out, d_bias = torch.zeros(6, 70, device=device), torch.zeros(6, device=device)
    kernels.column_d_weight(dz, ids, rows, hidden, out, d_bias)
    assert (out[4] == want).all() and d_bias[4] == want and (out[1] == 9).all()
    table, got = torch.tensor([[4, -1, 4, -1, 4]], dtype=torch.int32, device=device), torch.empty(1, 70, device=device)
    spread = torch.tensor([[values[0], math.nan, values[1], math.nan, values[2]]], device=device)
    kernels.column_d_hidden(spread, table, torch.ones(6, 70, device=device), got)
    assert (got == want).all()


def test_bits_of_a_row_alone_in_company_and_in_a_wider_table(kernels, device):
    for case in ("pads anywhere", "one place", "one id a row", "more than a block"):
        hidden, weight, bias, ids, dz = table(case, torch.bfloat16, device)
        n, w = ids.shape
        wide = torch.full((n, 3 * w + 5), -1, dtype=torch.int32, device=device)
        spread = torch.full(wide.shape, math.nan, device=device)
        at = torch.arange(w, device=device) * 3 + 2
        wide[:, at], spread[:, at] = ids, dz
        z, out = kernels.column_logits(hidden, weight, bias, ids), torch.empty_like(hidden)
        kernels.column_d_hidden(dz, ids, weight, out)
        for i in range(n):
            for some_ids, some_dz, places in ((ids, dz, slice(None)), (wide, spread, at)):
                few = slice(i, i + 1)
                alone = kernels.column_logits(hidden[few], weight, bias, some_ids[few])
                got = torch.empty_like(out[few])
                kernels.column_d_hidden(some_dz[few], some_ids[few], weight, got)
                assert torch.equal(alone[:, places], z[few]) and torch.equal(got, out[few]), (case, i)


# ---- the columns that carry a gradient


def scored(name, logits, ids, inv_temperature, softcap=None):
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = Rows(ids, mask, inv_temperature)
    scores = backends.get(name).row_stats(logits, rows, want_entropy=True, softcap=softcap)
    return Rows(ids, None, inv_temperature), scores


def target_gradient(logits, rows, logp, entropy, g, h, softcap):
    """(n,) dL/dlogits at the targets, float64, from logp, which has the digits of 1 - p where p is near 1."""
    lp = logp.double()
    dz = g.double() * -torch.expm1(lp)
    if h is not None:
        dz -= h.double() * (lp.exp() * (lp + entropy.double())).nan_to_num(0)
    if softcap is not None:
        x = logits.flatten(0, 1).gather(1, rows.ids.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
        dz *= 1 - torch.tanh(x.double() / softcap).square()
    return dz * rows.inv_temperature.double()


def verify(name, logits, rows, scores, g, h, tolerance, room, softcap=None):
    """What the contract says of `select_columns`, held against the same backend's `row_grad` in fp32."""
    got = backends.columns(name).select_columns(logits, rows, scores, g, h, tolerance, room, softcap=softcap)
    n, V = len(g), logits.shape[-1]
    assert got.ids.shape == got.dz.shape and got.ids.shape[0] == n and got.ids.shape[1] <= room
    assert (got.ids.dtype, got.dz.dtype, got.sizes.dtype) == (torch.int32, torch.float32, torch.int32)
    assert got.sizes.shape == (n,)
    wide = logits.float()
    out = torch.empty(wide.shape, device=logits.device)
    backends.get(name).row_grad(wide, rows, scores, g, h, out, softcap=softcap)
    dense = out.flatten(0, 1)
    of_target = target_gradient(logits, rows, scores.logp, scores.entropy, g, h, softcap)
    for i in range(n):
        size, target, exact = int(got.sizes[i]), int(rows.ids[i]), dense[i].double().abs()
        what, k = f"row {i}, size {size}", size if size <= room else 0
        assert (got.ids[i, k:] == -1).all() and (got.dz[i, k:] == 0).all(), what
        if g[i] == 0 and (h is None or h[i] == 0):
            assert size == 0, what
            continue
        known = 0 <= target < V
        if not exact.isfinite().all() or (known and not of_target[i].isfinite()):
            assert size > room, what
            continue
        if known:
            exact[target] = 0
        budget = tolerance * float(exact.sum() + (of_target[i].abs() if known else 0))
        least = int((exact.sort().values.cumsum(0) > budget).sum()) + known
        assert (size if size <= room else room) <= 1.2 * least + 2, f"{what}, where {least} would do"
        if size > room:
            continue
        ids = got.ids[i, :k].long()
        assert (ids.diff() > 0).all() and (ids >= 0).all() and (ids < V).all(), what
        assert not known or target in ids.tolist(), what
        exact[ids] = 0
        # but for subnormal numbers, which kernels may take for 0
        assert float(exact.sum()) <= budget * (1 + 1e-5) + V * 2**-126, what
        others = ids != target
        torch.testing.assert_close(got.dz[i, :k][others], dense[i, ids][others], rtol=0, atol=0)
        if known:
            assert got.dz[i, :k][~others].item() == pytest.approx(float(of_target[i]), rel=3e-6, abs=1e-37), what
    return got


def policy(case, V, dtype=torch.float32, seed=0):
    """(logits (1, n, V), ids) of rows of one kind."""
    generator = torch.Generator().manual_seed(seed)
    n = 3
    x = torch.randn(1, n, V, generator=generator)
    ids = torch.randint(V, (n,), generator=generator)
    if case == "sampled":
        x *= 6
        ids = torch.multinomial(x[0].softmax(-1), 1, generator=generator)[:, 0]
    elif case == "likely":  # p of the target is 1, or nearly
        x *= 3
        x[0, torch.arange(n), ids] += torch.tensor([15.0, 25.0, 60.0])
    elif case == "unlikely":
        x = x * 4
        x[0, torch.arange(n), ids] -= 30
    elif case == "flat":
        x *= 0.1
    elif case == "lumps":  # a long tail of equal columns, of which some must stay
        x = torch.full_like(x, -9.0)
        x[..., ::7], x[..., ::50] = -5.0, 6.0
    elif case == "ruled out":
        x *= 4
        x[0, :, ::2] = -math.inf
        x[0, 1, 5:] = -math.inf
        x[0, 2] = -math.inf
        ids = torch.tensor([3, 3, 3])
        x[0, :, 3] = 2.0
    elif case == "far":  # exponents that take the careful way
        x *= 4
        x[0, 0] += 1e4
        x[0, 1] -= 1e4
        x[0, 2, ::3] = -1e30
    return x.to(dtype), ids


POLICIES = ["sampled", "likely", "unlikely", "flat", "lumps", "ruled out", "far"]


@pytest.mark.parametrize("case", POLICIES)
def test_select_columns(case, name, device):
    logits, ids = (x.to(device) for x in policy(case, 601))
    rows, scores = scored(name, logits, ids, torch.tensor([1.0, 0.7, 1.4], device=device))
    g, h = torch.tensor([1.0, -0.3, 1e-6], device=device), torch.tensor([0.3, -0.5, 2e-6], device=device)
    room = 64 if case == "flat" else 601
    for dlogp, dentropy, tolerance in ((g, None, 2**-14), (g, h, 2**-10), (0 * g, h, 2**-7), (g, None, 2**-4)):
        got = verify(name, logits, rows, scores, dlogp, dentropy, tolerance, room)
        if case == "flat":
            assert (got.sizes > room).all()
        elif case == "sampled" and tolerance > 2**-14:
            assert (got.sizes < 400).all()  # else nothing was dropped


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_and_a_softcap(dtype, softcap, name, device):
    logits, ids = (x.to(device) for x in policy("sampled", 333, dtype))
    rows, scores = scored(name, logits, ids, torch.ones(3, device=device), softcap)
    g, h = torch.tensor([1.0, -0.3, 0.5], device=device), torch.tensor([0.1, 0.0, -0.2], device=device)
    verify(name, logits, rows, scores, g, None, 2**-12, 333, softcap)
    verify(name, logits, rows, scores, g, h, 2**-8, 100, softcap)


@pytest.mark.parametrize("V", [1, 2, 7, 1030])
def test_lengths_of_a_row(V, name, device):
    logits, ids = (x.to(device) for x in policy("sampled", V))
    rows, scores = scored(name, logits, ids, torch.ones(3, device=device))
    g = torch.tensor([1.0, -2.0, 0.5], device=device)
    for room in (1, 16):
        verify(name, logits, rows, scores, g, None, 2**-6, room)


def test_rows_that_are_not_read_or_not_finite(name, device):
    logits, _ = policy("sampled", 200)
    logits = logits.repeat(1, 3, 1)[:, :8].to(device)
    ids = torch.tensor([3, 3, 3, 3, -100, 200, 3, 3], device=device)
    rows, scores = scored(name, logits, ids, torch.ones(8, device=device))
    logits[0, 0] = math.nan
    logits[0, 1, 7] = math.nan
    logits[0, 2, 7] = math.inf
    g = torch.tensor([0.0, 1.0, 1.0, math.nan, 1.0, -1.0, math.inf, 1.0], device=device)
    h = torch.zeros_like(g)
    scores = Scores(scores.logp, scores.lse, scores.entropy)
    for dentropy in (None, h):
        got = verify(name, logits, rows, scores, g, dentropy, 2**-8, 150)
        assert got.sizes[0] == 0 and (got.sizes[[1, 2, 3, 6]] > 150).all()
        assert ((got.sizes[[4, 5, 7]] > 0) & (got.sizes[[4, 5, 7]] <= 150)).all()


def test_an_id_outside_the_vocabulary_wherever_its_row_begins(name, device):
    logits, _ = policy("sampled", 201)
    logits = logits.repeat(1, 2, 1).to(device)
    rows, scores = scored(name, logits, torch.full((6,), -100, device=device), torch.ones(6, device=device))
    got = verify(name, logits, rows, scores, torch.ones(6, device=device), None, 2**-8, 150)
    assert (got.sizes <= 150).all() and torch.equal(got.sizes[:3], got.sizes[3:])


def test_a_row_of_its_target_alone(name, device):
    """Its gradient is 0 everywhere, and the target stays."""
    logits = torch.full((1, 2, 601), -math.inf, device=device)
    logits[0, :, 3] = 2.0
    logits[0, 1, 5] = -110.0
    rows, scores = scored(name, logits, torch.tensor([3, 3], device=device), torch.ones(2, device=device))
    got = verify(name, logits, rows, scores, torch.ones(2, device=device), None, 2**-8, 64)
    assert got.sizes.tolist() == [1, 1] or (got.sizes[0] == 1 and got.sizes[1] <= 2)


def test_no_rows_to_select_from(name, device):
    none = torch.empty(0, device=device)
    rows = Rows(none.long(), None, none)
    logits, scores = torch.empty(2, 0, 5, device=device), Scores(none, none, None)
    got = backends.columns(name).select_columns(logits, rows, scores, none, None, 2**-8, 16)
    assert got.ids.shape == got.dz.shape and len(got.ids) == 0 and got.sizes.shape == (0,)


def test_bits_of_a_row_of_logits_alone_in_company_and_anywhere(name, device):
    V = 601
    logits, ids = (x.to(device) for x in policy("sampled", V))
    rows, scores = scored(name, logits, ids, torch.ones(3, device=device))
    g, h = torch.tensor([1.0, -0.3, 0.5], device=device), torch.tensor([0.1, 0.2, -0.2], device=device)
    select = backends.columns(name).select_columns
    first = select(logits, rows, scores, g, h, 2**-9, 400)
    assert (first.sizes > 4).all() and (first.sizes < 400).all()
    for offset in range(4):  # every place of a row modulo 16 bytes
        for i in range(3):
            store = torch.full((V + 8,), math.nan, device=device)
            store[offset : offset + V] = logits[0, i]
            few, x = slice(i, i + 1), store[None, None, offset : offset + V]
            some = Scores(scores.logp[few], scores.lse[few], scores.entropy[few])
            got = select(x, Rows(ids[few], None, rows.inv_temperature[few]), some, g[few], h[few], 2**-9, 400)
            k = int(first.sizes[i])
            assert torch.equal(first.sizes[few], got.sizes), (offset, i)
            for a, b in zip(first[:2], got[:2], strict=True):
                assert torch.equal(a[few, :k], b[:, :k]), (offset, i)


def test_more_candidates_than_are_written_apart(monkeypatch):
    """Triton's rows with many small columns take another way, of the same answer."""
    if (why := backends.get("triton").unavailable()) is not None:
        pytest.skip(why)
    from fastgrpo.backends.triton import columns, launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(launch, "geometry", lambda V, dtype: launch.Geometry(4, 32, 2, 64))
    for case in ("sampled", "lumps"):
        logits, ids = (x.to(device) for x in policy(case, 601))
        rows, scores = scored("triton", logits, ids, torch.ones(3, device=device))
        g = torch.tensor([1.0, -0.3, 0.5], device=device)
        found = []
        for room in (32, 1):
            monkeypatch.setattr(columns, "_CANDIDATES", room)
            found.append(verify("triton", logits, rows, scores, g, None, 2**-8, 90))
        assert torch.equal(found[0].ids, found[1].ids)


def test_bits_on_any_number_of_threads():
    """Of calls that are worth three."""
    if (why := backends.get("cpu").unavailable()) is not None:
        pytest.skip(why)
    kernels, generator, before = backends.columns("cpu"), torch.Generator().manual_seed(0), torch.get_num_threads()
    n, w, V, H = 48, 200, 40_000, 400
    hidden, weight = torch.randn(n, H, generator=generator), torch.randn(V, H, generator=generator)
    ids = torch.randint(-1, V // 8, (n, w), generator=generator, dtype=torch.int32)
    dz, rows = torch.randn(n, w, generator=generator), torch.arange(n, dtype=torch.int32).repeat_interleave(w)
    logits = 6 * torch.randn(1, n, V, generator=generator)
    of_rows, scores = scored("cpu", logits, torch.randint(V, (n,), generator=generator), torch.ones(n))
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
            kernels.column_d_hidden(dz, ids, weight, d_hidden)
            kernels.column_d_weight(dz.flatten(), ids.flatten(), rows, hidden, d_weight, None)
            found = kernels.select_columns(logits, of_rows, scores, torch.ones(n), None, 2**-8, 300)
            made.append((kernels.column_logits(hidden, weight, None, ids), d_hidden, d_weight, *found))
    finally:
        torch.set_num_threads(before)
    assert 0 < (found.sizes > 300).sum() < n
    assert all(torch.equal(a, b) for more in made[1:] for a, b in zip(more, made[0], strict=True))


@pytest.fixture(params=backends.get("cpu").instruction_sets() if backends.get("cpu").unavailable() is None else [])
def instructions(request, monkeypatch):
    monkeypatch.setenv("FASTGRPO_CPU_ISA", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_of_a_cpu(dtype, instructions):
    """Products against float64 and the choice against `row_grad`, of lengths with whole vectors and remainders."""
    kernels = backends.columns("cpu")
    for case in ("pads anywhere", "more than a block"):
        test_column_logits(case, dtype, kernels, "cpu")
        for narrow in (False, True):
            test_column_d_hidden(case, dtype, narrow, kernels, "cpu")
            test_column_d_weight(case, dtype, narrow, kernels, "cpu")
    g, h = torch.tensor([1.0, -0.3, 0.5]), torch.tensor([0.1, 0.0, -0.2])
    for case in ("sampled", "lumps", "ruled out"):
        logits, ids = policy(case, 333, dtype)
        for softcap in (None, 20.0):
            rows, scores = scored("cpu", logits, ids, torch.ones(3), softcap)
            for dentropy in (None, h):
                verify("cpu", logits, rows, scores, g, dentropy, 2**-10, 300, softcap)
    test_rows_that_are_not_read_or_not_finite("cpu", "cpu")
