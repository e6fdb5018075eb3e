"""The CPU library's own matrix products on every instruction set: their error, what they read and write, and that an
element has the same bits whatever else is in the product."""

import contextlib
import itertools
import math

import cpu_amx
import pytest
import torch
from cases import assert_close

from fastgrpo import Objective, linear_grpo_loss, linear_logps
from fastgrpo.backends import Rows, cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")

ISAS = cpu.instruction_sets() if cpu.unavailable() is None else []
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMULATED = ("emulated amx", "bf16")  # the other dtypes do without its tiles
CASES = [*itertools.product(ISAS, DTYPES), EMULATED]
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
LAYOUTS = list(itertools.product((False, True), repeat=2))  # whether a and b are transposed
DEEP = 16384  # kDeep of products.cpp
SHAPES = [
    (1, 1, 1),
    (1, 70, 5),
    (3, 1, 33),
    (7, 65, 31),
    (16, 64, 32),
    (17, 33, 512),
    (33, 95, 513),
    (97, 130, 577),
    (130, 97, 64),
    (5, 40, DEEP),
    (5, 37, DEEP + 1),
    (40, 33, DEEP + 4097),
    (4, 5, 0),
    (0, 5, 7),
    (5, 0, 7),
]


@pytest.fixture(scope="module")
def amx_library(tmp_path_factory):
    if (why := cpu_amx.unavailable()) is not None:
        pytest.skip(f"the CPU library cannot be built for an emulated AMX: {why}")
    return cpu_amx.build(tmp_path_factory.mktemp("cpu_amx"))


@pytest.fixture(params=CASES, ids="-".join)
def dtype(request, monkeypatch):
    """That of the operands; the instruction set is set besides."""
    isa, name = request.param
    monkeypatch.setenv("FASTGRPO_CPU_ISA", isa.split()[-1])
    if request.param != EMULATED:
        yield DTYPES[name]
        return
    with cpu_amx.backend(request.getfixturevalue("amx_library")) as library:
        yield DTYPES[name]
        assert library.fastgrpo_host_tiles_in_use() == 0


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def among_nan(x, transposed=False):
    """x with NaN on all sides of it in memory; its rows, or with `transposed` its columns, lie there one by one."""
    x = x.t() if transposed else x
    rows, columns = x.shape
    buffer = torch.full((rows + 2, columns + 3), math.nan, dtype=x.dtype)
    inside = buffer[1:-1, 1:-2]  # rows at odd addresses, so that pairs are not aligned
    inside.copy_(x)
    return inside.t() if transposed else inside


def operands(M, N, K, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((M, K), (K, N)))
    return a, b


def product(a, b, *, dtype=torch.float32, bias=None, add_to=None):
    """a @ b (+ bias) or add_to + a @ b, in a buffer whose other elements must stay what they are."""
    M, N = a.shape[0], b.shape[1]
    buffer = torch.full((M + 2, N + 3), math.nan, dtype=dtype)
    out = buffer[1:-1, 1:-2]
    if add_to is not None:
        out.copy_(add_to)
    cpu.matmul(a, b, out, bias=bias, add=add_to is not None)
    inside = out.clone()
    out.fill_(math.nan)
    assert buffer.isnan().all()
    return inside


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(dtype, shape):
    M, N, _ = shape
    plain = operands(*shape, dtype)
    generator = torch.Generator().manual_seed(1)
    bias, start = torch.randn(N, generator=generator), torch.randn(M, N, generator=generator)
    exact, size = plain[0].double() @ plain[1].double(), plain[0].double().abs() @ plain[1].double().abs()
    slack = 2.0**-19 * size + 2.0**-22  # one element of k left out is 2^-15 at least
    found = {}
    for layout in LAYOUTS:
        a, b = (among_nan(x, transposed) for x, transposed in zip(plain, layout, strict=True))
        found[layout] = product(a, b), product(a, b, bias=bias), product(a, b, add_to=start)
        for got, more in zip(found[layout], (0, bias, start), strict=True):
            assert ((got - (exact + more)).abs() <= slack).all()
        if dtype != torch.float32:  # rounded once
            assert_same(product(a, b, dtype=dtype, bias=bias), found[layout][1].to(dtype))
    for other in list(found.values())[1:]:
        for got, want in zip(other, found[False, False], strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("K", [1, 31, 33, 515])
def test_infinity_and_nan_arrive(dtype, K, layout):
    a, b = operands(37, 70, K, dtype)
    a[3, K - 1], a[20, 0], a[36, K // 2] = math.inf, -math.inf, math.nan
    b[K - 1, 5], b[0, 69], b[K // 2, 33] = math.inf, -math.inf, math.nan
    want = a.double() @ b.double()
    got = product(*(among_nan(x, transposed) for x, transposed in zip((a, b), layout, strict=True)))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf()) and torch.equal(got[got.isinf()], want[want.isinf()].float())


@pytest.mark.parametrize("K", [37, 700, DEEP + 999])
def test_bits_of_an_element(dtype, K):
    """The same alone, in another batch, at another place and with other threads; layouts are compared above."""
    M, N = (150, 270) if K < DEEP else (35, 70)
    a, b = operands(M, N, K, dtype)
    with threads(1):
        want = product(a, b)
    for count in (2, 3):
        with threads(count):
            assert_same(product(a, b), want)
            assert_same(product(a[: M // 2], b), want[: M // 2])
    for m, n in ((0, 0), (M - 1, N - 1), (M // 2, N // 3)):
        assert_same(product(a[m : m + 1], b[:, n : n + 1]), want[m : m + 1, n : n + 1])
        assert_same(product(a[m : m + 1], b), want[m : m + 1])
        assert_same(product(a, b[:, n : n + 1]), want[:, n : n + 1])
    few, some = slice(5, 28), slice(13, 33)  # more rows than columns: the right operand is packed first
    assert_same(product(a[few], b[:, some]), want[few, some])
    rows, columns = torch.randperm(M), torch.randperm(N)
    assert_same(product(a[rows], b[:, columns]), want[rows][:, columns])


def test_large_results_written_past_the_caches(dtype):
    a, b = operands(1030, 2080, 3, dtype)  # beyond 8 MiB
    bias = torch.randn(2080)
    for columns in (2080, 2079):  # rows that begin on cache lines, and rows that do not
        out = torch.full((1030, columns), math.nan)
        for added in (None, bias[:columns]):
            cpu.matmul(a, b[:, :columns], out, bias=added)
            for rows in (slice(0, 3), slice(1000, 1030)):
                assert_same(out[rows], product(a[rows], b[:, :columns], bias=added))


def test_sums_of_segments_some_rows_at_a_time():
    """Where those of all rows would take more than 4 MiB a thread; on the best instruction set."""
    a, b = operands(530, 2000, DEEP + 7, torch.bfloat16)
    with threads(2):
        got = product(a, b)
    for rows in (slice(0, 1), slice(480, 530)):
        assert_same(product(a[rows], b), got[rows])


HEADS = {  # rows, vocabulary, width, softcap
    "one": (1, 1, 1, None),
    "no rows": (0, 40, 7, None),
    "a block and a bit": (37, 4099, 33, None),
    "softcap": (37, 4500, 20, 5.0),
    "more than a slice": (2100, 70, 17, None),
    "blocks": (100, 3 * 4096 + 5, 64, 30.0),
    "panel by panel": (530, 1100, 2200, None),
    "deep": (3, 70, DEEP + 3, None),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_head_stats_are_row_stats(dtype, with_bias, name):
    count, vocab, width, softcap = HEADS[name]
    hidden, weight = operands(count, vocab, width, dtype)
    weight = weight.t().mul(3 / width**0.5)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(vocab, generator=generator).index_fill_(0, torch.tensor([vocab // 3]), -math.inf)
    bias = bias if with_bias else None
    ids = torch.randint(vocab, (count,), generator=generator)
    ids[1::9], ids[2::9], ids[3::9], ids[4::9] = -1, vocab, -100, vocab // 3
    mask = torch.rand(count, generator=generator) > 0.2
    hidden[5::7] = math.nan
    mask[5::14] = False
    rows = Rows(ids, mask, torch.rand(count, generator=generator) + 0.5)
    logits = torch.full((count, vocab), math.nan)
    cpu.matmul(hidden, weight.t(), logits, bias=bias)
    for want_entropy in (False, True):
        want = cpu.row_stats(logits[None], rows, want_entropy=want_entropy, softcap=softcap)
        for thread_count in (1, 2, 5) if want_entropy else (2,):
            with threads(thread_count):
                got = cpu.head_stats(hidden, weight, bias, rows, want_entropy=want_entropy, softcap=softcap)
            assert (got.entropy is None) == (not want_entropy)
            for one, other in zip(got, want, strict=True):
                if one is not None:
                    assert_same(one, other)
    good = mask & (ids >= 0) & (ids < vocab) & ~hidden.isnan().any(-1)
    z = hidden[good].double() @ weight.double().t() + (0 if bias is None else bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z * rows.inv_temperature[good, None]).log_softmax(-1)
    assert_close(got.logp[good], log_p.gather(1, ids[good, None])[:, 0], 1e-5)


def test_amx_sums_as_the_manual_says(amx_library, monkeypatch):
    """Of every 32 elements of k, those at even places are summed up, and those at odd ones; both join a sum of 512."""
    monkeypatch.setenv("FASTGRPO_CPU_ISA", "amx")
    a, b = operands(19, 37, 512 + 32 * 2 + 5, torch.bfloat16)
    with cpu_amx.backend(amx_library):
        got = product(a, b)
    sums = torch.zeros(2, 19, 37)
    for start in range(0, a.shape[1], 32):
        parts = torch.zeros(2, 19, 37)
        for k in range(start, min(start + 32, a.shape[1])):
            parts[k % 2] += a[:, k, None].float() * b[k].float()  # the product is exact
        sums[start // 512] += parts[0] + parts[1]
    assert torch.equal(got, sums[0] + sums[1])


@pytest.mark.parametrize("M, configurations", [(1, 1), (32, 1), (50, 1), (96, 1), (192, 1)])
def test_amx_configures_its_tiles_rarely(M, configurations, amx_library, monkeypatch):
    """Once where all are of one height. None stays in use: the system would save 8 KiB at every switch of threads."""
    monkeypatch.setenv("FASTGRPO_CPU_ISA", "amx")
    with cpu_amx.backend(amx_library) as library, threads(1):
        before = library.fastgrpo_host_tiles_loaded()
        product(*operands(M, 200, 300, torch.bfloat16))
        assert library.fastgrpo_host_tiles_loaded() - before == configurations
        assert library.fastgrpo_host_tiles_in_use() == 0


# More than kDeep, so that dH is summed by segments over threads.
WIDTH, VOCAB, SEQUENCES, TOKENS = 24, DEEP + 200, 4, 9


def loss_of(hidden, weight, ids, advantages, old, chunk_size):
    """(logps, dL/dhidden) of a loss of single tokens whose normaliser is no matter of the batch."""
    hidden = hidden.clone().requires_grad_()
    objective = Objective(loss_type="dapo")
    batch = dict(advantages=advantages, old_per_token_logps=old, num_items_in_batch=torch.tensor(30.0))
    output = linear_grpo_loss(hidden, weight, ids, objective=objective, chunk_size=chunk_size, backend="cpu", **batch)
    output.loss.backward()
    return output.per_token_logps, hidden.grad


def logps_of(hidden, weight, ids, advantages, old, chunk_size):
    """(logps, dL/dhidden) of logps and entropies."""
    hidden = hidden.clone().requires_grad_()
    call = dict(return_entropy=True, chunk_size=chunk_size, backend="cpu")
    logps, entropies = linear_logps(hidden, weight, ids, **call)
    (logps * (advantages[:, None] + old) + 0.1 * entropies).sum().backward()
    return logps.detach(), hidden.grad


@pytest.mark.parametrize("function", [loss_of, logps_of])
def test_bits_of_a_row_from_hidden_states(dtype, function):
    """logps and dH of a row: the same alone, in any batch and order, with any chunks and threads."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(SEQUENCES, TOKENS, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) * 3 / WIDTH**0.5).to(dtype)
    ids = torch.randint(VOCAB, (SEQUENCES, TOKENS), generator=generator)
    advantages = torch.randn(SEQUENCES, generator=generator)
    old = linear_logps(hidden, weight, ids, backend="cpu") + 0.2 * torch.randn(SEQUENCES, TOKENS, generator=generator)

    def call(sequences, tokens, chunk_size=None, count=1):
        inputs = hidden[sequences][:, tokens], weight, ids[sequences][:, tokens]
        with threads(count):
            return function(*inputs, advantages[sequences], old[sequences][:, tokens], chunk_size)

    everything = slice(None)
    logps, gradient = call(everything, everything)
    assert (gradient.flatten(0, 1).norm(dim=-1) > 0).sum() > SEQUENCES * TOKENS // 2
    for chunk_size, count in ((1, 2), (7, 1), (20, 3), (None, 2)):
        got = call(everything, everything, chunk_size, count)
        assert_same(got[0], logps)
        assert_same(got[1], gradient)
    backwards = torch.arange(SEQUENCES - 1, -1, -1)
    for sequences, tokens in ((slice(1, 2), slice(4, 5)), (slice(3, 4), everything), (backwards, slice(2, None))):
        got = call(sequences, tokens)
        assert_same(got[0], logps[sequences][:, tokens])
        assert_same(got[1], gradient[sequences][:, tokens])
    if function is loss_of:  # the ratio of a first update is 1
        scored = linear_logps(hidden[1:2], weight, ids[1:2], chunk_size=5, backend="cpu")
        assert_same(scored, logps[1:2])
