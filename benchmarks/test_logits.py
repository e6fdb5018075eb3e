"""Forward + backward of the loss from logits, paired: `pytest benchmarks`.

The size is one micro-batch of 512 tokens at Qwen2.5's vocabulary. Both sides compute the same loss (beta > 0, old
logps given) and the same gradient, which is checked before anything is timed. The ratio that the README quotes is
measured within one process and alternating, because timings on a shared machine drift.
"""

import statistics
import time

import pytest
import torch

from fastgrpo import Objective, grpo_loss

N, V = 512, 151_936
OBJECTIVE = Objective(beta=0.04)
MINIMUM = {torch.bfloat16: 10.0, torch.float32: 7.0}  # x eager


def make_case(dtype):
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(8, N // 8, V, generator=gen).mul_(2).to(dtype)
    ids = torch.randint(0, V, (8, N // 8), generator=gen)
    with torch.no_grad():
        logps = eager_logps(logits, ids)
    kwargs = dict(advantages=torch.randn(8, generator=gen))
    kwargs["old_per_token_logps"] = logps + 0.1 * torch.randn(logps.shape, generator=gen)
    kwargs["ref_per_token_logps"] = logps + 0.1 * torch.randn(logps.shape, generator=gen)
    return logits, ids, kwargs


def eager_logps(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].float()


def eager_step(logits, ids, advantages, old_per_token_logps, ref_per_token_logps):
    """log_softmax + gather + autograd in the logits' own dtype: the fewest passes eager torch can make."""
    leaf = logits.detach().requires_grad_()
    logps = eager_logps(leaf, ids)
    ratio = (logps - old_per_token_logps).exp()
    a = advantages[:, None]
    diff = ref_per_token_logps - logps
    kl = (diff.exp() - diff - 1) * ratio
    loss = (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) + OBJECTIVE.beta * kl).mean()
    loss.backward()
    return loss.detach(), leaf.grad


def fused_step(logits, ids, inplace, **kwargs):
    leaf = logits.detach().requires_grad_()
    loss = grpo_loss(leaf, ids, objective=OBJECTIVE, inplace=inplace, return_stats=False, **kwargs).loss
    loss.backward()
    return loss.detach(), leaf.grad


def fused_inplace(logits, ids, **kwargs):
    return fused_step(logits, ids, True, **kwargs)


def fused(logits, ids, **kwargs):
    return fused_step(logits, ids, False, **kwargs)


DTYPES = pytest.mark.parametrize("dtype", list(MINIMUM), ids=["bf16", "fp32"])


@DTYPES
@pytest.mark.parametrize("step", [eager_step, fused, fused_inplace])
def test_logits_forward_backward(benchmark, dtype, step):
    logits, ids, kwargs = make_case(dtype)
    benchmark.extra_info.update(tokens=N, vocab=V, bytes=3 * logits.numel() * logits.element_size())

    def setup():  # in place, the last round left its gradient where the logits were
        return (logits.clone(), ids), kwargs

    benchmark.pedantic(step, setup=setup, rounds=5, warmup_rounds=1)


@DTYPES
def test_ratio_to_eager(benchmark, dtype):
    """The ratio of medians over alternating rounds; fails below the project's floor for two cores."""
    logits, ids, kwargs = make_case(dtype)
    work = logits.clone()
    got_loss, got = fused_inplace(work, ids, **kwargs)
    want_loss, want = eager_step(logits.float(), ids, **kwargs)  # fp32: eager bf16 rounds its logps to 8 bits
    assert abs(got_loss - want_loss) <= 1e-4 * abs(want_loss)
    assert (got.float() - want).norm() <= (1e-5 if dtype == torch.float32 else 2**-8) * want.norm()
    del want, got
    times = {eager_step: [], fused: [], fused_inplace: []}

    def interleaved():
        for _ in range(7):
            for step, seconds in times.items():
                work.copy_(logits)
                start = time.perf_counter()
                step(work, ids, **kwargs)
                seconds.append(time.perf_counter() - start)

    benchmark.pedantic(interleaved, rounds=1)
    median = {step.__name__: statistics.median(seconds) for step, seconds in times.items()}
    ratios = {name: median["eager_step"] / median[name] for name in ("fused", "fused_inplace")}
    benchmark.extra_info.update(ratios=ratios, median_seconds=median)
    print(f"\n{dtype}: " + ", ".join(f"{k} {v * 1e3:.1f} ms" for k, v in median.items()) + f"; {ratios}")
    assert ratios["fused_inplace"] >= MINIMUM[dtype]
