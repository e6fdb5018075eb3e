"""The loss from logits on a GPU: `pytest benchmarks/test_gpu.py -s`.

Prints a JSON line per measurement, and appends it to the file that FASTGRPO_RESULTS names, if it does.
8192 tokens at the vocabularies of Llama 3 and Qwen2.5, bf16, old logps given. The gradient of every side is checked
against the float64 reference, on some rows, before anything is timed. Sides take turns, timed by events; the logits
are many times the L2 cache, so nothing is left there from the turn before.
"""

import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from fastgrpo import Objective, backends, grpo_loss, grpo_loss_reference, selective_logps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
B, T = 8, 1024
ROUNDS = 10
OBJECTIVE = Objective(epsilon=0.2)


def make_case(V):
    """(logits (B, T+1, V), of which the last position is nobody's, ids, advantages, old logps)."""
    torch.manual_seed(0)
    logits = (torch.randn(B, T + 1, V, device="cuda", dtype=torch.bfloat16)).mul_(2)
    ids = torch.randint(V, (B, T), device="cuda")
    old = selective_logps(logits[:, :-1], ids) + 0.1 * torch.randn(B, T, device="cuda")
    return logits, ids, torch.randn(B, device="cuda"), old


def fused(backend):
    def step(logits, ids, advantages, old):
        leaf = logits[:, :-1].detach().requires_grad_()
        call = dict(old_per_token_logps=old, objective=OBJECTIVE, return_stats=False)
        loss = grpo_loss(leaf, ids, advantages, inplace=True, backend=backend, **call).loss
        loss.backward()
        return loss.detach(), leaf.grad

    return step


def liger(logits, ids, advantages, old):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    leaf = logits.detach().requires_grad_()
    options = dict(temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, loss_type="dapo", reduce=True)
    loss, _ = triton_grpo_loss(leaf, old, None, ids, advantages, **options)
    loss.backward()
    return loss.detach(), leaf.grad[:, :-1]


def eager(logits, ids, advantages, old):
    leaf = logits[:, :-1].detach().requires_grad_()
    logps = leaf.log_softmax(-1).gather(-1, ids[..., None])[..., 0].float()
    ratio, a = (logps - old).exp(), advantages[:, None]
    loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    loss.backward()
    return loss.detach(), leaf.grad


def forward(backend):
    return lambda logits, ids, *_: selective_logps(logits[:, :-1], ids, return_entropy=True, backend=backend)


def check(step, logits, ids, advantages, old):
    """The relative error of the gradient of the first rows."""
    rows = slice(0, 4)
    want = logits[:1, rows].double().requires_grad_()
    options = dict(num_items_in_batch=B * T, objective=OBJECTIVE, old_per_token_logps=old[:1, rows])
    grpo_loss_reference(want, ids[:1, rows], advantages[:1], **options).loss.backward()
    _, grad = step(logits.clone(), ids, advantages, old)
    return float((grad[:1, rows].double() - want.grad).norm() / want.grad.norm())


def measure(steps, case):
    """{name: milliseconds of every round}, of steps(logits, ...) on logits that are put back before each."""
    logits, *rest = case
    work, times = logits.clone(), {name: [] for name in steps}
    for turn in range(ROUNDS + 2):
        for name, step in steps.items():
            work.copy_(logits)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(work, *rest)
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
    return times


def record(op, name, V, times, moved, copy_rate, error):
    quantiles = statistics.quantiles(times, n=10)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    row = dict(
        op=op,
        impl=name,
        shape=dict(B=B, T=T, V=V),
        dtype="bf16",
        ms_p50=statistics.median(times),
        ms_p20=quantiles[1],
        ms_p80=quantiles[7],
        bytes=moved,
        roof_share=moved / (statistics.median(times) / 1e3) / copy_rate,
        rel_err=error,
        device=torch.cuda.get_device_name(),
        versions={name: importlib.metadata.version(name) for name in ("torch", "triton", "fastgrpo")},
        commit=commit.stdout.strip(),
        date=datetime.date.today().isoformat(),
    )
    line = json.dumps(row)
    print(line)
    if path := os.environ.get("FASTGRPO_RESULTS"):
        with open(path, "a") as file:
            file.write(line + "\n")


@pytest.mark.parametrize("V", [128_256, 151_936])
def test_one_pass_and_forward(V):
    case = make_case(V)
    logits = case[0]
    size = B * T * V * 2
    names = [name for name in ("cuda", "triton") if backends.get(name).unavailable() is None]
    passes = {name: fused(name) for name in names} | {"eager": eager}
    try:
        import liger_kernel  # noqa: F401

        passes["liger"] = liger
    except ImportError:
        print("liger_kernel is not installed: not measured")
    errors = {name: check(step, *case) for name, step in passes.items()}
    assert all(errors[name] <= 2**-8 for name in names), errors
    print(f"relative errors of the gradients: {errors}")
    other = torch.empty_like(logits)
    steps = {"copy": lambda work, *_: other.copy_(work)}
    steps |= {f"pass {name}": step for name, step in passes.items() if errors[name] <= 2**-5}
    steps |= {f"forward {name}": forward(name) for name in names}
    times = measure(steps, case)
    median = {name: statistics.median(x) for name, x in times.items()}
    copy_rate = 2 * logits.numel() * 2 / (median["copy"] / 1e3)
    for name, x in times.items():
        op, _, impl = name.partition(" ")
        record(op, impl or "torch", V, x, size if op == "forward" else 2 * size, copy_rate, errors.get(impl))
    print({name: f"{ms:.3f} ms" for name, ms in median.items()})
    best_pass = min(median[f"pass {name}"] for name in names)
    best_forward = min(median[f"forward {name}"] for name in names)
    ratios = {
        "pass / copy": best_pass / median["copy"],
        "forward's share of the copy's bandwidth": size / (best_forward / 1e3) / copy_rate,
        "eager / pass": median["pass eager"] / best_pass,
    }
    if "pass liger" in median:
        ratios["liger / pass"] = median["pass liger"] / best_pass
    print(ratios)
    assert ratios["pass / copy"] <= 1.15 and ratios["forward's share of the copy's bandwidth"] >= 0.92
    assert ratios["eager / pass"] >= 8 and ratios.get("liger / pass", 2) >= 2
