"""group_advantages against the formula and TRL's rules for rewards that are missing."""

import pytest
import torch
from cases import assert_close

from fastgrpo import group_advantages


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
