"""What every backend has in common: the functions of the contract, which calls it refuses, and group advantages; and
that the structures of Python and C are the same."""

from __future__ import annotations

import ctypes
import inspect
import math

import pytest
import torch
from cuda_rows import make, rows_of

from fastgrpo import backends, group_advantages
from fastgrpo.backends import Backend, Call, Rows, TokenSpec, native

FUNCTIONS = [name for name, value in vars(Backend).items() if inspect.isfunction(value) and not name.startswith("_")]
TWICE = {"cpu": "reads a row twice", "triton": "second reading", "torch": "more than once"}
USUAL = dict(dtype=torch.bfloat16, vocab=151936)
# What differs from a usual call on the backend's own device: who refuses it, and with what words.
CALLS = {
    "usual": ({}, {}),
    "index": (dict(device_index=0), {}),
    "meta": (dict(device_type="meta"), {name: "on meta" for name in ("cpu", "cuda", "triton")}),
    "float64": (dict(dtype=torch.float64), {name: "float64" for name in ("cpu", "cuda", "triton")}),
    "int8": (dict(dtype=torch.int8), {name: "int8" for name in ("cpu", "cuda", "triton")}),
    "softcap": (dict(softcap=30.0), {"cuda": "softcap: expected None"}),
    "fused": (dict(fused=True), {"torch": "no fused objective"}),
    "softcap, fused": (dict(softcap=30.0, fused=True), {"cuda": "softcap", "torch": "no fused objective"}),
    "one pass": (dict(one_pass=True), TWICE),
    "one pass, fp32": (dict(one_pass=True, dtype=torch.float32), TWICE),
    "a row that no cluster holds": (dict(vocab=2_000_003), {}),
    "the same in one pass": (dict(vocab=2_000_003, one_pass=True), {"cuda": "no room", **TWICE}),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_a_backend_refuses(call, backend, device):
    changes, refused = CALLS[call]
    why = backends.get(backend).refuses(Call(**{"device_type": device, "device_index": None, **USUAL, **changes}))
    if backend in refused:
        assert why is not None and refused[backend] in why
    else:
        assert why is None


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_has_the_functions_of_the_contract(name):
    module = backends.get(name)
    assert isinstance(module, Backend) and len(FUNCTIONS) == 6
    for function in FUNCTIONS:
        _, *parameters = inspect.signature(getattr(Backend, function)).parameters.values()  # but self
        signature = inspect.signature(getattr(module, function))
        assert list(signature.parameters.values()) == parameters, function
        assert signature.return_annotation == inspect.signature(getattr(Backend, function)).return_annotation


def test_results_have_no_entropy_unless_it_is_wanted(backend, device):
    kernels = backends.get(backend)
    logits, *vectors = make(1, 3, 100, device=device)
    rows, token = Rows(*vectors), rows_of(3, device, advantages=torch.ones(3, device=device))
    for wanted in (False, True):
        results = [kernels.row_stats(logits, rows, want_entropy=wanted)]
        if backend != "torch":
            for h in (None, torch.ones(3, device=device)):
                results.append(
                    kernels.token_loss(logits, rows, token._replace(h=h), TokenSpec(), None, want_entropy=wanted)
                )
        assert all((x.entropy is not None) == wanted for x in results)


@pytest.mark.parametrize("scale_by_std", [False, True])
def test_group_advantages(scale_by_std, backend, device):
    """Once per sequence: those of rows are their sequence's, to the last bit, for more sequences than a block of
    threads has; NaN rewards and groups without spread are 0."""
    if backend == "torch":
        pytest.skip("no fused objective")
    kernels, size = backends.get(backend), 4
    sequences, tokens = (300, 2) if backend == "cuda" else (20, 3)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(sequences, generator=generator) + 100
    rewards[:size], rewards[size + 1], rewards[3 * size - 3 : 3 * size] = 0.1, math.nan, math.nan
    want = group_advantages(rewards.double(), size, scale_rewards="group" if scale_by_std else "none")
    spec = TokenSpec(group_size=size, scale_by_std=scale_by_std)
    rewards, want = rewards.to(device), want.to(device)

    def loss(tokens, **given):
        logits, *vectors = make(sequences, tokens, 19, device=device)
        n = sequences * tokens
        seq = torch.arange(sequences, dtype=torch.int32, device=device).repeat_interleave(tokens)
        token = rows_of(n, device, weight=torch.ones(n, device=device), **given)
        token = token._replace(seq=None if token.rewards is None else seq)
        return kernels.token_loss(logits, Rows(*vectors), token, spec, None, want_entropy=False)

    per_sequence = -loss(1, rewards=rewards).loss  # the ratio is 1
    torch.testing.assert_close(per_sequence.double(), want, rtol=1e-5, atol=1e-5)
    assert (per_sequence[:size] == 0).all() and per_sequence[size + 1] == 0 and per_sequence.count_nonzero() > 10
    found, known = loss(tokens, rewards=rewards), loss(tokens, advantages=per_sequence.repeat_interleave(tokens))
    assert torch.equal(found.loss, known.loss) and torch.equal(found.g, known.g)


def _swapped(fields, i):
    """The same fields, but numbers i and i + 1 in each other's place."""
    return [*fields[:i], fields[i + 1], fields[i], *fields[i + 2 :]]


def _structures():
    """(the first field at fault, such a structure) of everything that a build of other sources may differ in."""
    fields = native.Args._fields_
    size = ctypes.sizeof
    for i, ((name, kind), (_, after)) in enumerate(zip(fields, fields[1:], strict=False)):
        if size(kind) == size(after):
            yield name, _swapped(fields, i)
    at = next(i for i, (name, _) in enumerate(fields) if name == "spec")
    spec = type("Spec", (ctypes.Structure,), {"_fields_": _swapped(native.Spec._fields_, 2)})
    yield "spec.beta", [*fields[:at], ("spec", spec), *fields[at + 1 :]]
    yield fields[-1][0], fields[:-1]
    yield "another", [*fields, ("another", ctypes.c_int64)]


@pytest.mark.parametrize("name", ["fastgrpo_cpu", "fastgrpo_cuda"])
def test_a_library_with_other_fields_is_refused(name, request, monkeypatch):
    """Also where sizes agree: it would take one pointer for another."""
    if name == "fastgrpo_cuda":
        path = request.getfixturevalue("cuda_host_library")
        monkeypatch.setattr(native, "library_path", lambda name: path)
    elif (why := backends.get("cpu").unavailable()) is not None:
        pytest.skip(f"backend cpu: {why}")
    assert native.load(name, "a compiler")[1] is None
    cases = list(_structures())
    assert len(cases) > 20
    for field, fields in cases:
        monkeypatch.setattr(native, "Args", type("Args", (ctypes.Structure,), {"_fields_": fields}))
        library, why = native.load(name, "a compiler")
        assert library is None and f"the field {field}, " in why and "reinstall fastgrpo" in why, (field, why)
