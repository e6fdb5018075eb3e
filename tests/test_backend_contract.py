"""What every backend has in common: the functions of the contract, which calls it refuses, the gradient of nearly
certain targets, and group advantages; and that the structures of Python and C are the same."""

from __future__ import annotations

import ctypes
import inspect
import math

import pytest
import torch
from cuda_rows import make, rows_of

from fastgrpo import (
    Objective,
    backends,
    group_advantages,
    grpo_loss,
    grpo_loss_reference,
    linear_grpo_loss,
    linear_logps,
    selective_logps,
)
from fastgrpo.backends import Backend, Call, Rows, Scores, TokenSpec, native

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


# ---- targets whose p is near 1, as most are of a policy that has learnt: their gradient is g * (1 - p)

REST = (1e-2, 1e-4, 1e-6, 1e-8)  # 1 - p, row by row
LSE = (0, 20, 100)
G, H = (-1.0, 0.5, -0.25, 2.0), (-0.02, 0.01, -0.005, 0.04)  # of one sign, so that nothing cancels in the truth


def certain(lse, device, vocab=300):
    """(logits (1, 4, V) in fp32, ids): targets in a row's ends and within."""
    ids = torch.tensor([0, 5, 150, vocab - 1])
    is_target, rest = torch.arange(vocab) == ids[:, None], torch.tensor(REST, dtype=torch.float64)[:, None]
    z = torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)).double()
    z = z.masked_fill(is_target, -math.inf).log_softmax(-1) + rest.log()
    z = torch.where(is_target, torch.log1p(-rest), z)
    return (z + lse).float()[None].to(device), ids.to(device)


def counted_from_target(z, ids):
    """Row by row, so that the float64 truth about logits of any size keeps its digits: lse is near 0."""
    return z - z.gather(-1, ids[None, :, None]).detach()


def at_target(loss, logits, ids):
    """dL/dlogits of the targets."""
    x = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0][0].gather(-1, ids[:, None])[:, 0].double()


def true_scores(z, ids):
    """logp and entropy in float64."""
    log_p = counted_from_target(z, ids).log_softmax(-1)[0]
    return log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def assert_digits(got, want, tolerance, what):
    error = (got / want - 1).abs()
    assert (error <= tolerance).all(), f"{what}: errors {error.tolist()}"


def of_statistics(backend, device, lse, softcap=None):
    """How far 1 - p may be off: its exponentials are of -32 to 0 in base 2, in fp32 to 7e-7 of the result, and are
    counted from a maximum to the target in two steps. A capped logit is good to 1e-7 of the cap. Triton's interpreter
    rounds the product in an FMA, and with it the digits of a logit."""
    rounded = 2**-24 * lse if backend == "triton" and device == "cpu" else 0
    return 1.5e-6 + rounded + 1e-7 * (softcap or 0)


def instruction_sets(backend, monkeypatch):
    """Chooses each in turn."""
    if backend != "cpu":
        yield ""
        return
    for isa in backends.get("cpu").instruction_sets():
        monkeypatch.setenv("FASTGRPO_CPU_ISA", isa)
        yield isa


@pytest.mark.parametrize("lse, softcap", [*((lse, None) for lse in LSE), (0, 50.0)])
def test_row_grad_of_nearly_certain_targets(lse, softcap, backend, device, monkeypatch):
    """From the backend's own statistics, and from the true ones, beside which a few roundings are all there is."""
    if softcap is not None and backend == "cuda":
        pytest.skip("it takes no softcap")
    logits, ids = certain(lse, device)
    ones, (g, h) = torch.ones(4, device=device), torch.tensor((G, H), device=device)
    rows, kernels = Rows(ids, ones != 0, ones), backends.get(backend)

    def capped(x):
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    logp, entropy = true_scores(capped(logits.double()), ids)
    true = Scores(logp.float(), capped(logits.double()).logsumexp(-1)[0].float(), entropy.float())
    for isa in instruction_sets(backend, monkeypatch):
        own = kernels.row_stats(logits, rows, want_entropy=True, softcap=softcap)
        for slope in (None, h):

            def loss(x, slope=slope):
                logp, entropy = true_scores(capped(x), ids)
                return (g * logp).sum() + (0 if slope is None else (slope * entropy).sum())

            want = at_target(loss, logits.double(), ids)
            own_tolerance = of_statistics(backend, device, lse, softcap)
            for name, scores, tolerance in (("own", own, own_tolerance), ("true", true, 5e-7)):
                out = torch.full_like(logits, math.nan)
                kernels.row_grad(logits, rows._replace(mask=None), scores, g, slope, out, softcap=softcap)
                got = out[0].gather(-1, ids[:, None])[:, 0].double()
                assert_digits(got, want, tolerance, f"{isa} h {slope is not None}, {name} statistics")


def ways(ids, backend):
    """(name, loss of logits by the backend, the same in float64); hidden states are logits, with a weight of 1."""
    ids, g, advantages = ids[None], torch.tensor([G], device=ids.device), torch.tensor([-1.0], device=ids.device)
    of_heads = {"": lambda x: (x,), "linear ": lambda x: (x, torch.eye(x.shape[-1], device=x.device))}
    for head, f in zip(of_heads, (selective_logps, linear_logps), strict=True):
        yield (
            f"{head}logps",
            lambda x, head=head, f=f: (g * f(*of_heads[head](x), ids, backend=backend)).sum(),
            lambda x: (g * true_scores(x, ids[0])[0]).sum(),
        )
    for level in ("token", "sequence"):  # one pass where the backend has one, and two sweeps
        o = Objective(loss_type="grpo", importance_sampling_level=level, entropy_coef=0.02)
        for head, f in zip(of_heads, (grpo_loss, linear_grpo_loss), strict=True):
            yield (
                f"{head}loss, {level}",
                lambda x, head=head, f=f, o=o: (
                    f(*of_heads[head](x), ids, advantages, objective=o, backend=backend).loss
                ),
                lambda x, o=o: grpo_loss_reference(counted_from_target(x, ids[0]), ids, advantages, objective=o).loss,
            )


@pytest.mark.parametrize("lse", LSE)
def test_nearly_certain_targets_from_end_to_end(lse, backend, device, monkeypatch):
    logits, ids = certain(lse, device)
    for isa in instruction_sets(backend, monkeypatch):
        for name, loss, true in ways(ids, backend):
            want = at_target(true, logits.double(), ids)
            assert_digits(at_target(loss, logits, ids), want, of_statistics(backend, device, lse), f"{isa} {name}")


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
