"""The operators as torch sees them: opcheck, torch.compile, fakes."""

import pytest
import torch
from cases import assert_close, loss_and_grad, make_inputs, objective_for
from torch.library import opcheck

from fastgrpo import Objective, grpo_loss, ops, selective_logps
from fastgrpo.layout import make_batch
from fastgrpo.loss import token_inputs


def _arguments(backend, device, extras=("old", "ref")):
    logits, ids, kwargs = make_inputs(extras, vocab=37, device=device, backend=backend)
    objective = Objective(beta=0.1, entropy_coef=0.1)
    batch = make_batch(ids, kwargs.pop("advantages"), objective=objective, dtype=torch.float32, **kwargs)
    return logits, batch, objective


def test_opcheck(backend, device):
    logits, batch, objective = _arguments(backend, device)
    rows = (batch.ids, batch.mask, batch.inv_temperature)
    leaf = logits.clone().requires_grad_()
    for want_entropy in (False, True):
        opcheck(ops.row_stats, (leaf, *rows, want_entropy, backend))
    _, lse, entropy = ops.row_stats(logits, *rows, True, backend)
    g = torch.randn_like(lse)
    for h in (None, torch.randn_like(lse)):
        stats = (batch.ids, lse, entropy, g, h, batch.inv_temperature, backend)
        opcheck(ops.row_grad, (logits, *stats))
        opcheck(ops.row_grad_, (logits.clone(), *stats))
    opcheck(ops.scale_, (logits.clone(), torch.tensor(2.0, device=device), backend))
    if backend != "torch":
        token_rows, spec = token_inputs(objective, batch)
        inputs = (*rows, True, *token_rows, list(spec), backend)
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
        return out._replace(loss=out.loss * 3)

    torch._dynamo.reset()
    want, want_grad = loss_and_grad(step, logits, ids, **kwargs)
    got, grad = loss_and_grad(torch.compile(step, fullgraph=True), logits, ids, **kwargs)
    assert_close(got.loss, want.loss, 1e-6)
    assert_close(grad, want_grad, 1e-6)
    for name in want.metrics:
        assert_close(got.metrics[name], want.metrics[name], 1e-5, name)


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
