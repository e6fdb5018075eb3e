"""From Q-learning to GRPO: one maze, five methods, and what each changed in the one before (docs/lineage.md).

python examples/maze.py --plot lineage.svg   # a table in under a minute on one core; the plot needs matplotlib

    S . #      start S, end E, walls #. A move goes up, down, left or right; into a wall or out of the maze it stays.
    . . .      The move onto E has reward 1, the others 0, and γ = 0.9. So a walk of T moves returns γ^(T - 1), and the
    # . E      best have four moves. All methods but Q-learning cut a walk off after 50 moves; then it returns 0.
"""

import argparse
import random
from statistics import median

import torch

from fastgrpo import Objective, gae, policy_loss

START, END, WALLS, SHORTEST, LONGEST, GAMMA = 0, 8, (2, 6), 4, 50, 0.9
BATCH, EPOCHS, EPSILON, EVERY = 8, 4, 0.1, 20  # walks an update, passes over them; ε; steps between points of the plot


def move(cell, action):
    row, column = cell // 3 + (-1, 1, 0, 0)[action], cell % 3 + (0, 0, -1, 1)[action]  # up, down, left, right
    free = row in range(3) and column in range(3) and 3 * row + column not in WALLS
    return 3 * row + column if free else cell


NEXT = torch.tensor([[move(cell, action) for action in range(4)] for cell in range(9)])


def q_learning(seed, alpha=0.5):
    """Watkins and Dayan, Q-learning, Machine Learning 8, 1992."""
    rng, q, steps, s = random.Random(seed), [[0.0] * 4 for _ in range(9)], 0, START
    while True:
        # ε-greedy: with probability ε any action, else argmax_a Q(s, a), ties broken at random
        best = [a for a in range(4) if q[s][a] == max(q[s])]
        a = rng.randrange(4) if rng.random() < EPSILON else rng.choice(best)
        after = move(s, a)
        # Bellman: Q(s, a) ← Q(s, a) + α (r + γ max_a' Q(s', a') - Q(s, a)), where Q of the end stays 0
        q[s][a] += alpha * ((after == END) + GAMMA * max(q[after]) - q[s][a])
        steps, s = steps + 1, START if after == END else after
        yield steps, torch.tensor(q)


def walks(seed):
    """A policy softmax(theta), the steps so far, and (B, T) each: cells s, actions a, rewards r, mask of its walks."""
    theta, generator, steps = torch.zeros(9, 4, requires_grad=True), torch.Generator().manual_seed(seed), 0
    while True:
        s, seen, chances = torch.full((BATCH,), START), [], theta.detach().softmax(1).cumsum(1)
        while len(seen) < LONGEST and (s != END).any():
            a = (chances[s] < torch.rand(BATCH, 1, generator=generator)).sum(1).clamp(max=3)
            after = torch.where(s == END, END, NEXT[s, a])
            seen.append(torch.stack([s, a, (s != END) & (after == END), s != END]))
            s = after
        s, a, r, mask = torch.stack(seen, 2)
        steps += int(mask.sum())
        yield theta, steps, s, a, r.double(), mask.bool()


def logps_of(theta, s, a):  # log π(a | s)
    return theta.log_softmax(1)[s, a]


def returns_of(r, mask):  # G_t = r_t + γ G_{t+1}, which is GAE with V = 0 and λ = 1
    return gae(r, torch.zeros_like(r), mask, GAMMA, 1.0)[0]


def reinforce(seed, alpha=2.0):
    """Williams, Simple statistical gradient-following algorithms, Machine Learning 8, 1992."""
    for theta, steps, s, a, r, mask in walks(seed):
        # θ ← θ + α ∇J,  ∇J = 1/B Σ over walks of Σ_t G_t ∇ log π(a_t | s_t)
        objective = (returns_of(r, mask) * logps_of(theta, s, a)).sum() / BATCH
        theta.data += alpha * torch.autograd.grad(objective, theta)[0]
        yield steps, theta.detach()


def surrogate(theta, old, s, a, returns):  # L = mean over moves of π(a | s) / π_old(a | s) · G
    return ((logps_of(theta, s, a) - logps_of(old, s, a)).exp() * returns).mean()


def kl(theta, old, s):  # D = mean over moves of KL(π_old(· | s) ‖ π(· | s))
    return (old.softmax(1) * (old.log_softmax(1) - theta.log_softmax(1))).sum(1)[s].mean()


def natural_step(g, slope, theta, delta, damping=1e-4, iterations=10):
    """x = F⁻¹ g by conjugate gradients, F the Hessian of D, as long as ½ xᵀ F x = δ makes it."""
    x, residual, p = torch.zeros_like(g), g, g
    for _ in range(iterations):
        if (before := residual.square().sum()) > 1e-20:
            fp = torch.autograd.grad(slope, theta, p, retain_graph=True)[0] + damping * p  # F p = ∇(∇D · p)
            length = before / (p * fp).sum()
            x, residual = x + length * p, residual - length * fp
            p = residual + residual.square().sum() / before * p
    return x * (2 * delta / (x * g).sum().clamp(min=1e-20)).sqrt()


def trpo(seed, delta=0.05):
    """Schulman et al., Trust region policy optimization, arXiv:1502.05477."""
    for theta, steps, s, a, r, mask in walks(seed):
        old, s, a, returns = theta.detach(), s[mask], a[mask], returns_of(r, mask)[mask]
        g = torch.autograd.grad(surrogate(theta, old, s, a, returns), theta)[0]
        slope = torch.autograd.grad(kl(theta, old, s), theta, create_graph=True)[0]
        x = natural_step(g, slope, theta, delta)
        # line search: the first of θ + x, θ + x/2, θ + x/4, … with D ≤ δ and L above that of θ, which is the mean of G
        for tried in (old + x / 2**i for i in range(10)):
            if kl(tried, old, s) <= delta and surrogate(tried, old, s, a, returns) > returns.mean():
                theta.data = tried
                break
        yield steps, theta.detach()


def ppo(seed, alpha=32.0, alpha_value=2.0, lam=0.95):
    """Schulman et al., Proximal policy optimization, arXiv:1707.06347; GAE, arXiv:1506.02438."""
    value = torch.zeros(9)
    for theta, steps, s, a, r, mask in walks(seed):
        # δ_t = r_t + γ V(s_{t+1}) - V(s_t),  A_t = δ_t + γλ A_{t+1},  R_t = A_t + V(s_t)
        old, (advantages, returns) = logps_of(theta, s, a).detach(), gae(r, value[s], mask, GAMMA, lam)
        for _ in range(EPOCHS):
            # -1/N Σ_t min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t), ρ = π / π_old, ε = 0.2, and ½/N Σ_t (V(s_t) - R_t)²
            loss = policy_loss(logps_of(theta, s, a), advantages, completion_mask=mask, old_per_token_logps=old).loss
            theta.data -= alpha * torch.autograd.grad(loss, theta)[0]
            value.index_add_(0, s[mask], (returns - value[s])[mask], alpha=alpha_value / int(mask.sum()))
        yield steps, theta.detach()


def grpo(seed, alpha=4.0):
    """Shao et al., DeepSeekMath, arXiv:2402.03300."""
    paper = Objective.preset("grpo-paper")  # ε = 0.2, β = 0.04
    for theta, steps, s, a, r, mask in walks(seed):
        # A_i = (R_i - mean R) / std R for every move of walk i; all begin at one place, so a batch is one group
        group = dict(rewards=returns_of(r, mask)[:, 0], num_generations=BATCH, completion_mask=mask)
        old, ref = logps_of(theta, s, a).detach(), logps_of(torch.zeros(9, 4), s, a)  # π_ref is the policy at first
        for _ in range(EPOCHS):
            # -1/B Σ_i 1/|o_i| Σ_t [min(ρ A_i, clip(ρ, 1 - ε, 1 + ε) A_i) - β (exp(d) - d - 1)],  d = log π_ref - log π
            logps = logps_of(theta, s, a)
            loss = policy_loss(logps, old_per_token_logps=old, ref_per_token_logps=ref, objective=paper, **group).loss
            theta.data -= alpha * torch.autograd.grad(loss, theta)[0]
        yield steps, theta.detach()


METHODS = {"Q-learning": q_learning, "REINFORCE": reinforce, "TRPO": trpo, "PPO": ppo, "GRPO": grpo}


def is_optimal(scores):
    """Whether the greedy policy, argmax_a of scores (9, 4), walks an optimal path, whichever way it breaks ties."""
    scores, cells = scores.tolist(), {START}
    for _ in range(SHORTEST):
        cells = {move(s, a) for s in cells for a in range(4) if scores[s][a] == max(scores[s])}
    return cells == {END}


def expected_return(name, scores):
    """J = V(start) of the policy that acts, from V = r + γ P V, for walks that are not cut off."""
    greedy = torch.nn.functional.normalize((scores == scores.amax(1, keepdim=True)).double(), p=1)
    policy = EPSILON / 4 + (1 - EPSILON) * greedy if name == "Q-learning" else scores.softmax(1)
    p = torch.zeros(9, 9).scatter_add_(1, NEXT, policy)
    return torch.linalg.solve(torch.eye(END) - GAMMA * p[:END, :END], p[:END, END])[START].item()


def train(name, seed, limit):
    """(steps to the first optimal path, steps from which on it stays optimal, J at every point of the curve)."""
    first, settled, curve, before = None, None, [], torch.zeros(9, 4)
    for steps, scores in METHODS[name](seed):
        while len(curve) * EVERY < min(steps, limit + 1):
            curve.append(expected_return(name, before))
        if steps > limit:
            return first, settled, curve
        settled = (settled or steps) if is_optimal(scores) else None
        first, before = first or settled, scores.clone()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000, help="environment steps of each run")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves to an SVG or PNG; needs matplotlib")
    options, curves = parser.parse_args(), {}
    torch.set_num_threads(1)  # a second one saves tables this small nothing
    torch.set_default_dtype(torch.float64)
    print("              reached  least  median  most  settled  return")
    for name in METHODS:
        runs = [train(name, seed, options.steps) for seed in range(options.seeds)]
        first, last = (sorted(run[i] or torch.inf for run in runs) for i in (0, 1))
        curves[name] = torch.tensor([run[2] for run in runs]).mean(0)
        print(f"{name:12}{sum(x < torch.inf for x in first):3} of {len(runs):<2}", end="")
        print(f"{first[0]:7.0f}{median(first):8.0f}{first[-1]:6.0f}{median(last):9.0f}{curves[name][-1]:8.3f}")
    if options.plot:
        from matplotlib import pyplot

        pyplot.rcParams.update({"svg.hashsalt": "fastgrpo", "font.size": 9})  # the same file from the same curves
        figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
        axes.plot(range(0, options.steps + 1, EVERY), torch.stack([*curves.values()]).T, label=[*curves])
        axes.axhline(GAMMA ** (SHORTEST - 1), color="black", linestyle=":", label="an optimal policy")
        axes.set(xlabel="environment steps", ylabel="expected return, mean over seeds")
        axes.legend()
        figure.savefig(options.plot, metadata={"Date": None} if options.plot.endswith(".svg") else None)


if __name__ == "__main__":
    main()
