"""The operators as torch sees them: opcheck, torch.compile, fakes."""

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
from torch.library import opcheck

from fastgrpo import GRPOOutput, Objective, grpo_loss, linear_grpo_loss, linear_logps, selective_logps
from fastgrpo.backends import Rows
from fastgrpo.batch.inputs import make_batch
from fastgrpo.engine import ops
from fastgrpo.engine.logits import fuse
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
    _, lse, entropy = ops.row_stats(logits, *rows, True, backend)
    g = torch.randn_like(lse)
    for h in (None, torch.randn_like(lse)):
        opcheck(ops.row_grad, (logits, batch.ids, batch.inv_temperature, lse, entropy, g, h, backend))
    opcheck(ops.scale_, (logits.clone(), torch.tensor(2.0, device=device), backend))
    if backend != "torch":  # which has no fused objective
        _, token, spec = fuse(rows, objective, batch, row_weights(objective, batch))
        inputs = ([*rows], [*token], ops.spec_numbers(spec), True, backend)
        opcheck(ops.token_loss, (leaf, *inputs))
        opcheck(ops.token_loss_, (logits.clone(), *inputs))


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


def test_compile_for_any_vocabulary():
    """A graph is made for one V, since the choice of a backend may depend on it; another V gets another graph."""

    def step(x, ids):
        return selective_logps(x, ids).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for V in (33, 47):
        x, ids = torch.randn(2, 3, V), torch.randint(V, (2, 3))
        assert_close(compiled(x, ids), step(x, ids), 1e-6)


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


@pytest.mark.parametrize("softcap, dtype", [(None, torch.float32), (4.0, torch.bfloat16)])
def test_opcheck_linear(softcap, dtype, backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(
        ("old", "ref"), vocab=37, dtype=dtype, device=device, backend=backend
    )
    objective = objective_for("grpo", "token", dict(beta=0.1, entropy_coef=0.1))
    batch = make_batch(ids, kwargs.pop("advantages"), kwargs, dtype=torch.float32)
    head = [x.clone().requires_grad_() for x in (hidden, weight, torch.randn(37, device=device).to(dtype))]
    options = ([37, 4], softcap_on(backend, softcap), dtype, backend)
    for mask, want_entropy in ((None, False), (batch.mask, True)):
        rows = [batch.ids, mask, batch.inv_temperature]
        opcheck(ops.linear_stats, (*head, rows, want_entropy, *options))
    _, lse, entropy = (x.detach() for x in ops.linear_stats(*head, rows, True, *options))
    g = torch.randn_like(lse)
    for h, needs in ((None, [True, False, True]), (torch.randn_like(lse), [True, True, True])):
        rows = [batch.ids, batch.inv_temperature, lse, entropy, g, h]
        opcheck(ops.linear_grad, (*(x.detach() for x in head), rows, needs, *options))
    if backend != "torch":  # which has no fused objective
        rows = Rows(batch.ids, batch.mask, batch.inv_temperature)
        _, token, spec = fuse(rows, objective, batch, row_weights(objective, batch))
        rows = [batch.ids, batch.mask, None, batch.inv_temperature]
        how = ([*token], ops.spec_numbers(spec), [True, True, True], True)
        opcheck(ops.linear_loss, (*head, rows, *how, *options))


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("loss_type, level", [("dapo", "token"), ("grpo", "sequence"), ("vespo", "token")])
def test_compile_fullgraph_linear(loss_type, level, chunk_size, backend, device):
    """One operator with the gradient in the forward pass where kernels hold the objective, else two."""
    objective = objective_for(loss_type, level, dict(beta=0.1, entropy_coef=0.01, delta=1.5))
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
