"""The scripts in examples/: each runs to its end, and PPO's loss is the textbook's."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from fastgrpo import Objective
from fastgrpo.recipes import sums

EXAMPLES = Path(__file__).parent.parent / "examples"

# a script with so short a warm start that nothing is learnt
QUICK = """
import runpy, sys
from fastgrpo.recipes import sums
sums.WARM_START_MAX_STEPS = 2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_gsm8k(folder):
    """What load_dataset("openai/gsm8k", "main") finds in the current folder before it asks the hub."""
    data = folder / "openai" / "gsm8k"
    data.mkdir(parents=True)
    files = "\n".join(f"  - {{split: {split}, path: {split}.jsonl}}" for split in ("train", "test"))
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}\n---\n")
    for split in ("train", "test"):
        rows = [{"question": f"{i}+1", "answer": f"#### {i + 1}"} for i in range(64)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder):
    """The embedded model with a chat template that keeps the digits of a question."""
    tokenizer = sums.make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'][:3] }}="
    tokenizer.save_pretrained(folder)
    sums.make_model(tokenizer, seed=0).save_pretrained(folder)


RUNS = {  # script: (arguments, what it prints)
    "maze": (["--steps", "1500", "--seeds", "2", "--plot", "maze.svg"], "GRPO          2 of 2"),
    "raw_loop": ([], "accuracy 0."),
    "ppo": (["--beta", "0.04"], "ppo accuracy 0."),
    "r1": (["--documents", "6400"], "all scenarios: accuracy 0."),
    "trl_grpo": ([], "mean reward: "),
    "train_hf": (["--model", "model"], ""),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_runs_to_its_end(name, tmp_path):
    arguments, printed = RUNS[name]  # a new example needs a line there
    if name == "trl_grpo":
        pytest.importorskip("trl", reason="pip install '.[test]'")
    if name == "train_hf":
        make_gsm8k(tmp_path)
        make_model(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", QUICK, EXAMPLES / f"{name}.py", "--steps", "1", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert printed in result.stdout
    assert "torch stands in" not in result.stderr, "the kernels were not used"
    if name == "train_hf":
        assert AutoTokenizer.from_pretrained(tmp_path / "gsm8k-grpo").eos_token == "<eos>"


def test_grpo_beside_ppo(monkeypatch, capsys):
    """The other algorithm of ppo.py; in this process, to save the imports."""
    monkeypatch.setattr(sums, "WARM_START_MAX_STEPS", 2)
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--algorithm", "grpo", "--steps", "1", "--beta", "0.04"])
    threads = torch.get_num_threads()
    try:
        load("ppo").main()
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.startswith("grpo accuracy 0.")


def test_ppo_is_the_textbook(gamma=0.9, lam=0.8, clip=0.2, beta=0.1):
    """Rewards, GAE, clipped policy and value loss of ppo.py, against loops over tokens and autograd in float64."""
    ppo = load("ppo")
    torch.manual_seed(0)
    b, t, h, v = 5, 7, 6, 11
    lengths = [7, 1, 4, 2, 6]
    mask = torch.tensor([[i < n for i in range(t)] for n in lengths])
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(b, t, h), (v, h), (1, h)]]
    hidden, weight, value_weight = leaves
    value_head = nn.Linear(h, 1, bias=False, dtype=torch.float64)
    value_head.weight = nn.Parameter(value_weight.detach().clone())
    ids = torch.randint(v, (b, t))
    scores = torch.randn(b, dtype=torch.float64)
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    values = (hidden @ value_weight.T)[..., 0]
    # old ones near enough that some are clipped and some are not, on both sides
    old_logps = logps.detach() + 0.3 * torch.randn(b, t, dtype=torch.float64)
    ref_logps = logps.detach() + 0.3 * torch.randn(b, t, dtype=torch.float64)
    old_values = values.detach() + 0.3 * torch.randn(b, t, dtype=torch.float64)

    advantages, returns = {}, {}
    for i, n in enumerate(lengths):
        later = 0.0
        for j in reversed(range(n)):
            reward = (scores[i] if j == n - 1 else 0.0) - beta * (old_logps[i, j] - ref_logps[i, j])
            following = old_values[i, j + 1] if j + 1 < n else 0.0
            later = reward + gamma * following - old_values[i, j] + gamma * lam * later
            advantages[i, j], returns[i, j] = later, later + old_values[i, j]
    every = torch.stack(list(advantages.values()))
    policy, value, clipped = 0.0, 0.0, 0
    for (i, j), advantage in advantages.items():
        advantage = (advantage - every.mean()) / (every.std() + 1e-8)
        ratio = (logps[i, j] - old_logps[i, j]).exp()
        policy = policy - torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        near = old_values[i, j] + (values[i, j] - old_values[i, j]).clamp(-ppo.VALUE_CLIP, ppo.VALUE_CLIP)
        value = value + torch.maximum((values[i, j] - returns[i, j]) ** 2, (near - returns[i, j]) ** 2) / 2
        clipped += int((ratio - 1).abs() > clip)
    assert 0 < clipped < len(advantages)
    expected = (policy + ppo.VALUE_COEF * value) / len(advantages)
    expected_grads = torch.autograd.grad(expected, leaves)

    batch = dict(completion_ids=ids, mask=mask, old_logps=old_logps, old_values=old_values, ref_logps=None)
    rewards = ppo.token_rewards(scores, mask, beta * (old_logps - ref_logps))
    batch["advantages"], batch["returns"] = ppo.ppo_advantages(rewards, old_values, mask, gamma, lam)
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = ppo.update_loss(hidden, weight, value_head, batch, Objective(epsilon=clip))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the loss itself is fp32
    for got, want in zip((hidden.grad, weight.grad, value_head.weight.grad), expected_grads, strict=True):
        assert (got - want).norm() <= 1e-9 * want.norm()
