"""Losses of a user's own, as he writes them; some equal to built-in ones, some that may not be one."""

import torch

from fastgrpo import register_loss


def clipped(t):
    """The clipped ratio, as "dapo"."""
    r, a = t.ratio, t.advantages
    return -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)


def of_sequences(t):
    """GSPO, with its own ratio."""
    r, a = t.seq_mean(t.logp - t.old_logp).exp(), t.advantages
    return -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)


def with_entropy(t):
    """The clipped ratio with an entropy bonus."""
    return clipped(t) - 0.02 * t.entropy


def with_reference(t):
    """The clipped ratio with a KL of one's own, k3."""
    d = t.ref_logp - t.logp
    return clipped(t) + 0.1 * (d.exp() - d - 1)


register_loss("mine", clipped)
register_loss("mine-of-sequences", of_sequences)
register_loss("mine-with-entropy", with_entropy, average="bnpo")

# (the function, the same objective in built-in options, inputs that it reads)
OWN = {
    "clipped": (clipped, dict(loss_type="dapo"), ("old",)),
    "of_sequences": (of_sequences, dict(loss_type="dapo", importance_sampling_level="sequence"), ("old",)),
    "with_entropy": (with_entropy, dict(loss_type="dapo", entropy_coef=0.02), ("old",)),
    "with_reference": (with_reference, dict(beta=0.1, use_bias_correction_kl=False), ("old", "ref")),
}

# (a function, what its error says)
REFUSED = {
    "one number": (lambda t: clipped(t).mean(), r"\(30,\), the loss of each row, got a tensor of shape \(\)"),
    "nothing": (lambda t: None, "the loss of each row, got None"),
    "integers": (lambda t: clipped(t).long(), "the loss of each row, got .*int64"),
    "a broken graph": (lambda t: clipped(t).detach(), "gradient in t.logp or t.entropy, got one without"),
    "a mean of all rows": (lambda t: clipped(t) - clipped(t).mean(), "of its own row.*changes with others"),
    "whitened advantages": (lambda t: -t.logp * t.advantages / t.advantages.std(), "of its own row"),
    "the row before": (lambda t: clipped(t) + t.logp.roll(1), "of its own row"),
    "a sum so far": (lambda t: clipped(t).cumsum(0), "of its own row"),
    "a gradient alone": (lambda t: clipped(t) + t.logp.mean() - t.logp.mean().detach(), "of its own row"),
    "others beside its sequence": (lambda t: of_sequences(t) / t.advantages.std(), "of its own sequence"),
    "masked tokens": (lambda t: t.seq_mean(t.logp) * (t.logp * (1 - t.mask)).sum(), "of its own sequence"),
    "a mean of a number": (lambda t: clipped(t) * t.seq_mean(2.0), "t.seq_mean and t.seq_sum of a tensor"),
}
