"""The averages by name, each written out, whatever the loss is and however the micro-batches are cut."""

import pytest
import torch
from cases import assert_close, linear_loss_and_grads, make_inputs, make_linear_inputs, pack

from fastgrpo import Objective, linear_grpo_loss, policy_loss
from fastgrpo.objective import AVERAGES, LOSS_TYPES, LOSSES

K = 2  # completions of a prompt
L = 9  # max_completion_length


def textbook(name, losses, mask, items):
    """The average of losses (B, T), written out sequence by sequence."""
    sums = [(row * m).sum() for row, m in zip(losses, mask, strict=True)]
    lengths = [int(m.sum()) for m in mask]
    means = [s / n for s, n in zip(sums, lengths, strict=True) if n]
    prompts = [slice(i, i + K) for i in range(0, len(sums), K)]
    of_prompts = [sum(sums[p]) / sum(lengths[p]) for p in prompts if sum(lengths[p])]
    filled = sum(n > 0 for n in lengths)
    return {
        "grpo": lambda: sum(means) / len(sums),
        "bnpo": lambda: sum(sums) / sum(lengths),
        "dr_grpo": lambda: sum(sums) / (len(sums) * L),
        "dapo": lambda: sum(sums) / (items or sum(lengths)),
        "luspo": lambda: sum(sums) / len(sums),
        "token-mean": lambda: sum(sums) / (items or sum(lengths)),
        "seq-mean-token-mean": lambda: sum(means) / (items or filled),
        "seq-mean-token-sum": lambda: sum(sums) / (items or filled),
        "seq-mean-token-sum-norm": lambda: sum(sums) / (items or filled) / L,
        "token-sum": lambda: sum(sums),
        "prompt-mean": lambda: sum(of_prompts) / (items or len(of_prompts)),
    }[name]()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("items", [None, 37, torch.tensor(5.5)])
@pytest.mark.parametrize("name", AVERAGES)
def test_is_its_formula(name, items, packed):
    logits, ids, kwargs = make_inputs(("old",), batch=4, length=7)
    kwargs["completion_mask"][-1, :2] = 1
    kwargs["completion_mask"][2] = 0  # a sequence without loss tokens
    mask, a = kwargs["completion_mask"], kwargs["advantages"].double()
    logps = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    r = (logps - kwargs["old_per_token_logps"]).exp()
    losses = -torch.minimum(r * a[:, None], r.clamp(0.8, 1.2) * a[:, None])
    want = textbook(name, losses, mask, None if items is None else float(items))
    objective = Objective(average=name, max_completion_length=L)
    kwargs |= dict(num_generations=K, num_items_in_batch=items, loss_scale=0.5)
    if packed:
        cu_seqlens, kwargs = pack(kwargs.pop("completion_mask"), dict(kwargs, logps=logps))
        logps, kwargs["cu_seqlens"] = kwargs.pop("logps"), cu_seqlens
    assert_close(policy_loss(logps, objective=objective, **kwargs).loss, want / 2, 1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_none_is_the_losses_own(loss_type):
    logps, advantages = torch.randn(3, 4), torch.randn(3)
    options = dict(loss_type=loss_type, max_completion_length=L, cov_share=1.0)
    own = policy_loss(logps, advantages, objective=Objective(**options)).loss
    named = policy_loss(logps, advantages, objective=Objective(average=LOSSES[loss_type].average, **options)).loss
    assert torch.equal(own, named)


@pytest.mark.parametrize("name", [name for name, average in AVERAGES.items() if average.counts])
def test_micro_batches_add_up_to_the_step(name):
    """Two processes with two micro-batches each: with the step's count over the processes, their mean is its loss."""
    logps, old, advantages = torch.randn(8, 5).double(), torch.randn(8, 5).double(), torch.randn(8).double()
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 4, 5, 1])[:, None]
    objective = Objective(average=name, max_completion_length=L)

    def loss(rows, items):
        given = dict(num_generations=K, num_items_in_batch=items, objective=objective)
        given |= dict(completion_mask=mask[rows], old_per_token_logps=old[rows])
        return policy_loss(logps[rows], advantages[rows], **given).loss

    count = {"tokens": mask.sum().double(), "sequences": 8, "prompts": 4}[AVERAGES[name].counts]
    processes = [[slice(0, 2), slice(2, 4)], [slice(4, 6), slice(6, 8)]]
    step = sum(sum(loss(rows, count / 2) for rows in micro) for micro in processes) / 2
    assert_close(step, loss(slice(0, 8), None), 1e-12)


def test_groups_by_id_in_any_order():
    logps, advantages = torch.randn(6, 5), torch.randn(6)
    objective = Objective(average="prompt-mean")
    ids = torch.tensor([7, 7, -1, -1, 3, 3])
    want = policy_loss(logps, advantages, num_generations=2, objective=objective).loss
    order = torch.tensor([4, 0, 2, 1, 5, 3])
    got = policy_loss(logps[order], advantages[order], group_ids=ids[order], objective=objective).loss
    assert_close(got, want, 1e-6)
    with pytest.raises(ValueError, match="num_generations, group_ids: .*'prompt-mean'.*None"):
        policy_loss(logps, advantages, objective=objective)
    with pytest.raises(ValueError, match=r"group_ids: .*\(6,\)"):
        policy_loss(logps, advantages, objective=objective, group_ids=ids[:5])


def test_token_weights_weigh_loss_and_kl(backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), device=device, backend="triton")
    weights = torch.rand(ids.shape, device=device)
    objective = Objective(beta=0.1, average="token-sum")
    call = dict(backend=backend, objective=objective, **kwargs)
    got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, token_weights=weights, **call)
    total, wanted = 0.0, [torch.zeros_like(hidden), torch.zeros_like(weight)]
    for i in range(len(ids)):  # a token's share is proportional to its weight: here, one sequence at a time
        for t in range(ids.shape[1]):
            mask = torch.zeros_like(ids)
            mask[i, t] = kwargs["completion_mask"][i, t]
            one, *gradients = linear_loss_and_grads(
                linear_grpo_loss, hidden, weight, ids, **{**call, "completion_mask": mask, "backend": "torch"}
            )
            total = total + weights[i, t] * one.loss
            wanted = [a + weights[i, t] * b for a, b in zip(wanted, gradients, strict=True)]
    assert_close(got.loss, total, 1e-5)
    for a, b in zip(grads, wanted, strict=True):
        assert_close(a, b, 1e-5)
    per_sequence = torch.rand(len(ids), device=device)
    logps = torch.randn(ids.shape, device=device)
    a, b = (policy_loss(logps, kwargs["advantages"], token_weights=w, objective=Objective(average="token-sum")).loss
            for w in (per_sequence, per_sequence[:, None].expand(ids.shape)))  # fmt: skip
    assert torch.equal(a, b)


def test_the_length_of_packed_inputs_is_asked_for():
    with pytest.raises(ValueError, match="max_completion_length: .*'seq-mean-token-sum-norm' of packed"):
        policy_loss(torch.randn(5), torch.randn(2), cu_seqlens=torch.tensor([0, 2, 5]),
                    objective=Objective(average="seq-mean-token-sum-norm"))  # fmt: skip
