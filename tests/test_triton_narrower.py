"""Gradients of the Triton backend that are narrower than their fp32 logits: elsewhere, and in their rows' second half.

Truth is float64, and the fp32 gradient rounded by torch. That no thread reads what another has overwritten is looked
up in a record of all accesses, because Triton's interpreter lets nothing happen at the same time.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from cuda_rows import exact, exact_grad, rows_of

from fastgrpo.backends import Rows, Scores, TokenSpec
from fastgrpo.backends import triton as backend
from fastgrpo.backends.triton import launch

if (_why := backend.unavailable()) is not None:
    pytest.skip(_why, allow_module_level=True)

from fastgrpo.backends.triton.memory import LANES_FIRST  # noqa: E402  # which needs Triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # errors of rounding, relative
LONG = 2251  # odd; 8 tiles and some, and 3 parts


@pytest.fixture(autouse=True)
def small_geometry(monkeypatch):
    """Tiles of 64 vectors, 256 fp32 logits, and parts of four tiles."""
    monkeypatch.setattr(launch, "geometry", lambda V, dtype: launch.Geometry(16 // dtype.itemsize, 32, 1, 256))


@pytest.fixture(params=["rows", "parts"])
def path(request, monkeypatch):
    """Both ways through a row: one program, or one program per part."""
    monkeypatch.setattr(launch, "split", lambda n, V, geometry, device: request.param == "parts")
    return request.param


# How the rows of logits lie: (elements before the first, from row to row for a V, bytes from a row to its gradient).
# "engine": as the projection's buffer. "tight": no padding. "odd": another phase in every row, and the gradient begins
# somewhat behind the row's middle.
OWN = {
    "engine": (0, lambda V: -(-V // 64) * 64, lambda V: 2 * (-(-V // 64) * 64)),
    "tight": (0, lambda V: V, lambda V: 2 * V),
    "odd": (1, lambda V: V + 3, lambda V: 2 * V + 6),
}
PLACES = [*OWN, "elsewhere", "elsewhere, another phase", "between the rows"]
WAYS = [*((torch.bfloat16, place) for place in PLACES), (torch.float16, "engine"), (torch.float16, PLACES[-2])]


def make(V, place, dtype, n=4, seed=0):
    """(memory as int16, logits (2, n/2, V) fp32, out in `dtype`); NaN wherever no logit is, in one row more, too."""
    own = place in OWN
    offset, stride, start = OWN[place] if own else OWN["engine"]
    apart = 2 * stride(V) if place == "between the rows" else stride(V)
    memory = torch.full((offset + (n + 1) * apart + 8,), math.nan, device=DEVICE)
    logits = memory.as_strided((2, n // 2, V), (n // 2 * apart, apart, 1), offset)
    logits.copy_(3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))
    at = 4 * offset + (4 * stride(V) if place == "between the rows" else start(V))
    if own or place == "between the rows":
        out = memory.view(dtype).as_strided(logits.shape, (n * apart, 2 * apart, 1), at // 2)
    else:
        elsewhere = torch.full(((n + 1) * apart,), math.nan, dtype=dtype, device=DEVICE)
        out = elsewhere.as_strided(logits.shape, logits.stride(), 3 if "phase" in place else 0)
    return memory.view(torch.int16), logits, out


def slots(memory, x):
    """(len(memory),) bool: which of the 2-byte slots of `memory` hold x."""
    found = torch.zeros_like(memory, dtype=torch.bool)
    first, wide = (x.data_ptr() - memory.data_ptr()) // 2, x.element_size() // 2
    if 0 <= first < len(memory):
        stride_b, stride_t, _ = x.stride()
        found.as_strided((*x.shape[:2], wide * x.shape[2]), (wide * stride_b, wide * stride_t, 1), first).fill_(True)
    return found


def vectors(n, V, seed=1):
    """(ids, mask, inv_temperature) of n rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (n,), generator=generator).to(DEVICE)
    mask = torch.ones(n, dtype=torch.bool, device=DEVICE)
    return ids, mask, (0.5 + torch.rand(n, generator=generator)).to(DEVICE)


def vector(*numbers):
    return torch.tensor(numbers, device=DEVICE)


def check(out, fp32, want, name):
    """out is the fp32 gradient, rounded as torch does, and near the truth."""
    same = fp32.to(out.dtype)
    assert out.isnan().equal(same.isnan()), f"{name}: not where NaN is expected"
    assert torch.equal(out.nan_to_num(), same.nan_to_num()), f"{name}: not the fp32 gradient, rounded"
    error = (out.double() - want).abs().nan_to_num()
    limit = NARROW[out.dtype] * want.abs() + 1e-5 * want.abs().amax() + 1e-6
    worst = int((error - limit).argmax())
    assert (error <= limit).all(), f"{name}: {out.flatten()[worst]} for {want.flatten()[worst]} at {worst}"


def true_gradient(logits, ids, g, h, inv_temperature, softcap=None):
    z = logits.double().requires_grad_()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    _, _, entropy, p, log_p = exact(capped, ids, inv_temperature)
    return torch.autograd.grad(capped, z, exact_grad(ids, g, h, inv_temperature, entropy, p, log_p).view_as(z))[0]


def softcap_of(V):
    return 20.0 if V in (131, 300) else None


@functools.cache
def fp32_row_grad(V):
    """(logits, rows, scores, g, ways): `row_grad` to fp32, each way an (h, gradient, true gradient)."""
    _, logits, _ = make(V, "engine", torch.bfloat16)
    logits = logits.contiguous()
    ids, mask, inv_t = vectors(4, V)
    ids[0], ids[1] = 0, V - 1  # targets in the row's ends
    g, h = vector(1.5, -0.7, 0.0, 0.4), vector(0.2, -0.4, 0.0, 0.0)
    scores = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True, softcap=softcap_of(V))
    rows, ways = Rows(ids, None, inv_t), []
    for weight in (None, h):
        want, fp32 = true_gradient(logits, ids, g, weight, inv_t, softcap_of(V)), torch.full_like(logits, math.nan)
        backend.row_grad(logits, rows, scores, g, weight, fp32, softcap=softcap_of(V))
        ways.append((weight, fp32, want))
    logits[1, 0] = math.nan  # g and h are 0: not read
    return logits, rows, scores, g, ways


# 1 and 7: only ends; 131: no full tile; 300: one tile, even.
@pytest.mark.parametrize("V", [1, 7, 131, 300, LONG])
@pytest.mark.parametrize("dtype, place", WAYS, ids=str)
def test_row_grad(dtype, place, V):
    memory, logits, out = make(V, place, dtype)
    kept, rows, scores, g, ways = fp32_row_grad(V)
    untouched, before = ~(slots(memory, logits) | slots(memory, out)), memory.clone()
    for h, fp32, want in ways:
        out.fill_(math.nan)
        logits.copy_(kept)
        backend.row_grad(logits, rows, scores, g, h, out, softcap=softcap_of(V))
        check(out, fp32, want, f"h {h}")
        assert (out[1, 0] == 0).all()
        assert torch.equal(memory[untouched], before[untouched])


@functools.cache
def fp32_token_loss(V, path):
    """(logits, arguments, options, result, gradient, true gradient) of `token_loss` to fp32."""
    _, logits, _ = make(V, "engine", torch.bfloat16, n=8)
    logits = logits.contiguous()
    ids, mask, inv_t = vectors(8, V)
    mask[1] = False
    advantages = vector(1.0, 1.0, 0.0, -2.0, 1.0, -1.0, 1.0, -1.0)
    shift = vector(0.01, 0.0, 0.03, -0.1, 1000.0, -1000.0, -1000.0, 1000.0)  # of the log ratio
    h, options = 0.03 * shift.clamp(-1, 1), dict(want_entropy=True, softcap=softcap_of(V))
    rows = Rows(ids, mask, inv_t)
    logp = backend.row_stats(logits, rows, **options).logp
    logits[0, 1] = math.nan
    token = rows_of(8, DEVICE, advantages=advantages, old=logp - shift, h=torch.where(advantages == 0, 0.0, h))
    spec, fp32 = TokenSpec(numbers=(0.8, 1.2, 3.0, math.inf), skip_zero=1), torch.full_like(logits, math.nan)
    arguments = rows, token, spec
    kept = logits.clone()
    result = backend.token_loss(logits, *arguments, fp32, **options)
    assert torch.equal(kept.nan_to_num(7.0), logits.nan_to_num(7.0)), "logits whose gradient goes elsewhere"
    learns = mask & (advantages != 0)
    g, h = (torch.where(learns, x, 0.0) for x in (result.g, token.h))
    want = true_gradient(logits.nan_to_num(), ids, g, h, inv_t, softcap_of(V))
    return logits, arguments, options, result, fp32, want


@pytest.mark.parametrize("V", [1, 131, LONG])
@pytest.mark.parametrize("dtype, place", WAYS, ids=str)
def test_token_loss(dtype, place, V, path):
    memory, logits, out = make(V, place, dtype, n=8)
    kept, arguments, options, result, fp32, want = fp32_token_loss(V, path)
    logits.copy_(kept)
    untouched, before = ~slots(memory, out), memory.clone()
    if place in OWN:
        untouched &= ~slots(memory, logits)
    got = backend.token_loss(logits, *arguments, out, **options)
    for name, a, b in zip(got._fields, got, result, strict=True):
        assert torch.equal(a, b), name
    check(out, fp32, want, place)
    rows = out.flatten(0, 1)
    assert (rows[1:3] == 0).all() and (V == 1 or rows[[0, 3, 4, 5, 6, 7]].any(1).all())
    assert torch.equal(memory[untouched], before[untouched])


@pytest.mark.parametrize("place", ["engine", "elsewhere"])
def test_what_overflows_fp16_is_infinite(place):
    _, logits, out = make(300, place, torch.float16)
    ids, mask, inv_t = vectors(4, 300)
    g = vector(1e6, -1e6, 1e9, 6e4)
    scores, fp32 = backend.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=False), torch.empty_like(logits)
    for to in (fp32, out):
        backend.row_grad(logits, Rows(ids, None, inv_t), scores, g, None, to)
    assert out.isposinf().any() and out.isneginf().any() and out.isfinite().any()
    assert torch.equal(out, fp32.half())


@pytest.mark.parametrize("dtype", list(NARROW), ids=str)
def test_no_rows(dtype):
    buffer = torch.empty(1, 0, 64, device=DEVICE)
    logits, out = buffer[..., :50], buffer.view(dtype)[..., 64:114]
    none = torch.empty(0, device=DEVICE)
    backend.row_grad(logits, Rows(none.long(), None, none), Scores(none, none, none), none, None, out)
    rows = Rows(none.long(), none.bool(), none)
    got = backend.token_loss(logits, rows, rows_of(0, DEVICE, advantages=none), TokenSpec(), out, want_entropy=True)
    assert [x.shape for x in got] == [(0,)] * 7


def test_a_gradient_elsewhere_leaves_the_logits_alone(path):
    logits, out = torch.randn(1, 3, 4099, device=DEVICE), torch.full((1, 3, 4099), math.nan, device=DEVICE)
    ids, mask, inv_t = vectors(3, 4099)
    kept, token = logits.clone(), rows_of(3, DEVICE, advantages=vector(1.0, 0.0, -2.0))
    mask[2] = False
    found = []
    for to in (out, logits):
        backend.token_loss(logits, Rows(ids, mask, inv_t), token, TokenSpec(), to, want_entropy=False)
        found.append(torch.equal(logits, kept))
    assert found == [True, False] and torch.equal(out, logits)


# ---- races


class Accesses:
    """Who reads and writes what in `memory`, as the interpreter runs programs one after another."""

    ANY = -1  # a thread that may be each of a program's

    def __init__(self, memory, monkeypatch, *, barriers=True):
        from triton.runtime.interpreter import InterpreterBuilder

        self.memory, self.launch, self.times, self.seen = memory, 0, {}, []
        real = {name: getattr(InterpreterBuilder, f"create_masked_{name}") for name in ("load", "store")}

        def load(builder, pointers, mask, *rest):
            self.note(builder, False, pointers, mask)
            return real["load"](builder, pointers, mask, *rest)

        def store(builder, pointers, value, mask, *rest):
            self.note(builder, True, pointers, mask)
            return real["store"](builder, pointers, value, mask, *rest)

        def barrier(builder):
            program = self.program(builder)
            self.times[program] = self.times.get(program, 0) + barriers

        def run(*args, real=launch.run, **more):
            self.launch += 1
            real(*args, **more)

        for name, function in (("masked_load", load), ("masked_store", store), ("barrier", barrier)):
            monkeypatch.setattr(InterpreterBuilder, f"create_{name}", function)
        monkeypatch.setattr(launch, "run", run)

    def program(self, builder):
        return self.launch, builder.grid_idx[0]

    def note(self, builder, stores, pointers, mask):
        """Remember the slots of 2 bytes that are accessed, each with its thread: a tile has a lane per thread."""
        address = np.asarray(pointers.data)
        thread = np.full(address.shape, self.ANY)
        if address.size > 1:
            lanes = 0 if LANES_FIRST.value else address.ndim // 2  # of a tile, or of a row's ends
            thread = np.indices(address.shape)[lanes]
        inside = np.broadcast_to(np.asarray(mask.data), address.shape).astype(bool)
        wide = max(1, pointers.get_element_ty().primitive_bitwidth // 16)
        slot = (address[inside].astype(np.int64) - self.memory.data_ptr())[:, None] // 2 + np.arange(wide)
        here = (slot[:, 0] >= 0) & (slot[:, -1] < len(self.memory))
        if here.any():
            program = self.program(builder)
            time = self.times.get(program, 0)
            self.seen.append((program, time, stores, slot[here].ravel(), np.repeat(thread[inside][here], wide)))

    def races(self):
        """How many slots a thread stores to while another one accesses them: without a barrier between the two, or in
        another program of the same launch.

        That all programs of a row read its target's logit is none: only the one that overwrites it uses it.
        """
        together, raced = {}, np.zeros(len(self.memory), bool)
        for (number, program), time, stores, slot, thread in self.seen:
            together.setdefault((number, program, time), []).append((stores, slot, thread))
            if stores or thread[0] != self.ANY:
                together.setdefault(number, []).append((stores, slot, np.full(len(slot), program)))
        for accesses in together.values():
            writer = np.full(len(self.memory), -2)
            for stores, slot, who in sorted(accesses, key=lambda x: not x[0]):
                raced[slot[(writer[slot] != -2) & ((writer[slot] != who) | (who == self.ANY))]] = True
                if stores:
                    writer[slot] = who
        return int(raced.sum())


def prepare(kernel, place, V, monkeypatch):
    """(memory of the gradient, what is to be called): a kernel on rows of which one is idle, and one is masked.

    place None: over the logits themselves.
    """
    memory, logits, out = make(V, place or "engine", torch.bfloat16)
    out = logits if place is None else out
    if place is not None and "elsewhere" in place:
        memory = out._base.view(torch.int16)
    ids, mask, inv_t = vectors(4, V)
    ids[0], ids[1] = V - 1, V // 2  # what the gradient of the row's tail, and of its head, overwrites
    mask[2] = False
    g = vector(1.0, -2.0, 0.0, 0.0)
    rows, scores = Rows(ids, mask, inv_t), Scores(g, torch.full_like(g, 10.0), g)
    token = rows_of(4, DEVICE, advantages=g, h=0.1 * g)
    monkeypatch.setattr(launch, "split", lambda *_: "split" in kernel)

    def call():
        if kernel == "row_grad":
            backend.row_grad(logits, rows, scores, g, 0.1 * g, out)
        else:
            with backend.using(lanes=1024 if "wide" in kernel else 512, programs=2):
                backend.token_loss(logits, rows, token, TokenSpec(), out, want_entropy=True)

    return memory, call


RUNS = ["row_grad", "token_loss", "token_loss, wide", "token_loss, split"]


interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter shows accesses")


@interpreted
# 3: only ends; 515: behind a head of 3 elements two full tiles, of which the second has no barrier.
@pytest.mark.parametrize("V", [3, 515, LONG])
@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("kernel", RUNS)
def test_no_thread_accesses_what_another_overwrites(kernel, place, V, monkeypatch):
    memory, call = prepare(kernel, place, V, monkeypatch)
    accesses = Accesses(memory, monkeypatch)
    call()
    assert accesses.seen and accesses.races() == 0


@interpreted
@pytest.mark.parametrize("place", [None, *OWN])
@pytest.mark.parametrize("kernel", RUNS)
def test_without_barriers_some_would(kernel, place, monkeypatch):
    memory, call = prepare(kernel, place, LONG, monkeypatch)
    accesses = Accesses(memory, monkeypatch, barriers=False)
    call()
    assert accesses.races() >= (1 if place is None else 1000)


@interpreted
@pytest.mark.parametrize("place", OWN)
def test_several_programs_over_a_row_would(place, monkeypatch):
    real, launched = launch.sweep, []
    memory, call = prepare("row_grad", place, LONG, monkeypatch)

    def sweep(kernel, programs, cut, *args, **constants):  # a program per part, as where the gradient lies elsewhere
        launched.append(programs)
        constants["INPLACE"] = False
        real(kernel, 4 * cut.parts(LONG), cut, *args[:-1], cut.PART, **constants)

    monkeypatch.setattr(launch, "sweep", sweep)
    accesses = Accesses(memory, monkeypatch)
    call()
    assert launched == [4] and accesses.races() > 1000


# Bytes from an aligned address to the logits and to the gradient; from row to row, in elements of each.
@pytest.mark.parametrize(
    "logits, out, strides, dtype, same",
    [
        (0, 0, (64, 64), torch.float32, True),
        (4, 4, (63, 63), torch.float32, True),
        (4, 8, (64, 64), torch.float32, False),
        (4, 4, (64, 65), torch.float32, False),
        (0, 0, (64, 64), torch.bfloat16, True),
        (0, 8, (64, 128), torch.bfloat16, True),
        (4, 2, (61, 65), torch.bfloat16, True),  # both a vector's second element, in every row
        (4, 4, (61, 61), torch.bfloat16, False),
        (0, 4, (64, 64), torch.bfloat16, False),
        (0, 0, (63, 126), torch.bfloat16, False),
    ],
)
def test_same_phase(logits, out, strides, dtype, same):
    memory = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    x = memory[logits : logits + 2048].view(torch.float32).as_strided((1, 2, 60), (0, strides[0], 1), logits // 4)
    y = memory.view(dtype).as_strided((1, 2, 60), (0, strides[1], 1), out // dtype.itemsize)
    assert launch.same_phase(x, y) == same
