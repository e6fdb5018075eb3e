"""Advantage estimators against textbook loops over Python floats, and what they do at the edges."""

import itertools
import math
import statistics

import pytest
import torch
from cases import assert_close

from fastgrpo import Objective, advantages, group_advantages, grpo_loss, kl_in_reward, linear_grpo_loss
from fastgrpo.advantages import (
    ESTIMATORS,
    best_of_group,
    estimate,
    gdpo,
    gpg,
    maxrl,
    opo,
    optimal_token_baseline,
    pass_at_k,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
)

NAN = torch.nan
B, T = 12, 7


# The textbook: rewards of a batch as floats, NaN where nobody judged; groups as lists of their judged rows


def groups_of(rewards, ids):
    return [[i for i, key in enumerate(ids) if key == group and rewards[i] == rewards[i]] for group in set(ids)]


def in_each_group(formula):
    """An estimator that sees one group at a time: formula(rewards of the group, the place of one of them, lengths)."""

    def oracle(rewards, ids, lengths, **options):
        result = [0.0] * len(rewards)
        for rows in groups_of(rewards, ids):
            r, n = [rewards[i] for i in rows], [lengths[i] for i in rows]
            for place, i in enumerate(rows):
                result[i] = formula(r, place, n, **options) if len(rows) > 1 else 0.0
        return result

    return oracle


def mean_of_others(r, i, n):
    return r[i] - sum(r[:i] + r[i + 1 :]) / (len(r) - 1)


def less_the_weighted_mean(r, i, n):
    return r[i] - sum(x * y for x, y in zip(r, n, strict=True)) / sum(n) if sum(n) else 0.0


def over_the_mean(r, i, n, epsilon=1e-6):
    mean = sum(r) / len(r)
    return (r[i] - mean) / (mean + epsilon)


def lead_of_the_best(r, i, n, epsilon=1e-6, scale_rewards="group"):
    lead = max(0.0, r[i] - max(r[:i] + r[i + 1 :]))
    return lead / (statistics.stdev(r) + epsilon) if scale_rewards == "group" else lead


def best_of_all_sets(r, i, n, k, epsilon=1e-6):
    if k > len(r):
        return 0.0
    sets = list(itertools.combinations(range(len(r)), k))
    best = [max(r[j] for j in members) for members in sets]
    own = [value for value, members in zip(best, sets, strict=True) if i in members]
    return (statistics.fmean(own) - statistics.fmean(best)) / (statistics.pstdev(best) + epsilon)


def normalised(r, i, n, epsilon=1e-4):
    return (r[i] - statistics.fmean(r)) / (statistics.stdev(r) + epsilon)


def over_tokens(values, lengths):
    """Each value `length` times, normalised over all of them."""
    tokens = [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]
    mean = statistics.fmean(tokens)
    scale = math.sqrt(statistics.variance(tokens) + 1e-8)
    return [(value - mean) / scale if length else 0.0 for value, length in zip(values, lengths, strict=True)]


def centred_then_over_tokens(rewards, ids, lengths):
    centred = in_each_group(lambda r, i, n: r[i] - statistics.fmean(r))(rewards, ids, lengths)
    judged = [length if reward == reward else 0 for length, reward in zip(lengths, rewards, strict=True)]
    return over_tokens(centred, judged)


def times_the_share(rewards, ids, lengths, valid="nonzero"):
    groups = groups_of(rewards, ids)
    counts = {
        "nonzero": sum(reward == reward and reward != 0 for reward in rewards),
        "unequal": sum(len(rows) for rows in groups if len({rewards[i] for i in rows}) > 1),
    }
    alpha = sum(map(len, groups)) / max(counts[valid], 1)
    return in_each_group(lambda r, i, n: alpha * (r[i] - statistics.fmean(r)))(rewards, ids, lengths)


def returns_of(rewards, mask, gamma):
    """(B, T) rewards to come over the loss tokens; rewards of a completion are at its last loss token."""
    result = []
    for reward, row in zip(rewards, mask, strict=True):
        tokens = [t for t, here in enumerate(row) if here]
        each = [0.0] * len(row)
        to_come = 0.0
        for t in reversed(tokens):
            to_come = (reward[t] if isinstance(reward, list) else reward * (t == tokens[-1])) + gamma * to_come
            each[t] = to_come
        result.append(each)
    return result


def is_judged(reward, row):
    values = [x for x, here in zip(reward, row, strict=True) if here] if isinstance(reward, list) else [reward]
    return all(x == x for x in values)


def normalised_returns(rewards, mask, gamma=1.0):
    returns = returns_of(rewards, mask, gamma)
    judged = [is_judged(reward, row) for reward, row in zip(rewards, mask, strict=True)]
    cells = [(i, t) for i, row in enumerate(mask) for t, here in enumerate(row) if here and judged[i]]
    values = over_tokens([returns[i][t] for i, t in cells], [1] * len(cells))
    result = [[0.0] * len(row) for row in mask]
    for (i, t), value in zip(cells, values, strict=True):
        result[i][t] = value
    return result


def less_the_token_baseline(rewards, mask, ids, logps, squares, ratios=None):
    returns = returns_of(rewards, mask, 1.0)
    result = [[0.0] * len(row) for row in mask]
    judged = [is_judged(reward, row) for reward, row in zip(rewards, mask, strict=True)]
    tokens = [[t for t, here in enumerate(row) if here and judged[i]] for i, row in enumerate(mask)]

    def weight(i, place):
        return sum(
            (1 - 2 * math.exp(logps[i][t]) + squares[i][t]) * (1.0 if ratios is None else ratios[i][t] ** 2)
            for t in tokens[i][: place + 1]
        )

    for i, row in enumerate(tokens):
        for place, t in enumerate(row):
            others = [j for j in range(len(ids)) if ids[j] == ids[i] and len(tokens[j]) > place]
            weights = [weight(j, place) for j in others]
            values = [returns[j][tokens[j][place]] for j in others]
            baseline = sum(w * g for w, g in zip(weights, values, strict=True)) / (sum(weights) + 1e-8)
            result[i][t] = returns[i][t] - (baseline if len(others) > 1 else 0.0)
            if len(others) > 1 and len(set(values)) == 1:
                result[i][t] = 0.0
    return result


# Inputs


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(B, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.7
    for row in range(B // 2):
        mask[row] = torch.arange(T) < T - row  # padding on the right; the others have holes
    mask[3] = False
    logps = -torch.rand(B, T, generator=generator, dtype=torch.float64) * 3 - 0.01
    squares = logps.exp() ** 2 + 0.1 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    ratios = torch.rand(B, T, generator=generator, dtype=torch.float64) * 2
    per_token = torch.randn(B, T, generator=generator, dtype=torch.float64)
    binary = (torch.rand(B, generator=generator) < 0.4).double()
    binary[:4] = 1.0  # a group of equal ones
    missing = normal.clone()
    missing[[1, 5, 8, 9, 10]] = NAN
    rewards = {"normal": normal, "binary": binary, "missing": missing, "large": normal + 1e4}
    return rewards, mask, logps, squares, ratios, per_token


REWARDS, MASK, LOGPS, SQUARES, RATIOS, PER_TOKEN = tensors()
LENGTHS = MASK.sum(1)
GROUPS = {
    "contiguous": ((4,), {}, [0] * 4 + [1] * 4 + [2] * 4),
    "ids": ((), dict(group_ids=torch.tensor([9, -3, 9, 9, 5, -3, 9, 5, 5, 7, 9, -3])), [9, -3, 9, 9, 5, -3, 9, 5, 5, 7,
                                                                                        9, -3]),
}  # fmt: skip
WITH_MASK = dict(completion_mask=MASK)
OF_COMPLETIONS = {
    "rloo": (rloo, in_each_group(mean_of_others), {}, {}),
    "opo": (opo, in_each_group(less_the_weighted_mean), WITH_MASK, {}),
    "reinforce++ baseline": (reinforce_plus_plus_baseline, centred_then_over_tokens, WITH_MASK, {}),
    "gpg": (gpg, times_the_share, {}, {}),
    "gpg unequal": (gpg, times_the_share, {}, dict(valid="unequal")),
    "maxrl": (maxrl, in_each_group(over_the_mean), {}, {}),
    "maxrl epsilon": (maxrl, in_each_group(over_the_mean), {}, dict(epsilon=0.5)),
    "best": (best_of_group, in_each_group(lead_of_the_best), {}, {}),
    "best unscaled": (best_of_group, in_each_group(lead_of_the_best), {}, dict(scale_rewards="none")),
    **{f"pass@{k}": (pass_at_k, in_each_group(best_of_all_sets), {}, dict(k=k)) for k in (1, 2, 3)},
    "group": (group_advantages, in_each_group(normalised), {}, dict(epsilon=1e-6)),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("name", OF_COMPLETIONS)
def test_of_completions(name, kind, groups):
    function, oracle, data, options = OF_COMPLETIONS[name]
    args, ids, keys = GROUPS[groups]
    got = function(REWARDS[kind], *args, **data, **ids, **options)
    want = oracle(REWARDS[kind].tolist(), keys, LENGTHS.tolist(), **options)
    assert got.dtype == torch.float64
    # what rounding costs where the rewards are far from 0
    rel = 1e-9 if kind == "large" else 1e-12
    assert_close(got, torch.tensor(want, dtype=torch.float64), rel, name)


def test_the_papers_formula_of_pass_at_k():
    """For 0 and 1, by binomials: 1 - C(f, k) / C(n, k)."""
    rewards, k, n = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]).double(), 3, 8
    f = 6
    mean = 1 - math.comb(f, k) / math.comb(n, k)
    std = math.sqrt(mean * (1 - mean))
    below = (1 - mean - math.comb(f - 1, k - 1) / math.comb(n - 1, k - 1)) / std
    want = torch.tensor([(1 - mean) / std if reward else below for reward in rewards], dtype=torch.float64)
    assert_close(pass_at_k(rewards, n, k=k, epsilon=0.0), want, 1e-12)


def test_pass_at_k_of_a_large_group():
    """Ratios of binomials that overflow alone."""
    rewards = torch.arange(2048) < 3
    got = pass_at_k(rewards.double(), 2048, k=1500, epsilon=0.0)
    mean = 1 - math.comb(2045, 1500) / math.comb(2048, 1500)
    assert_close(got[:3], torch.tensor([math.sqrt((1 - mean) / mean)] * 3, dtype=torch.float64), 1e-9)
    assert got.isfinite().all()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("of", ["completions", "tokens"])
def test_gdpo(groups, of):
    args, ids, keys = GROUPS[groups]
    rewards = torch.stack([REWARDS["normal"], REWARDS["binary"], REWARDS["missing"]], dim=1)
    rewards[2] = NAN
    weights = [1.0, 0.5, -2.0]
    each = [in_each_group(normalised)(column.tolist(), keys, LENGTHS.tolist()) for column in rewards.unbind(1)]
    total = [sum(w * x for w, x in zip(weights, row, strict=True)) for row in zip(*each, strict=True)]
    judged = [not row.isnan().all() for row in rewards]
    if of == "tokens":
        want = over_tokens(total, [length * here for length, here in zip(LENGTHS.tolist(), judged, strict=True)])
    else:
        kept = [x for x, here in zip(total, judged, strict=True) if here]
        mean, std = statistics.fmean(kept), statistics.stdev(kept)
        want = [(x - mean) / (std + 1e-4) if here else 0.0 for x, here in zip(total, judged, strict=True)]
    mask = WITH_MASK if of == "tokens" else {}
    got = gdpo(rewards, *args, **ids, **mask, weights=weights)
    assert_close(got, torch.tensor(want, dtype=torch.float64), 1e-12)
    assert torch.equal(got, gdpo(rewards, *args, **ids, **mask, weights=torch.tensor(weights)))


def token_rewards(kind):
    if kind != "tokens":
        return REWARDS[kind]
    rewards = PER_TOKEN.masked_fill(~MASK, NAN)
    rewards[2, 1] = NAN  # not judged
    return rewards


OF_TOKENS = ("normal", "binary", "missing", "tokens")


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0])
@pytest.mark.parametrize("kind", OF_TOKENS)
def test_reinforce_plus_plus(kind, gamma):
    rewards = token_rewards(kind)
    got = reinforce_plus_plus(rewards, completion_mask=MASK, gamma=gamma)
    want = torch.tensor(normalised_returns(rewards.tolist(), MASK.tolist(), gamma), dtype=torch.float64)
    assert_close(got, want, 1e-11)
    assert (got[~MASK] == 0).all()


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_remax(kind):
    rewards, greedy = token_rewards(kind), REWARDS["normal"].roll(1)
    greedy[0] = NAN
    got = remax(rewards, greedy, completion_mask=MASK)
    want = torch.tensor(returns_of(rewards.tolist(), MASK.tolist(), 1.0), dtype=torch.float64) - greedy[:, None]
    judged = torch.tensor([is_judged(r, row) for r, row in zip(rewards.tolist(), MASK.tolist(), strict=True)])
    kept = MASK & judged[:, None] & ~greedy.isnan()[:, None]
    assert_close(got, torch.where(kept, want, 0.0), 1e-12)


@pytest.mark.parametrize("with_ratio", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", OF_TOKENS)
def test_optimal_token_baseline(kind, groups, with_ratio):
    args, ids, keys = GROUPS[groups]
    rewards = token_rewards(kind)
    hidden = [x.masked_fill(~MASK, NAN) for x in (LOGPS, SQUARES, RATIOS)]
    ratio = dict(importance_sampling_ratio=hidden[2]) if with_ratio else {}
    got = optimal_token_baseline(
        rewards, *args, **ids, **ratio, completion_mask=MASK, per_token_logps=hidden[0], sum_pi_squared=hidden[1]
    )
    ratios = RATIOS.tolist() if with_ratio else None
    want = less_the_token_baseline(
        rewards.tolist(), MASK.tolist(), keys, LOGPS.tolist(), SQUARES.tolist(), ratios
    )  # fmt: skip
    assert_close(got, torch.tensor(want, dtype=torch.float64), 1e-11)


def test_the_gradient_norm_of_a_token():
    """1 - 2π + Σπ² is |d logp / d logits|²."""
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (5,))
    logps = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    squares = logits.softmax(-1).square().sum(-1)
    torch.testing.assert_close(1 - 2 * logps.exp() + squares, gradient.square().sum(-1))


# Edges


def everything(rewards, count, mask):
    """(name, advantages) of every estimator, from rewards (B,) in contiguous groups of `count`."""
    ones = torch.ones(mask.shape, device=rewards.device)
    given = dict(per_token_logps=-ones, sum_pi_squared=0.3 * ones)
    for name in ESTIMATORS:
        options = dict(k=2) if name == "pass_at_k" else {}
        yield name, estimate(name, rewards, count, completion_mask=mask, **options)
    yield "gdpo", gdpo(rewards[:, None].expand(-1, 2), count)
    yield "gdpo of tokens", gdpo(rewards[:, None].expand(-1, 2), count, completion_mask=mask)
    yield "remax", remax(rewards, rewards, completion_mask=mask)
    yield "otb", optimal_token_baseline(rewards, count, completion_mask=mask, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_equal_rewards_are_exactly_zero(value, dtype):
    """Of all completions; 0.1 seven times over 7 is not 0.1."""
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 0, 2, 5, 4] * 2)[:, None]
    mask[0] = mask[1]  # the longest one has company: beyond it, the optimal token baseline is 0
    mask[7] = mask[12]
    for name, got in everything(torch.full((14,), value, dtype=dtype), 7, mask):
        if name == "otb":
            alone = torch.tensor([False] * 5 + [True] + [False] * 8)[:, None] & (torch.arange(5) > 3)
            got = torch.where(alone | alone.roll(7, 0), 0.0, got)
        assert (got == 0).all(), name


@pytest.mark.parametrize("name", ["group", "rloo", "opo", "maxrl", "best_of_group", "pass_at_k", "gpg"])
def test_a_group_of_equal_rewards_beside_another(name):
    rewards = torch.tensor([0.1] * 7 + [0.3, 0.1, 0.5, 0.2, 0.3, 0.4, 0.9])
    mask = torch.ones(14, 3)
    got = estimate(name, rewards, 7, completion_mask=mask, **(dict(k=3) if name == "pass_at_k" else {}))
    assert (got[:7] == 0).all() and (got[7:] != 0).any()


def test_pass_at_k_of_a_certain_best():
    """Two of four are right, so three tries always find one: nobody learns, exactly."""
    assert (pass_at_k(torch.tensor([0.1, 0.3, 0.1, 0.3]), 4, k=3) == 0).all()


def test_groups_of_one():
    mask = torch.ones(3, 2)
    rewards = torch.tensor([0.5, -1.0, NAN])
    for function in (rloo, gpg, maxrl, best_of_group, group_advantages):
        assert (function(rewards, 1) == 0).all(), function
    for function in (opo, reinforce_plus_plus_baseline):
        assert (function(rewards, 1, completion_mask=mask) == 0).all(), function
    ids = torch.arange(3)
    assert (pass_at_k(rewards, group_ids=ids, k=1) == 0).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_dtypes(dtype):
    mask = torch.ones(8, 3, dtype=torch.int32)
    rewards = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1]).to(dtype)
    exact = dict(everything(rewards.double(), 4, mask))
    for name, got in everything(rewards, 4, mask):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        assert_close(got, exact[name], 1e-6, name)


@pytest.mark.parametrize("count, length", [(0, 3), (0, 0), (4, 0)])
def test_nothing(count, length):
    mask = torch.ones(count, length, dtype=torch.bool)
    for name, got in everything(torch.zeros(count), 4, mask):
        assert got.shape in ((count,), (count, length)) and (got == 0).all(), name
    if not count:
        ids = dict(group_ids=torch.zeros(0, dtype=torch.int64))
        assert rloo(torch.zeros(0), **ids).shape == pass_at_k(torch.zeros(0), **ids, k=1).shape == (0,)


def test_one_loss_token():
    mask = torch.tensor([[True, False], [False, False]])
    rewards = torch.tensor([3.0, 1.0])
    assert (reinforce_plus_plus(rewards, completion_mask=mask) == 0).all()
    assert (reinforce_plus_plus_baseline(rewards, 2, completion_mask=mask) == 0).all()


def test_no_loss_token_in_a_group():
    assert (opo(torch.tensor([3.0, 1.0]), 2, completion_mask=torch.zeros(2, 4)) == 0).all()


def test_contiguous_groups_wait_for_nothing():
    """A meta tensor has no values to wait for."""
    meta = torch.device("meta")
    mask = torch.ones(8, 3, dtype=torch.bool, device=meta)
    rewards = torch.ones(8, device=meta)
    given = dict(per_token_logps=torch.ones(8, 3, device=meta), sum_pi_squared=torch.ones(8, 3, device=meta))
    for name in ESTIMATORS:
        estimate(name, rewards, 4, completion_mask=mask, **(dict(k=2) if name == "pass_at_k" else {}))
    gdpo(rewards[:, None], 4, completion_mask=mask)
    remax(rewards, rewards, completion_mask=mask)
    optimal_token_baseline(rewards, 4, completion_mask=mask, **given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """The CPU's numbers, twice the same bits, and no wait for the device."""
    rewards, mask = REWARDS["missing"].float().cuda(), MASK.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again = (dict(everything(rewards, 4, mask)) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for name, want in everything(rewards.cpu(), 4, MASK):
        assert torch.equal(first[name], again[name])
        assert_close(first[name], want, 1e-6, name)


def test_no_gradient_flows():
    rewards = torch.randn(8, requires_grad=True)
    for name, got in everything(rewards, 4, torch.ones(8, 3)):
        assert not got.requires_grad, name


# In the losses


@pytest.mark.parametrize("objective", [Objective(), Objective("grpo", importance_sampling_level="sequence")])
def test_advantages_of_tokens_in_the_losses(objective):
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 0])[:, None]
    logps, ref = -torch.rand(4, 5), -torch.rand(4, 5)
    rewards = kl_in_reward(torch.randn(4), logps, ref, beta=0.1, completion_mask=mask)
    given = reinforce_plus_plus(rewards, completion_mask=mask, gamma=0.9)
    hidden, weight = torch.randn(4, 5, 6), torch.randn(9, 6)
    ids = torch.randint(9, (4, 5))
    options = dict(completion_mask=mask, old_per_token_logps=logps - 2, objective=objective)
    got = linear_grpo_loss(hidden, weight, ids, given, **options).loss
    want = grpo_loss((hidden.double() @ weight.double().T), ids, given.double(), **options).loss
    assert_close(got, want, 1e-5)
    same = grpo_loss(hidden @ weight.T, ids, torch.ones(4), **options).loss
    assert not torch.isclose(got, same)


# Names and errors


def test_names():
    for name in ESTIMATORS:
        assert name == "group" or getattr(advantages, name) is ESTIMATORS[name]
    assert torch.equal(
        estimate("group", REWARDS["normal"], 4, completion_mask=MASK, scale_rewards="none"),
        group_advantages(REWARDS["normal"], 4, scale_rewards="none"),
    )
    ids = GROUPS["ids"][1]
    assert torch.equal(
        estimate("opo", REWARDS["normal"], completion_mask=MASK, **ids),
        opo(REWARDS["normal"], completion_mask=MASK, **ids),
    )


four, ones = torch.ones(4), torch.ones(4, 3)
of_tokens = dict(completion_mask=ones, per_token_logps=ones, sum_pi_squared=ones)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rloo([1.0], 1), r"rewards: .*\(B,\).*\[1.0\]"),
        (lambda: rloo(four), "num_generations: .*None"),
        (lambda: rloo(four, 3), "rewards: expected whole groups.*num_generations=3"),
        (lambda: rloo(four, group_ids=ones), r"group_ids: .*\(4,\).*\(4, 3\)"),
        (lambda: opo(four, 2, completion_mask=None), r"completion_mask: .*\(4, T\).*None"),
        (lambda: opo(four, 2, completion_mask=ones[:3]), r"completion_mask: .*\(4, T\).*\(3, 3\)"),
        (lambda: opo(four, 2, completion_mask=ones.cfloat()), "completion_mask: .*dtype.*complex64"),
        (lambda: opo(four, 2, completion_mask=ones.to("meta")), "completion_mask: .*device cpu.*meta"),
        (lambda: gpg(four, 2, valid="all"), "valid: .*nonzero, unequal.*'all'"),
        (lambda: maxrl(four, 2, epsilon=-1.0), "epsilon: .*>= 0.*-1.0"),
        (lambda: maxrl(four, 2, epsilon=None), "epsilon: .*None"),
        (lambda: best_of_group(four, 2, scale_rewards="std"), "scale_rewards: .*'std'"),
        (lambda: group_advantages(four, 2, epsilon=math.inf), "epsilon: .*inf"),
        (lambda: pass_at_k(four, 4, k=4), "k: .*below the size of a group, 4, got 4"),
        (lambda: pass_at_k(four, 4, k=0), "k: .*got 0"),
        (lambda: pass_at_k(four, 4, k=2.0), "k: .*got 2.0"),
        (lambda: gdpo(four, 2), r"rewards: .*\(B, F\).*\(4,\)"),
        (lambda: gdpo(ones[:, :0], 2), r"rewards: .*F > 0"),
        (lambda: gdpo(ones, 2, weights=[1.0]), "weights: expected 3 numbers.*"),
        (lambda: gdpo(ones.cfloat(), 2), "rewards: .*complex64"),
        (lambda: reinforce_plus_plus(four[None, None], completion_mask=ones), r"rewards: .*\(B, T\).*\(1, 1, 4\)"),
        (lambda: reinforce_plus_plus(ones[:, :2], completion_mask=ones), r"rewards: .*\(4, 3\).*\(4, 2\)"),
        (lambda: reinforce_plus_plus(four, completion_mask=ones, gamma=1.1), "gamma: .*1.1"),
        (lambda: reinforce_plus_plus(four.cfloat(), completion_mask=ones), "rewards: .*complex64"),
        (lambda: remax(four, four[:2], completion_mask=ones), r"baseline_rewards: .*\(4,\).*\(2,\)"),
        (
            lambda: optimal_token_baseline(four, 2, **of_tokens | dict(sum_pi_squared=four)),
            r"sum_pi_squared: .*\(4, 3\).*\(4,\)",
        ),
        (
            lambda: optimal_token_baseline(four, 2, **of_tokens | dict(per_token_logps=None)),
            r"per_token_logps: .*\(4, 3\).*None",
        ),
        (
            lambda: optimal_token_baseline(four, 2, **of_tokens, importance_sampling_ratio=four),
            r"importance_sampling_ratio: .*\(4, 3\)",
        ),
        (lambda: estimate("ppo", four, 2, completion_mask=ones), "advantage_estimator: .*rloo.*'ppo'"),
        (lambda: estimate("rloo", four, 2, completion_mask=ones, gamma=1.0), "gamma: expected one of no options of"),
        (lambda: estimate("pass_at_k", four, 2, completion_mask=ones), "k: expected a value.*'pass_at_k'"),
        (
            lambda: estimate("reinforce_plus_plus", four, 2, completion_mask=ones, group_ids=four),
            "group_ids: expected one of gamma of 'reinforce_plus_plus'",
        ),
    ],
)
def test_names_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
