"""examples/maze.py: every method finds an optimal path, and each update is the formula that stands beside it."""

import functools
import importlib.util
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "maze.py"
METHODS = ["Q-learning", "REINFORCE", "TRPO", "PPO", "GRPO"]
UP, DOWN, LEFT, RIGHT = range(4)


@pytest.fixture(scope="module")
def maze():
    spec = importlib.util.spec_from_file_location("maze", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)  # as the script does
    torch.set_num_threads(1)
    yield module
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_an_optimal_path(name, seed, maze):
    assert list(maze.METHODS) == METHODS
    first, settled, curve = maze.train(name, seed, 3000)
    assert first is not None and first <= settled <= 3000
    assert curve[0] < 0.2 and len(curve) == 3000 // maze.EVERY + 1
    assert curve[-1] > 0.65, "the policy that acts is far from the best, 0.729"


def test_what_is_counted(maze, monkeypatch):
    """The first optimal path, from when on it stays, and the return of the policy that acts at each point."""
    good, bad = torch.zeros(9, 4), torch.zeros(9, 4)
    good[[0, 1, 4, 5], [RIGHT, DOWN, RIGHT, DOWN]] = 5.0
    bad[0, UP] = 1.0
    updates = [(30, bad), (40, good), (60, good), (61, bad), (95, good), (100, good), (101, bad)]
    monkeypatch.setitem(maze.METHODS, "fake", lambda seed: iter(updates))
    first, settled, curve = maze.train("fake", 0, 100)
    assert (first, settled) == (40, 95)
    acting = [torch.zeros(9, 4), torch.zeros(9, 4), good, good, bad, good]  # after 0, 20, … 100 steps
    assert curve == [maze.expected_return("fake", scores) for scores in acting]
    assert maze.train("fake", 0, 35)[:2] == (None, None)


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 200


def test_the_maze(maze):
    """Four of the walks of four moves arrive, and none of fewer."""
    walks = {length: 0 for length in range(1, 5)}
    for length in walks:
        for actions in itertools.product(range(4), repeat=length):
            cell = maze.START
            for action in actions:
                cell = maze.move(cell, action)
                assert cell not in (2, 6)
            walks[length] += cell == maze.END
    assert walks == {1: 0, 2: 0, 3: 0, 4: 4}


RIGHT_DOWN = {0: [RIGHT], 1: [DOWN], 4: [RIGHT], 5: [DOWN]}


@pytest.mark.parametrize(
    "best, expected",
    [
        (RIGHT_DOWN, True),
        ({0: [DOWN], 3: [RIGHT], 4: [DOWN], 7: [RIGHT]}, True),
        (RIGHT_DOWN | {0: [RIGHT, DOWN], 3: [RIGHT]}, True),  # a tie between two optimal moves
        (RIGHT_DOWN | {0: [RIGHT, DOWN], 3: [LEFT]}, False),
        (RIGHT_DOWN | {0: [RIGHT, UP]}, False),  # ties with moves into the border
        (RIGHT_DOWN | {5: [DOWN, RIGHT]}, False),
        (RIGHT_DOWN | {1: [RIGHT]}, False),  # into a wall
        (RIGHT_DOWN | {4: [LEFT]}, False),
        (RIGHT_DOWN | {5: [UP]}, False),
        ({}, False),  # all equal, as before the first update
    ],
)
def test_what_an_optimal_path_is(best, expected, maze):
    scores = torch.zeros(9, 4)
    for cell, actions in best.items():
        scores[cell, actions] = 1.0
    assert maze.is_optimal(scores) is expected


@pytest.mark.parametrize("name", ["Q-learning", "PPO"])
def test_expected_return(name, maze):
    """Against V = r + γ P V, repeated until it stands."""
    scores = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    values = [0.0] * 9
    for _ in range(600):
        new = [0.0] * 9
        for cell in (0, 1, 3, 4, 5, 7):
            for action in range(4):
                chance = float(scores[cell].softmax(0)[action])
                if name == "Q-learning":
                    chance = 0.1 / 4 + 0.9 * (action == int(scores[cell].argmax()))
                after = maze.move(cell, action)
                new[cell] += chance * (1.0 if after == maze.END else 0.9 * values[after])
        values = new
    assert maze.expected_return(name, scores) == pytest.approx(values[0], rel=1e-9)


def test_walks(maze):
    theta, steps, cells, actions, rewards, mask = next(maze.walks(0))
    lengths = mask.sum(1).tolist()
    assert steps == sum(lengths) and len(set(lengths)) > 1 and max(lengths) == 50
    for i, length in enumerate(lengths):
        cell = maze.START
        for t in range(length):
            assert cells[i, t] == cell != maze.END and mask[i, t]
            cell = maze.move(cell, int(actions[i, t]))
            assert rewards[i, t] == (cell == maze.END)
        assert cell == maze.END or length == 50
        assert not rewards[i, length:].any()


def start(method, maze, monkeypatch, seed=3):
    """A policy, a batch of walks, and the policy after one update of the method with them."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(9, 4, generator=generator).mul(0.3).requires_grad_()
    _, steps, *batch = next(maze.walks(seed))  # by another policy, which an update cannot know
    monkeypatch.setattr(maze, "walks", lambda seed: iter([(theta, steps, *batch)]))
    before = theta.detach().clone()
    yielded, after = next(maze.METHODS[method](0))
    assert yielded == steps
    return before, batch, after


def moves(batch, gamma=0.9):
    """(walk, cell, action, return from there on) of each move."""
    cells, actions, rewards, mask = batch
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            later = sum(gamma ** (k - t) * float(rewards[i, k]) for k in range(t, length))
            yield i, int(cells[i, t]), int(actions[i, t]), later


def descend(theta, loss, alpha, epochs):
    for _ in range(epochs):
        theta = theta.detach().requires_grad_()
        theta = theta.detach() - alpha * torch.autograd.grad(loss(theta.log_softmax(1)), theta)[0]
    return theta


def assert_same_step(after, expected, before):
    assert (expected - before).norm() > 0.01
    assert (after - expected).norm() <= 1e-6 * (expected - before).norm()


def test_reinforce_is_its_formula(maze, monkeypatch):
    before, batch, after = start("REINFORCE", maze, monkeypatch)
    expected = descend(before, lambda logps: -sum(g * logps[s, a] for _, s, a, g in moves(batch)) / 8, 2.0, 1)
    assert_same_step(after, expected, before)


@pytest.mark.parametrize("seed, halvings", [(3, 0), (0, 1), (4, 1)])
def test_trpo_is_its_formula(seed, halvings, maze, monkeypatch, delta=0.05):
    """The natural gradient with the Fisher matrix written out, and halved until both conditions hold."""
    step = functools.partial(maze.natural_step, iterations=50)  # ten leave an error of half a percent
    monkeypatch.setattr(maze, "natural_step", step)
    before, batch, after = start("TRPO", maze, monkeypatch, seed)
    every = list(moves(batch))
    chances = before.softmax(1)

    def surrogate(theta):
        return sum(g * theta.softmax(1)[s, a] / chances[s, a] for _, s, a, g in every) / len(every)

    def kl(theta):
        logs = chances.log() - theta.log_softmax(1)
        return sum(float((chances[s] * logs[s]).sum()) for _, s, _, _ in every) / len(every)

    fisher = torch.zeros(9, 4, 9, 4)
    for _, s, _, _ in every:
        fisher[s, :, s, :] += (chances[s].diag() - chances[s].outer(chances[s])) / len(every)
    leaf = before.clone().requires_grad_()
    g = torch.autograd.grad(surrogate(leaf), leaf)[0].flatten()
    x = torch.linalg.solve(fisher.view(36, 36) + 1e-4 * torch.eye(36), g)
    x = (x * (2 * delta / (x @ g)).sqrt()).view(9, 4)
    steps = [x / 2**i for i in range(10)]
    allowed = [kl(before + x) <= delta and bool(surrogate(before + x) > surrogate(before)) for x in steps]
    assert allowed.index(True) == halvings
    assert_same_step(after, before + steps[halvings], before)
    assert 0.2 * delta < kl(after) <= delta


def test_trpo_takes_no_step_that_lowers_the_surrogate(maze, monkeypatch):
    uphill = maze.natural_step
    monkeypatch.setattr(maze, "natural_step", lambda *given: -uphill(*given))
    before, _, after = start("TRPO", maze, monkeypatch)
    assert torch.equal(after, before)


def test_ppo_is_its_formula(maze, monkeypatch):
    """With V = 0, as it begins."""
    before, batch, after = start("PPO", maze, monkeypatch)
    old = before.log_softmax(1)
    every = [(s, a, _lambda_return(batch, i, t)) for i, t, s, a in _places(batch)]

    def loss(logps):
        ratios = [((logps[s, a] - old[s, a]).exp(), advantage) for s, a, advantage in every]
        return -sum(torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A) for rho, A in ratios) / len(every)

    assert_same_step(after, descend(before, loss, 32.0, 4), before)


def _places(batch):
    cells, actions, _, mask = batch
    for i, t in mask.nonzero().tolist():
        yield i, t, int(cells[i, t]), int(actions[i, t])


def _lambda_return(batch, i, t, gamma=0.9, lam=0.95):
    """Σ_k (γλ)^(k - t) δ_k, where δ_k = r_k since V = 0."""
    return sum((gamma * lam) ** (k - t) * float(r) for k, r in enumerate(batch[2][i]) if k >= t)


def test_ppo_learns_values(maze, monkeypatch):
    """The second update sees V after four steps of gradient descent on ½ · mean (V - R)²."""
    _, batch, _ = start("PPO", maze, monkeypatch)
    seen, gae = [], maze.gae
    monkeypatch.setattr(maze, "gae", lambda r, v, *rest: (seen.append(v), gae(r, v, *rest))[1])
    theta = torch.zeros(9, 4, requires_grad=True)
    monkeypatch.setattr(maze, "walks", lambda seed: iter([(theta, 1, *batch)] * 2))
    list(maze.ppo(0))
    values, every = torch.zeros(9), [(s, _lambda_return(batch, i, t)) for i, t, s, _ in _places(batch)]
    for _ in range(4):
        slope = torch.zeros(9)
        for s, target in every:
            slope[s] += (values[s] - target) / len(every)
        values = values - 2.0 * slope
    assert values.max() > 0.05
    torch.testing.assert_close(seen[1], values[batch[0]])


def test_grpo_is_its_formula(maze, monkeypatch):
    before, batch, after = start("GRPO", maze, monkeypatch)
    old, every = before.log_softmax(1), list(moves(batch))
    lengths = batch[3].sum(1).tolist()
    arrived = batch[2].any(1).tolist()
    returns = [0.9 ** (length - 1) * end for length, end in zip(lengths, arrived, strict=True)]
    mean = sum(returns) / 8
    std = math.sqrt(sum((r - mean) ** 2 for r in returns) / 7)

    def loss(logps):
        total = 0.0
        for i, s, a, _ in every:
            A, d = (returns[i] - mean) / (std + 1e-4), math.log(1 / 4) - logps[s, a]
            rho = (logps[s, a] - old[s, a]).exp()
            kl = d.exp() - d - 1
            total = total - (torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A) - 0.04 * kl) / lengths[i] / 8
        return total

    assert_same_step(after, descend(before, loss, 4.0, 4), before)


def test_q_learning_is_its_formula(maze, monkeypatch):
    """Replayed from the moves, of which one in ten is random."""
    made, move = [], maze.move
    monkeypatch.setattr(maze, "move", lambda *where: (made.append(where), move(*where))[1])
    q, greedy, cell = torch.zeros(9, 4), 0, maze.START
    for steps, scores in itertools.islice(maze.q_learning(0), 3000):
        (s, a), after = made[-1], move(*made[-1])
        assert len(made) == steps and s == cell
        greedy += bool(q[s, a] == q[s].max())
        target = 1.0 if after == maze.END else 0.9 * float(q[after].max())
        q[s, a] += 0.5 * (target - float(q[s, a]))
        torch.testing.assert_close(scores, q, rtol=1e-12, atol=0)
        cell = maze.START if after == maze.END else after
    assert 0.91 < greedy / 3000 < 0.96  # 1 - ε + ε/4, and the ties
    assert float(q.max()) == pytest.approx(1.0) and float(q[0].max()) == pytest.approx(0.9**3)


@pytest.mark.slow
def test_the_table_of_the_documentation():
    """What the script prints for all 20 seeds is what docs/lineage.md shows."""
    command = [sys.executable, SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout in (ROOT / "docs" / "lineage.md").read_text()
    assert len(re.findall(r"\b20 of 20\b", result.stdout)) == len(METHODS)
