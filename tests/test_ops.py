"""The operators as torch sees them: opcheck, torch.compile, fakes."""

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    assert_close,
    linear_loss_and_grads,
    loss_and_grad,
    make_inputs,
    make_linear_inputs,
    objective_for,
    softcap_on,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastgrpo import GRPOOutput, Objective, grpo_loss, linear_grpo_loss, linear_logps, selective_logps
from fastgrpo.backends import Rows
from fastgrpo.batch.inputs import make_batch
from fastgrpo.engine import hidden_ops, ops, projection
from fastgrpo.engine.logits import Apart, fuse
from fastgrpo.objective import PRESETS
from fastgrpo.objective.terms import row_weights


def _arguments(backend, device, extras=("old", "ref")):
    logits, ids, kwargs = make_inputs(extras, vocab=37, device=device, backend=backend)
    objective = Objective(beta=0.1, entropy_coef=0.1)
    batch = make_batch(ids, kwargs.pop("advantages"), kwargs, dtype=torch.float32)
    return logits, batch, objective


def test_opcheck(backend, device):
    logits, batch, objective = _arguments(backend, device)
    rows = Rows(batch.ids, batch.mask, batch.inv_temperature)
    leaf = logits.clone().requires_grad_()
    for want_entropy in (False, True):
        opcheck(ops.row_stats, (leaf, *rows, want_entropy, backend))
    *scores, _ = ops.row_stats(logits, *rows, True, backend)
    g = torch.randn_like(scores[0])
    for h in (None, torch.randn_like(g)):
        opcheck(ops.row_grad, (logits, batch.ids, batch.inv_temperature, *scores, g, h, backend))
    opcheck(ops.scale_, (logits.clone(), torch.tensor(2.0, device=device), backend))
    if backend != "torch":  # which has no fused objective
        _, token, spec = fuse(rows, objective, batch, row_weights(objective, batch))
        inputs = ([*rows], [*token], ops.spec_numbers(spec), True, backend)
        opcheck(ops.token_loss, (leaf, *inputs))
        opcheck(ops.token_loss_, (logits.clone(), *inputs))


def test_an_operator_puts_any_objective_together_again():
    logits, batch, _ = _arguments("torch", "cpu")
    rows, batch = Rows(batch.ids, batch.mask, batch.inv_temperature), replace(batch, group_size=2)
    changed = dict(average="bnpo", kl_average="luspo", kl_anchor="current", log_ratio_clamp=3.0, cov_share=0.5)
    for preset in PRESETS:
        for options in ({}, dict(beta=0.1, kl_estimator="k1+"), dict(beta=0.1, **changed)):
            objective = Objective.preset(preset, **{"max_completion_length": 7, **options})
            weights = row_weights(objective, batch)
            how = Apart(rows, objective, batch, weights, batch.mask)
            vectors, numbers, names = hidden_ops.taken_apart(how)
            again = hidden_ops._how(batch.ids, batch.mask, batch.inv_temperature, vectors, numbers, names)
            assert again.objective == objective
            for a, b in zip(again.weights, weights, strict=True):
                assert a is b


@pytest.mark.parametrize("options", [dict(loss_type="gmpo"), dict(beta=0.1, kl_estimator="k2", kl_average="grpo"),
                                     dict(loss_type="kl_cov", cov_share=0.3, average="token-sum")])  # fmt: skip
def test_compile_fullgraph_linear_of_other_losses(options):
    objective = Objective(**options)
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"))

    def step(hidden, weight, ids, **kwargs):
        return linear_grpo_loss(hidden * 1, weight, ids, objective=objective, **kwargs)

    torch._dynamo.reset()
    want, *wanted = linear_loss_and_grads(step, hidden, weight, ids, **kwargs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, *grads = linear_loss_and_grads(compiled, hidden, weight, ids, **kwargs)
    assert_close(got.loss, want.loss, 1e-6)
    for a, b in zip(grads, wanted, strict=True):
        assert_close(a, b, 1e-6)
    assert set(got.metrics) == set(want.metrics)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss_type, level", [("dapo", "token"), ("grpo", "sequence"), ("vespo", "token")])
def test_compile_fullgraph(loss_type, level, inplace, backend, device):
    if inplace and (backend == "torch" or level == "sequence" or loss_type == "vespo"):
        pytest.skip("documented: inplace=True compiles at token level on the kernel backends")
    objective = objective_for(loss_type, level, dict(beta=0.1, entropy_coef=0.01, delta=1.5))
    logits, ids, kwargs = make_inputs(("old", "ref"), device=device, backend=backend)

    def step(x, ids, **kwargs):
        out = grpo_loss(x * 1, ids, objective=objective, temperature=0.9, backend=backend, inplace=inplace, **kwargs)
        return GRPOOutput(out.loss * 3, *out[1:])

    torch._dynamo.reset()
    want, want_grad = loss_and_grad(step, logits, ids, **kwargs)
    got, grad = loss_and_grad(torch.compile(step, fullgraph=True), logits, ids, **kwargs)
    assert_close(got.loss, want.loss, 1e-6)
    assert_close(grad, want_grad, 1e-6)
    for name in want.metrics:
        assert_close(got.metrics[name], want.metrics[name], 1e-5, name)


def test_one_graph_serves_many_vocabularies():
    """V is a dynamic size where the choice of a backend does not depend on it, as on a CPU."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x, ids: selective_logps(x, ids).sum(), fullgraph=True, dynamic=True, backend=graphs)
    for V in range(30, 42):
        x, ids = torch.randn(2, 3, V), torch.randint(V, (2, 3))
        assert_close(step(x, ids), selective_logps(x, ids).sum(), 1e-6)
    assert graphs.frame_count <= 2


def test_compile_selective_logps(backend, device):
    logits, ids, _ = make_inputs(device=device, backend=backend)

    def entropy_regularised(x):
        logps, entropies = selective_logps(x, ids, return_entropy=True, backend=backend)
        return logps.sum() + 0.1 * entropies.sum()

    torch._dynamo.reset()
    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(entropy_regularised(leaf), leaf)
    (got,) = torch.autograd.grad(torch.compile(entropy_regularised, fullgraph=True)(leaf), leaf)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize(
    "softcap, dtype, tolerance",
    [(None, torch.float32, 0.0), (4.0, torch.bfloat16, 0.0), (None, torch.float32, 0.25)],
)
def test_opcheck_linear(softcap, dtype, tolerance, backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(
        ("old", "ref"), vocab=37, dtype=dtype, device=device, backend=backend
    )
    objective = objective_for("grpo", "token", dict(beta=0.1, entropy_coef=0.1))
    batch = make_batch(ids, kwargs.pop("advantages"), kwargs, dtype=torch.float32)
    head = [x.clone().requires_grad_() for x in (hidden, weight, torch.randn(37, device=device).to(dtype))]
    options = ([37, 4, dtype.itemsize], [softcap_on(backend, softcap) or math.inf, tolerance], dtype, backend)
    for mask, want_entropy in ((None, False), (batch.mask, True)):
        rows = [batch.ids, mask, batch.inv_temperature]
        opcheck(hidden_ops.linear_stats, (*head, rows, want_entropy, *options))
    scores = [x.detach() for x in hidden_ops.linear_stats(*head, rows, True, *options)[:3]]
    g, h = torch.randn(2, len(batch.ids), device=device)
    for of_entropy, needs in ((None, [True, False, True]), (None, [True, False, False]), (h, [True] * 3)):
        rows = [batch.ids, batch.inv_temperature, *scores, g, of_entropy]
        opcheck(hidden_ops.linear_grad, (*(x.detach() for x in head), rows, needs, *options))
    rows, weights = Rows(batch.ids, batch.mask, batch.inv_temperature), row_weights(objective, batch)
    hows = [Apart(rows, replace(objective, importance_sampling_level="sequence"), batch, weights, batch.mask)]
    hows += [fuse(rows, objective, batch, weights)] if backend != "torch" else []  # which has no fused objective
    (_, *options), rows = options, [batch.ids, batch.mask, None, batch.inv_temperature]
    for how in hows:
        opcheck(
            hidden_ops.linear_loss,
            (*head, rows, *hidden_ops.taken_apart(how), [True] * 4, [37, 50, dtype.itemsize], *options),
        )


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize(
    "loss_type, level, quantile",
    [("dapo", "token", 1), ("dapo", "token", 0.5), ("grpo", "sequence", 1), ("vespo", "token", 1)],
)
def test_compile_fullgraph_linear(loss_type, level, quantile, chunk_size, backend, device):
    """One operator with the gradient in the forward pass, or two where a graph cannot know the sequences' lengths."""
    objective = objective_for(
        loss_type, level, dict(beta=0.1, entropy_coef=0.01, delta=1.5, top_entropy_quantile=quantile)
    )
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), device=device, backend=backend)
    cap = softcap_on(backend, 5.0)

    def step(hidden, weight, ids, **kwargs):
        call = dict(objective=objective, softcap=cap, backend=backend, chunk_size=chunk_size)
        out = linear_grpo_loss(hidden * 1, weight, ids, **call, **kwargs)
        return GRPOOutput(out.loss * 3, *out[1:])

    torch._dynamo.reset()
    want = linear_loss_and_grads(step, hidden, weight, ids, **kwargs)
    got = linear_loss_and_grads(torch.compile(step, fullgraph=True), hidden, weight, ids, **kwargs)
    for a, b in zip((got[0].loss, *got[1:]), (want[0].loss, *want[1:]), strict=True):
        assert_close(a, b, 1e-6)
    for name in want[0].metrics:
        assert_close(got[0].metrics[name], want[0].metrics[name], 1e-5, name)


def test_compile_linear_logps(backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(device=device, backend=backend)

    def total(hidden, weight):
        call = dict(mask=kwargs["completion_mask"], return_entropy=True, chunk_size=5, backend=backend)
        logps, entropies = linear_logps(hidden, weight, ids, **call)
        return logps.sum() + 0.1 * entropies.sum()

    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    want = torch.autograd.grad(total(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(total, fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(importance_sampling_level="sequence"),
        dict(loss_type="luspo", importance_sampling_level="sequence"),
        dict(loss_type="vespo"),
        dict(top_entropy_quantile=0.5),
    ],
    ids=str,
)
def test_a_compiled_batch_that_fits_projects_once(options, monkeypatch):
    """As an eager call: 6NHV FLOPs, three GEMMs, where the whole batch fits into a chunk."""
    objective = Objective(**{"loss_type": "grpo", **options})
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    ids, old = torch.randint(33, (2, 4)), torch.full((2, 4), -3.0)

    def step(hidden, weight, ids, advantages, old):
        return linear_grpo_loss(hidden, weight, ids, advantages, old_per_token_logps=old, objective=objective).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = (ids, torch.tensor([1.0, -1.0]), old)
    compiled(hidden, weight, *arguments).backward()
    products, product = [], projection.product
    monkeypatch.setattr(projection, "product", lambda *a, **k: products.append(a) or product(*a, **k))
    compiled(hidden, weight, *arguments).backward()
    assert len(products) == 3
