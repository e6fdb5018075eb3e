"""Parts of a chunk on two streams: the cut, the order of what touches the same memory, and the gradients. On a CPU a
stand-in takes the place of the streams, and knows what each operation was enqueued after."""

from __future__ import annotations

import contextlib
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from cases import make_inputs, objective_for, rel_norm

from fastgrpo import Objective, linear_grpo_loss
from fastgrpo.backends import cpu
from fastgrpo.engine import overlap, projection
from fastgrpo.engine.logits import Sweeps

H, V = 16, 203


class Stream:
    def __init__(self):
        self.known = set()  # the operations that one enqueued here now comes after

    def wait_stream(self, other):
        self.known |= other.known


class Operation(NamedTuple):
    name: str
    rows: int
    stream: Stream
    after: set
    reads: list  # tensors, kept: the memory of one that is gone may come again
    writes: list


class Recorder:
    """Streams that record: `operations`, in the order in which they are enqueued."""

    def __init__(self):
        self.main, self.beside = Stream(), (Stream(), Stream())
        self.current, self.operations, self.kept = self.main, [], []

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def keep(self, x):
        self.kept.append(x)

    def enqueue(self, name, rows, reads, writes):
        stream = self.current
        self.operations.append(Operation(name, rows, stream, set(stream.known), reads, writes))
        stream.known.add(len(self.operations) - 1)

    def races(self):
        """Pairs of operations that touch the same memory, one to write, and of which none is after the other."""
        found = []
        for (i, a), (_, b) in combinations(enumerate(self.operations), 2):
            clash = meet(a.writes, b.writes) or meet(a.writes, b.reads) or meet(a.reads, b.writes)
            if clash and i not in b.after:
                found.append((a.name, b.name))
        return found


def span(x):
    """The bytes from its first element to its last."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def meet(some, others):
    return any(a < d and c < b for a, b in map(span, some) for c, d in map(span, others))


@pytest.fixture
def recorder(monkeypatch):
    """Calls on a CPU think that it has streams."""
    recorder = Recorder()
    real_product, real_sweep = projection.product, Sweeps.token_loss

    def product(a, b, out, *, add=False, bias=None):
        reads = [a, b, *([out] if add else []), *([] if bias is None else [bias])]
        name = {V: "project", H: "dW" if a.shape[0] == V else "dH"}[b.shape[1]]
        recorder.enqueue(name, a.shape[1] if name == "dW" else a.shape[0], reads, [out])
        real_product(a, b, out, add=add, bias=bias)

    def token_loss(self, logits, how, want_entropy, out):
        recorder.enqueue("sweep", logits.shape[1], [logits, how.rows.ids], [] if out is None else [out])
        return real_sweep(self, logits, how, want_entropy, out)

    real_stats = cpu.head_stats

    def head_stats(hidden, weight, *args, **options):  # of rows that are only scored, without logits
        recorder.enqueue("project", len(hidden), [hidden, weight], [])
        return real_stats(hidden, weight, *args, **options)

    monkeypatch.setattr(cpu, "head_stats", head_stats)
    monkeypatch.setattr(overlap, "streams", lambda device: recorder)
    monkeypatch.setattr(projection, "product", product)
    monkeypatch.setattr(Sweeps, "token_loss", token_loss)
    return recorder


def run(parts, *, dtype=torch.float32, chunk_size=8, reads=("old",), backend="cpu", device="cpu", **options):
    """(output, dH, dW, db) of a loss from hidden states, some of whose rows are masked and cannot learn."""
    _, ids, kwargs = make_inputs(reads, vocab=V, device=device)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        (0.3 * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()
        for shape in ((*ids.shape, H), (V, H), (V,))
    )
    kwargs["advantages"][0] = 0
    for name in ("old_per_token_logps", "ref_per_token_logps"):  # near those of such a head
        if name in kwargs:
            kwargs[name] = kwargs[name] * 0.1 - 5
    with overlap.using(parts=parts):
        out = linear_grpo_loss(hidden, weight, ids, bias=bias, objective=objective_for("grpo", "token", options),
                               chunk_size=chunk_size, backend=backend, **kwargs)  # fmt: skip
    out.loss.backward()
    return out, hidden.grad, weight.grad, bias.grad


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_results_are_those_of_whole_chunks(dtype, parts, recorder):
    """To rounding: of a GEMM of other shapes, and of sums of a loss over parts."""
    for options in ({}, dict(entropy_coef=0.02, beta=0.1)):
        reads = ("old", "ref") if options else ("old",)
        plain, *want = run(1, dtype=dtype, reads=reads, **options)
        assert {x.stream for x in recorder.operations} == {recorder.main}
        recorder.operations.clear()
        out, *got = run(parts, dtype=dtype, reads=reads, **options)
        assert {x.stream for x in recorder.operations} == {recorder.main, *recorder.beside}
        recorder.operations.clear()
        rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(out.loss, plain.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.per_token_logps, plain.per_token_logps, rtol=1e-5, atol=rounding)
        for a, b in zip(got, want, strict=True):
            assert b.norm() > 0 and rel_norm(a, b.double()) <= rounding


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_every_row_once_and_nothing_races(parts, recorder):
    """Each row is projected, swept and multiplied once; a chunk's dW is one GEMM; what touches the same memory is in
    order, over more than one chunk in the same buffer."""
    run(parts)
    of = {name: [x for x in recorder.operations if x.name == name] for name in ("project", "sweep", "dH", "dW")}
    rows = {name: [x.rows for x in found] for name, found in of.items()}
    assert rows["sweep"] == rows["dH"] and rows["project"][: len(rows["sweep"])] == rows["sweep"]
    assert len(rows["dW"]) > 1 and len(rows["sweep"]) == parts * len(rows["dW"])
    assert sum(rows["dW"]) == sum(rows["sweep"]) < sum(rows["project"])  # some rows are only scored
    streams = [recorder.main] if parts == 1 else recorder.beside
    for kind in ("project", "sweep", "dH"):
        for number, operation in enumerate(of[kind][: len(of["sweep"])]):
            assert operation.stream is streams[number % parts % len(streams)]
    assert all(x.stream is recorder.main for x in of["dW"])
    assert recorder.races() == []
    if parts > 1:  # and parts on the two streams are not in order, or nothing would overlap
        first, second = of["project"][:2]
        assert recorder.operations.index(first) not in second.after


@pytest.mark.parametrize("broken", ["fork", "join"])
def test_a_race_would_be_seen(broken, recorder, monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None) if broken == "fork" else monkeypatch.setattr(
        overlap.Lanes, "join", lambda self, *made: None
    )
    run(2)
    assert {"fork": ("dW", "project"), "join": ("sweep", "dW")}[broken] in recorder.races()


def test_what_parts_made_is_kept_for_the_main_stream(recorder):
    out, *_ = run(4, entropy_coef=0.02)
    assert len(recorder.kept) > 8 and all(x.dim() == 0 for x in recorder.kept)
    assert recorder.main.known >= {i for i, x in enumerate(recorder.operations) if x.stream in recorder.beside}


def test_a_part_that_fails(recorder, monkeypatch):
    """What comes next still waits for the others."""
    real, calls = Sweeps.token_loss, []

    def fails(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise ZeroDivisionError
        return real(self, *arguments)

    monkeypatch.setattr(Sweeps, "token_loss", fails)
    with pytest.raises(ZeroDivisionError):
        run(2)
    assert recorder.current is recorder.main
    assert recorder.main.known == set(range(len(recorder.operations)))


def test_sequences_are_not_cut(recorder):
    """An objective beyond single tokens runs as ever."""
    _, ids, kwargs = make_inputs(("old",), vocab=V)
    hidden, weight = torch.randn(*ids.shape, H, requires_grad=True), torch.randn(V, H)
    with overlap.using(parts=2):
        linear_grpo_loss(hidden, weight, ids, objective=Objective(importance_sampling_level="sequence"), **kwargs)
    assert {x.stream for x in recorder.operations} == {recorder.main}


def test_choices():
    """Off unless chosen; other devices have no such streams."""
    assert overlap._choices.get().parts == 1 and overlap.streams(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="parts: expected one of 1, 2, 4, got 3"), overlap.using(parts=3):
        pass
    lanes = overlap.Lanes(torch.device("cpu"), alone=False)
    assert [(rows, part) for rows, part, _ in lanes.cut(slice(5, 9))] == [(slice(5, 9), slice(0, 4))]


@pytest.mark.parametrize("parts, rows, sizes", [(2, 7, [3, 4]), (4, 8, [2, 2, 2, 2]), (4, 3, [1, 1, 1]), (2, 1, [1])])
def test_the_cut(parts, rows, sizes, recorder):
    with overlap.using(parts=parts):
        lanes = overlap.Lanes(torch.device("cpu"), alone=False)
    cut = [(at, part) for at, part, _ in lanes.cut(slice(10, 10 + rows))]
    assert [at.stop - at.start for at, _ in cut] == sizes
    assert [(part.start + 10, part.stop + 10) for _, part in cut] == [(at.start, at.stop) for at, _ in cut]
    assert cut[0][0].start == 10 and cut[-1][0].stop == 10 + rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("parts", [2, 4])
def test_streams_of_a_gpu(parts):
    for dtype in (torch.float32, torch.bfloat16):
        plain, *want = run(1, dtype=dtype, device="cuda", backend="auto")
        for _ in range(20):
            out, *got = run(parts, dtype=dtype, device="cuda", backend="auto")
            torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=0)
            for a, b in zip(got, want, strict=True):
                assert rel_norm(a, b.double()) <= (1e-5 if dtype == torch.float32 else 4e-3)
