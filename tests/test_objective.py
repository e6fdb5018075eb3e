"""Objective and its mathematics in torch, against TRL's own code and against textbook formulas."""

import copy
import dataclasses
import itertools
import json
import math
import pickle

import pytest
import torch
from cases import (
    LEVELS,
    LOG_RATIOS,
    OPTIONS,
    TRL_LOSS_TYPES,
    assert_close,
    exact_loss,
    make_inputs,
    make_linear_inputs,
    objective_for,
    rel_norm,
)

from fastgrpo import Correction, Objective, group_advantages, grpo_loss, kept_sets, linear_grpo_loss, policy_loss
from fastgrpo.objective import LOSS_TYPES, LOSSES
from fastgrpo.objective.losses import Kind
from fastgrpo.objective.metrics import reduce_metrics
from fastgrpo.objective.terms import high_entropy_mask


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("level", LEVELS[:2])
@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_equals_trl(loss_type, level, option):
    pytest.importorskip("trl", reason="TRL is the oracle (pip install '.[test]')")
    from fastgrpo.bench.trl_loss import trl_loss

    options, extras = OPTIONS[option]
    objective = objective_for(loss_type, level, options)
    logits, ids, kwargs = make_inputs(extras, seed=3)
    gen = torch.Generator().manual_seed(7)
    logps = (logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]).requires_grad_()
    entropies = (torch.rand(ids.shape, generator=gen) * 3).requires_grad_()
    ours = policy_loss(logps, entropies=entropies, objective=objective, **kwargs)
    wanted = [logps, entropies] if objective.entropy_coef else [logps]
    got = torch.autograd.grad(ours.loss, wanted)
    loss, metrics = trl_loss(objective, logps, entropies, **kwargs)
    want = torch.autograd.grad(loss, wanted)
    assert_close(ours.loss, loss, 1e-5, "loss")
    for name, a, b in zip(("logps", "entropies"), got, want, strict=False):
        assert_close(a, b, 1e-5, f"gradient of {name}")
    assert want[0].norm() > 0
    named = {name for name in ours.metrics if not name.startswith("sampling/")}  # which TRL does not log of its loss
    assert named == set(metrics) - {"entropy_coef"}
    for name in named:
        got, expected = ours.metrics[name].item(), metrics[name]
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), name


def test_accumulation_equals_trl():
    pytest.importorskip("trl", reason="TRL is the oracle (pip install '.[test]')")
    from fastgrpo.bench.trl_loss import trl_loss

    logits, ids, kwargs = make_inputs(("old", "ref"))
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    entropies = torch.rand(ids.shape)
    for loss_type in TRL_LOSS_TYPES:
        objective = objective_for(loss_type, "token", dict(beta=0.1, entropy_coef=0.1))
        # TRL's count spans the accumulation window; num_items_in_batch is then the mean per micro-batch
        loss, _ = trl_loss(objective, logps, entropies, accumulation=4, num_items_in_batch=torch.tensor(60), **kwargs)
        ours = policy_loss(
            logps, entropies=entropies, objective=objective, num_items_in_batch=60 / 4, loss_scale=1 / 4, **kwargs
        )
        assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_sequence_token_has_the_sequence_value_and_the_token_gradient():
    logits, ids, kwargs = make_inputs(("old",))
    logps = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0].requires_grad_()
    options = dict(loss_type="grpo", epsilon=10.0)  # no clipping: the loss is linear in the ratio
    sequence = policy_loss(logps, objective=Objective(importance_sampling_level="sequence", **options), **kwargs)
    both = policy_loss(logps, objective=Objective(importance_sampling_level="sequence_token", **options), **kwargs)
    assert_close(both.loss, sequence.loss, 1e-12)
    mask = kwargs["completion_mask"].double()
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    s = (((logps.detach() - kwargs["old_per_token_logps"]) * mask).sum(-1, keepdim=True) / lengths).exp()
    want = -s * kwargs["advantages"][:, None] * mask / lengths / len(mask)
    assert_close(torch.autograd.grad(both.loss, logps)[0], want, 1e-12)


def test_the_papers_formula():
    """The seeds' GRPO, written out: mean over sequences of the mean over tokens of min(rA, clip(r)A) - beta k3."""
    logits, ids, kwargs = make_inputs(("old", "ref"), batch=3)
    logps = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss = policy_loss(logps, objective=Objective.preset("grpo-paper", beta=0.04), **kwargs).loss
    total = 0.0
    for i in range(3):
        terms = []
        for t in range(ids.shape[1]):
            if kwargs["completion_mask"][i, t]:
                a, lp = kwargs["advantages"][i].double(), logps[i, t]
                r = (lp - kwargs["old_per_token_logps"][i, t]).exp()
                d = kwargs["ref_per_token_logps"][i, t] - lp
                terms.append(torch.min(r * a, r.clamp(0.8, 1.2) * a) - 0.04 * (d.exp() - d - 1))
        total += sum(terms) / len(terms)
    assert_close(loss, -total / 3, 1e-9)


def test_on_policy_gradient_is_alive():
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    policy_loss(logps, torch.tensor([1.0, -2.0]), objective=Objective(loss_type="bnpo")).loss.backward()
    assert_close(logps.grad, torch.tensor([[-1.0] * 3, [2.0] * 3]) / 6, 1e-6)


def test_delta_below_the_clip_range_keeps_the_gradient_of_negative_advantages():
    logps = torch.tensor([[math.log(1.15)]], requires_grad=True)  # delta 1.1 < ratio 1.15 < 1.2
    objective = Objective(loss_type="bnpo", delta=1.1)
    policy_loss(
        logps, torch.tensor([-1.0]), old_per_token_logps=torch.zeros(1, 1), objective=objective
    ).loss.backward()
    assert logps.grad.item() == pytest.approx(1.15, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 51, 101, 1001])  # 0.3 · 100 and the like round to no whole rank
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.8, 0.9, 1.0])
def test_high_entropy_mask_is_a_quantile(count, threshold):
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        entropies = torch.rand(count + 5, generator=random)
        mask = torch.zeros(count + 5, dtype=torch.bool)
        mask[torch.randperm(count + 5, generator=random)[:count]] = True
        want = (entropies >= torch.quantile(entropies[mask], threshold)) & mask
        assert torch.equal(high_entropy_mask(entropies, mask, threshold), want), seed


def test_high_entropy_mask_beyond_the_limit_of_torch_quantile():
    entropies = torch.rand(16_777_216 + 10)
    kept = high_entropy_mask(entropies, torch.ones(entropies.shape, dtype=torch.bool), 0.8).float().mean().item()
    assert kept == pytest.approx(0.2, abs=1e-3)


def test_masked_content_reaches_nothing():
    logits, ids, kwargs = make_inputs(("old", "ref", "sampling", "is_token", "token_advantages"))
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    entropies = torch.rand(ids.shape)
    masked = kwargs["completion_mask"] == 0
    for loss_type in LOSS_TYPES:
        for level in LEVELS:
            options = dict(beta=0.1, entropy_coef=0.1, top_entropy_quantile=0.5, off_policy_mask_threshold=0.1)
            objective = objective_for(loss_type, level, options)
            want = policy_loss(logps, entropies=entropies, objective=objective, **kwargs)
            poisoned = {
                k: torch.where(masked, torch.nan, v) if v.shape == masked.shape and v.is_floating_point() else v
                for k, v in kwargs.items()
            }
            leaf = torch.where(masked, torch.nan, logps).requires_grad_()
            got = policy_loss(
                leaf, entropies=torch.where(masked, torch.nan, entropies), objective=objective, **poisoned
            )
            assert torch.equal(got.loss, want.loss), (loss_type, level)
            got.loss.backward()
            assert leaf.grad.isfinite().all() and (leaf.grad[masked] == 0).all()
            assert all(torch.equal(got.metrics[k], want.metrics[k]) or want.metrics[k].isnan() for k in want.metrics)


def test_advantage_of_a_wholly_masked_sequence_may_be_nan():
    logps, mask = torch.randn(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]])
    for loss_type in LOSS_TYPES:
        for level in LEVELS:
            objective = objective_for(loss_type, level, {})
            want = policy_loss(logps, torch.tensor([1.0, 0.0]), completion_mask=mask, objective=objective).loss
            got = policy_loss(logps, torch.tensor([1.0, torch.nan]), completion_mask=mask, objective=objective).loss
            assert torch.equal(got, want), (loss_type, level)


def test_presets():
    assert Objective.preset("dr_grpo", max_completion_length=5).max_completion_length == 5
    assert Objective.preset("dapo", beta=0.1) == Objective(epsilon_high=0.28, beta=0.1)
    with pytest.raises(ValueError, match="preset.*'nope'"):
        Objective.preset("nope")


OWN_OPTIONS = ("average", "ratio_anchor", "log_ratio_clamp", "clip_ratio_c", "log_ratio_penalty", "kl_estimator",
               "kl_log_ratio_clamp", "kl_clamp", "kl_anchor", "kl_average", "cov_share", "cov_low", "cov_high",
               "cov_coef", "sampling_correction")  # fmt: skip


def test_defaults_are_trls():
    trl = pytest.importorskip("trl", reason="TRL is the oracle (pip install '.[test]')")
    import dataclasses

    defaults = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    for field in dataclasses.fields(Objective):
        if field.name in OWN_OPTIONS:
            assert field.name not in defaults
        elif field.name != "max_completion_length":  # 512 in TRL; here only dr_grpo reads it, and asks for it
            assert field.default == defaults[field.name], field.name


def test_quantity_of_signal():
    """The table's inputs clip some tokens and leave others: a test that cannot see clipping would prove nothing."""
    logits, ids, kwargs = make_inputs(("old",), seed=3)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    metrics = policy_loss(logps, objective=Objective(), **kwargs).metrics
    assert 0 < metrics["clip_ratio/region_mean"] < 1
    assert rel_norm(torch.ones(1), torch.full((1,), 2.0)) == 0.5


def _loss_and_gradient(objective, logps, xs, ds, advantage, dtype=torch.float32, **inputs):
    """policy_loss of one sequence, given the log ratios to the old policy and of the reference to this one."""
    leaf = torch.tensor([logps], dtype=dtype, requires_grad=True)
    old, ref = (torch.tensor([[lp + sign * v for lp, v in zip(logps, values, strict=True)]], dtype=dtype)
                for sign, values in ((-1, xs), (1, ds)))  # fmt: skip
    loss = policy_loss(
        leaf, torch.tensor([advantage], dtype=dtype), old_per_token_logps=old, ref_per_token_logps=ref,
        objective=objective, return_stats=False, **inputs,
    ).loss  # fmt: skip
    return loss.item(), torch.autograd.grad(loss, leaf)[0][0].double()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ratios_beyond_fp32(loss_type, level):
    """Loss and gradient are float64's wherever those fit; beyond fp32's largest number the loss is infinite."""
    weight = {"luspo": 1.0, "dr_grpo": 1 / 9}.get(loss_type, 1 / 3)
    options = [dict(beta=0.0), dict(beta=0.1), dict(beta=0.1, use_bias_correction_kl=False)]
    options += [dict(beta=0.0, log_ratio_clamp=20.0), dict(beta=0.1, log_ratio_clamp=78.0)]
    if LOSSES[loss_type].kind == Kind.CLIP:
        options += [dict(beta=0.0, delta=4.0), dict(beta=0.0, clip_ratio_c=3.0)]
    if loss_type in ("dppo_tv", "dppo_kl"):
        options += [dict(beta=0.0, clip_ratio_c=20.0)]
    for option, advantage, tokens in itertools.product(options, (1.5, 0.0, -1.5), ((1, 1, 1), (0, 1, 0))):
        objective = objective_for(loss_type, level, option)
        for ratio, ref in itertools.product(LOG_RATIOS, ("here", "near", "old") if objective.beta else ("here",)):
            xs = [ratio * token for token in tokens]
            ds = [{"here": 0.0, "near": 0.25, "old": -x}[ref] for x in xs]
            losses, gradient = exact_loss(objective, xs, ds, advantage, logp=-1.5)
            want, want_gradient = weight * sum(losses), weight * torch.tensor(gradient, dtype=torch.float64)
            for dtype in (torch.float32, torch.float64) if abs(ratio) == 1000 else (torch.float32,):
                got, got_gradient = _loss_and_gradient(objective, [-1.5] * 3, xs, ds, advantage, dtype)
                largest = torch.finfo(dtype).max
                case = f"{option}, advantage {advantage}, log ratios {xs}, reference {ref}, {dtype}"
                if abs(want) <= largest:
                    assert got == pytest.approx(want, rel=1e-5, abs=1e-12), case
                else:
                    # where nothing bounds the policy term, it may be -inf beside a KL of inf
                    opposite = objective.beta and loss_type in ("dppo", "dppo_tv", "dppo_kl", "kl_cov")
                    assert got == math.copysign(math.inf, want) or (opposite and math.isnan(got)), case
                if (want_gradient.abs() <= largest).all():
                    # what float64 itself rounds on the way to the loss is no error
                    bound = 1e-5 * want_gradient.abs().max() + 1e-15 * (1 + min(abs(want), largest))
                    worst = (got_gradient - want_gradient).abs().max()
                    assert worst <= bound, f"{case}: {got_gradient.tolist()} for {want_gradient.tolist()}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_policy_term_that_is_left_out_may_overflow(loss_type, level):
    """Its factor is 0: the importance ratio, or what a mask makes of it; or its weight."""
    cases = {
        "weight": ({}, dict(token_weights=torch.zeros(1, 3)), 0),
        "off-policy mask": (dict(off_policy_mask_threshold=0.1), dict(sampling_per_token_logps=torch.zeros(1, 3)), 0),
    }
    if not LOSSES[loss_type].takes_importance_ratio:
        cases["importance ratio"] = ({}, dict(importance_sampling_ratio=torch.zeros(1, 3)), 0)
    if level == "token" and loss_type != "gmpo":  # whose loss is of all tokens of a sequence
        entropies = torch.tensor([[3.0, 2.0, 1.0]])  # the first token alone is kept, and has ratio 1
        cases["entropy mask"] = (dict(top_entropy_quantile=0.0), dict(entropies=entropies), 1)
    for name, (options, inputs, kept) in cases.items():
        xs = [0.0] * kept + [100.0] * (3 - kept)
        objective = objective_for(loss_type, level, options)
        loss, gradient = _loss_and_gradient(objective, [-1.5] * 3, xs, [0.0] * 3, -1.0, **inputs)
        assert math.isfinite(loss) and (kept or loss == 0), name
        assert (gradient[kept:] == 0).all() and gradient.isfinite().all(), name


@pytest.mark.parametrize("options", [dict(use_bias_correction_kl=False), {}, dict(kl_anchor="current"),
                                     dict(kl_average="grpo"), dict(kl_estimator="k2")])  # fmt: skip
@pytest.mark.parametrize("level", LEVELS)
def test_a_token_of_weight_0_may_overflow(level, options):
    """It has no say, whatever its ratio and its KL; the others of its sequence keep their loss and gradient."""
    xs, ds = [1000.0, 0.1, -0.2] if level == "token" else [1.0, 0.1, -0.2], [1000.0, 0.3, 0.1]
    objective = objective_for("dapo", level, dict(beta=0.1, **options))
    weights = torch.tensor([[0.0, 1.0, 1.0]])
    loss, gradient = _loss_and_gradient(objective, [-1.5] * 3, xs, ds, -1.0, token_weights=weights)
    near = _loss_and_gradient(objective, [-1.5] * 3, xs, [0.0, *ds[1:]], -1.0, token_weights=weights)
    assert loss == near[0] and torch.equal(gradient, near[1]) and gradient[1:].all() and math.isfinite(loss)
    loss, gradient = _loss_and_gradient(objective, [-1.5] * 3, [1000.0] * 3, ds, -1.0, token_weights=weights * 0)
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_not_a_number_stays_one(loss_type, level):
    for option in ({}, dict(beta=0.1), dict(beta=0.1, use_bias_correction_kl=False)):
        objective = objective_for(loss_type, level, option)
        loss, gradient = _loss_and_gradient(objective, [-1.5, math.nan], [100.0, math.nan], [0.0, 0.0], 1.0)
        assert math.isnan(loss), option
        assert gradient[1].isnan(), option
        loss, gradient = _loss_and_gradient(objective, [-1.5] * 2, [100.0] * 2, [0.0] * 2, math.nan)
        assert math.isnan(loss) and gradient.isnan().all(), option


def test_tokens_are_chosen_by_covariance():
    """As many as the share says: by kl_cov the largest, by clip_cov any of those in its range, none of them twice."""
    gen = torch.Generator().manual_seed(0)
    logps, advantages = torch.randn(4, 25, generator=gen), torch.randn(4, generator=gen)
    mask = torch.rand(4, 25, generator=gen) < 0.8
    a = advantages[:, None].expand(4, 25)
    cov = (a - a[mask].mean()) * (logps - logps[mask].mean())
    count, drawn = int(0.1 * mask.sum()), set()

    def loss_of(loss_type, **options):
        leaf = logps.clone().requires_grad_()
        objective = Objective(loss_type=loss_type, cov_share=0.1, average="token-sum", **options)
        out = policy_loss(leaf, advantages, completion_mask=mask, objective=objective)
        assert out.metrics["cov/chosen_mean"].item() == pytest.approx(count / mask.sum().item())
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return ((gradient + a).abs() > 1e-6) & mask  # on-policy, the gradient of the others is -A

    largest = torch.where(mask, cov, -torch.inf).flatten().topk(count).indices.tolist()
    old = dict(old_per_token_logps=logps - 0.01)
    leaf = logps.clone().requires_grad_()
    objective = Objective(loss_type="kl_cov", cov_share=0.1, average="token-sum")
    (gradient,) = torch.autograd.grad(
        policy_loss(leaf, advantages, completion_mask=mask, objective=objective, **old).loss, leaf
    )
    moved = ((gradient + a * math.exp(0.01)).abs() > 1e-3) & mask
    assert sorted(moved.flatten().nonzero()[:, 0].tolist()) == sorted(largest)
    for seed in range(8):
        torch.manual_seed(seed)
        chosen = loss_of("clip_cov", cov_low=0.0, cov_high=2.0)
        assert chosen.sum() == count and ((cov > 0) & (cov < 2))[chosen].all()
        drawn.add(tuple(chosen.flatten().nonzero()[:, 0].tolist()))
    assert len(drawn) > 4


def test_one_number_cannot_count_two_things():
    logps, a = torch.randn(2, 3), torch.ones(2)
    objective = Objective(beta=0.1, kl_average="seq-mean-token-mean")
    assert objective.counts == ("tokens", "sequences") and Objective(kl_average="grpo", beta=0.1).counts == ("tokens",)
    policy_loss(logps, a, ref_per_token_logps=logps, objective=objective)
    with pytest.raises(
        ValueError, match="num_items_in_batch: expected None, because average and kl_average count tok"
    ):
        policy_loss(logps, a, ref_per_token_logps=logps, objective=objective, num_items_in_batch=6)
    with pytest.raises(
        ValueError, match="kl_average: expected one that counts tokens in a trainer, as average 'dapo'"
    ):
        objective.items_in_batch(tokens=torch.ones(()), sequences=1)
    with pytest.raises(
        ValueError, match="kl_average: expected one of tokens or sequences in a trainer, got 'prompt-m"
    ):
        Objective(beta=0.1, kl_average="prompt-mean").items_in_batch(tokens=torch.ones(()), sequences=1)
    of_kl = Objective("grpo", beta=0.1, kl_average="token-mean")  # the loss's average counts nothing
    assert of_kl.items_in_batch(tokens=torch.tensor(7.0), sequences=2) == 7
    with pytest.raises(ValueError, match="max_completion_length: expected a number > 0 with kl_average 'dr_grpo'"):
        Objective(beta=0.1, kl_average="dr_grpo")
    assert Objective(beta=0.1, kl_average="token-mean").is_fused  # the same as dapo's own


def test_a_kl_of_another_average_is_divided_by_what_it_counts():
    logps, ref, mask = -torch.rand(2, 3), -torch.rand(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]])
    given = dict(completion_mask=mask, ref_per_token_logps=ref)
    objective = Objective("grpo", beta=0.1, kl_average="token-mean", use_bias_correction_kl=False)
    items = objective.items_in_batch(tokens=torch.tensor(8.0), sequences=4)
    got = policy_loss(logps, torch.zeros(2), objective=objective, num_items_in_batch=items, **given).loss
    want = 0.1 * ((ref - logps).exp() - (ref - logps) - 1)[mask.bool()].sum() / 8
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_a_ratio_to_the_sampler_where_it_has_a_number(level):
    """NaN counts as if the sampler agreed with the old policy, or without one with the current."""
    gen = torch.Generator().manual_seed(0)
    logps = -torch.rand(3, 4, generator=gen, dtype=torch.float64)
    old, sampling = (logps + 0.2 * torch.randn(3, 4, generator=gen, dtype=torch.float64) for _ in range(2))
    lacking = torch.rand(3, 4, generator=gen) < 0.4
    given = dict(advantages=torch.tensor([1.0, -2.0, 0.5]).double())
    options = dict(importance_sampling_level=level, log_ratio_penalty=0.1)
    for anchors in (dict(old_per_token_logps=old), {}):
        leaf = logps.clone().requires_grad_()
        anchored = torch.where(lacking, anchors.get("old_per_token_logps", logps), sampling)
        want = policy_loss(leaf, old_per_token_logps=anchored, objective=Objective(**options), **given)
        (want_gradient,) = torch.autograd.grad(want.loss, leaf)
        got = policy_loss(
            leaf,
            sampling_per_token_logps=torch.where(lacking, torch.nan, sampling),
            objective=Objective(ratio_anchor="sampling", **options),
            **anchors,
            **given,
        )
        (gradient,) = torch.autograd.grad(got.loss, leaf)
        assert_close(got.loss, want.loss, 1e-12)
        assert_close(gradient, want_gradient, 1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if LOSSES[name].kind in (Kind.CLIP, Kind.SAPO)])
def test_on_policy_the_ratio_of_an_impossible_token_is_1(loss_type, level):
    leaf = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    losses = []
    for second in (-torch.inf, -2.0):
        leaf = torch.tensor([[-1.0, second]], requires_grad=True)
        objective = objective_for(loss_type, level, {})
        losses.append(policy_loss(leaf, torch.tensor([1.5]), objective=objective).loss)
        losses.append(torch.autograd.grad(losses[-1], leaf)[0])
    assert losses[0] == losses[2] and torch.equal(losses[1], losses[3]) and losses[1].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_reaches_no_number(dtype):
    logps = -torch.rand(2, 3)
    given = dict(old_per_token_logps=logps - 0.1, sampling_per_token_logps=logps - 0.2)
    objectives = [Objective(sampling_correction="token_drop:0.5_2"), *(Objective(name) for name in ("sapo", "vespo"))]
    want = [policy_loss(logps, torch.ones(2), objective=o, **given).loss for o in objectives]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        got = [policy_loss(logps, torch.ones(2, dtype=torch.float32), objective=o, **given).loss for o in objectives]
        corrected = loss_from_logits(logps, objectives[0], given)
    finally:
        torch.set_default_dtype(before)
    assert [x.item() for x in got] == [x.item() for x in want]
    assert torch.equal(corrected, loss_from_logits(logps, objectives[0], given))


def loss_from_logits(logps, objective, given):
    """The loss of the same from logits, in one pass."""
    logits = torch.stack([logps, torch.log(-torch.expm1(logps))], dim=-1).requires_grad_()
    ids = torch.zeros(logps.shape, dtype=torch.int64)
    return grpo_loss(logits, ids, torch.ones(2, dtype=torch.float32), objective=objective, **given).loss


class Both:
    """Two processes, of which this one is the second."""

    def gather(self, mine):
        both, self.first = torch.cat([getattr(self, "first", mine), mine]), mine
        return both


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "icepop", "vespo"])
def test_shares_over_processes_are_of_sequences_unless_advantages_are_of_tokens(loss_type, per_token):
    """Two processes of one sequence: a short one whose tokens are all clipped, and a long one of others."""
    objective = objective_for(loss_type, "sequence", {})
    processes = Both()
    for length, ratio in ((2, 5.0), (6, 1.0)):
        logps, mask = torch.zeros(1, 6), (torch.arange(6) < length)[None]
        a = torch.ones(1, 6) if per_token else torch.ones(1)
        old = logps - math.log(ratio)
        metrics = policy_loss(logps, a, completion_mask=mask, old_per_token_logps=old, objective=objective).metrics
        reduced = reduce_metrics(processes, objective, metrics, mask, 1, per_token)
    name = {"dapo": "clip_ratio/high_mean", "cispo": "cispo_clip_ratio", "icepop": "icepop/dropped_mean"}.get(
        loss_type
    )
    share = 2 / 8 if per_token else 1 / 2
    if name is not None:
        assert reduced[name].item() == pytest.approx(share)
    else:  # φ is 1 in the second
        phi = math.exp(3 + 2 * math.log(25.0) - 3 * 25.0)
        assert reduced["vespo/phi_seq_mean"].item() == pytest.approx(share * phi + (1 - share))


def test_clipped_tokens_are_counted_whatever_their_advantage(backend, device):
    """From hidden states as from logits: rows of advantage 0 are only scored, and have their ratio."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    kwargs["advantages"] = torch.zeros_like(kwargs["advantages"])
    kwargs["advantages"][0] = 1.0
    objective = Objective("cispo_clip", epsilon=0.01)
    given = dict(objective=objective, backend=backend, **kwargs)
    got = linear_grpo_loss(hidden.requires_grad_(), weight, ids, **given).metrics["cispo_clip_ratio"]
    want = grpo_loss(hidden.detach() @ weight.T, ids, **given).metrics["cispo_clip_ratio"]
    assert got == want > 0.5


def test_under_another_default_device():
    """Nothing is made on it that belongs to the tensors of a call, or to a trial on the CPU."""
    hidden, weight = torch.randn(8, 16).requires_grad_(), torch.randn(5000, 16)
    ids, offsets = torch.arange(8), torch.tensor([0, 8])
    logps, advantages = torch.randn(2, 3), torch.ones(2)
    options = dict(cu_seqlens=offsets, column_tolerance=2**-12)
    with torch.device("meta"):
        own = Objective(loss_type=lambda t: -t.seq_mean(t.ratio) * t.advantages)
        policy_loss(logps, advantages, objective=own).loss.item()
        for scale in (1e-3, 10.0):  # rows with many columns, and with few
            loss = linear_grpo_loss(hidden, weight * scale, ids, advantages[:1], **options).loss
            assert torch.autograd.grad(loss, hidden)[0].isfinite().all()
        assert kept_sets([[5, 17], [3]]).kept_ids.tolist() == [5, 17, 3]
        group_advantages(torch.randn(4, device="cpu"), 2).sum().item()


ROUND_TRIPS = {
    "asdict": lambda o: Objective(**dataclasses.asdict(o)),
    "asdict through JSON": lambda o: Objective(**json.loads(json.dumps(dataclasses.asdict(o)))),
    "replace": lambda o: dataclasses.replace(dataclasses.replace(o, epsilon=0.9), epsilon=o.epsilon),
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "repr": lambda o: eval(repr(o)),
}


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize(
    "text", [None, "token_truncate:2", "token_mask:0.5_5,any_drop:1e-4_,geometric_reject_k3:0.01"]
)
def test_an_objective_comes_back_as_it_was(text, way):
    objective = Objective(loss_type="grpo", epsilon=0.3, beta=0.1, sampling_correction=text)
    again = ROUND_TRIPS[way](objective)
    assert again == objective and hash(again) == hash(objective) and again.corrections == objective.corrections
    given = dict(old_per_token_logps=torch.zeros(1, 2))
    assert again.in_pass(given) == objective.in_pass(given) and again.in_pass(given).corrections is None


@pytest.mark.parametrize("given", [{}, {"level": "token"}, [{"level": "token", "outside": "mask", "lowest": 0.5}]])
def test_a_correction_of_other_fields_is_refused(given):
    with pytest.raises(ValueError, match="^sampling_correction: expected the fields level, outside, low, high, mea"):
        Objective(sampling_correction=given)
    assert Objective(sampling_correction={"level": "token", "outside": "mask"}).corrections == (
        Correction("token", "mask"),
    )
