"""What a type checker says of calls: nothing of right ones, an error of each wrong one."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgrpo
from fastgrpo import linear, logps, loss

HOUSE = Path(fastgrpo.__file__).parent

SETUP = """
from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo import advantages
from fastgrpo import (
    GRPOLoss,
    GRPOOutput,
    LinearGRPOLoss,
    LogpsOutput,
    Objective,
    gae,
    group_advantages,
    grpo_loss,
    grpo_loss_reference,
    kl_in_reward,
    linear_grpo_loss,
    linear_grpo_loss_reference,
    linear_logps,
    policy_loss,
    register_loss,
    selective_logps,
)
from fastgrpo.objective import Tokens
from fastgrpo.rewards import RewardFunc, combine, exact, numeric
from fastgrpo.trainer import GRPOConfig, GRPOTrainer

hidden, weight, logits = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(2, 3, 5)
ids, mask, rewards = torch.randint(5, (2, 3)), torch.ones(2, 3), torch.tensor([1.0, 0.0])
one: Tensor
two: tuple[Tensor, Tensor]
either: Tensor | tuple[Tensor, Tensor]
wants: bool = len(ids) > 1
"""

RIGHT = """
one = grpo_loss(logits, ids, rewards).loss
one = grpo_loss(logits, ids, None, rewards=rewards, num_generations=2, scale_rewards="batch", inplace=True).loss
one = grpo_loss(logits, ids, rewards, objective=Objective(beta=0), loss_scale=one, num_items_in_batch=6).loss
one = grpo_loss(logits, ids, rewards, completion_mask=None, temperature=mask, ref_per_token_logps=one).loss
one = grpo_loss_reference(logits, ids, rewards, cu_seqlens=None, return_stats=False).loss
one = linear_grpo_loss(hidden, weight, ids, rewards, bias=None, softcap=30.0, vocab_size=5).loss
one = linear_grpo_loss_reference(hidden, weight, ids, rewards, logit_scale=2, importance_sampling_ratio=mask).loss
one = policy_loss(mask, rewards, entropies=mask, old_per_token_logps=mask).loss
one = GRPOLoss()(logits, ids, rewards).loss
one = GRPOLoss(Objective(), inplace=True, temperature=0.7)(logits, ids, rewards=rewards, num_generations=2).loss
one = LinearGRPOLoss(Objective.preset("gspo", beta=0.0), softcap=30.0)(hidden, weight, ids, rewards, bias=None).loss
one = selective_logps(logits, ids, mask=mask, temperature=0.7)
two = selective_logps(logits, ids, return_entropy=True, backend="torch")
either = selective_logps(logits, ids, return_entropy=wants)
one = linear_logps(hidden, weight, ids, softcap=30.0).sum()
two = linear_logps(hidden, weight, ids, return_entropy=True, bias=None)
either = linear_logps(hidden, weight, ids, return_entropy=wants, chunk_size=2, backend="cpu")
found: LogpsOutput = selective_logps(logits, ids, statistics=("is_top1", "mean_logits"), mask=mask)
found = linear_logps(hidden, weight, ids, statistics=["sum_pi_squared"], return_entropy=True, softcap=30.0)
one = linear_logps(hidden, weight, ids, statistics=["log_sum_sq_probs"]).statistics["log_sum_sq_probs"]
one = group_advantages(rewards, 2, scale_rewards="none")
one = group_advantages(rewards, group_ids=ids[:, 0], epsilon=1e-6)
one = advantages.rloo(rewards, 2) + advantages.opo(rewards, 2, completion_mask=mask)
one = advantages.gdpo(mask, 2, weights=[1.0, 2.0, 0.5]) + advantages.pass_at_k(rewards, group_ids=None, k=1)
one = advantages.estimate("gpg", rewards, 2, valid="unequal")
two = gae(mask, mask, mask, gamma=1.0, lam=0.95)
output: GRPOOutput = policy_loss(mask, rewards)
metrics: dict[str, Tensor] | None = output.metrics
one = grpo_loss(logits, ids, rewards, token_weights=mask, group_ids=ids[:, 0]).loss
one = kl_in_reward(rewards, mask, mask, beta=0.1, kl_estimator="k3")
own: Objective = Objective(loss_type=lambda t: -t.ratio * t.advantages, average="grpo", kl_average=None)
lent: Callable[[Tokens], Tensor] = register_loss("lent", lambda t: -t.logp * t.advantages, needs_entropy=False)
frozen: Objective = Objective(loss_type="grpo", epsilon=0.2, epsilon_high=None, delta=None)
reward: RewardFunc = combine(exact, numeric, weights=[1.0, 0.5])
args: GRPOConfig = GRPOConfig("out", beta=0.1, loss_type="grpo", num_generations=2, bf16=None, learning_rate=1e-5)
trainer = GRPOTrainer("model", [exact, reward], args, train_dataset=[{"prompt": "2 + 2 =", "answer": "4"}])
"""

WRONG = {
    "grpo_loss(logits, ids, rewards, completion_msk=mask)": "call-arg",
    "grpo_loss(logits, ids, rewards, chunk_size=2)": "call-arg",
    "grpo_loss(logits)": "call-arg",
    "grpo_loss(logits, ids, rewards, mask)": "call-arg",
    "grpo_loss(logits, ids, rewards, temperature='hot')": "arg-type",
    "grpo_loss(logits, ids, rewards, loss_scale=None)": "arg-type",
    "grpo_loss(logits, ids, rewards, num_generations=2.5)": "arg-type",
    "grpo_loss(logits, ids, rewards, objective='dapo')": "arg-type",
    "grpo_loss(logits, ids, rewards).los": "attr-defined",
    "grpo_loss_reference(logits, ids, rewards, inplace=True)": "call-arg",
    "linear_grpo_loss(hidden, weight, ids, rewards, softcp=30.0)": "call-arg",
    "linear_grpo_loss(hidden, weight, ids, rewards, inplace=True)": "call-arg",
    "linear_grpo_loss(hidden, weight, ids, rewards, softcap='30')": "arg-type",
    "linear_grpo_loss(hidden, weight, ids, rewards, cu_seqlens=[0, 3])": "arg-type",
    "linear_grpo_loss_reference(hidden, weight, ids, rewards, backend='cpu')": "call-arg",
    "policy_loss(mask, rewards, temperature=0.7)": "call-arg",
    "policy_loss(mask, [1.0, 0.0])": "arg-type",
    "GRPOLoss(Objective(), inplce=True)": "call-arg",
    "GRPOLoss(objective=Objective(), inplace='yes')": "arg-type",
    "GRPOLoss(softcap=30.0)": "call-arg",
    "GRPOLoss('dapo')": "arg-type",
    "GRPOLoss()(logits, ids, rewards, completion_msk=mask)": "call-arg",
    "GRPOLoss()(logits, ids, rewards, temperature='hot')": "arg-type",
    "GRPOLoss()(logits, ids, rewards, objective=Objective())": "call-arg",
    "GRPOLoss()(hidden, weight, ids, rewards)": "call-arg",
    "GRPOLoss()(logits, ids, rewards).los": "attr-defined",
    "LinearGRPOLoss(inplace=True)": "call-arg",
    "LinearGRPOLoss(chunk_size='large')": "arg-type",
    "LinearGRPOLoss()(hidden, weight)": "call-arg",
    "LinearGRPOLoss()(hidden, weight, ids, rewards, softcap='30')": "arg-type",
    "Objective(los_type='dapo')": "call-arg",
    "Objective(beta='0.1')": "arg-type",
    "Objective(delta=2, max_completion_length=1.5)": "arg-type",
    "Objective(loss_type=3)": "arg-type",
    "Objective(average=1)": "arg-type",
    "register_loss('lent', print, needs=True)": "call-overload",
    "Objective().beta = 0.1": "misc",
    "Objective.preset(1)": "arg-type",
    "selective_logps(logits, ids, masks=mask)": "call-overload",
    "selective_logps(logits, ids, softcap=30.0)": "call-overload",
    "selective_logps(logits, ids, return_entropy=True).sum()": "attr-defined",
    "one, _ = linear_logps(hidden, weight, ids, return_entropy='yes')": "call-overload",
    "linear_logps(hidden, weight, ids, chunk_size='large')": "call-overload",
    "linear_logps(hidden, weight, ids, statistics=['top1'])": "list-item",
    "selective_logps(logits, ids, statistics='is_top1')": "arg-type",
    "selective_logps(logits, ids, statistics=['is_top1']).sum()": "attr-defined",
    "group_advantages(rewards, num_generation=2)": "call-arg",
    "gae(mask, mask, mask, gamma=1.0)": "call-arg",
    "advantages.rloo(rewards, 2, gamma=1.0)": "call-arg",
    "advantages.pass_at_k(rewards, 2)": "call-arg",
    "advantages.opo(rewards, 2)": "call-arg",
    "combine(exact, wights=[1.0])": "call-arg",
    "GRPOConfig('out', betta=0.1)": "call-arg",
    "GRPOConfig('out', beta='0.1')": "arg-type",
    "GRPOTrainer('model')": "call-arg",
    "GRPOTrainer('model', numeric, {'beta': 0.1})": "arg-type",
}


def test_the_package_says_that_it_has_types():
    assert (HOUSE / "py.typed").is_file()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{line: codes of its errors} of a user's file with all these calls, under mypy's strict rules."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    folder = tmp_path_factory.mktemp("user")
    (folder / "packages").mkdir()
    (folder / "packages" / "fastgrpo").symlink_to(HOUSE)  # as if it were installed, so that py.typed counts
    (folder / "user.py").write_text("\n".join([SETUP, RIGHT, *WRONG]))
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "--no-error-summary", "user.py"],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": str(folder / "packages"), "MYPYPATH": ""},
    )  # fmt: skip
    assert result.returncode in (0, 1), result.stdout + result.stderr
    lines = (folder / "user.py").read_text().splitlines()
    errors = re.findall(r"^user\.py:(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.MULTILINE)
    assert len(errors) == result.stdout.count(": error: "), result.stdout
    codes = {line: [] for line in lines}
    for number, code in errors:
        codes[lines[int(number) - 1]].append(code)
    return codes


def test_right_calls(found):
    assert {line: codes for line, codes in found.items() if codes and line not in WRONG} == {}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_calls(line, found):
    assert WRONG[line] in found[line]


@pytest.mark.parametrize(
    "function, declared, apart",
    [
        (loss.grpo_loss, loss.Options, ("objective",)),
        (linear.linear_grpo_loss, linear.Options, ("objective",)),
        (logps.selective_logps, logps._Options, ("return_entropy", "statistics")),
        (logps.linear_logps, logps._LinearOptions, ("return_entropy", "statistics")),
    ],
)
def test_what_is_declared_for_type_checkers(function, declared, apart):
    """The keywords that stand there a second time are those of the function, with their types."""
    keywords = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in apart
    }
    assert {name: kind.__forward_arg__ for name, kind in declared.__annotations__.items()} == keywords
