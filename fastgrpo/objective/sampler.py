"""Corrections of samples whose sampler is not quite the old policy: their record, their text, and their weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.batch.layout import Layout

LEVELS = ("token", "sequence", "geometric", "any")
OUTSIDE = ("truncate", "mask", "drop", "reject")

# of a token, from q = old - sampling, and from the probabilities that both give it
_MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ratio": lambda q, old, sampling: q,  # its logarithm, which adds up where ratios multiply
    "k2": lambda q, old, sampling: q.square() / 2,
    "k3": lambda q, old, sampling: torch.expm1(q) - q,
    "binary_kl": lambda q, old, sampling: _binary_kl(sampling.clamp(1e-6, 1 - 1e-6), old.clamp(1e-6, 1 - 1e-6)),
    "tv": lambda q, old, sampling: (sampling - old).abs(),
}
MEASURES = tuple(_MEASURES)


@dataclass(frozen=True)
class Correction:
    """One correction for the sampler: a measure of a token or a sequence, a band, and what happens outside of it.

    With q = old - sampling, the ratio of a unit is

        "token": exp(q)    "sequence": exp(sum of q)    "geometric": exp(mean of q)

    over the loss tokens of a sequence. As text it is "level_outside:low_high" with the measure behind `outside`, as in
    "token_truncate:2", "sequence_mask:0.5_2", "any_drop:1e-4_" or "geometric_reject_k3:0.01".

    Args:
        level: the unit: "token"; "sequence" or "geometric", a whole sequence by the sum or the mean over its tokens;
            or "any", a whole sequence that is outside if one of its tokens is.
        outside: what multiplies the policy term. "truncate": the ratio, bounded to the band; "mask": the ratio, and 0
            outside; "drop": 1, and 0 outside. Or "reject": tokens outside are no loss tokens any more, so that they
            leave the averages, the KL and the entropy, too.
        low, high: the band, both ends included; None: no bound.
        measure: "ratio"; or for "drop" and "reject" a divergence of the two policies at the sampled token: "k2",
            q²/2; "k3", exp(q) - 1 - q; "binary_kl", of sampling to old; "tv", the distance of the two probabilities.

    Raises:
        ValueError: names the field, what was expected and what came.
    """

    level: str
    outside: str
    low: float | None = None
    high: float | None = None
    measure: str = "ratio"

    def __post_init__(self) -> None:
        weighs = self.outside in ("truncate", "mask")
        for name, choices in (("level", LEVELS), ("outside", OUTSIDE), ("measure", MEASURES)):
            if getattr(self, name) not in choices:
                raise _wrong(f"{name} one of {', '.join(choices)}", getattr(self, name))
        if weighs and (self.level == "any" or self.measure != "ratio"):
            raise _wrong(f"a ratio of level token, sequence or geometric with {self.outside!r}", str(self))
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise _wrong(f"{name} None or a finite number >= 0", value)
            object.__setattr__(self, name, float(value))
        if not weighs and self.low is None and self.high is None:
            raise _wrong(f"a bound with {self.outside!r}", str(self))
        if self.low is not None and self.high is not None and self.low > self.high:
            raise _wrong("low at most high", str(self))

    def __str__(self) -> str:
        measure = "" if self.measure == "ratio" else f"_{self.measure}"
        low, high = ("" if x is None else repr(x) for x in (self.low, self.high))
        return f"{self.level}_{self.outside}{measure}:{low}_{high}"

    @property
    def of_sequences(self) -> bool:
        """Whether all tokens of a sequence get the same."""
        return self.level != "token"


def corrections_of(given: Any) -> tuple[Correction, ...] | None:
    """The corrections that the option stands for: its text, with commas between them, a record or several; None: none.

    A record may be the dict that `dataclasses.asdict` makes of it.

    Raises:
        ValueError: it is none of these.
    """
    if given is None:
        return None
    if isinstance(given, str):
        given = [_parsed(text) for text in given.split(",")]
    made = tuple(map(_record, given if isinstance(given, Sequence) else (given,)))
    if not made or not all(isinstance(one, Correction) for one in made):
        raise _wrong("a text such as 'token_truncate:2', Corrections or None", given)
    return made


def _record(one: Any) -> Any:
    if not isinstance(one, Mapping):
        return one
    fields = dataclasses.fields(Correction)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not needed <= set(one) <= {field.name for field in fields}:
        raise _wrong(f"the fields {', '.join(field.name for field in fields)}", one)
    return Correction(**one)


def text_of(corrections: tuple[Correction, ...] | None) -> str | None:
    """The corrections as `corrections_of` reads them again."""
    return None if corrections is None else ",".join([str(one) for one in corrections])


def _parsed(text: str) -> Correction:
    number = r"[0-9.]+(?:e[+-]?[0-9]+)?"
    found = re.fullmatch(rf"([a-z]+)_([a-z]+)(?:_(\w+))?(?::({number})?(_)?({number})?)?", text.strip().lower())
    if found is None:
        raise _wrong("level_outside:low_high, such as 'token_truncate:2' or 'token_mask:0.5_5'", text)
    level, outside, measure, first, between, second = found.groups()
    low, high = (first, second) if between else (None, first)
    try:
        bounds = tuple(None if x is None else float(x) for x in (low, high))
    except ValueError:
        raise _wrong("numbers as bounds", text) from None
    return Correction(level, outside, bounds[0], bounds[1], measure or "ratio")


def _wrong(expected: str, got: object) -> ValueError:
    return ValueError(f"sampling_correction: expected {expected}, got {got!r}")


def _binary_kl(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


class Corrected(NamedTuple):
    """What corrections make of rows; (N,) each."""

    weight: Tensor | None  # factor of the policy term; None: 1
    kept: Tensor | None  # bool: not rejected; None: all
    outside: Tensor  # bool: outside of a band


@torch.no_grad()
def correct(
    corrections: tuple[Correction, ...], layout: Layout, mask: Tensor, old: Tensor, sampling: Tensor
) -> Corrected:
    """The corrections of rows whose logps are `old` and `sampling`; those outside `mask` may hold anything.

    A token that the sampler has no number for (NaN) counts as if both policies agreed, as in TRL.
    """
    old = torch.where(mask, old, 0.0)
    sampling = torch.where(mask & ~sampling.isnan(), sampling, old)
    q = torch.where(old.isnan(), 0.0, old - sampling)
    weight, kept, all_outside = None, None, torch.zeros_like(mask)
    for one in corrections:
        x, outside = _measured(one, layout, mask, q, old, sampling)
        all_outside = all_outside | outside
        if one.outside == "reject":
            kept = ~outside if kept is None else kept & ~outside
            continue
        if one.outside == "truncate":
            made = x.clamp(one.low, one.high) if (one.low, one.high) != (None, None) else x
        else:
            made = torch.where(outside, 0.0, x if one.outside == "mask" else torch.ones_like(x))
        weight = made if weight is None else weight * made
    return Corrected(weight, kept, all_outside)


def _measured(
    one: Correction, layout: Layout, mask: Tensor, q: Tensor, old: Tensor, sampling: Tensor
) -> tuple[Tensor, Tensor]:
    """(the measure of each row's unit, whether that is outside of the band), (N,) each."""
    x = _MEASURES[one.measure](q, old.exp(), sampling.exp())
    if one.level in ("sequence", "geometric"):
        of_sequence = layout.seq_sum(torch.where(mask, x, 0.0))
        if one.level == "geometric":
            of_sequence = of_sequence / layout.seq_sum(mask.to(x.dtype)).clamp(min=1)
        x = layout.to_rows(of_sequence)
    if one.measure == "ratio":
        x = x.exp().clamp(max=torch.finfo(x.dtype).max)  # so that 0 times it is 0
    outside = torch.zeros_like(mask)
    if one.low is not None:
        outside = outside | (x < one.low)
    if one.high is not None:
        outside = outside | (x > one.high)
    if one.level == "any":
        outside = layout.to_rows(layout.seq_sum((outside & mask).to(x.dtype)) > 0)
    return x, outside & mask


def rejects(corrections: tuple[Correction, ...] | None) -> bool:
    """Whether tokens may be loss tokens no more."""
    return any(one.outside == "reject" for one in corrections or ())


def corrected(corrections: tuple[Correction, ...] | None, batch: Batch) -> Batch:
    """The batch with the corrections made that need no logps of the current policy: all, if it has old ones."""
    if corrections is None:
        return batch
    weighing = [one for one in corrections if one.outside != "reject"]
    changes: dict[str, Any] = dict(importance_ratio_per_sequence=all(one.of_sequences for one in weighing))
    if batch.old is not None:
        assert batch.sampling is not None  # as check_objective says
        made = correct(corrections, batch.layout, batch.mask, batch.old, batch.sampling)
        changes["importance_ratio"] = made.weight
        if made.kept is not None:
            changes |= dict(mask=batch.mask & made.kept, masked=True, sampled=batch.mask)
    return dataclasses.replace(batch, **changes)


def mismatch(corrections: tuple[Correction, ...] | None, batch: Batch, logps: Tensor) -> dict[str, Tensor]:
    """What is logged of the sampler before any correction, 0-dim tensors: of the loss tokens that it has a number for.

    Their number; the ratio's mean and maximum; the KL of the sampler to the old policy, estimated by k1 and k3; and
    with corrections the share of tokens outside of a band.
    """
    assert batch.sampling is not None
    old, mask = logps if batch.old is None else batch.old, batch.mask if batch.sampled is None else batch.sampled
    known = mask & ~batch.sampling.isnan()
    q = torch.where(known, old - batch.sampling, 0.0)
    ratio = q.exp()
    columns = {"ratio_mean": ratio, "kl_k1": -q, "kl_k3": torch.expm1(q) - q}
    if corrections is not None:
        columns["outside_mean"] = correct(corrections, batch.layout, mask, old, batch.sampling).outside
    table = torch.stack([*columns.values(), known], dim=1).to(batch.dtype)
    sums = torch.where(known[:, None], table, 0.0).sum(0)
    metrics = dict(zip(columns, (sums[:-1] / sums[-1].clamp(min=1)).unbind(), strict=True))
    metrics["tokens"] = sums[-1]
    largest = torch.cat([torch.where(known, ratio, -torch.inf), ratio.new_full((1,), -torch.inf)]).amax()
    metrics["ratio_max"] = torch.where(largest == -torch.inf, torch.nan, largest)
    return {f"sampling/{name}": value for name, value in metrics.items()}
