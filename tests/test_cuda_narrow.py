"""The CUDA backend's gradients of fp32 logits in bf16 and fp16: elsewhere, and in the second half of the rows' own
memory, over logits that other threads, and other blocks of the cluster, still have to read. On a GPU where there is
one, else on the machine of cuda_host, which sees who overwrites what another has not read."""

from __future__ import annotations

import ctypes
import math

import cuda_host
import pytest
import torch
from cuda_rows import exact, exact_grad, make, rows_of

from fastgrpo.backends import Rows, Scores, TokenSpec, cuda

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
CLUSTERS = (-1, 1, 2, 4, 8, 16)  # -1: two passes
# V, the first row's offset and what is between rows, in fp32 elements. 1, 2, 5: nothing but edges; 61: slices without
# an element; 4099: odd; 10007: more than two tiles of two passes. With an odd stride, halves of rows begin anywhere.
SHAPES = [
    (1, 1, 0),
    (2, 1, 1),
    (5, 3, 3),
    (61, 0, 0),
    (61, 2, 3),
    (1000, 0, 24),
    (1000, 1, 0),
    (4099, 2, 5),
    (10007, 3, 1),
]


@pytest.fixture
def device(cuda_anywhere):
    return cuda_anywhere


def seed(device, number):
    if device == "cpu":
        cuda._load()[0].fastgrpo_host_seed(ctypes.c_uint64(number))


def own_memory(logits):
    """A copy of the logits and what lies around them, and the same memory as integers of 16 bits."""
    base = logits._base.clone()
    return base.as_strided(logits.shape, logits.stride(), logits.storage_offset()), base.view(torch.int16)


def second_half(logits, dtype):
    """Where a gradient lies in the rows' own memory: half a stride after each row's start."""
    *strides, _ = logits.stride()
    at = 2 * logits.storage_offset() + strides[-1]
    return logits._base.view(dtype).as_strided(logits.shape, (*(2 * x for x in strides), 1), at)


def places(logits, dtype):
    """{where: (logits to read, gradient, its memory in integers, those that it may change)}; what is elsewhere begins
    at every address modulo 8."""
    for name in ("second half", "aligned", "2 bytes on", "4 bytes on", "6 bytes on"):
        read, memory = own_memory(logits)
        if name == "second half":
            out = second_half(read, dtype)
        else:
            store = torch.full((2 * logits._base.numel() + 64,), math.nan, dtype=dtype, device=logits.device)
            lead = 0 if name == "aligned" else int(name[0]) // 2
            stride = (logits.stride(1) + 7) // 8 * 8
            out = store.as_strided(logits.shape, (logits.shape[1] * stride, stride, 1), 8 + lead)
            memory = store.view(torch.int16)
        inside = torch.zeros_like(memory, dtype=torch.bool)
        inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
        yield name, read, out, memory, inside


def assert_gradient(where, out, memory, before, inside, wide, want, atol):
    """It is that of fp32, rounded once; right; and nothing around it has changed."""
    assert torch.equal(out, wide.to(out.dtype)), where
    got = out.flatten(0, 1).double()
    torch.testing.assert_close(got, want, rtol=ROUNDING[out.dtype], atol=atol, msg=lambda text: f"{where}: {text}")
    assert torch.equal(memory[~inside], before[~inside]), f"{where}: what is around the gradient"


@pytest.mark.parametrize("V, offset, extra", SHAPES)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_row_grad(dtype, V, offset, extra, device):
    """With and without the entropy's gradient; a row without a gradient may hold NaN, and gets zeroes."""
    logits, ids, _, inv_t = make(2, 2, V, offset=offset, stride=V + extra, device=device)
    logp, lse, entropy, p, log_p = exact(logits, ids, inv_t)
    scores = Scores(logp.float(), lse.float(), entropy.float())
    g, h = torch.randn(2, 4, generator=torch.Generator().manual_seed(V)).to(device)
    g[1] = h[1] = 0
    logits[0, 1] = math.nan
    for slope in (None, h):
        want = exact_grad(ids, g, slope, inv_t, entropy, p, log_p)
        atol = 2e-6 * float(g.abs().max() + h.abs().max()) + 2**-25
        wide = torch.full_like(logits, math.nan)
        cuda.row_grad(logits, Rows(ids, None, inv_t), scores, g, slope, wide)
        for turn, (where, read, out, memory, inside) in enumerate(places(logits, dtype)):
            seed(device, turn)
            before = memory.clone()
            cuda.row_grad(read, Rows(ids, None, inv_t), scores, g, slope, out)
            assert (out[0, 1] == 0).all()
            assert_gradient(where, out, memory, before, inside, wide, want, atol)


@pytest.mark.parametrize("V, offset, extra", SHAPES)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_token_loss(cluster, dtype, V, offset, extra, device):
    """More rows than are on their way at once, one of which is masked and holds NaN, and one without an advantage; the
    statistics are, bit for bit, those of any other call."""
    n = 9
    logits, ids, mask, inv_t = make(3, 3, V, offset=offset, stride=V + extra, device=device)
    _, _, entropy, p, log_p = exact(logits, ids, inv_t)
    advantages, h = torch.randn(2, n, generator=torch.Generator().manual_seed(V)).to(device)
    mask[1], advantages[2] = False, 0
    logits[0, 1] = math.nan
    for slope in (None, h):
        rows = rows_of(n, device, advantages=advantages, h=slope)  # the loss is advantage/4 at ratio 1
        want = exact_grad(ids, -advantages / 4, slope, inv_t, entropy, p, log_p) * mask[:, None]
        atol = 2e-6 * float(advantages.abs().max() + h.abs().max()) + 2**-25
        with cuda.using(cluster=cluster):
            wide, _ = own_memory(logits)
            results = cuda.token_loss(wide, Rows(ids, mask, inv_t), rows, TokenSpec(), wide, want_entropy=True)
            for turn, (where, read, out, memory, inside) in enumerate(places(logits, dtype)):
                seed(device, turn)
                before = memory.clone()
                got = cuda.token_loss(read, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=True)
                assert all(map(torch.equal, got, results)), where
                assert (out[0, 1] == 0).all() and (slope is not None or (out[0, 2] == 0).all())
                assert_gradient(where, out, memory, before, inside, wide, want, atol)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_a_real_vocabulary(dtype, device):
    """In the shape that is chosen for it, and in two passes; copies that come late, soon, and at any moment."""
    V = 151_936
    logits, ids, mask, inv_t = make(1, 3, V, device=device)
    true = exact(logits, ids, inv_t)
    rows = rows_of(3, device, advantages=torch.tensor([1.0, -2.0, 0.5], device=device))
    want = exact_grad(ids, -0.25 * rows.advantages, None, inv_t, *true[2:])
    assert cuda.shape(V, torch.float32, 0, out_dtype=dtype)[:-2] == cuda.shape(V, torch.float32, 0)[:-2]
    for cluster, turn in ((0, 0), (0, 1), (0, 2), (-1, 0)):
        seed(device, turn)
        read, _ = own_memory(logits)
        out = second_half(read, dtype)
        with cuda.using(cluster=cluster):
            results = cuda.token_loss(read, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=True)
        torch.testing.assert_close(results.logp.double(), true[0], rtol=1e-6, atol=2e-6)
        error = (out[0].double() - want).norm() / want.norm()
        assert error <= ROUNDING[dtype]


def test_other_dtypes_are_refused(device):
    logits, ids, _, inv_t = make(1, 1, 50, torch.bfloat16, device=device)
    lse, g = torch.zeros(2, 1, device=device)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match=f"out: expected the dtype of the logits, torch.bfloat16, got {dtype}"):
            cuda.row_grad(logits, Rows(ids, None, inv_t), Scores(lse, lse, None), g, None, logits.to(dtype))


# ---- what is wrong is seen

# {file: {text: what is there in its place}}, each for a number of `planted`
PLANTED = {
    "one_pass.cu": {
        "const Sums part = block_sums(sums, top, exponent, kWarpSums);": (
            "const Sums part = block_sums(sums, top, exponent, kWarpSums);\n"
            "if (planted == 1 && !kAsWide<E, O>) zero(Span<O>(p.a.out, plan.out, plan.count), thread, kWorkers);"
        ),
    },
    "two_pass.cu": {
        "sync_threads(kWorkersBarrier, kWorkers);  // no store of a tile before": (
            "if (planted != 2) sync_threads(kWorkersBarrier, kWorkers);  // no store of a tile before"
        ),
        "const int last = end - 1 - thread_index();": (
            "const int last = (planted != 3 ? end : first + whole - end + kAtOnce * kWorkers) - 1 - thread_index();"
        ),
        "FASTGRPO_DEVICE int backwards(int first, int end, L load, S store) {": (
            "FASTGRPO_DEVICE int backwards(int first, int end, L load, S store) {\n  const int whole = end;"
        ),
        "sync_threads(kWorkersBarrier, kWorkers);  // no edge is stored": (
            "if (planted != 4) sync_threads(kWorkersBarrier, kWorkers);  // no edge is stored"
        ),
    },
}
# planted: (V, offset, extra, clusters that show it)
SHOWN = {1: (4096, 0, 0, (2, 4, 16)), 2: (10007, 0, 0, (-1,)), 3: (12288, 0, 0, (-1,)), 4: (2, 1, 1, (-1,))}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """planted(number): the machine's kernels have this fault from now on; 0: none."""
    if (why := cuda_host.unavailable()) is not None:
        pytest.skip(why)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, which sees no race")
    directory = tmp_path_factory.mktemp("planted")
    sources = []
    for path in sorted((cuda_host.CSRC / "cuda").glob("*.cu")):
        text = path.read_text()
        for old, new in PLANTED.get(path.name, {}).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        declared = {"one_pass.cu": 'extern "C" { int planted = 0; }\n', "two_pass.cu": 'extern "C" int planted;\n'}
        text = declared.get(path.name, "") + text
        sources.append(directory / path.name)
        sources[-1].write_text(text)
    library = cuda_host.build(directory, sources)
    with cuda_host.backend(library) as machine:
        yield lambda number: setattr(ctypes.c_int.in_dll(machine, "planted"), "value", number)


@pytest.mark.parametrize("number", SHOWN)
def test_what_is_written_early_is_seen(number, planted):
    """By a block before another of the cluster has its slice; by a thread or a tile before another has been read."""
    V, offset, extra, clusters = SHOWN[number]
    logits, ids, mask, inv_t = make(1, 2, V, offset=offset, stride=V + extra, device="cpu")
    rows = rows_of(2, "cpu", advantages=torch.ones(2))
    for fault in (0, number):
        planted(fault)
        for cluster in clusters:
            for turn in range(6):
                seed("cpu", turn)
                read, _ = own_memory(logits)
                call = (read, Rows(ids, mask, inv_t), rows, TokenSpec(), second_half(read, torch.bfloat16))
                with cuda.using(cluster=cluster):
                    if fault == 0:
                        cuda.token_loss(*call, want_entropy=False)
                        continue
                    with pytest.raises(RuntimeError, match=r"race: |copy source: |in flight: ") as error:
                        cuda.token_loss(*call, want_entropy=False)
                    assert "at address" in str(error.value)
