"""Corrections for the sampler, each written out token by token, on every way that a loss takes."""

import math

import pytest
import torch
from cases import (
    LEVELS,
    LOSS_TYPES,
    assert_close,
    linear_loss_and_grads,
    linear_truth,
    loss_and_grad,
    make_inputs,
    make_linear_inputs,
    objective_for,
    pack,
    truth,
)

from fastgrpo import Correction, Objective, grpo_loss, linear_grpo_loss, policy_loss
from fastgrpo.batch.inputs import make_batch
from fastgrpo.engine.logits import Sweeps
from fastgrpo.engine.plan import roles
from fastgrpo.objective.metrics import reduce_metrics
from fastgrpo.objective.sampler import LEVELS as UNITS
from fastgrpo.objective.sampler import MEASURES, OUTSIDE, corrected, text_of

BANDS = dict(token=("0.9_1.1", "1.05", "0.95_"), sequence=("0.6_1.4", "1.2", "0.8_"),
             geometric=("0.95_1.05", "1.01", "0.97_"))  # fmt: skip
HIGHS = dict(k2=(0.03, 0.27, 0.04, 0.1), k3=(0.03, 0.28, 0.04, 0.12), binary_kl=(2e-5, 7e-4, 2e-4, 6e-4),
             tv=(2e-4, 5e-3, 1e-3, 2.5e-3))  # fmt: skip
TEXTS = [
    *(f"{unit}_{outside}:{band}" for unit in UNITS[:3] for outside in OUTSIDE for band in BANDS[unit]),
    *(f"any_{outside}:0.6_1.6" for outside in ("drop", "reject")),
    *(f"{unit}_{outside}_{measure}:{high}" for measure, bounds in HIGHS.items()
      for unit, high in zip(UNITS, bounds, strict=True) for outside in ("drop", "reject")),
    "token_truncate",
    "token_mask:0.8_5,any_drop:0.6_",
    "token_truncate:1.1,geometric_drop:0.98_1.03",
    "sequence_truncate:1.2,token_reject_k3:0.05,sequence_reject:0.5_2",
]  # fmt: skip
BEFORE, WITHIN = "of the old policy", "of the current one"


def each_way(texts):
    """(text, when); what is rejected has to be known before."""
    cases = [(text, when) for text in texts for when in (BEFORE, WITHIN) if when == BEFORE or "reject" not in text]
    return pytest.mark.parametrize("text, when", cases)


def _divergence(measure, q, old, sampling):
    p, o = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (sampling, old))
    return {
        "ratio": lambda: q,
        "k2": lambda: q * q / 2,
        "k3": lambda: math.exp(q) - 1 - q,
        "binary_kl": lambda: p * math.log(p / o) + (1 - p) * math.log((1 - p) / (1 - o)),
        "tv": lambda: abs(math.exp(sampling) - math.exp(old)),
    }[measure]()


def textbook(corrections, mask, old, sampling):
    """(weight, kept, outside), (B, T) float64 each, token by token."""
    weight, kept, outside = torch.ones(mask.shape).double(), mask.double(), torch.zeros(mask.shape).double()
    for i, row in enumerate(mask.tolist()):
        places = [t for t, m in enumerate(row) if m]
        pairs = [(old[i, t].item(), sampling[i, t].item()) for t in places]
        pairs = [(o, o if math.isnan(s) else s) for o, s in pairs]
        for one in corrections:
            xs = [_divergence(one.measure, o - s, o, s) for o, s in pairs]
            if one.level in ("sequence", "geometric") and xs:
                xs = [sum(xs) / (len(xs) if one.level == "geometric" else 1)] * len(xs)
            if one.measure == "ratio":
                xs = [math.exp(x) for x in xs]
            low, high = -math.inf if one.low is None else one.low, math.inf if one.high is None else one.high
            out = [not low <= x <= high for x in xs]
            if one.level == "any":
                out = [any(out)] * len(out)
            for t, x, o in zip(places, xs, out, strict=True):
                outside[i, t] = max(outside[i, t], o)
                if one.outside == "reject":
                    kept[i, t] *= not o
                else:
                    made = {"truncate": min(max(x, low), high), "mask": 0 if o else x, "drop": not o}
                    weight[i, t] *= made[one.outside]
    return weight, kept, outside


def _logps(extras=("old", "ref", "sampling")):
    """(logps (B, T) float64 that need a gradient, the arguments of a loss); the sampler has no number for a token."""
    logits, ids, kwargs = make_inputs(extras, batch=7, length=8)
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    return logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0].requires_grad_(), kwargs


def _poisoned(kwargs, logps):
    masked = kwargs["completion_mask"] == 0
    per_token = {k: v for k, v in kwargs.items() if v.shape == masked.shape and v.is_floating_point()}
    return kwargs | {k: torch.where(masked, torch.nan, v) for k, v in per_token.items()}, torch.where(
        masked, torch.nan, logps
    )


@pytest.mark.parametrize("layout", ["padded", "packed", "NaN where masked"])
@each_way(TEXTS)
def test_is_its_formula(text, when, layout):
    objective = Objective(sampling_correction=text, beta=0.1, use_bias_correction_kl=False)
    logps, kwargs = _logps()
    old = kwargs.pop("old_per_token_logps") if when == WITHIN else kwargs["old_per_token_logps"]
    old = logps.detach() if when == WITHIN else old
    mask, a = kwargs["completion_mask"], kwargs["advantages"][:, None]
    sampling = kwargs["sampling_per_token_logps"]
    weight, kept, outside = textbook(objective.corrections, mask, old, sampling)
    r, d = (logps - old).exp(), kwargs["ref_per_token_logps"] - logps
    losses = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a) * weight + 0.1 * (d.exp() - 1 - d)
    want = (losses * kept).sum() / kept.sum().clamp(min=1)
    (want_grad,) = torch.autograd.grad(want, logps)
    given = logps
    if layout == "NaN where masked":
        kwargs, given = _poisoned(kwargs, logps)
    if layout == "packed":
        cu_seqlens, kwargs = pack(kwargs.pop("completion_mask"), dict(kwargs, given=given))
        given, kwargs["cu_seqlens"] = kwargs.pop("given"), cu_seqlens
    out = policy_loss(given, objective=objective, **kwargs)
    assert_close(out.loss, want, 1e-12, "loss")
    assert_close(torch.autograd.grad(out.loss, logps)[0], want_grad, 1e-12, "gradient")
    known = (mask > 0) & ~sampling.isnan()
    assert known.sum() == mask.sum() - 1
    assert_close(out.metrics["sampling/outside_mean"], outside[known].mean(), 1e-12)


def test_signal():
    """Each correction leaves some tokens alone, and touches others."""
    logps, kwargs = _logps()
    mask, old = kwargs["completion_mask"], kwargs["old_per_token_logps"]
    for text in TEXTS:
        corrections = Objective(sampling_correction=text).corrections
        weight, kept, outside = textbook(corrections, mask, old, kwargs["sampling_per_token_logps"])
        assert 0 < outside.sum() < mask.sum() or text == "token_truncate", text
        assert kept.sum() > 0, text


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_of_every_loss(loss_type):
    """It is the importance_sampling_ratio of its weights, and the completion_mask of what it keeps."""
    logps, kwargs = _logps()
    mask, sampling = kwargs["completion_mask"], kwargs.pop("sampling_per_token_logps")
    for level in LEVELS:
        for text in ("token_truncate:0.9_1.1", "sequence_mask:0.5_3", "token_reject:0.9_1.1", *TEXTS[-2:]):
            objective = objective_for(loss_type, level, dict(beta=0.1, sampling_correction=text))
            per_sequence = all(one.of_sequences for one in objective.corrections if one.outside != "reject")
            for when in (BEFORE, WITHIN):
                given = {k: v for k, v in kwargs.items() if when == BEFORE or not k.startswith("old")}
                if when == WITHIN and "reject" in text:
                    continue
                old = given.get("old_per_token_logps", logps.detach())
                got = policy_loss(logps, objective=objective, sampling_per_token_logps=sampling, **given)
                weight, kept, _ = textbook(objective.corrections, mask, old, sampling)
                ratio = dict(importance_sampling_ratio=weight[:, :1] if per_sequence else weight)
                if all(one.outside == "reject" for one in objective.corrections):
                    ratio = {}
                plain = objective_for(loss_type, level, dict(beta=0.1))
                want = policy_loss(logps, objective=plain, **{**given, "completion_mask": kept}, **ratio)
                case = f"{level}, {text}, {when}"
                assert_close(got.loss, want.loss, 1e-10, case)
                a, b = (torch.autograd.grad(x.loss, logps)[0] for x in (got, want))
                assert_close(a, b, 1e-10, case)
                for name, value in want.metrics.items():
                    assert_close(got.metrics[name], value, 1e-10, f"{case}: {name}")


def spied(name, function, calls):
    return lambda *args, **options: calls.append(name) or function(*args, **options)


WAYS = ["token_truncate:1.1", "token_mask:0.9_1.1", "token_reject:0.9_1.1", "sequence_truncate:1.2,any_drop:0.6_1.6"]


@each_way(WAYS)
def test_from_logits(text, when, backend, device, monkeypatch):
    objective = Objective(sampling_correction=text, beta=0.1)
    logits, ids, kwargs = make_inputs(("old", "ref", "sampling"), device=device, backend=backend)
    if when == WITHIN:
        del kwargs["old_per_token_logps"]
    want, want_grad = truth(logits, ids, 2.0, objective=objective, **kwargs)
    calls = []
    for name in ("stats", "grad", "token_loss"):
        function = getattr(Sweeps, name)
        monkeypatch.setattr(Sweeps, name, spied(name, function, calls))
    for inplace in (False, True):
        calls.clear()
        call = dict(objective=objective, backend=backend, inplace=inplace)
        got, grad = loss_and_grad(grpo_loss, logits, ids, 2.0, **call, **kwargs)
        assert_close(got.loss, want.loss, 1e-5, "loss")
        assert_close(grad, want_grad, 1e-5, "gradient")
        for name, value in want.metrics.items():
            assert_close(got.metrics[name], value, 2e-5, name)
        fused = when == BEFORE and backend != "torch"
        one_pass = ["token_loss"] if inplace else ["token_loss", "grad"]
        assert calls == (one_pass if fused else ["stats", "grad"])


@each_way(WAYS)
def test_from_hidden_states(text, when, backend, device):
    slow = backend in ("triton", "cuda")
    if slow and "mask" in text:
        pytest.skip("slow, and as the others")
    objective = Objective(sampling_correction=text)
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "sampling"), device=device,
                                                     backend="triton" if slow else None)  # fmt: skip
    kwargs["advantages"][1] = 0  # a sequence that does not learn
    if when == WITHIN:
        del kwargs["old_per_token_logps"]
    want, *wanted = linear_truth(hidden, weight, ids, 2.0, objective=objective, **kwargs)
    for chunk in (None,) if slow else (None, 8, 2):  # all in one, cut between sequences, and through them
        for statistics in (True, False):
            call = dict(objective=objective, chunk_size=chunk, backend=backend, return_stats=statistics)
            got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, 2.0, **call, **kwargs)
            assert_close(got.loss, want.loss, 2e-6, "loss")
            for a, b in zip(grads, wanted, strict=True):
                assert_close(a, b, 1e-5, "gradient")
            for name, value in want.metrics.items() if statistics else ():
                assert_close(got.metrics[name], value, 2e-5, name)


@each_way([WAYS[0], *WAYS[2:]])
def test_in_a_compiled_graph(text, when):
    """A graph in one piece waits for nothing, the metrics included."""
    objective = Objective(sampling_correction=text)
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "sampling"))
    if when == WITHIN:
        del kwargs["old_per_token_logps"]

    def linear(hidden, weight, ids, **kwargs):
        return linear_grpo_loss(hidden * 1, weight, ids, objective=objective, **kwargs)

    torch._dynamo.reset()
    want, *wanted = linear_loss_and_grads(linear, hidden, weight, ids, **kwargs)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    got, *grads = linear_loss_and_grads(compiled, hidden, weight, ids, **kwargs)
    assert_close(got.loss, want.loss, 1e-6)
    for a, b in zip(grads, wanted, strict=True):
        assert_close(a, b, 1e-6)
    assert set(got.metrics) == set(want.metrics)
    for name, value in want.metrics.items():
        assert_close(got.metrics[name], value, 1e-6, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [-1000.0, -100.0, -20.0, 20.0, 100.0, 1000.0])
def test_log_ratios_beyond_fp32(q, dtype):
    """A finite bound gives finite weights; where the ratio itself is asked for, it has a largest number."""
    old = torch.full((1, 3), -2.0, dtype=dtype)
    sampling = old - torch.tensor([[q, 0.01, -0.01]], dtype=dtype)
    exp = math.exp(min(q, 700))
    inside = 0.5 <= exp <= 5
    divergent = not q * q / 2 <= 250  # 20 is within
    wanted = {
        "token_truncate:2": [min(exp, 2), math.exp(0.01), math.exp(-0.01)],
        "token_truncate:0.5_2": [min(max(exp, 0.5), 2), math.exp(0.01), math.exp(-0.01)],
        "token_mask:0.5_5": [exp * inside, math.exp(0.01), math.exp(-0.01)],
        "sequence_truncate:5": [min(exp, 5)] * 3,
        "sequence_mask:0.5_5": [exp * inside] * 3,
        "geometric_truncate:0.5_5": [min(max(math.exp(q / 3), 0.5), 5)] * 3,
        "any_drop:1e-4_": [float(q > -9)] * 3,
        "token_drop_k2:250": [float(not divergent), 1, 1],
        "token_drop_k3:1e9": [float(q <= 20), 1, 1],
        "sequence_drop_binary_kl:100": [1, 1, 1],
    }
    for text, weights in wanted.items():
        for advantage in (1.5, 0.0, -1.5):
            leaf = old.clone().requires_grad_()
            given = dict(old_per_token_logps=old, sampling_per_token_logps=sampling)
            objective = Objective(sampling_correction=text)
            out = policy_loss(leaf, torch.tensor([advantage], dtype=dtype), objective=objective, **given)
            want = -advantage * torch.tensor([weights], dtype=torch.float64) / 3
            case = f"{text}, advantage {advantage}"
            assert_close(out.loss, want.sum(), 2e-6, case)
            assert_close(torch.autograd.grad(out.loss, leaf)[0], want, 2e-6, case)
    raw = Objective(sampling_correction="token_truncate")
    zero = policy_loss(leaf, torch.zeros(1, dtype=dtype), objective=raw, **given)
    assert zero.loss == 0 and torch.autograd.grad(zero.loss, leaf)[0].abs().max() == 0


def test_metrics_are_of_all_loss_tokens_before_any_correction():
    logps, kwargs = _logps()
    mask, old, sampling = (kwargs[k] for k in ("completion_mask", "old_per_token_logps", "sampling_per_token_logps"))
    known = (mask > 0) & ~sampling.isnan()
    for when in (BEFORE, WITHIN):
        given = {k: v for k, v in kwargs.items() if when == BEFORE or not k.startswith("old")}
        q = ((old if when == BEFORE else logps.detach()) - sampling)[known]
        want = dict(ratio_mean=q.exp().mean(), ratio_max=q.exp().max(), kl_k1=-q.mean(),
                    kl_k3=(q.exp() - 1 - q).mean(), tokens=known.sum())  # fmt: skip
        for text in (None, "token_truncate:1.1", "token_reject:0.9_1.1,any_reject:0.99_1.01"):
            if when == WITHIN and text is not None and "reject" in text:
                continue
            metrics = policy_loss(logps, objective=Objective(sampling_correction=text), **given).metrics
            got = {k.removeprefix("sampling/"): v for k, v in metrics.items() if k.startswith("sampling/")}
            more = ["outside_mean"] * (text is not None) + ["accepted"] * ("reject" in (text or ""))
            assert set(got) == {*want, *more}
            for name, value in want.items():
                assert_close(got[name], value, 1e-12, name)
    nothing = policy_loss(logps, objective=Objective(), **(kwargs | dict(completion_mask=mask * 0))).metrics
    assert nothing["sampling/ratio_mean"] == 0 and nothing["sampling/ratio_max"].isnan()
    del kwargs["sampling_per_token_logps"]
    assert not any(name.startswith("sampling/") for name in policy_loss(logps, **kwargs).metrics)


def test_rejected_tokens_leave_the_averages_and_dropped_ones_stay():
    logps, kwargs = _logps(("old", "sampling"))
    out = {}
    for outside in ("drop", "reject"):
        objective = Objective(sampling_correction=f"token_{outside}:0.9_1.1")
        out[outside] = policy_loss(logps, objective=objective, **kwargs)
    _, kept, _ = textbook(objective.corrections, *(kwargs[k] for k in (
        "completion_mask", "old_per_token_logps", "sampling_per_token_logps")))  # fmt: skip
    tokens = kwargs["completion_mask"].sum()
    assert 0 < kept.sum() < tokens
    assert_close(out["drop"].loss * tokens, out["reject"].loss * kept.sum(), 1e-12)
    assert (out["reject"].per_token_logps != 0).sum() == kept.sum()


def test_ends_of_a_band_are_within_and_masked_tokens_are_nowhere():
    old = torch.zeros(2, 3).double()
    for text, q, mask, kept in (
        ("token_drop:1_1", [0.0, 0.0, 0.0], [1, 1, 1], [1, 1, 1]),
        ("token_mask:1_2", [0.0, math.log(2.5), 0.1], [1, 1, 0], [1, 0, 0]),
        ("any_drop:1.2_", [0.5, 0.4, -9.0], [1, 1, 0], [1, 1, 0]),
        ("sequence_drop:1.2_", [0.5, -0.1, -9.0], [1, 1, 0], [1, 1, 0]),
        ("geometric_drop:_1.2", [0.5, -0.2, 9.0], [1, 1, 0], [1, 1, 0]),
    ):
        sampling = old - torch.tensor([q, [math.nan] * 3]).double()
        leaf, mask = old.clone().requires_grad_(), torch.tensor([mask, [0, 0, 0]])
        given = dict(old_per_token_logps=old, sampling_per_token_logps=sampling, completion_mask=mask)
        loss = policy_loss(leaf, torch.ones(2).double(), objective=Objective(sampling_correction=text), **given).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert (gradient != 0).tolist() == [[bool(x) for x in kept], [False] * 3], text


def test_rejected_tokens_enter_no_product():
    objective = Objective(sampling_correction="token_reject:0.9_1.1")
    ids, old = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)
    given = dict(old_per_token_logps=old, sampling_per_token_logps=torch.tensor([[0.0, 1.0, 0.05]]))
    batch = corrected(objective.corrections, make_batch(ids, torch.ones(1), given, dtype=torch.float32))
    for statistics in (True, False):
        scored, learn = roles(objective.in_pass(given), batch, statistics)
        assert scored.tolist() == [True, False, True] and (learn is None or learn.tolist() == [True, False, True])


def test_reject_without_a_mask():
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "sampling"))
    del kwargs["completion_mask"]
    objective = Objective(sampling_correction="token_reject:0.9_1.1")
    want, *wanted = linear_truth(hidden, weight, ids, objective=objective, **kwargs)
    for chunk in (None, 4):
        got, *grads = linear_loss_and_grads(
            linear_grpo_loss, hidden, weight, ids, objective=objective, chunk_size=chunk, **kwargs
        )
        assert_close(got.loss, want.loss, 1e-5)
        assert_close(got.per_token_logps, want.per_token_logps, 2e-6)
        for a, b in zip(grads, wanted, strict=True):
            assert_close(a, b, 1e-5)


def test_text():
    one = Correction("token", "truncate", high=2)
    for text, want in {
        "token_truncate:2": one,
        "token_truncate:_2": one,
        " Token_Truncate:2.0 ": one,
        "token_truncate": Correction("token", "truncate"),
        "any_drop:1e-4_": Correction("any", "drop", low=1e-4),
        "geometric_reject_binary_kl:1e-3": Correction("geometric", "reject", high=1e-3, measure="binary_kl"),
        "token_mask:.5_5": Correction("token", "mask", 0.5, 5.0),
    }.items():
        assert Objective(sampling_correction=text).corrections == (want,)
        assert Objective(sampling_correction=want) == Objective(sampling_correction=[want])
        assert Objective(sampling_correction=text) == Objective(sampling_correction=want)
    for text in TEXTS:
        objective = Objective(sampling_correction=text)
        assert Objective(sampling_correction=text_of(objective.corrections)) == objective
        assert " " not in text_of(objective.corrections)
    assert Objective(sampling_correction=None) == Objective()
    assert Objective.preset("verl", sampling_correction="token_truncate:2").corrections == (one,)


@pytest.mark.parametrize(
    "given, message",
    {
        "nope": "level_outside:low_high",
        "": "level_outside:low_high",
        "token_truncate:1_2_3": "level_outside:low_high",
        "token_truncate:1..2": "numbers as bounds",
        "row_truncate:2": "level one of token, sequence, geometric, any, got 'row'",
        "token_clip:2": "outside one of truncate, mask, drop, reject, got 'clip'",
        "token_drop_k4:2": f"measure one of {', '.join(MEASURES)}, got 'k4'",
        "any_mask:0.5_2": "a ratio of level token, sequence or geometric with 'mask'",
        "token_truncate_k3:2": "a ratio of level token.*with 'truncate'",
        "token_drop": "a bound with 'drop'",
        "sequence_truncate:3_2": "low at most high",
        3: "a text such as.*got 3",
        (): "a text such as",
        ("token_truncate:2",): "a text such as",
    }.items(),
)  # fmt: skip
def test_bad_corrections(given, message):
    with pytest.raises(ValueError, match=f"sampling_correction: expected .*{message}"):
        Objective(sampling_correction=given)


def test_bad_bounds():
    for name in ("low", "high"):
        for bound in (-1, math.inf, math.nan, True, "2"):
            with pytest.raises(ValueError, match=f"sampling_correction: expected {name} None or a finite number >= 0"):
                Correction("token", "truncate", **{name: bound})


def test_what_a_correction_needs():
    logps, kwargs = _logps()
    given = dict(objective=Objective(sampling_correction="token_truncate:2"), **kwargs)
    with pytest.raises(ValueError, match="sampling_per_token_logps: expected a tensor because .*sampling_correction"):
        policy_loss(logps, **given | dict(sampling_per_token_logps=None))
    with pytest.raises(ValueError, match="importance_sampling_ratio: expected None beside a sampling_correction"):
        policy_loss(logps, importance_sampling_ratio=torch.ones(4, 1).double(), **given)
    given["objective"] = Objective(sampling_correction="token_truncate:2,token_reject:0.5_2")
    with pytest.raises(ValueError, match="old_per_token_logps: expected a tensor because .*rejects.*'drop'"):
        policy_loss(logps, **given | dict(old_per_token_logps=None))


OVER_PROCESSES = [
    "token_reject:0.9_1.1",
    "sequence_reject:0.6_1.4",
    "token_truncate:1.1,token_reject_k3:0.001",
    "token_drop:0.9_1.1",
    None,
]


@pytest.mark.parametrize("text", OVER_PROCESSES)
def test_metrics_over_processes_are_those_of_the_whole_batch(text):
    """Means are weighed by the tokens that they are of: not those that were rejected, or that the sampler lacks."""
    logps, kwargs = _logps()
    kwargs["sampling_per_token_logps"][:2, :3] = torch.nan
    kwargs["old_per_token_logps"][:3] = kwargs["old_per_token_logps"][:3] + 0.3  # most is rejected there
    kwargs["num_items_in_batch"] = 50.0
    objective = Objective(sampling_correction=text, beta=0.1)

    def metrics_of(rows):
        given = {name: x[rows] if torch.is_tensor(x) else x for name, x in kwargs.items()}
        return policy_loss(logps[rows], objective=objective, **given).metrics, given["completion_mask"]

    class Processes:
        def __init__(self):
            self.packed = []

        def gather(self, mine):
            self.packed.append(mine)
            return torch.cat(self.packed)

    processes, parts = Processes(), [metrics_of(rows) for rows in (slice(0, 3), slice(3, 4), slice(4, 7))]
    reduced = [reduce_metrics(processes, objective, *part, 1) for part in parts][-1]
    want = metrics_of(slice(0, 7))[0]
    assert ("sampling/accepted" in want) == ("reject" in (text or ""))
    assert set(want) - set(reduced) == {"sampling/tokens", "sampling/accepted"} & set(want)
    for name, x in reduced.items():
        assert x.item() == pytest.approx(want[name].item(), rel=2e-6, abs=1e-7), name
