"""Objectives of one's own: a function of `Tokens` as a loss type, on every way that a built-in loss takes."""

import pickle

import own_losses
import pytest
import torch
from cases import (
    assert_close,
    linear_loss_and_grads,
    loss_and_grad,
    make_inputs,
    make_linear_inputs,
    pack,
    truth,
)
from own_losses import OWN, REFUSED

from fastgrpo import Objective, grpo_loss, linear_grpo_loss, policy_loss, register_loss
from fastgrpo.batch.inputs import make_batch
from fastgrpo.engine.plan import roles
from fastgrpo.objective import LOSSES

INPUTS = {
    "as it is": ((), {}),
    "importance ratio": (("is_token",), {}),
    "token advantages": (("token_advantages",), {}),
    "items": (("num_items",), {}),
    "high entropies": ((), dict(top_entropy_quantile=0.5)),
    "a KL too": (("ref",), dict(beta=0.1)),
    "off-policy mask": (("sampling",), dict(off_policy_mask_threshold=0.02)),
}


def _pair(name, options):
    function, built_in, extras = OWN[name]
    return Objective(loss_type=function, **options), Objective(**{**built_in, **options}), extras


# there a factor leaves the built-in bonus or KL alone, or the built-in KL has another ratio
ANOTHER = {
    "of_sequences": {"a KL too"},
    "with_entropy": {"importance ratio", "high entropies", "off-policy mask"},
    "with_reference": {"importance ratio", "high entropies", "off-policy mask", "a KL too"},
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("name", OWN)
def test_equals_the_built_in_loss_from_logits(name, case, backend, device):
    if case in ANOTHER.get(name, ()):
        pytest.skip("the built-in option is another loss there")
    if case != "as it is" and backend in ("triton", "cuda"):
        pytest.skip("slow, and what differs from case to case is in torch")
    extras, options = INPUTS[case]
    own, built_in, needed = _pair(name, options)
    logits, ids, kwargs = make_inputs((*needed, *extras), device=device, backend=backend)
    if case == "items" and name == "with_entropy":
        kwargs.pop("num_items_in_batch")  # the built-in bonus is a mean over the tokens that are here
    for inplace in (False, True):
        got, grad = loss_and_grad(
            grpo_loss, logits, ids, 2.0, objective=own, inplace=inplace, backend=backend, **kwargs
        )
        want, want_grad = truth(logits, ids, 2.0, objective=built_in, **kwargs)
        assert_close(got.loss, want.loss, 2e-6, "loss")
        assert_close(grad, want_grad, 1e-5, "gradient")
        want, want_grad = loss_and_grad(grpo_loss, logits, ids, 2.0, objective=built_in, backend=backend, **kwargs)
        assert_close(got.loss, want.loss, 1e-6, "loss")
        assert_close(grad, want_grad, 1e-6, "gradient")
        assert_close(got.per_token_logps, want.per_token_logps, 1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_equals_the_built_in_loss_from_hidden_states(name, packed, backend, device):
    own, built_in, needed = _pair(name, {})
    slow = backend in ("triton", "cuda")
    if slow and packed:
        pytest.skip("slow, and the layout is of no account to a backend")
    hidden, weight, ids, kwargs = make_linear_inputs(needed, device=device, backend="triton" if slow else None)
    if packed:
        cu_seqlens, kwargs = pack(kwargs.pop("completion_mask"), dict(hidden=hidden, ids=ids) | kwargs)
        hidden, ids, kwargs["cu_seqlens"] = kwargs.pop("hidden"), kwargs.pop("ids"), cu_seqlens
        keep = cu_seqlens.diff() > 0
        kwargs["cu_seqlens"] = torch.cat([cu_seqlens[:1], cu_seqlens[1:][keep]])
        kwargs["advantages"] = kwargs["advantages"][keep]
    for chunk in (4,) if slow else (None, 8, 2):  # all in one, cut between sequences, and through them
        call = dict(chunk_size=chunk, backend=backend, **kwargs)
        got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, 2.0, objective=own, **call)
        want, *wanted = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, 2.0, objective=built_in, **call)
        assert_close(got.loss, want.loss, 1e-6, "loss")
        for gradient, other in zip(grads, wanted, strict=True):
            assert_close(gradient, other, 2e-6, "gradient")


@pytest.mark.parametrize("name", OWN)
def test_equals_the_built_in_loss_from_logps_in_float64(name):
    own, built_in, needed = _pair(name, {})
    logits, ids, kwargs = make_inputs(needed)
    logps = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0].requires_grad_()
    entropies = torch.rand(ids.shape, dtype=torch.float64).requires_grad_()
    leaves = [logps, entropies][: 1 + own.differentiates_entropy]
    losses = [policy_loss(logps, entropies=entropies, objective=o, **kwargs).loss for o in (own, built_in)]
    assert_close(*losses, 1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_function_may_not_do(name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"loss_type: .*{message}"):
        Objective(loss_type=function)
    with pytest.raises(ValueError, match=f"loss_type: .*{message}"):
        register_loss("refused", function)
    assert "refused" not in LOSSES


def test_needs_are_found_out():
    def needs(function):
        record = Objective(loss_type=function).record
        names = ("whole_sequences", "needs_entropy", "needs_ref", "inert")
        return [name for name in names if getattr(record, name)]

    assert needs(own_losses.clipped) == ["inert"]
    assert needs(own_losses.of_sequences) == ["whole_sequences", "inert"]
    assert needs(own_losses.with_entropy) == ["needs_entropy"]
    assert needs(own_losses.with_reference) == ["needs_ref"]
    assert needs(lambda t: -t.logp * t.advantages + 1e-3 * (t.logp - t.sampling_logp) ** 2) == []
    assert needs(lambda t: -t.logp * (t.advantages + 1e-6)) == []
    assert needs(lambda t: torch.where(t.ratio > 1e6, t.ratio, -t.ratio * t.advantages)) == []
    assert needs(lambda t: -t.ratio * t.advantages * torch.rand_like(t.mask)) == ["inert"]  # its own random number


def test_rows_of_advantage_0_are_left_out_where_they_add_nothing():
    ids, advantages = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1.0, 0.0])
    batch = make_batch(ids, advantages, {}, dtype=torch.float32)
    assert roles(Objective(loss_type=own_losses.clipped), batch, True).learn.sum() == 3
    assert roles(Objective(loss_type=own_losses.of_sequences), batch, False).scored.sum() == 3
    assert roles(Objective(loss_type=own_losses.with_entropy), batch, False).learn is None


def test_a_need_may_be_given():
    def sometimes(t):
        return -t.logp * t.advantages if len(t.mask) != 6 else -t.seq_mean(t.logp) * t.advantages

    logps, advantages = torch.randn(2, 3, requires_grad=True), torch.randn(2)
    with pytest.raises(ValueError, match="sometimes reads t.seq_mean, which .*give needs_sequences=True"):
        policy_loss(logps, advantages, objective=Objective(loss_type=sometimes))
    register_loss("sometimes", sometimes, needs_sequences=True)
    try:
        assert LOSSES["sometimes"].whole_sequences
        got = policy_loss(logps, advantages, objective=Objective(loss_type="sometimes")).loss
        assert_close(got, -(logps.mean(1) * advantages).mean(), 1e-6)
    finally:
        del LOSSES["sometimes"]
    untried = dict(needs_sequences=False, needs_entropy=False, needs_ref=False)
    register_loss("untried", lambda t: 1 / 0, **untried)
    assert not LOSSES.pop("untried").inert


def test_names():
    assert Objective(loss_type="own_losses:clipped") == Objective(loss_type="own_losses:clipped")
    assert Objective(loss_type="own_losses:mine").record is LOSSES["mine"]  # the name that it was registered under
    assert Objective(loss_type="mine-with-entropy").average_name == "bnpo"
    assert Objective(loss_type="mine-with-entropy", average="grpo").average_name == "grpo"

    @register_loss("decorated")
    def decorated(t):
        return -t.logp * t.advantages

    try:
        assert Objective(loss_type="decorated").record.token is decorated
        with pytest.raises(ValueError, match="name: .*'decorated'"):
            register_loss("decorated", own_losses.clipped)
        for name in ("", "a b", "a:b", None):
            with pytest.raises(ValueError, match="name: "):
                register_loss(name, own_losses.clipped)
        with pytest.raises(ValueError, match="average: .*'mean'"):
            register_loss("other", own_losses.clipped, average="mean")
    finally:
        del LOSSES["decorated"]
    texts = {
        "nope:f": "cannot be imported",
        "math:nope": "cannot be imported",
        "math:pi": "a function, got 3.14",
        "nope": "one of grpo.*module:function.*'nope'",
    }
    for text, message in texts.items():
        with pytest.raises(ValueError, match=f"loss_type: .*{message}"):
            Objective(loss_type=text)


def test_an_objective_of_a_function_is_a_value():
    o = Objective(loss_type=own_losses.clipped, beta=0.1)
    assert o == Objective(loss_type=own_losses.clipped, beta=0.1) and hash(o) == hash(pickle.loads(pickle.dumps(o)))
    assert pickle.loads(pickle.dumps(o)) == o != Objective(beta=0.1)
    assert not o.is_fused and Objective(beta=0.1).is_fused


@pytest.mark.parametrize("name", ["clipped", "of_sequences", "with_entropy"])
def test_in_a_compiled_graph(name, backend, device):
    function, _, needed = OWN[name]
    registered = {"clipped": "mine", "of_sequences": "own_losses:of_sequences", "with_entropy": "mine-with-entropy"}
    logits, ids, kwargs = make_inputs(needed, device=device, backend=backend)
    torch._dynamo.reset()
    for loss_type in (function, registered[name]):  # from logits a function is traced itself
        objective = Objective(loss_type=loss_type)

        def step(x, ids, objective=objective, **kwargs):
            return grpo_loss(x * 1, ids, objective=objective, backend=backend, **kwargs)

        want, want_grad = loss_and_grad(step, logits, ids, **kwargs)
        got, grad = loss_and_grad(torch.compile(step, fullgraph=True, backend="aot_eager"), logits, ids, **kwargs)
        assert_close(got.loss, want.loss, 1e-6)
        assert_close(grad, want_grad, 1e-6)

    hidden, weight, ids, kwargs = make_linear_inputs(needed, device=device)
    for loss_type in (registered[name], own_losses.clipped if name == "clipped" else registered[name]):
        objective = Objective(loss_type=loss_type)

        def linear(hidden, weight, ids, objective=objective, **kwargs):
            return linear_grpo_loss(hidden * 1, weight, ids, objective=objective, backend=backend, **kwargs)

        want, *wanted = linear_loss_and_grads(linear, hidden, weight, ids, **kwargs)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        got, *grads = linear_loss_and_grads(compiled, hidden, weight, ids, **kwargs)
        assert_close(got.loss, want.loss, 1e-6)
        for a, b in zip(grads, wanted, strict=True):
            assert_close(a, b, 1e-6)


def test_an_operator_needs_a_name():
    hidden, weight, ids, kwargs = make_linear_inputs(("old",))
    objective = Objective(loss_type=lambda t: -t.logp * t.advantages)

    def linear(hidden):
        return linear_grpo_loss(hidden, weight, ids, objective=objective, **kwargs).loss

    torch._dynamo.reset()
    with pytest.raises(Exception, match="loss_type: expected a name in a compiled graph.*register_loss"):
        torch.compile(linear, fullgraph=True, backend="eager")(hidden.requires_grad_())


@pytest.mark.parametrize("log_ratio", [-1000.0, -100.0, 100.0, 1000.0])
def test_ratios_beyond_fp32(log_ratio):
    """t.ratio stays finite, so that what does not depend on it there has a loss and a gradient."""
    objective = Objective(loss_type=own_losses.clipped)
    for advantage in (1.5, 0.0):
        leaf = torch.tensor([[-1.5, -1.5]], requires_grad=True)
        old = torch.tensor([[-1.5 - log_ratio, -1.5]])
        loss = policy_loss(leaf, torch.tensor([advantage]), old_per_token_logps=old, objective=objective).loss
        want = -advantage * (min(1.2, 2.0**log_ratio if log_ratio < 0 else 2.0) + 1) / 2
        assert loss.item() == pytest.approx(want, abs=1e-6)
        loss.backward()
        assert_close(leaf.grad, torch.tensor([[0.0, -advantage / 2]]), 1e-6)
    off = policy_loss(leaf, torch.tensor([-1.5]), old_per_token_logps=old, objective=objective,
                      importance_sampling_ratio=torch.tensor([[0.0, 1.0]]))  # fmt: skip
    assert off.loss.item() == pytest.approx(0.75)
    assert torch.autograd.grad(off.loss, leaf)[0].tolist() == [[0.0, 0.75]]
