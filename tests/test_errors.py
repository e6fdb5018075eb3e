"""Bad input: a ValueError that names the argument, what was expected and what came; nothing is lost."""

import pytest
import torch

from fastgrpo import (
    GRPOLoss,
    Objective,
    gae,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    policy_loss,
    selective_logps,
)
from fastgrpo import advantages as estimators

B, T, V = 4, 3, 11


def call(**changes):
    arguments = dict(logits=torch.randn(B, T, V), completion_ids=torch.zeros(B, T, dtype=torch.int64))
    arguments["advantages"] = torch.randn(B)
    arguments.update(changes)
    return grpo_loss(**arguments)


ids = torch.zeros(B, T, dtype=torch.int64)
packed = dict(logits=torch.randn(B * T, V), completion_ids=ids.view(-1))
BAD_CALLS = {
    "logits-rank": (dict(logits=torch.randn(V)), r"logits: .*\(B, T, V\).*\(11,\)"),
    "logits-type": (dict(logits=[1.0]), r"logits: .*tensor.*\[1.0\]"),
    "logits-integer": (dict(logits=torch.zeros(B, T, V, dtype=torch.int64)), "logits: .*floating point"),
    "logits-empty-vocabulary": (dict(logits=torch.randn(B, T, 0)), "logits: .*V > 0"),
    "ids-shape": (dict(completion_ids=ids[:, 1:]), r"completion_ids: .*\(4, 3\).*\(4, 2\)"),
    "ids-float": (dict(completion_ids=ids.float()), "completion_ids: .*integer dtype.*float32"),
    "ids-too-large": (dict(completion_ids=ids + V), r"completion_ids: .*\[0, 11\).*got 11 at flat position 0"),
    "ids-negative": (dict(completion_ids=ids - 100), r"completion_ids: .*\[0, 11\).*got -100"),
    "mask-shape": (dict(completion_mask=torch.ones(B)), r"completion_mask: .*\(4, 3\).*\(4,\)"),
    "advantages-shape": (dict(advantages=torch.randn(B + 1)), r"advantages: .*\(4, 3\).*\(4,\).*\(5,\)"),
    "advantages-type": (dict(advantages=1.0), "advantages: .*tensor.*1.0"),
    "neither-advantages-nor-rewards": (dict(advantages=None), "advantages, rewards: expected exactly one"),
    "both-advantages-and-rewards": (
        dict(rewards=torch.randn(B), num_generations=2),
        "advantages, rewards: .*exactly one",
    ),
    "rewards-shape": (dict(advantages=None, rewards=torch.randn(B, 1), num_generations=2), r"rewards: .*\(4,\)"),
    "rewards-cut-group": (
        dict(advantages=None, rewards=torch.randn(B), num_generations=3),
        "rewards: .*num_generations=3.*4",
    ),
    "rewards-without-group": (dict(advantages=None, rewards=torch.randn(B)), "num_generations: .*None"),
    "num_generations-zero": (dict(advantages=None, rewards=torch.randn(B), num_generations=0), "num_generations: .*0"),
    "scale_rewards": (dict(scale_rewards="std"), "scale_rewards: .*group, batch, none.*'std'"),
    "old-shape": (dict(old_per_token_logps=torch.randn(B)), r"old_per_token_logps: .*\(4, 3\)"),
    "old-type": (dict(old_per_token_logps=0.0), "old_per_token_logps: .*0.0"),
    "ref-missing": (dict(objective=Objective(beta=0.1)), "ref_per_token_logps: .*beta.*None"),
    "ref-shape": (dict(ref_per_token_logps=torch.randn(B, T + 1)), r"ref_per_token_logps: .*\(4, 3\)"),
    "sampling-shape": (dict(sampling_per_token_logps=torch.randn(T, B)), r"sampling_per_token_logps: .*\(4, 3\)"),
    "ratio-shape": (dict(importance_sampling_ratio=torch.ones(1, T)), r"importance_sampling_ratio: .*\(1, 3\)"),
    "num_items-shape": (dict(num_items_in_batch=torch.ones(2)), "num_items_in_batch: .*0-dim"),
    "loss_scale-type": (dict(loss_scale="1"), "loss_scale: .*number.*'1'"),
    "temperature-zero": (dict(temperature=0.0), "temperature: .*> 0.*0.0"),
    "temperature-negative": (dict(temperature=-1), "temperature: .*> 0.*-1"),
    "temperature-nan": (dict(temperature=float("nan")), "temperature: .*> 0.*nan"),
    "temperature-tensor-zero": (dict(temperature=torch.zeros(B)), "temperature: .*> 0"),
    "temperature-shape": (dict(temperature=torch.ones(T, B)), r"temperature: .*\(4, 3\)"),
    "cu_seqlens-missing": (packed, r"cu_seqlens: .*\(S\+1,\).*None"),
    "cu_seqlens-with-padded": (dict(cu_seqlens=torch.tensor([0, 12])), "cu_seqlens: expected None"),
    "cu_seqlens-end": (dict(**packed, cu_seqlens=torch.tensor([0, 4, 8, 9, 11])), "cu_seqlens: .*up to 12.*11"),
    "cu_seqlens-falling": (dict(**packed, cu_seqlens=torch.tensor([0, 9, 8, 9, 12])), "cu_seqlens: .*never falling"),
    "cu_seqlens-float": (dict(**packed, cu_seqlens=torch.tensor([0.0, 12.0])), "cu_seqlens: .*integer"),
    "objective-type": (dict(objective="dapo"), "objective: expected an Objective.*'dapo'"),
    "backend-name": (dict(backend="cuda9"), "backend: .*'cuda9'"),
    "inplace-strides": (
        dict(logits=torch.randn(B, V, T).transpose(1, 2), inplace=True),
        "logits: .*unit stride.*inplace",
    ),
    "inplace-overlap": (dict(logits=torch.randn(1, T, V).expand(B, T, V), inplace=True), "logits: .*share no memory"),
    "old-integer": (dict(old_per_token_logps=ids), "old_per_token_logps: .*floating point.*int64"),
    "advantages-complex": (dict(advantages=torch.ones(B, dtype=torch.complex64)), "advantages: .*floating point"),
    "num_items-negative": (dict(num_items_in_batch=-3), "num_items_in_batch: .*>= 0.*-3"),
    "token_weights-type": (dict(token_weights=[1.0] * B), r"token_weights: expected shape .*\[1.0, "),
    "num_items-bool": (dict(num_items_in_batch=True), "num_items_in_batch: .*True"),
    "loss_scale-nan": (dict(loss_scale=float("nan")), "loss_scale: .*nan"),
    "temperature-tensor-inf": (dict(temperature=torch.tensor(float("inf"))), "temperature: .*finite"),
    "device": (dict(completion_mask=torch.ones(B, T, device="meta")), "completion_mask: .*device cpu.*meta"),
    "device-advantages": (dict(advantages=torch.ones(B, device="meta")), "advantages: .*cpu.*meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(**changes)


H = 5
BAD_HEADS = {
    "hidden-rank": (dict(hidden=torch.randn(H)), r"hidden: .*\(B, T, H\).*\(5,\)"),
    "hidden-integer": (dict(hidden=torch.zeros(B, T, H, dtype=torch.int64)), "hidden: .*floating point"),
    "ids-shape": (dict(completion_ids=ids[:, 1:]), r"completion_ids: .*\(4, 3\) to match hidden.*\(4, 2\)"),
    "weight-rank": (dict(weight=torch.randn(H)), r"weight: .*\(V, 5\).*\(5,\)"),
    "weight-width": (dict(weight=torch.randn(V, H + 1)), r"weight: .*\(V, 5\).*\(11, 6\)"),
    "weight-type": (dict(weight=None), "weight: .*None"),
    "weight-empty": (dict(weight=torch.randn(0, H)), r"weight: .*\(0, 5\)"),
    "weight-dtype": (dict(weight=torch.randn(V, H).bfloat16()), "weight: .*float32, outside autocast.*bfloat16"),
    "weight-device": (dict(weight=torch.randn(V, H, device="meta")), "weight: .*device cpu.*meta"),
    "bias-shape": (dict(bias=torch.zeros(V + 1)), r"bias: .*\(11,\).*\(12,\)"),
    "bias-integer": (dict(bias=torch.zeros(V, dtype=torch.int64)), "bias: .*floating point"),
    "scale-zero": (dict(logit_scale=0.0), "logit_scale: .*> 0.*0.0"),
    "scale-negative": (dict(logit_scale=-1), "logit_scale: .*> 0.*-1"),
    "scale-none": (dict(logit_scale=None), "logit_scale: .*> 0.*None"),
    "softcap-zero": (dict(softcap=0.0), "softcap: .*> 0.*0.0"),
    "softcap-nan": (dict(softcap=float("nan")), "softcap: .*nan"),
    "softcap-out-of-range": (dict(softcap=1e-50), "softcap: .*between 1e-30 and 1e30.*1e-50"),
    "vocab_size-large": (dict(vocab_size=V + 1), "vocab_size: .*from 1 to 11.*12"),
    "vocab_size-zero": (dict(vocab_size=0), "vocab_size: .*from 1 to 11.*0"),
    "ids-in-padding": (dict(vocab_size=3, completion_ids=ids + 3), r"completion_ids: .*\[0, 3\).*got 3"),
    "chunk_size-zero": (dict(chunk_size=0), "chunk_size: .*> 0.*0"),
    "chunk_size-float": (dict(chunk_size=2.0), "chunk_size: .*2.0"),
    "backend-name": (dict(backend="cuda9"), "backend: .*'cuda9'"),
    "temperature": (dict(temperature=0.0), "temperature: .*0.0"),
    "logits_dtype-name": (
        dict(logits_dtype="float32"),
        "logits_dtype: expected 'auto' or torch.float32, got 'float32'",
    ),
    "logits_dtype-none": (dict(logits_dtype=None), "logits_dtype: .*None"),
    "logits_dtype-narrow": (dict(logits_dtype=torch.bfloat16), "logits_dtype: .*'auto' or torch.float32, .*bfloat16"),
    "logits_dtype-other": (
        dict(hidden=torch.randn(B, T, H).bfloat16(), weight=torch.randn(V, H).bfloat16(), logits_dtype=torch.float16),
        "logits_dtype: expected 'auto' or torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "logits_dtype-float64": (
        dict(hidden=torch.randn(B, T, H).double(), weight=torch.randn(V, H).double(), logits_dtype=torch.float32),
        "logits_dtype: expected 'auto' or torch.float64, got torch.float32",
    ),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_bad_head(name):
    changes, message = BAD_HEADS[name]
    arguments = dict(hidden=torch.randn(B, T, H), weight=torch.randn(V, H), completion_ids=ids) | changes
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(**arguments, advantages=torch.randn(B))
    with pytest.raises(ValueError, match=message.replace("completion_mask", "mask")):
        linear_logps(**arguments)


BAD_OBJECTIVES = {
    "loss_type": (dict(loss_type="ppo"), "loss_type: .*grpo.*'ppo'"),
    "level": (dict(importance_sampling_level="batch"), "importance_sampling_level: .*token.*'batch'"),
    "beta": (dict(beta=-0.1), "beta: .*>= 0.*-0.1"),
    "beta-nan": (dict(beta=float("nan")), "beta: .*finite.*nan"),
    "beta-type": (dict(beta="0.1"), "beta: .*number.*'0.1'"),
    "epsilon": (dict(epsilon=-0.2), "epsilon: .*>= 0.*-0.2"),
    "epsilon_high": (dict(epsilon_high=-0.2), "epsilon_high: .*>= 0"),
    "bias-correction": (dict(use_bias_correction_kl="no"), "use_bias_correction_kl: .*True or False.*'no'"),
    "delta": (dict(delta=0.0), "delta: .*> 0"),
    "entropy_coef": (dict(entropy_coef=None), "entropy_coef: .*number.*None"),
    "quantile": (dict(top_entropy_quantile=1.5), "top_entropy_quantile: .*between 0 and 1.*1.5"),
    "sapo": (dict(sapo_temperature_pos=0.0), "sapo_temperature_pos: .*> 0"),
    "dr_grpo": (dict(loss_type="dr_grpo"), "max_completion_length: .*dr_grpo.*None"),
    "loss_type-object": (dict(loss_type=3), "loss_type: .*a function.*3"),
    "average": (dict(average="mean"), "average: .*token-mean.*'mean'"),
    "average-dr_grpo": (dict(average="dr_grpo"), "max_completion_length: .*'dr_grpo'.*None"),
    "kl_average": (dict(kl_average=1), "kl_average: .*token-mean.*1"),
    "kl_estimator": (dict(kl_estimator="full"), "kl_estimator: .*low_var_kl.*'full'"),
    "kl_anchor": (dict(kl_anchor="new"), "kl_anchor: .*current.*'new'"),
    "ratio_anchor": (dict(ratio_anchor=None), "ratio_anchor: .*sampling.*None"),
    "log_ratio_clamp": (dict(log_ratio_clamp=0.0), "log_ratio_clamp: .*> 0.*0.0"),
    "clip_ratio_c": (dict(clip_ratio_c=-1), "clip_ratio_c: .*> 0.*-1"),
    "kl_clamp": (dict(kl_clamp=0), "kl_clamp: .*> 0.*0"),
    "cov_share": (dict(cov_share=0.0), "cov_share: .*above 0.*0.0"),
    "max_completion_length": (dict(max_completion_length=0), "max_completion_length: .*> 0.*0"),
}


@pytest.mark.parametrize("name", BAD_OBJECTIVES)
def test_bad_objective(name):
    options, message = BAD_OBJECTIVES[name]
    with pytest.raises(ValueError, match=message):
        Objective(**options)


OTHER_CALLS = {
    "advantages-rank": (lambda: group_advantages(torch.ones(2, 2), 2), r"rewards: .*\(B,\).*\(2, 2\)"),
    "advantages-list": (lambda: group_advantages([1.0, 2.0], 2), r"rewards: .*tensor"),
    "advantages-scale": (lambda: group_advantages(torch.ones(4), 2, scale_rewards="all"), "scale_rewards: .*'all'"),
    "advantages-ids": (
        lambda: group_advantages(torch.ones(4), group_ids=torch.zeros(3)),
        r"group_ids: .*\(4,\).*\(3,\)",
    ),
    "advantages-id-list": (lambda: group_advantages(torch.ones(2), group_ids=[0, 1]), r"group_ids: .*\[0, 1\]"),
    "module-objective": (lambda: GRPOLoss("dapo"), "objective: .*'dapo'"),
    "module-option": (lambda: GRPOLoss(completion_maks=1), "completion_maks"),
    "policy-entropies-integer": (
        lambda: policy_loss(torch.zeros(B, T), torch.zeros(B), entropies=ids),
        "entropies: .*floating point",
    ),
    "advantages-size": (lambda: group_advantages(torch.ones(4), 2.0), "num_generations: .*2.0"),
    "logps-ids": (
        lambda: selective_logps(torch.zeros(2, 3, 4), torch.full((2, 3), 4)),
        "completion_ids: .*mask is set.*4",
    ),
    "logps-mask": (
        lambda: selective_logps(torch.zeros(2, 4), ids.view(-1)[:2], mask=torch.ones(3)),
        r"mask: .*\(2,\)",
    ),
    "logps-temperature": (
        lambda: selective_logps(torch.zeros(2, 4), ids.view(-1)[:2], temperature=0),
        "temperature: .*0",
    ),
    "policy-rank": (lambda: policy_loss(torch.zeros(1, 1, 1), torch.zeros(1)), r"per_token_logps: .*\(B, T\)"),
    "policy-type": (lambda: policy_loss(ids, torch.zeros(B)), "per_token_logps: .*floating"),
    "policy-entropies": (
        lambda: policy_loss(torch.zeros(B, T), torch.zeros(B), objective=Objective(entropy_coef=0.1)),
        "entropies: .*bonus.*None",
    ),
    "policy-entropies-shape": (
        lambda: policy_loss(torch.zeros(B, T), torch.zeros(B), entropies=torch.zeros(B)),
        r"entropies: .*\(4, 3\).*\(4,\)",
    ),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_functions(name):
    function, message = OTHER_CALLS[name]
    with pytest.raises(ValueError, match=message):
        function()


def _quantised(x):
    return torch._empty_affine_quantized(x.shape, scale=1.0, zero_point=0, dtype=torch.quint8)


def _loss_of(name, x):
    """grpo_loss with that one argument; a per-sequence or a 0-dim one in its own shape."""
    beside = dict(advantages=None, num_generations=2) if name == "rewards" else {}
    return call(**beside, **{name: x})


def _packed(name, x):
    return grpo_loss(**packed, advantages=torch.randn(B), **{name: x})


def _head(name, x):
    arguments = dict(hidden=torch.randn(B, T, H), weight=torch.randn(V, H), completion_ids=ids) | {name: x}
    with pytest.raises(ValueError, match=f"{name}: "):
        linear_logps(**arguments)
    return linear_grpo_loss(**arguments, advantages=torch.randn(B))


def _policy(name, x):
    return policy_loss(**dict(per_token_logps=torch.zeros(B, T), advantages=torch.zeros(B)) | {name: x})


def _gae(name, x):
    return gae(**dict(rewards=torch.ones(B, T), values=torch.ones(B, T), mask=torch.ones(B, T).bool()) | {name: x},
               gamma=0.9, lam=0.9)  # fmt: skip


COMPLEX, QUANTISED, FLOAT8 = torch.complex64, torch.quint8, torch.float8_e4m3fn
ODD = (COMPLEX, QUANTISED, FLOAT8)
NOT_FLOAT, NOT_INTEGER = (*ODD, torch.int64, torch.bool), (*ODD, torch.float32, torch.bool)
DTYPES = {  # (function, argument): (its shape, the dtypes that it is not of)
    (_loss_of, "logits"): ((B, T, V), NOT_FLOAT),
    (_loss_of, "completion_ids"): ((B, T), NOT_INTEGER),
    (_loss_of, "completion_mask"): ((B, T), ODD),
    (_loss_of, "advantages"): ((B,), NOT_FLOAT),
    (_loss_of, "rewards"): ((B,), ODD),
    (_loss_of, "old_per_token_logps"): ((B, T), NOT_FLOAT),
    (_loss_of, "ref_per_token_logps"): ((B, T), NOT_FLOAT),
    (_loss_of, "sampling_per_token_logps"): ((B, T), NOT_FLOAT),
    (_loss_of, "importance_sampling_ratio"): ((B,), NOT_FLOAT),
    (_loss_of, "temperature"): ((B,), NOT_FLOAT),
    (_loss_of, "num_items_in_batch"): ((), (*ODD, torch.bool)),
    (_loss_of, "loss_scale"): ((), (*ODD, torch.bool)),
    (_packed, "cu_seqlens"): ((B + 1,), NOT_INTEGER),
    (_head, "hidden"): ((B, T, H), NOT_FLOAT),
    (_head, "weight"): ((V, H), NOT_FLOAT),
    (_head, "bias"): ((V,), NOT_FLOAT),
    (_head, "completion_ids"): ((B, T), NOT_INTEGER),
    (_head, "temperature"): ((), (*ODD, torch.bool)),
    (_policy, "per_token_logps"): ((B, T), NOT_FLOAT),
    (_policy, "entropies"): ((B, T), NOT_FLOAT),
    (_gae, "rewards"): ((B, T), ODD),
    (_gae, "values"): ((B, T), NOT_FLOAT),
    (_gae, "mask"): ((B, T), (*ODD, torch.float32)),
    (lambda _, x: selective_logps(torch.zeros(B, T, V), ids, mask=x), "mask"): ((B, T), ODD),
    (lambda _, x: group_advantages(x, 2), "rewards"): ((B,), ODD),
    (lambda _, x: estimators.gdpo(x, 2), "rewards"): ((B, T), ODD),
    (lambda _, x: estimators.reinforce_plus_plus(x, completion_mask=torch.ones(B, T)), "rewards"): ((B, T), ODD),
    (lambda _, x: estimators.opo(torch.ones(B), 2, completion_mask=x), "completion_mask"): ((B, T), ODD),
    (lambda _, x: estimators.remax(torch.ones(B), x, completion_mask=torch.ones(B, T)), "baseline_rewards"): (
        (B,),
        ODD,
    ),
    (lambda _, x: group_advantages(torch.ones(B), group_ids=x), "group_ids"): ((B,), (*ODD, torch.float32)),
}


@pytest.mark.parametrize("function, name", DTYPES, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_dtype(function, name):
    """Complex, quantised and 8-bit numbers, and whatever else does not fit, are named and never cast in silence."""
    shape, dtypes = DTYPES[function, name]
    for dtype in dtypes:
        x = _quantised(torch.ones(shape)) if dtype == QUANTISED else torch.ones(shape).to(dtype)
        with pytest.raises(ValueError, match=f"^{name}: expected .*dtype.*{dtype}"):
            function(name, x)


def test_masked_ids_may_be_anything():
    odd = ids.clone()
    odd[0] = -100
    mask = torch.ones(B, T)
    mask[0] = 0
    assert call(completion_ids=odd, completion_mask=mask).loss.isfinite()


def test_a_failed_call_loses_nothing():
    logits = torch.randn(B, T, V, requires_grad=True)
    before = logits.detach().clone()
    with pytest.raises(ValueError):
        call(logits=logits, inplace=True, temperature=0)
    assert torch.equal(logits.detach(), before)


def test_debug_mode_checks_values_on_every_device(monkeypatch):
    """Elsewhere than on a CPU reading a value is a sync, so only FASTGRPO_DEBUG=1 asks for it."""
    from fastgrpo.batch.checks import values_can_be_checked

    elsewhere = torch.zeros(1, device="meta")
    monkeypatch.delenv("FASTGRPO_DEBUG", raising=False)
    assert values_can_be_checked(torch.zeros(1)) and not values_can_be_checked(elsewhere)
    monkeypatch.setenv("FASTGRPO_DEBUG", "1")
    assert values_can_be_checked(elsewhere)
