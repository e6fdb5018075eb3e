"""Inputs and comparisons that the tests share."""

import math

import torch

from fastgrpo import Objective, grpo_loss_reference, linear_grpo_loss_reference
from fastgrpo.objective import LOSS_TYPES

TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")  # of TRL 1.16
LEVELS = ("token", "sequence", "sequence_token")
MAX_COMPLETION_LENGTH = 9

# (name, objective options, inputs that the objective reads beyond advantages and mask)
OPTIONS = {
    "plain": ({}, ()),
    "old": ({}, ("old",)),
    "beta": (dict(beta=0.1), ("ref",)),
    "beta-old": (dict(beta=0.1), ("old", "ref")),
    "beta-old-unbiased": (dict(beta=0.1, use_bias_correction_kl=False), ("old", "ref")),
    "delta": (dict(delta=1.1, epsilon_high=0.3), ("old",)),
    "entropy": (dict(entropy_coef=0.02), ("old",)),
    "quantile": (dict(top_entropy_quantile=0.4, entropy_coef=0.02), ("old",)),
    "off-policy": (dict(off_policy_mask_threshold=0.02), ("old",)),
    "off-policy-sampler": (dict(off_policy_mask_threshold=0.02), ("old", "sampling")),
    "is-token": ({}, ("old", "is_token")),
    "is-sequence": (dict(beta=0.1), ("old", "ref", "is_sequence")),
    "token-advantages": ({}, ("old", "token_advantages")),
    "num-items": (dict(beta=0.1), ("old", "ref", "num_items")),
}


def objective_for(loss_type: str, level: str, options: dict) -> Objective:
    defaults = dict(loss_type=loss_type, importance_sampling_level=level, max_completion_length=MAX_COMPLETION_LENGTH)
    if loss_type == "cispo":
        defaults["epsilon_high"] = 1.1  # the cap itself: so that some tokens reach it
    defaults |= {"clip_cov": dict(cov_share=1.0), "kl_cov": dict(cov_share=0.3)}.get(loss_type, {})  # none is drawn
    if loss_type in ("dppo", "dppo_tv", "dppo_kl"):
        defaults |= dict(epsilon=0.01, epsilon_high=0.01)  # of probabilities: so that some tokens leave it
    return Objective(**{**defaults, **options})


LOG_RATIOS = (-1000.0, -100.0, -80.0, -20.0, 20.0, 80.0, 100.0, 1000.0)  # exp beyond fp32, and beyond float64


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _times(a: float, b: float) -> float:  # 0 times what has overflowed is 0
    return 0.0 if a == 0 or b == 0 else a * b


def _exact_policy(
    o: Objective, x: float, own_x: float, log_w: float, advantage: float, logp: float, first: bool
) -> tuple[float, float, float]:
    """(loss, its derivative in the log ratio x, its derivative in logp at a fixed x) of a token.

    `own_x` is the log ratio of the token alone; `first` stands for the token that covariance selects among equal ones.
    """
    ratio, a = _exp(x), advantage
    moving = _times(ratio, a)
    constant = None  # minus the factor of A logp
    if o.loss_type == "cispo":
        constant = min(ratio, o.clip_high)
    elif o.loss_type == "cispo_clip":
        constant = min(max(ratio, 1 - o.epsilon), o.clip_high)
    elif o.loss_type == "reinforce":
        constant = 1.0
    elif o.loss_type == "icepop":
        constant = ratio if 1 - o.epsilon < ratio < o.clip_high else 0.0
    elif o.loss_type == "vespo":
        k, lam = (o.vespo_k_pos, o.vespo_lambda_pos) if a >= 0 else (o.vespo_k_neg, o.vespo_lambda_neg)
        log_w = min(max(log_w, math.log(1e-8)), 20)
        constant = math.exp(lam + k * log_w - lam * math.exp(log_w))
    elif o.loss_type in ("dppo", "dppo_tv", "dppo_kl"):
        old_logp = logp - own_x
        p, old = math.exp(logp), _exp(old_logp)
        if o.loss_type == "dppo_kl":
            kl = old * -own_x + (1 - old) * math.log((1 - old + 1e-8) / (1 - p + 1e-8)) if old < 1 + 1e-8 else math.nan
            dropped = (p > old and kl > o.clip_high) if a > 0 else (p < old and kl > o.epsilon)
        else:
            dropped = p - old > o.clip_high if a > 0 else p - old < -o.epsilon
        if o.loss_type == "dppo":
            return (0.0, 0.0, 0.0) if dropped else (-moving, -moving, 0.0)
        constant = 0.0 if dropped else ratio if o.clip_ratio_c is None else min(ratio, o.clip_ratio_c)
    if constant is not None:
        coefficient = -_times(constant, a)
        return coefficient * logp, 0.0, coefficient
    if o.loss_type == "kl_cov":
        chosen = o.cov_coef * first
        return chosen * abs(x) - moving, chosen * ((x > 0) - (x < 0)) - moving, 0.0
    if o.loss_type == "sapo":
        tau = o.sapo_temperature_pos if a > 0 else o.sapo_temperature_neg
        rest = _exp(-tau * (ratio - 1))  # (1 - gate) / gate
        return -a * 4 / tau / (1 + rest), _times(-a * 4 * rest / (1 + rest) ** 2, ratio), 0.0
    bound = o.delta is not None and ratio > o.delta
    unclipped = o.delta * a if bound else moving
    clipped = min(max(ratio, 1 - o.epsilon), o.clip_high) * a
    inside = 1 - o.epsilon <= ratio <= o.clip_high
    chosen_moves = not bound if unclipped < clipped else inside
    loss, slope = -min(unclipped, clipped), -moving if chosen_moves else 0.0
    if o.clip_ratio_c is not None and a < 0 and loss > -o.clip_ratio_c * a:
        return -o.clip_ratio_c * a, 0.0, 0.0
    return loss, slope, 0.0


def _exact_gmpo(o: Objective, xs: list, advantage: float) -> tuple[list, list]:
    """(loss, dL/dlogp) of each token."""
    low, high, a = -o.epsilon, o.clip_high, advantage
    clipped = [min(x, high) if a > 0 else max(x, low) if a < 0 else 0.0 for x in xs]
    value = -_times(_exp(sum(clipped) / len(xs)), a)
    # two equal numbers share the gradient, and the clamped one has its own within the range
    moves = [float(x <= high if a > 0 else x >= low) for x in xs]
    return [value] * len(xs), [_times(value, move) for move in moves]


def exact_loss(o: Objective, xs: list, ds: list, advantage: float, logp: float) -> tuple[list, list]:
    """(loss, dL/dlogp) of each token of a sequence in float64, by formulas that hold where exp overflows.

    From xs = logp - old, ds = ref - logp, and the logp and advantage that all its tokens share; not averaged.
    """
    n, bound = len(xs), math.inf if o.log_ratio_clamp is None else o.log_ratio_clamp
    lowest = -bound
    level_xs = xs
    if o.importance_sampling_level != "token":
        level_xs, lowest = [sum(xs) / n] * n, -math.inf
    alive = [float(lowest <= x <= bound) for x in level_xs]  # a ratio that is clamped has no derivative
    level_xs = [min(max(x, lowest), bound) for x in level_xs]
    log_w = sum(min(max(x, -20), 20) for x in xs)
    per_sequence = o.importance_sampling_level == "sequence"
    if o.loss_type == "gmpo":
        losses, slopes = _exact_gmpo(o, level_xs, advantage)
        direct = [0.0] * n
    else:
        each = [_exact_policy(o, x, own, log_w, advantage, logp, i == 0)
                for i, (x, own) in enumerate(zip(level_xs, xs, strict=True))]  # fmt: skip
        losses, slopes, direct = zip(*each, strict=True)
    slopes = [_times(slope, a) for slope, a in zip(slopes, alive, strict=True)]
    gradient = [s + d for s, d in zip([sum(slopes) / n] * n if per_sequence else slopes, direct, strict=True)]
    if o.beta:
        kl, dkl = _exact_kl(o.use_bias_correction_kl, level_xs, ds, per_sequence, alive)
        losses = [loss + o.beta * k for loss, k in zip(losses, kl, strict=True)]
        gradient = [g + o.beta * k for g, k in zip(gradient, dkl, strict=True)]
    return list(losses), gradient


def _exact_kl(times_ratio: bool, xs: list, ds: list, per_sequence: bool, alive: list) -> tuple[list, list]:
    """(k3 or k3 times the ratio, its derivative in logp) of each token."""
    if not times_ratio:
        return [math.expm1(d) - d if d < 709 else math.inf for d in ds], [1 - _exp(d) for d in ds]
    kl = [
        _times(math.expm1(d) - d, _exp(x)) if d < 1 else _exp(x + d) - _times(1 + d, _exp(x))
        for x, d in zip(xs, ds, strict=True)
    ]
    grown = [_times(math.expm1(d), _exp(x)) if d < 1 else _exp(x + d) - _exp(x) for x, d in zip(xs, ds, strict=True)]
    if not per_sequence:  # the two parts of the derivative share e^(x + d), which is gone from their sum
        return kl, [_times(-d, _exp(x)) if a else -e for x, d, e, a in zip(xs, ds, grown, alive, strict=True)]
    mean = sum(kl) / len(kl)
    return kl, [mean * a - e for e, a in zip(grown, alive, strict=True)]


def make_inputs(
    extras=(), *, batch=None, length=None, vocab=61, dtype=torch.float32, seed=0, device="cpu", scale=3.0, backend=None
):
    """(logits, ids, kwargs of a loss call) with a realistic spread: ratios around 1, some beyond the clip range.

    Fewer rows for Triton's interpreter, which takes some 20 ms for each.
    """
    interpreted = backend == "triton" and device == "cpu"
    batch = batch or (3 if interpreted else 4)
    length = length or (3 if interpreted else 7)
    gen = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=gen)

    logits = (noise(batch, length, vocab) * scale).to(dtype)
    ids = torch.randint(0, vocab, (batch, length), generator=gen)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):  # ragged, and the last sequence has no loss token at all
        mask[row, length - row :] = 0
    if batch > 3:
        mask[-1] = 0
    logps = grpo_loss_reference(logits.double(), ids, torch.zeros(batch)).per_token_logps
    kwargs = dict(completion_mask=mask)
    kwargs["advantages"] = noise(batch, length) if "token_advantages" in extras else noise(batch)
    if "old" in extras:
        kwargs["old_per_token_logps"] = (logps + 0.25 * noise(batch, length)).float()
    if "ref" in extras:
        kwargs["ref_per_token_logps"] = (logps + 0.3 * noise(batch, length)).float()
    if "sampling" in extras:
        sampling = (logps + 0.2 * noise(batch, length)).float()
        sampling[0, 0] = torch.nan  # a token that the sampler could not score
        kwargs["sampling_per_token_logps"] = sampling
    if "is_token" in extras:
        kwargs["importance_sampling_ratio"] = (0.3 * noise(batch, length) * mask).exp()  # 1 where masked, as TRL's
    if "is_sequence" in extras:
        kwargs["importance_sampling_ratio"] = (0.3 * noise(batch, 1) * mask[:, :1]).exp()
    if "num_items" in extras:
        kwargs["num_items_in_batch"] = torch.tensor(37)
    move = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return logits.to(device), ids.to(device), move


def softcap_on(backend: str, softcap: float) -> float | None:
    """The softcap to test a backend with: the CUDA kernels take none."""
    return None if backend == "cuda" else softcap


def loss_and_grad(function, logits, ids, upstream=1.0, **kwargs):
    """(output, gradient of the logits) of a call on a fresh leaf."""
    leaf = logits.clone().requires_grad_()
    output = function(leaf, ids, **kwargs)
    (output.loss * upstream).backward()
    return output, leaf.grad


def truth(logits, ids, upstream=1.0, **kwargs):
    """loss_and_grad of the reference in float64, on the CPU."""
    kwargs = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return loss_and_grad(grpo_loss_reference, logits.detach().cpu().double(), ids.cpu(), upstream, **kwargs)


def make_linear_inputs(extras=(), *, width=16, vocab=61, dtype=torch.float32, seed=0, device="cpu", **shape):
    """(hidden, weight, ids, kwargs): `make_inputs`, with logits of the same spread that are a product."""
    logits, ids, kwargs = make_inputs(extras, vocab=vocab, seed=seed, **shape)
    gen = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(*ids.shape, width, generator=gen).to(dtype)
    weight = (torch.randn(vocab, width, generator=gen) * 3.0 / width**0.5).to(dtype)
    was = grpo_loss_reference(logits.double(), ids, torch.zeros(len(ids))).per_token_logps
    now = linear_grpo_loss_reference(hidden.double(), weight.double(), ids, torch.zeros(len(ids))).per_token_logps
    for name in [name for name in kwargs if name.endswith("logps")]:
        kwargs[name] = (kwargs[name] - was + now).float()
    move = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return hidden.to(device), weight.to(device), ids.to(device), move


def linear_loss_and_grads(function, hidden, weight, ids, upstream=1.0, bias=None, **kwargs):
    """(output, gradients of hidden, weight and, if there is one, bias) of a call on fresh leaves."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    if bias is not None:
        kwargs["bias"] = leaves[2]
    output = function(*leaves[:2], ids, **kwargs)
    (output.loss * upstream).backward()
    return output, *(leaf.grad for leaf in leaves)


def linear_truth(hidden, weight, ids, upstream=1.0, bias=None, **kwargs):
    """linear_loss_and_grads of the reference in float64, on the CPU."""
    kwargs = {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    hidden, weight, bias = (None if x is None else x.detach().cpu().double() for x in (hidden, weight, bias))
    return linear_loss_and_grads(linear_grpo_loss_reference, hidden, weight, ids.cpu(), upstream, bias, **kwargs)


def pack(mask, tensors: dict):
    """(cu_seqlens, the tensors packed) of a padded batch, its masked rows left out; what is per sequence stays."""
    lengths = mask.bool().sum(-1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    per_token = {k: isinstance(v, torch.Tensor) and v.shape[:2] == mask.shape for k, v in tensors.items()}
    return cu_seqlens, {k: v[mask.bool()] if per_token[k] else v for k, v in tensors.items()}


def rel_norm(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-30))


def assert_close(got: torch.Tensor, want: torch.Tensor, rel: float, what: str = "") -> None:
    """Relative in norm, and element-wise against the largest element; a failure names the worst index."""
    got, want = (x.detach().double().cpu().contiguous() for x in (got, want))
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    error = (got - want).abs()
    error[(got == want) | (got.isnan() & want.isnan())] = 0  # infinities of one sign agree
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    finite = want[want.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    value = float(error.view(-1)[worst])
    assert value <= rel * scale + 1e-12, (
        f"{what}: error {value:.3e} over {rel * scale:.3e} at flat index {worst}: got {float(got.view(-1)[worst])!r}, "
        f"expected {float(want.view(-1)[worst])!r}"
    )
    norm = rel_norm(torch.where(error == 0, want, got).nan_to_num(), want.nan_to_num())
    assert norm <= rel or scale == 0, f"{what}: relative norm of the error {norm:.3e} over {rel:.3e}"


__all__ = ["LEVELS", "LOSS_TYPES", "OPTIONS", "TRL_LOSS_TYPES"]
