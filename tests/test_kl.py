"""The estimates of the KL: in the loss against float64 formulas, and in the reward."""

import pytest
import torch
from cases import assert_close, linear_loss_and_grads, loss_and_grad, make_inputs, make_linear_inputs, truth

from fastgrpo import Objective, grpo_loss, kl_in_reward, linear_grpo_loss, policy_loss
from fastgrpo.objective.kl import KL_ESTIMATORS

VALUES = {
    "k1": lambda x: -x,
    "abs": lambda x: x.abs(),
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: x.exp() - x - 1,
    "low_var_kl": lambda x: (x.clamp(-20, 20).exp() - x.clamp(-20, 20) - 1).clamp(-10, 10),
}
OPTIONS = {
    "plain": dict(use_bias_correction_kl=False),
    "clamped": dict(use_bias_correction_kl=False, kl_log_ratio_clamp=1.0, kl_clamp=0.5),
    "times the ratio": dict(),
    "times the ratio, clamped": dict(kl_log_ratio_clamp=1.0, kl_clamp=0.5),
    "times a ratio of 1": dict(kl_anchor="current", kl_clamp=0.5),
}


def textbook(name, o, lp, old, ref):
    x = ref - lp
    bounded = x if o.kl_log_ratio_clamp is None else x.clamp(-o.kl_log_ratio_clamp, o.kl_log_ratio_clamp)
    kl, bound = VALUES[name.removesuffix("+")](bounded), torch.inf if o.kl_clamp is None else o.kl_clamp
    if not o.use_bias_correction_kl:
        kl = kl.clamp(-bound, bound)  # the gradient of k2 has no bound
    if name.endswith("+"):
        kl = kl.detach() + x**2 / 2 - (x**2 / 2).detach()
    if o.use_bias_correction_kl:
        kl = (kl * (lp - (lp.detach() if o.kl_anchor == "current" else old)).exp()).clamp(-bound, bound)
    return kl


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_is_its_formula(name, option):
    objective = Objective(beta=0.1, kl_estimator=name, loss_type="bnpo", **OPTIONS[option])
    lp = (-torch.rand(3, 6).double() * 4).requires_grad_()
    old, ref = lp.detach() + 0.3 * torch.randn(3, 6).double(), lp.detach() + torch.randn(3, 6).double()
    a = torch.zeros(3).double()
    loss = policy_loss(lp, a, old_per_token_logps=old, ref_per_token_logps=ref, objective=objective)
    want = textbook(name, objective, lp, old, ref)
    assert_close(loss.kl, want, 1e-10)
    got_gradient, want_gradient = (torch.autograd.grad(x, lp)[0] for x in (loss.loss, 0.1 * want.mean()))
    assert_close(got_gradient, want_gradient, 1e-10)
    assert_close(loss.loss, 0.1 * want.mean(), 1e-10)


@pytest.mark.parametrize("name", ["k1", "k2+", "low_var_kl", "k3+"])
def test_on_every_backend(name, backend, device):
    if name == "k2+":
        with pytest.raises(ValueError, match="kl_estimator: .*k3.*'k2[+]'"):
            Objective(kl_estimator=name)
        name = "k2"
    objective = Objective(beta=0.1, kl_estimator=name, use_bias_correction_kl=False, kl_average="grpo")
    assert not objective.is_fused and Objective(kl_estimator=name).is_fused  # without a beta none is asked for
    logits, ids, kwargs = make_inputs(("old", "ref"), device=device, backend=backend)
    want, want_grad = truth(logits, ids, objective=objective, **kwargs)
    got, grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, **kwargs)
    assert_close(got.loss, want.loss, 1e-5)
    assert_close(grad, want_grad, 1e-5)
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), device=device, backend="triton")
    call = dict(objective=objective, **kwargs)
    got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, backend=backend, chunk_size=4, **call)
    want, *wanted = linear_loss_and_grads(linear_grpo_loss, hidden.double(), weight.double(), ids, **call)
    assert_close(got.loss, want.loss, 1e-5)
    for a, b in zip(grads, wanted, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("far", [-1000.0, -100.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_far_from_the_reference(name, far):
    """Finite wherever float64 is; a clamped estimate is always."""
    for options in (dict(use_bias_correction_kl=False), dict(), dict(kl_clamp=10.0, kl_log_ratio_clamp=20.0)):
        lp = torch.tensor([[-1.5, -1.5]], requires_grad=True)
        old, ref = torch.tensor([[-1.5, -1.0]]), torch.tensor([[-1.5 + far, -1.0]])
        inputs = dict(old_per_token_logps=old, ref_per_token_logps=ref)
        objective = Objective(beta=0.1, kl_estimator=name, loss_type="bnpo", **options)
        loss = policy_loss(lp, torch.zeros(1), objective=objective, **inputs).loss
        (gradient,) = torch.autograd.grad(loss, lp)
        if name.startswith("k3") and "kl_clamp" not in options and far > 0:
            assert loss.isinf() and not gradient[:, 1:].isnan().any()
        else:
            assert loss.isfinite() and gradient.isfinite().all()


def test_kl_in_reward():
    gen = torch.Generator().manual_seed(0)
    logps, ref = -torch.rand(3, 4, generator=gen), -torch.rand(3, 4, generator=gen)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    logps[mask == 0] = torch.nan
    rewards = torch.tensor([1.0, -2.0, 5.0])
    got = kl_in_reward(rewards, logps, ref, beta=0.1, completion_mask=mask)
    want = torch.where(mask.bool(), -0.1 * (logps - ref), 0.0)
    want[0, 3] += 1.0
    want[1, 1] -= 2.0
    assert_close(got, want, 1e-6)
    assert_close(got.sum(1), torch.tensor([1.0, -2.0, 0.0]) - 0.1 * ((logps - ref).nan_to_num() * mask).sum(1), 1e-5)
    per_token = torch.randn(3, 4, generator=gen)
    got = kl_in_reward(per_token, logps, ref, beta=0.2, completion_mask=mask, kl_estimator="k3", kl_clamp=0.01)
    x = ref - logps
    want = torch.where(mask.bool(), per_token - 0.2 * (x.exp() - x - 1).clamp(max=0.01), 0.0)
    assert_close(got, want, 1e-6)
    for changes, message in (
        (dict(rewards=torch.zeros(4)), r"rewards: .*\(3,\).*\(4,\)"),
        (dict(ref_per_token_logps=ref[:2]), r"ref_per_token_logps: .*\(3, 4\).*\(2, 4\)"),
        (dict(kl_estimator="full"), "kl_estimator: .*low_var_kl.*'full'"),
        (dict(per_token_logps=logps[0]), r"per_token_logps: .*\(B, T\)"),
    ):
        arguments = dict(rewards=rewards, per_token_logps=logps, ref_per_token_logps=ref, beta=0.1) | changes
        with pytest.raises(ValueError, match=message):
            kl_in_reward(**arguments)
