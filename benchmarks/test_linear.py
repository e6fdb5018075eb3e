"""Forward + backward of the loss from hidden states, beside the GEMMs alone, TRL and Liger: `pytest benchmarks`.

The size is one micro-batch of 512 tokens at Qwen2.5-0.5B's head (H = 896, V = 151,936). All sides compute the same
loss (dapo, old logps given) and the same gradients, which is checked before anything is timed. Ratios are those of
medians within one process: sides take turns, because timings on a shared machine drift, and each runs a few times in a
row, as a training loop does. The GEMMs alone are `h @ Wᵀ`, `dL @ W` and `dLᵀ @ h` into buffers that are there already,
in the same chunks.

What a side allocates is part of its time. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 in the environment
makes glibc keep what is freed, which shows the arithmetic alone.
"""

import statistics
import subprocess
import sys
import time

import pytest
import torch

from fastgrpo import Objective, linear_grpo_loss, linear_logps, policy_loss
from fastgrpo.projection import cut, default_chunk

H, V = 896, 151_936
OBJECTIVE = Objective(beta=0.0)
# what the project holds itself to on two cores: times of the GEMMs alone, TRL's time over ours, and that with half of
# the sequences in groups of equal rewards
LIMITS = {torch.bfloat16: (1.25, 7.0, 11.0), torch.float32: (1.25, 1.8, 2.7)}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=["bf16", "fp32"])


def make_case(dtype, tokens=512, inactive=False):
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, tokens // 8, H, generator=gen).to(dtype)
    weight = torch.randn(V, H, generator=gen).mul_(2 / H**0.5).to(dtype)
    ids = torch.randint(0, V, hidden.shape[:2], generator=gen)
    advantages = torch.randn(8, generator=gen)
    if inactive:
        advantages[:4] = 0.0
    logps = linear_logps(hidden, weight, ids)
    return hidden, weight, ids, advantages, logps + 0.1 * torch.randn(logps.shape, generator=gen)


def leaves_of(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def fastgrpo_step(hidden, weight, ids, advantages, old):
    hidden, weight = leaves_of(hidden, weight)
    output = linear_grpo_loss(hidden, weight, ids, advantages, old_per_token_logps=old, objective=OBJECTIVE)
    output.loss.backward()
    return output.loss.detach(), hidden.grad, weight.grad


def trl_step(hidden, weight, ids, advantages, old):
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    hidden, weight = leaves_of(hidden, weight)
    logps, entropies, *_ = _ChunkedLogProbFunction.apply(
        hidden.view(-1, H), weight, None, ids.view(-1), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    logps, entropies = logps.view(ids.shape), entropies.view(ids.shape)
    output = policy_loss(logps, advantages, entropies=entropies, old_per_token_logps=old, objective=OBJECTIVE)
    output.loss.backward()
    return output.loss.detach(), hidden.grad, weight.grad


def liger_step(hidden, weight, ids, advantages, old):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = leaves_of(hidden, weight)
    loss_function = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    mask = torch.ones_like(ids)
    loss, *_ = loss_function(hidden, weight, ids, mask, advantages, old_per_token_logps=old)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def eager_step(hidden, weight, ids, advantages, old):
    hidden, weight = leaves_of(hidden, weight)
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss = policy_loss(logps, advantages, old_per_token_logps=old, objective=OBJECTIVE, return_stats=False).loss
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


STEPS = {"fastgrpo": fastgrpo_step, "trl": trl_step, "liger": liger_step, "eager": eager_step}


def gemms(hidden, weight):
    """The three GEMMs alone, as a function of no arguments."""
    rows = hidden.view(-1, H)
    parts = cut(0, len(rows), default_chunk(V, hidden.dtype, hidden.device))
    logits = torch.randn(parts[0].stop, V).to(hidden.dtype)
    d_hidden, d_weight = torch.zeros_like(rows), torch.zeros_like(weight)

    def run():
        for part in parts:
            chunk = logits[: part.stop - part.start]
            torch.mm(rows[part], weight.T, out=chunk)
            torch.mm(chunk, weight, out=d_hidden[part])
            torch.mm(chunk.T, rows[part], out=d_weight)

    return run


def measure(functions, rounds):
    """Median seconds of each function, by name: two turns, each of a warm-up and `rounds` calls in a row."""
    times = {name: [] for name in functions}
    for _ in range(2):
        for name, function in functions.items():
            function()
            for _ in range(rounds):
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def check_gradients(case, dtype, names):
    """Every side against fastgrpo's own; bf16 logits round differently on each."""
    want_loss, *want = STEPS["fastgrpo"](*case)
    for name in names:
        loss, *grads = STEPS[name](*case)
        assert abs(loss - want_loss) <= (1e-4 if dtype == torch.float32 else 2e-2) * want_loss.abs(), name
        for grad, other in zip(grads, want, strict=True):
            error = (grad.float() - other.float()).norm() / other.float().norm()
            assert error <= (1e-4 if dtype == torch.float32 else 3e-2), (name, float(error))


@DTYPES
def test_linear_ratios(benchmark, dtype):
    """Fails below the project's floors for two cores."""
    pytest.importorskip("trl", reason="TRL is the other side (pip install '.[test]')")
    case, half = make_case(dtype), make_case(dtype, inactive=True)
    check_gradients(case, dtype, ["trl"])
    functions = {
        "gemms": gemms(*case[:2]),
        "fastgrpo": lambda: fastgrpo_step(*case),
        "fastgrpo, half inactive": lambda: fastgrpo_step(*half),
        "trl": lambda: trl_step(*case),
    }
    times = benchmark.pedantic(measure, args=(functions, 3), rounds=1)
    ratios = {
        "x gemms": times["fastgrpo"] / times["gemms"],
        "trl / fastgrpo": times["trl"] / times["fastgrpo"],
        "trl / fastgrpo, half inactive": times["trl"] / times["fastgrpo, half inactive"],
    }
    report(dtype, times, ratios)
    benchmark.extra_info.update(ratios=ratios, median_seconds=times)
    most, least, least_half = LIMITS[dtype]
    assert ratios["x gemms"] <= most and ratios["trl / fastgrpo"] >= least
    assert ratios["trl / fastgrpo, half inactive"] >= least_half


@DTYPES
def test_linear_many_chunks(benchmark, dtype):
    """4096 tokens in a buffer of at most 512 MiB."""
    case = make_case(dtype, tokens=4096)
    functions = {"gemms": gemms(*case[:2]), "fastgrpo": lambda: fastgrpo_step(*case)}
    times = benchmark.pedantic(measure, args=(functions, 2), rounds=1)
    ratios = {"x gemms": times["fastgrpo"] / times["gemms"]}
    report(dtype, times, ratios)
    assert ratios["x gemms"] <= 1.4


@DTYPES
def test_linear_peers(benchmark, dtype):
    """Time and memory of every side; fails unless Liger is slower and takes more."""
    pytest.importorskip("trl", reason="TRL is a peer (pip install '.[bench]')")
    pytest.importorskip("liger_kernel", reason="Liger is a peer (pip install '.[bench]')")
    case = make_case(dtype)
    check_gradients(case, dtype, ["trl", "liger"])
    functions = {name: (lambda step=step: step(*case)) for name, step in STEPS.items()}
    times = benchmark.pedantic(measure, args=(functions, 2), rounds=1)
    peaks = {name: peak_memory(name, dtype) for name in STEPS}
    report(dtype, times, {f"{name} MiB": peak for name, peak in peaks.items()})
    assert times["fastgrpo"] < times["liger"] and peaks["fastgrpo"] < peaks["liger"]


def peak_memory(name, dtype):
    """MiB above inputs at the peak of one step, in a fresh process."""
    code = f"import test_linear, torch; test_linear.print_peak({name!r}, {dtype})"
    folder = __file__.rpartition("/")[0]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return int(run.stdout)


def print_peak(name, dtype):
    def status(field):
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return int(line.split()[1]) >> 10

    hidden, weight, ids, advantages, old = make_case(dtype)
    few = slice(0, 1)
    STEPS[name](hidden[few, :1], weight[:64], ids[few, :1] % 64, advantages[few], old[few, :1])  # libraries load
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    STEPS[name](hidden, weight, ids, advantages, old)
    print(status("VmHWM") - before)


def report(dtype, times, numbers):
    parts = [f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items()]
    parts += [f"{name} {number:.3g}" if number < 1000 else f"{name} {number}" for name, number in numbers.items()]
    print(f"\n{dtype}: " + ", ".join(parts))
