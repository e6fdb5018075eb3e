"""grpo_loss on every backend, against the reference and TRL in float64."""

import itertools
import math
from unittest import mock

import pytest
import torch
from cases import (
    LEVELS,
    LOG_RATIOS,
    OPTIONS,
    TRL_LOSS_TYPES,
    assert_close,
    exact_loss,
    loss_and_grad,
    make_inputs,
    objective_for,
    pack,
    rel_norm,
    truth,
)

from fastgrpo import (
    GRPOLoss,
    Objective,
    backends,
    group_advantages,
    grpo_loss,
    grpo_loss_reference,
    linear_grpo_loss,
    selective_logps,
)
from fastgrpo.backends import Rows, Scores
from fastgrpo.backends.select import _warn_once
from fastgrpo.batch.inputs import make_batch
from fastgrpo.batch.layout import Padded
from fastgrpo.engine.logits import Apart, Sweeps, fuse
from fastgrpo.objective import LOSS_TYPES, LOSSES
from fastgrpo.objective.losses import Kind
from fastgrpo.objective.presets import PRESETS
from fastgrpo.objective.terms import row_weights

REL = {torch.float32: 1e-5}  # bf16 and fp16 are held against plain torch instead
TABLE = list(itertools.product(LOSS_TYPES, LEVELS, ("plain", "old", "beta", "beta-old")))


@pytest.mark.parametrize("loss_type, level, option", TABLE)
def test_parity(loss_type, level, option, backend, device):
    """Loss type x level x beta x (old given or not), fp32, both ways of making the gradient."""
    options, extras = OPTIONS[option]
    objective = objective_for(loss_type, level, options)
    logits, ids, kwargs = make_inputs(extras, seed=3, device=device, backend=backend)
    want, want_grad = truth(logits, ids, objective=objective, **kwargs)
    if level != "sequence_token":
        _assert_trl_agrees(want, want_grad, logits, ids, objective, kwargs)
    assert want_grad.norm() > 1e-3
    # beyond token level both ways run the same kernels, which the interpreter would only take its time for twice
    for inplace in (False, True) if objective.is_token_local or backend != "triton" else (True,):
        got, grad = loss_and_grad(
            grpo_loss, logits, ids, objective=objective, backend=backend, inplace=inplace, **kwargs
        )
        assert_close(got.loss, want.loss, REL[torch.float32], "loss")
        assert_close(grad, want_grad, REL[torch.float32], "gradient")
        assert_close(got.per_token_logps, want.per_token_logps, 1e-5, "logps")
        assert_close(got.entropies, want.entropies, 1e-5, "entropies")
        assert (got.kl is None) == (objective.beta == 0)
        if objective.beta:
            assert_close(got.kl, want.kl, 2e-5, "kl")
        assert set(got.metrics) == set(want.metrics)
        for name, value in want.metrics.items():
            assert got.metrics[name].item() == pytest.approx(value.item(), rel=2e-5, abs=1e-6, nan_ok=True), name


def _assert_trl_agrees(want, want_grad, logits, ids, objective, kwargs):
    if objective.loss_type not in TRL_LOSS_TYPES:
        return
    pytest.importorskip("trl", reason="TRL is the oracle (pip install '.[test]')")
    from fastgrpo.bench.trl_loss import trl_loss_of_logits

    leaf = logits.cpu().double().requires_grad_()
    loss = trl_loss_of_logits(objective, leaf, ids, **kwargs)
    assert_close(loss, want.loss, 1e-9, "TRL's loss")
    assert_close(torch.autograd.grad(loss, leaf)[0], want_grad, 1e-8, "TRL's gradient")


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("plain", "old", "beta", "beta-old")])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo", "vespo"])
def test_options(loss_type, option, backend, device):
    options, extras = OPTIONS[option]
    objective = objective_for(loss_type, "token", options)
    logits, ids, kwargs = make_inputs(extras, seed=5, device=device, backend=backend)
    want, want_grad = truth(logits, ids, upstream=2.5, objective=objective, loss_scale=0.5, **kwargs)
    for inplace in (False, True) if objective.is_token_local or backend != "triton" else (True,):
        got, grad = loss_and_grad(
            grpo_loss,
            logits,
            ids,
            2.5,
            objective=objective,
            backend=backend,
            inplace=inplace,
            loss_scale=0.5,
            **kwargs,
        )
        rel = 3e-5 if loss_type == "vespo" else 1e-5  # exp(k log w - λ w) multiplies the rounding of the logps
        assert_close(got.loss, want.loss, rel, "loss")
        assert_close(grad, want_grad, rel, "gradient")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "loss_type, level", [("dapo", "token"), ("grpo", "sequence"), ("cispo", "token"), ("sapo", "token")]
)
def test_half_precision_error_is_at_most_twice_plain_torchs(loss_type, level, dtype, inplace, backend, device):
    objective = objective_for(loss_type, level, dict(beta=0.1, entropy_coef=0.01))
    logits, ids, kwargs = make_inputs(("old", "ref"), vocab=130, dtype=dtype, device=device, backend=backend)
    want, want_grad = truth(logits, ids, objective=objective, **kwargs)

    def plain(x, ids, **kw):  # what a careful eager user writes: fp32 inside, autograd's cast at the end
        return grpo_loss_reference(x.float(), ids, **kw)

    eager, eager_grad = loss_and_grad(plain, logits, ids, objective=objective, **kwargs)
    got, grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, inplace=inplace, **kwargs)
    assert grad.dtype == dtype
    assert_close(got.loss, want.loss, 1e-5, "loss")  # the loss never leaves fp32
    assert rel_norm(grad, want_grad) <= 2 * rel_norm(eager_grad, want_grad)


def test_temperature(backend, device):
    logits, ids, kwargs = make_inputs(("old", "ref"), device=device, backend=backend)
    objective = Objective(beta=0.1, entropy_coef=0.01)
    of_tokens = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    for temperature in (0.7, torch.linspace(0.5, 2.0, len(ids)), of_tokens, torch.tensor(1.7)):
        on_device = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
        want, want_grad = truth(logits, ids, objective=objective, temperature=temperature, **kwargs)
        got, grad = loss_and_grad(
            grpo_loss, logits, ids, objective=objective, temperature=on_device, backend=backend, **kwargs
        )
        assert_close(got.loss, want.loss, 1e-5)
        assert_close(grad, want_grad, 1e-5)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_rewards_are_normalised_in_the_pass(scale_rewards, backend, device):
    logits, ids, kwargs = make_inputs(("old",), batch=6, device=device, backend=backend)
    del kwargs["advantages"]
    rewards = torch.tensor([1.0, 0.25, torch.nan, 0.7, 0.7, 0.7], device=device)
    advantages = group_advantages(rewards, 3, scale_rewards=scale_rewards)
    assert (advantages[2:] == 0).all() and (advantages[:2] != 0).all()
    for inplace in (False, True):
        want, want_grad = loss_and_grad(
            grpo_loss, logits, ids, advantages=advantages, backend=backend, inplace=inplace, **kwargs
        )
        got, grad = loss_and_grad(
            grpo_loss,
            logits,
            ids,
            rewards=rewards,
            num_generations=3,
            scale_rewards=scale_rewards,
            backend=backend,
            inplace=inplace,
            **kwargs,
        )
        assert_close(got.loss, want.loss, 1e-6)
        assert_close(grad, want_grad, 1e-6)
        assert (grad[2:] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_packed_equals_padded(level, backend, device):
    extras = ("old", "ref", "is_sequence", "sampling")
    logits, ids, kwargs = make_inputs(extras, device=device, backend=backend)
    mask = kwargs.pop("completion_mask").bool()
    cu_seqlens, packed = pack(mask, kwargs)
    for loss_type in LOSS_TYPES:
        objective = objective_for(
            loss_type,
            level,
            dict(beta=0.1, entropy_coef=0.1, top_entropy_quantile=0.5, off_policy_mask_threshold=0.02),
        )
        call = dict(objective=objective, backend=backend)
        want, want_grad = loss_and_grad(grpo_loss, logits, ids, completion_mask=mask, **call, **kwargs)
        got, grad = loss_and_grad(grpo_loss, logits[mask], ids[mask], cu_seqlens=cu_seqlens, **call, **packed)
        assert_close(got.loss, want.loss, 1e-6)
        assert_close(grad, want_grad[mask], 1e-6)
        assert_close(got.per_token_logps, want.per_token_logps[mask], 0)
        for name, value in want.metrics.items():
            if name != "vespo/phi_seq_mean":  # the last sequence has no rows when packed, and so no phi to count
                assert got.metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6, nan_ok=True), name


def test_without_stats_rows_that_cannot_learn_are_not_scored(backend, device):
    """Their logits may even be NaN: they are not read. And the loss and gradient of the others are the same."""
    logits, ids, kwargs = make_inputs(("old",), device=device, backend=backend)
    kwargs["advantages"][1] = 0
    for level, inplace in itertools.product(LEVELS, (False, True)):
        call = dict(objective=objective_for("grpo", level, {}), backend=backend, inplace=inplace)
        want, want_grad = loss_and_grad(grpo_loss, logits, ids, **call, **kwargs)
        poisoned = logits.clone()
        poisoned[1] = torch.nan
        got, grad = loss_and_grad(grpo_loss, poisoned, ids, return_stats=False, **call, **kwargs)
        assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)
        assert got[1:] == (None,) * 4


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradients(inplace, backend, device):
    logits, ids, kwargs = make_inputs(("old", "ref"), device=device, backend=backend)
    for level in ("token", "sequence"):
        objective = objective_for("grpo", level, dict(beta=0.1))
        for upstream in (1.0, 0.0, -3.5, 65536.0, torch.tensor(0.25, device=device)):
            _, want = truth(logits, ids, float(upstream), objective=objective, **kwargs)
            _, got = loss_and_grad(
                grpo_loss, logits, ids, upstream, objective=objective, inplace=inplace, backend=backend, **kwargs
            )
            assert_close(got, want, 1e-5, f"upstream {upstream}")


def test_grad_scaler_keeps_small_fp16_gradients(backend, device):
    """With a loss scale of 2^16, gradients far below fp16's smallest number arrive, in place too."""
    logits, ids, kwargs = make_inputs(("old",), dtype=torch.float16, device=device, backend=backend)
    kwargs["num_items_in_batch"] = 1e6
    _, want = truth(logits, ids, 65536.0, **kwargs)
    for inplace in (False, True):
        _, got = loss_and_grad(grpo_loss, logits, ids, 65536.0, inplace=inplace, backend=backend, **kwargs)
        assert rel_norm(got, want) < 1e-3


def test_retained_graph_gives_the_gradient_again(backend, device):
    logits, ids, kwargs = make_inputs(("old",), device=device, backend=backend)
    leaf = logits.clone().requires_grad_()
    loss = grpo_loss(leaf, ids, backend=backend, **kwargs).loss
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss * 2, leaf)[0], first * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inplace_refuses_a_second_backward(dtype, backend, device):
    logits, ids, kwargs = make_inputs(("old",), dtype=dtype, device=device, backend=backend)
    leaf = logits.clone().requires_grad_()
    loss = grpo_loss(leaf * 1, ids, inplace=True, backend=backend, **kwargs).loss
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inplace_is_seen_by_autograd(dtype, backend, device):
    """Someone else who saved the logits gets autograd's error, not a gradient computed from a gradient."""
    logits, ids, kwargs = make_inputs(("old",), dtype=dtype, device=device, backend=backend)
    x = logits.clone().requires_grad_() * 1
    other = x.exp().sum() + x.pow(2).sum()  # pow saves its input
    loss = grpo_loss(x, ids, inplace=True, backend=backend, **kwargs).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_inplace_writes_the_gradient_over_the_logits(backend, device):
    logits, ids, kwargs = make_inputs(("old",), device=device, backend=backend)
    x = logits.clone().requires_grad_()
    y = x * 1
    grpo_loss(y, ids, inplace=True, backend=backend, **kwargs).loss.backward()
    assert torch.equal(x.grad, y.detach())
    frozen = logits.clone()
    grpo_loss(frozen, ids, inplace=True, backend=backend, **kwargs)
    with torch.no_grad():
        grpo_loss(frozen.requires_grad_(), ids, inplace=True, backend=backend, **kwargs)
    assert torch.equal(frozen, logits)  # nobody wanted a gradient: nothing is overwritten


def test_double_backward_is_refused(backend, device):
    logits, ids, kwargs = make_inputs(("old",), device=device, backend=backend)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = grpo_loss(leaf * 1, ids, inplace=inplace, backend=backend, **kwargs).loss
        with pytest.raises(RuntimeError, match="double backward"):
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            grad.sum().backward()


def test_first_update_has_ratio_one_exactly(backend, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, ids, kwargs = make_inputs(vocab=1037, dtype=dtype, device=device, backend=backend)
        old = selective_logps(logits, ids, mask=kwargs["completion_mask"], backend=backend)
        output = grpo_loss(logits, ids, old_per_token_logps=old, backend=backend, **kwargs)
        assert torch.equal(output.per_token_logps, old)


def test_autocast_changes_nothing(backend, device):
    logits, ids, kwargs = make_inputs(("old", "ref"), device=device, backend=backend)
    objective = Objective(beta=0.1)
    want, want_grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, **kwargs)
    with torch.autocast(device, torch.bfloat16):
        got, grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, **kwargs)
    assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)


def test_module_holds_objective_and_options(backend, device):
    logits, ids, kwargs = make_inputs(("old",), device=device, backend=backend)
    module = GRPOLoss(Objective(loss_type="grpo"), temperature=0.8, backend=backend)
    want = grpo_loss(logits, ids, objective=Objective(loss_type="grpo"), temperature=0.8, backend=backend, **kwargs)
    assert torch.equal(module(logits, ids, **kwargs).loss, want.loss)
    assert not list(module.parameters()) and "temperature=0.8" in repr(module)


def test_float64_goes_through_torch():
    logits, ids, kwargs = make_inputs(("old",))
    want, want_grad = truth(logits, ids, **kwargs)
    got, grad = loss_and_grad(grpo_loss, logits.double(), ids, **kwargs)
    assert got.loss.dtype == torch.float32
    assert_close(grad, want_grad, 1e-12)


def test_auto_says_when_torch_stands_in(monkeypatch):
    monkeypatch.setattr(backends.get("cpu"), "unavailable", lambda: "no compiler was there")
    _warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="cpu kernels are not used.*no compiler was there"):
        assert backends.select(torch.zeros(1, 1, 4)) == "torch"
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: no compiler was there"):
        backends.select(torch.zeros(1, 1, 4), "cpu")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_inplace_allocates_nothing_that_grows_with_the_vocabulary(level):
    """Counted by torch's allocator: the bytes of every allocation in forward and backward, at V and at 8 V."""
    if backends.get("cpu").unavailable() is not None:
        pytest.skip(f"backend cpu: {backends.get('cpu').unavailable()}")

    def allocated(vocab, inplace):
        logits, ids, kwargs = make_inputs(("old", "ref"), vocab=vocab)
        objective = objective_for("grpo", level, dict(beta=0.1))
        leaf = logits.requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            grpo_loss(leaf, ids, objective=objective, inplace=inplace, backend="cpu", **kwargs).loss.backward()
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    small, large = allocated(1000, True), allocated(8 * 1000, True)
    gradient = 7 * 28 * 1000 * 4  # what a gradient would add
    assert small > 0 and abs(large - small) < 1e-3 * gradient  # torch 2.9 counts some scalars otherwise
    assert allocated(8 * 1000, False) - allocated(1000, False) > 0.999 * gradient  # the count sees one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync_on_a_gpu():
    """Forward and backward queue their work and never wait for it, whatever the upstream gradient is."""
    logits, ids, kwargs = make_inputs(("old", "ref"), dtype=torch.bfloat16, device="cuda")
    kwargs["num_items_in_batch"] = torch.tensor(37, device="cuda")
    upstream = torch.tensor(3.0, device="cuda")
    for level, inplace in itertools.product(("token", "sequence"), (False, True)):
        call = dict(objective=objective_for("dapo", level, dict(beta=0.1)), inplace=inplace)
        loss_and_grad(grpo_loss, logits, ids, upstream, **call, **kwargs)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_and_grad(grpo_loss, logits, ids, upstream, **call, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


BEYOND = {  # what the fused objective reads: (objective, the reference's logps); each loss, and with its options
    **{
        record.token.__name__: (dict(loss_type=name, average="bnpo"), "here")
        for name, record in LOSSES.items()
        if record.kind is not None
    },
    "clip, delta": (dict(loss_type="bnpo", delta=4.0), "here"),
    "clip, corrected k3": (dict(loss_type="bnpo", beta=0.1), "old"),
    "clip, corrected k3 of 0": (dict(loss_type="bnpo", beta=0.1), "here"),
    "clip, k3": (dict(loss_type="bnpo", beta=0.1, use_bias_correction_kl=False), "old"),
    "clip, dual": (dict(loss_type="bnpo", clip_ratio_c=3.0), "here"),
    "clip, dual, a tie at 1": (dict(loss_type="bnpo", clip_ratio_c=1.0), "here"),
    "clip, dual below delta": (dict(loss_type="bnpo", clip_ratio_c=1.1, delta=2.0), "here"),
    "clip, clamped within the range": (dict(loss_type="bnpo", log_ratio_clamp=0.125), "here"),
    "clip, clamped": (dict(loss_type="bnpo", log_ratio_clamp=10.0), "here"),
    "clip, clamped, corrected k3": (dict(loss_type="bnpo", log_ratio_clamp=50.0, beta=0.1), "old"),
    "clip, clamped late, k3": (
        dict(loss_type="bnpo", log_ratio_clamp=85.0, beta=0.1, use_bias_correction_kl=False),
        "near",
    ),
    "cispo, above 1": (dict(loss_type="cispo", epsilon_high=5.0), "here"),
    "cispo, clamped, corrected k3": (
        dict(loss_type="cispo", epsilon_high=5.0, log_ratio_clamp=1.0, beta=0.1),
        "near",
    ),
    "cispo_clip, equal bounds": (dict(loss_type="cispo_clip", epsilon=0.0, epsilon_high=0.0), "here"),
    "reinforce": (dict(loss_type="reinforce"), "here"),
    "reinforce, k3": (dict(loss_type="reinforce", beta=0.1, use_bias_correction_kl=False), "near"),
    "reinforce, corrected k3": (dict(loss_type="reinforce", beta=0.1), "old"),
    "sapo, corrected k3": (dict(loss_type="sapo", beta=0.1), "near"),
    "sapo, clamped": (dict(loss_type="sapo", log_ratio_clamp=10.0), "here"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_ratios_beyond_fp32_in_the_fused_objective(name, backend, device):
    """Every row's loss, coefficient and gradient are float64's wherever those fit; beyond, the loss is infinite."""
    if backend == "torch":
        pytest.skip("the torch backend has no fused objective")
    options, ref = BEYOND[name]
    objective = Objective(**options)
    ratios = [x for x in LOG_RATIOS if x not in (-1000, -80) or backend != "triton"]  # the interpreter takes its time
    table = [*itertools.product(ratios, (1.5, 0.0, -1.5), (1.0,)), *((x, -1.5, 0.0) for x in ratios if x > 20)]
    n, vocab = len(table), 8
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(0)).expand(n, 1, -1).contiguous()
    logits, ids = logits.to(device), torch.zeros(n, 1, dtype=torch.int64, device=device)
    x, advantages, scale = (torch.tensor(column, device=device) for column in zip(*table, strict=True))
    logps = selective_logps(logits, ids, backend=backend)
    old = logps - x[:, None]
    inputs = dict(
        old_per_token_logps=old,
        ref_per_token_logps={"here": logps, "near": logps + 0.25, "old": old}[ref],
        importance_sampling_ratio=scale[:, None],
    )
    batch = make_batch(ids, advantages, inputs, dtype=torch.float32)
    rows = Rows(batch.ids, batch.mask, batch.inv_temperature)
    how = fuse(rows, objective, batch, row_weights(objective, batch))
    result = Sweeps(backend).token_loss(logits, how, False, out=logits)
    loss, g = result.loss.double().cpu(), result.g.double().cpu()
    p = torch.randn(vocab, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    logp = logps[0].item()
    for i, (_, advantage, factor) in enumerate(table):
        x, d = logp - old[i].item(), batch.ref[i].item() - logp
        (want,), (want_g,) = exact_loss(objective, [x], [d], advantage * factor, logp)
        want, want_g = want / n, want_g / n
        case = f"log ratio {x}, advantage {advantage}, factor {factor}, d {d}"
        if want < 3e38:
            assert loss[i].item() == pytest.approx(want, rel=1e-5, abs=1e-12), case
        else:
            assert loss[i] == torch.inf, case
        if abs(want_g) < 3e38:
            assert g[i].item() == pytest.approx(want_g, rel=1e-5, abs=1e-12), case
            gradient = -want_g * p
            gradient[0] += want_g
            assert_close(logits[i, 0], gradient, 1.5e-5, case)


NO_KIND, NOT_OF_TOKENS = ("loss_type",), ("importance_sampling_level",)
UNHELD = {  # a preset: the options that no kernel holds; the others take one pass
    **dict.fromkeys(("gspo", "gspo-token", "luspo"), NOT_OF_TOKENS),
    **dict.fromkeys(("vespo", "gmpo", "dppo-tv", "dppo-kl", "clip-cov", "kl-cov"), NO_KIND),
    "icepop": ("loss_type", "ratio_anchor"),
    "dro": ("log_ratio_penalty",),
    "prime-rl": ("loss_type", "ratio_anchor", "log_ratio_penalty"),
    "skyrl": ("kl_estimator", "kl_average"),
    "nemo-rl": ("kl_anchor", "kl_log_ratio_clamp", "kl_clamp"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_of_one_pass(name, backend, device, monkeypatch):
    objective = Objective.preset(name, **(dict(max_completion_length=9) if name == "dr_grpo" else {}))
    assert objective.unheld == UNHELD.get(name, ()) and objective.is_fused == (name not in UNHELD)
    logits, ids, kwargs = make_inputs(("old", "ref", "sampling"), batch=2, length=2, device=device, backend=backend)
    kwargs["group_ids"] = torch.tensor([0, 1], device=device)
    kernels, functions = backends.get(backend), ("token_loss", "row_stats", "row_grad")
    spies = {function: mock.Mock(wraps=getattr(kernels, function)) for function in functions}
    for function, spy in spies.items():
        monkeypatch.setattr(kernels, function, spy)
    out, grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, inplace=True, **kwargs)
    assert out.loss.isfinite() and grad.isfinite().all()  # though the sampler has no number for one token
    one_pass = name not in UNHELD and backend != "torch"
    wanted = {"token_loss"} if one_pass else {"row_stats", "row_grad"}
    assert {function for function, spy in spies.items() if spy.called} == wanted


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_an_impossible_token_has_the_ratio_1(loss_type, backend, device):
    """Its logit is -inf: loss and gradient are those of every backend and of the reference."""
    objective = objective_for(loss_type, "token", {})
    logits, ids, kwargs = make_inputs(batch=2, length=2, device=device, backend=backend)
    logits[0, 0, ids[0, 0]] = -torch.inf
    want, want_grad = truth(logits, ids, objective=objective, **kwargs)
    got, grad = loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, **kwargs)
    if LOSSES[loss_type].kind in (Kind.CLIP, Kind.SAPO):  # of the others the loss is A logp
        assert want.loss.isfinite() and want_grad.isfinite().all()
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5, nan_ok=True)
    assert torch.allclose(grad.double(), want_grad, rtol=1e-4, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_token_of_weight_0_has_no_say(loss_type, backend, device):
    """However far it is from the old policy and from the reference."""
    if loss_type == "gmpo":
        pytest.skip("its ratio is of all tokens of a sequence, whatever their weights")
    objective = objective_for(loss_type, "token", dict(beta=0.1, use_bias_correction_kl=False))
    logits, ids, kwargs = make_inputs(("old", "ref"), batch=2, length=2, device=device, backend=backend)
    kwargs["token_weights"] = torch.tensor([[0.0, 1.0], [1.0, 1.0]], device=device)
    results = []
    for far in (0.0, 1000.0):
        old, ref = (kwargs[f"{name}_per_token_logps"].clone() for name in ("old", "ref"))
        old[0, 0] -= far
        ref[0, 0] += far
        call = kwargs | dict(old_per_token_logps=old, ref_per_token_logps=ref, advantages=kwargs["advantages"] * 0 - 1)
        results.append(loss_and_grad(grpo_loss, logits, ids, objective=objective, backend=backend, **call))
    (near, near_grad), (far, far_grad) = results
    if LOSSES[loss_type].whole_sequences or LOSSES[loss_type].whole_batch:
        assert far.loss.isfinite() and far_grad.isfinite().all()
    else:
        assert far.loss == near.loss and torch.equal(far_grad, near_grad)


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("name", BEYOND)
def test_the_fused_objective_is_the_unfused_one(name, with_old, backend, device):
    """Row by row, NaN in each input included."""
    if backend == "torch":
        pytest.skip("the torch backend has no fused objective")
    objective, nan = Objective(**BEYOND[name][0]), math.nan
    assert objective.is_fused
    few = backend != "cpu"  # the others are emulated
    xs = (-1000.0, -0.3, 0.125, 0.15, 2.0, nan) if few else (*LOG_RATIOS, -0.3, 0.0, 0.125, 0.15, 0.5, 2.0, nan)
    table = [  # log ratio, advantage, importance ratio, ref - logp, id
        *((x, a, 1.0, d, 0) for x in (xs if with_old else (0.0,)) for a in (1.5, 0.0, -1.5)
          for d in ((0.25,) if few else (0.25, 22.0))),
        *((x, a, f, d, i) for x in ((100.0,) if few else xs) for a, f, d, i in (
            (-1.5, 0.0, 0.25, 0), (1.5, 0.7, -3.0, 0), (nan, 1.0, 0.0, 0), (1.5, 1.0, nan, 0), (1.5, 1.0, 0.25, -1),
            (0.0, 1.0, 0.0, -1), (1.5, nan, 0.0, 0),
        )),
    ]  # fmt: skip
    x, advantages, factor, d, ids = (
        torch.tensor(column, device=device)[:, None] for column in zip(*table, strict=True)
    )
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0)).expand(len(table), 1, -1).to(device)
    logps = selective_logps(logits[:1], ids[:1] * 0, backend=backend)
    inputs = dict(ref_per_token_logps=logps + d, importance_sampling_ratio=factor)
    inputs |= dict(old_per_token_logps=logps - x) if with_old else {}
    batch = make_batch(ids, advantages[:, 0], inputs, dtype=torch.float32)
    rows, weights = Rows(batch.ids, batch.mask, batch.inv_temperature), row_weights(objective, batch)
    fused = Sweeps(backend).token_loss(logits, fuse(rows, objective, batch, weights), False, out=None)
    apart = Apart(rows, objective, batch, weights, None)
    for i, case in enumerate(table):
        at = slice(i, i + 1)
        terms, g, _ = apart.part(at, Padded(1, 1)).coefficients(Scores(fused.logp[at], fused.lse[at], None))
        made = dict(loss=(fused.loss[i], terms.loss), g=(fused.g[i], g[0]))
        if objective.reads_ratio:
            made["ratio"] = fused.ratio[i], terms.ratio[0]
        if objective.beta:
            made["kl"] = fused.kl[i], terms.kl[0]
        for what, (got, want) in made.items():
            got, want = got.item(), want.item()
            if what == "g" and not (terms.loss.isfinite() or math.isnan(case[0]) or case[-1] < 0):
                continue  # where the loss has overflowed, or a factor is no number, autograd's may be 0 · inf, or 0
            assert got == pytest.approx(want, rel=1e-5, abs=1e-12, nan_ok=True), f"{what} at {case}: {got}, not {want}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ratios_beyond_fp32(loss_type, level, backend, device):
    """From logits and from hidden states: a ratio that overflows on the clipped side costs no gradient its value."""
    if loss_type == "kl_cov":
        pytest.skip("its ratio has no bound")
    objective = objective_for(loss_type, level, dict(beta=0.1, use_bias_correction_kl=False))
    table = [(-1000.0, 1.5), (-100.0, -1.5), (100.0, 0.0), (100.0, 1.5), (1000.0, 1.5)]
    shape = (len(table), 2)
    row = torch.randn(8, generator=torch.Generator().manual_seed(0)).to(device)
    logits, ids = row.expand(*shape, -1).contiguous(), torch.zeros(shape, dtype=torch.int64, device=device)
    ratios, advantages = (torch.tensor(column, device=device) for column in zip(*table, strict=True))
    logps = selective_logps(logits, ids, backend=backend)
    old = logps - ratios[:, None]
    kwargs = dict(advantages=advantages, old_per_token_logps=old, ref_per_token_logps=logps + 0.25)
    weight = {"luspo": 1 / shape[0], "dr_grpo": 1 / (shape[0] * objective.max_completion_length)}.get(
        loss_type, 1 / ids.numel()
    )
    want, want_grad, logp = 0.0, [], logps[0, 0].item()
    p = row.double().cpu().softmax(-1)
    for i, (_, advantage) in enumerate(table):
        xs = [logp - x for x in old[i].tolist()]
        ds = [x - logp for x in kwargs["ref_per_token_logps"][i].tolist()]
        losses, gradients = exact_loss(objective, xs, ds, advantage, logp)
        want += weight * sum(losses)
        want_grad += [weight * g * (torch.eye(8)[0].double() - p) for g in gradients]
    want, want_grad = torch.tensor(want, dtype=torch.float64), torch.stack(want_grad).view(*shape, -1)

    def from_hidden(hidden, ids, **options):
        return linear_grpo_loss(hidden, torch.eye(8, device=device), ids, chunk_size=4, **options)

    for function in (grpo_loss, from_hidden):
        got, grad = loss_and_grad(function, logits, ids, objective=objective, backend=backend, **kwargs)
        assert_close(got.loss, want, 1e-5, "loss")
        assert_close(grad, want_grad, 1e-5, "gradient")
