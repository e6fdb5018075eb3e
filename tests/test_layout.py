"""What the layouts promise, and that the functions which take a batch agree on its arguments."""

import inspect

import torch
from cases import assert_close

from fastgrpo import grpo_loss, linear_grpo_loss, linear_logps, policy_loss, selective_logps
from fastgrpo.batch.inputs import HeadOptions, Inputs, KeptInputs, PolicyInputs, make_layout
from fastgrpo.engine.head import make_head


def test_every_default_is_the_same_wherever_it_stands():
    """Arguments that stand in several signatures: a default that differs would be a silent disagreement."""
    signatures = [inspect.signature(f).parameters for f in (grpo_loss, policy_loss)]
    shown = [(name, p.default) for name, p in signatures[0].items() if name in Inputs.__annotations__]
    assert shown == [
        ("completion_mask", None),
        ("old_per_token_logps", None),
        ("ref_per_token_logps", None),
        ("rewards", None),
        ("num_generations", None),
        ("scale_rewards", "group"),
        ("importance_sampling_ratio", None),
        ("sampling_per_token_logps", None),
        ("num_items_in_batch", None),
        ("loss_scale", 1.0),
        ("temperature", 1.0),
        ("cu_seqlens", None),
        ("token_weights", None),
        ("group_ids", None),
        ("kept_ids", None),
        ("kept_offsets", None),
    ]
    of_logps = [(name, p.default) for name, p in signatures[1].items() if name in PolicyInputs.__annotations__]
    assert of_logps == [pair for pair in shown if pair[0] not in ("temperature", *KeptInputs.__annotations__)]
    for name in ("objective", "return_stats"):
        assert signatures[0][name].default == signatures[1][name].default
    linear, logps, linear_rows = (
        inspect.signature(f).parameters for f in (linear_grpo_loss, selective_logps, linear_logps)
    )
    for of_logits, of_hidden in ((signatures[0], linear), (logps, linear_rows)):
        shared = set(of_logits) - {"logits", "inplace"}
        assert shared == set(of_logits) & set(of_hidden)
        assert all(of_logits[name].default == of_hidden[name].default for name in shared)
    head = set(linear) - set(signatures[0])
    assert head - {"hidden", "weight"} == set(HeadOptions.__annotations__)
    for others in (linear_rows, inspect.signature(make_head).parameters):
        assert all(linear[name].default == others[name].default for name in (*head, "backend"))


def test_packed_reductions_equal_padded_ones():
    lengths = torch.tensor([3, 0, 5, 1])
    x = torch.randn(9, dtype=torch.float64)
    packed = make_layout(torch.Size([9]), torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(), x.device)
    parts = x.split(lengths.tolist())
    assert_close(packed.seq_sum(x), torch.stack([p.sum() for p in parts]), 1e-12)
    assert packed.to_rows(torch.arange(4)).tolist() == [0] * 3 + [2] * 5 + [3]
    padded = make_layout(torch.Size([3, 3]), None, x.device)
    assert_close(padded.seq_sum(x), x.view(3, 3).sum(1), 1e-12)
    assert padded.to_rows(torch.arange(3)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
