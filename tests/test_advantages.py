"""group_advantages against the formula and TRL's rules for missing rewards; gae against the textbook's loop."""

import pytest
import torch
from cases import assert_close

from fastgrpo import gae, group_advantages


def test_formula():
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.5, 3.0])
    groups = rewards.view(2, 3)
    centred = groups - groups.mean(1, keepdim=True)
    for scale, want in {
        "group": centred / (groups.std(1, keepdim=True) + 1e-4),
        "batch": centred / (rewards.std() + 1e-4),
        "none": centred,
    }.items():
        assert_close(group_advantages(rewards, 3, scale_rewards=scale), want.view(-1), 1e-6, scale)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_without_spread_are_exactly_zero(scale):
    rewards = torch.tensor([0.1] * 7 + [0.3] * 7 + [1.0, 2.0] + [0.0] * 5)  # 0.1 * 7 / 7 is not 0.1 in fp32
    advantages = group_advantages(rewards, 7, scale_rewards=scale)
    assert (advantages[:14] == 0).all() and (advantages[14:] != 0).all()


def test_small_spread_on_a_large_reward_keeps_its_digits():
    rewards = torch.tensor([1000.0, 1000.125, 1000.25, 1000.5])
    assert_close(group_advantages(rewards, 4), group_advantages(rewards - 1000, 4), 1e-6)


def test_missing_rewards_have_no_say_and_get_zero():
    nan = torch.nan
    rewards = torch.tensor([1.0, nan, 3.0, nan, nan, 2.0, nan, nan, nan])
    got = group_advantages(rewards, 3)
    want = torch.zeros(9)
    want[[0, 2]] = group_advantages(torch.tensor([1.0, 3.0]), 2)
    assert torch.equal(got, want)


def test_shuffled_groups_and_groups_of_any_size():
    rewards = torch.randn(24)
    order = torch.randperm(24)
    want = group_advantages(rewards, 6)
    ids = torch.arange(24) // 6 * 100 - 7
    assert torch.equal(group_advantages(rewards[order], group_ids=ids[order]), want[order])
    uneven = group_advantages(torch.tensor([1.0, 5.0, 2.0, 7.0, 3.0]), group_ids=torch.tensor([0, 1, 0, 2, 0]))
    assert_close(uneven[[0, 2, 4]], group_advantages(torch.tensor([1.0, 2.0, 3.0]), 3), 1e-7)
    assert (uneven[[1, 3]] == 0).all()  # alone in a group


def test_empty_and_integer_rewards():
    assert group_advantages(torch.zeros(0), 4).shape == (0,)
    assert group_advantages(torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert group_advantages(torch.tensor([0, 1]), 2).dtype == torch.float32


def test_equals_trl():
    """The formula in TRL's `_generate_and_score_completions`, with its own nanstd."""
    nanstd = pytest.importorskip("trl.trainer.utils", reason="TRL is the oracle (pip install '.[test]')").nanstd
    rewards = torch.randn(20)
    rewards[[3, 11]] = torch.nan
    grouped = rewards.view(-1, 5)
    mean, std = (x.repeat_interleave(5) for x in (grouped.nanmean(1), nanstd(grouped, dim=1)))
    assert_close(group_advantages(rewards, 5), ((rewards - mean) / (std + 1e-4)).nan_to_num(0.0), 1e-5)


# gae


def textbook_gae(rewards, values, mask, gamma, lam):
    """The recursion over each sequence without its masked tokens, in float64."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    returns = advantages.clone()
    for row, counts in enumerate(mask.bool()):
        next_value = next_advantage = 0.0
        for t in reversed(counts.nonzero()[:, 0].tolist()):
            value = float(values[row, t])
            delta = float(rewards[row, t]) + gamma * next_value - value
            next_value, next_advantage = value, delta + gamma * lam * next_advantage
            advantages[row, t], returns[row, t] = next_advantage, next_advantage + value
    return advantages, returns


def gae_inputs(batch, length, dtype=torch.float64, seed=0):
    """Right padding in the first rows, holes in the others, the last one empty; NaN in every masked place."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, length, generator=generator) < 0.7
    for row in range(batch // 2):
        mask[row] = torch.arange(length) < length - row * length // batch
    if batch:
        mask[-1] = batch == 1
    rewards, values = (torch.randn(batch, length, generator=generator, dtype=dtype) for _ in range(2))
    return rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf), mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (1, 0), (0, 1), (0.5, 0.3)])
@pytest.mark.parametrize("batch, length", [(6, 1), (6, 2), (6, 7), (8, 64), (1, 33), (5, 257)])
def test_gae_is_the_textbook_recursion(batch, length, gamma, lam):
    rewards, values, mask = gae_inputs(batch, length)
    for got, want in zip(
        gae(rewards, values, mask, gamma, lam), textbook_gae(rewards, values, mask, gamma, lam), strict=True
    ):
        assert got.dtype == torch.float64
        assert_close(got, want, 1e-13)
        assert (got[~mask] == 0).all()


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.999, 0.97)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gae_of_long_sequences_keeps_its_digits(dtype, gamma, lam):
    rewards, values, mask = gae_inputs(4, 4097, dtype)
    for got, want in zip(
        gae(rewards, values, mask, gamma, lam), textbook_gae(rewards, values, mask, gamma, lam), strict=True
    ):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(got, want, 1e-12 if dtype == torch.float64 else 2e-6)


def test_gae_of_a_compacted_sequence_is_the_same():
    rewards, values, mask = gae_inputs(2, 31)
    mask[1] = torch.arange(31) % 3 != 1
    rewards, values = torch.randn(2, 31), torch.randn(2, 31)
    keep = mask[1]
    short = gae(rewards[1:, keep], values[1:, keep], mask[1:, keep], 0.9, 0.8)
    for got, want in zip(gae(rewards, values, mask, 0.9, 0.8), short, strict=True):
        assert_close(got[1:, keep], want, 1e-6)


def test_gae_at_the_ends_of_lambda():
    """λ = 1 with γ = 1: the return is the sum of the rewards to come; λ = 0: the one-step error."""
    rewards, values, mask = torch.randn(3, 9), torch.randn(3, 9), torch.ones(3, 9, dtype=torch.int64)
    assert_close(gae(rewards, values, mask, 1.0, 1.0)[1], rewards.flip(1).cumsum(1).flip(1), 1e-6)
    shifted = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * shifted - values, 1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_gae_of_nothing(shape):
    empty = torch.zeros(shape)
    advantages, returns = gae(empty, empty, empty.bool(), 0.9, 0.9)
    assert advantages.shape == returns.shape == shape


def test_gae_of_constants():
    """Integer rewards and masks, views with strides; no gradient flows."""
    values = torch.randn(7, 4, requires_grad=True).T
    rewards, mask = torch.randint(-2, 3, (4, 7)), torch.randint(0, 2, (4, 7))
    advantages, returns = gae(rewards, values, mask, 0.9, 0.95)
    want = textbook_gae(rewards, values.detach(), mask, 0.9, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    assert_close(advantages, want[0], 1e-6)
    assert_close(returns, want[1], 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gae_on_a_gpu():
    inputs = gae_inputs(6, 1001, torch.float32)
    for got, want in zip(gae(*(x.cuda() for x in inputs), 0.99, 0.95), gae(*inputs, 0.99, 0.95), strict=True):
        assert got.is_cuda
        assert_close(got, want, 1e-6)


full = torch.ones(2, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(values=torch.ones(6)), r"values: .*\(B, T\).*\(6,\)"),
        (dict(values=full.long()), "values: .*floating point.*int64"),
        (dict(values=None), "values: .*None"),
        (dict(rewards=torch.ones(2)), r"rewards: .*\(2, 3\).*\(2,\)"),
        (dict(rewards=[1.0]), r"rewards: .*\[1.0\]"),
        (dict(rewards=full.cfloat()), "rewards: .*integer dtype.*complex64"),
        (dict(mask=full.bool().T), r"mask: .*\(2, 3\).*\(3, 2\)"),
        (dict(mask=full), "mask: .*bool or an integer dtype.*float32"),
        (dict(mask=full.bool().to("meta")), "mask: .*device cpu.*meta"),
        (dict(gamma=1.01), "gamma: .*1.01"),
        (dict(gamma=float("nan")), "gamma: .*nan"),
        (dict(gamma=torch.tensor(0.9)), "gamma: .*number"),
        (dict(lam=-0.1), "lam: .*-0.1"),
        (dict(lam=None), "lam: .*None"),
    ],
)
def test_gae_names_bad_arguments(changes, message):
    arguments = dict(rewards=full, values=full, mask=full.bool(), gamma=0.9, lam=0.9)
    with pytest.raises(ValueError, match=message):
        gae(**{**arguments, **changes})
