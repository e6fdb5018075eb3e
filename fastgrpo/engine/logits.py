"""The objective on rows of logits: between two sweeps in torch, or fused into one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.backends import Call, Rows, Scores, TokenLoss, TokenRows, TokenSpec
from fastgrpo.batch.batch import Batch, take
from fastgrpo.batch.kept import KeptSets
from fastgrpo.batch.layout import Layout
from fastgrpo.engine.kept import Table, arrange
from fastgrpo.objective.options import Objective
from fastgrpo.objective.terms import Terms, Weights, compute_terms, term_columns


class Sweeps(NamedTuple):
    """The kernels of a call: a backend's, on logits with this softcap."""

    backend: str
    softcap: float | None = None
    kept: KeptSets | None = None  # rows over these sets alone; of the others' logits nothing is read

    def stats(self, logits: Tensor, rows: Rows, want_entropy: bool) -> Scores:
        """logp, lse and entropy of each row; those outside rows.mask are not read, and give 0."""
        kernels, sets = backends.get(self.backend), self._sets(rows.mask)
        if sets is not None:
            assert rows.mask is not None
            rows = rows._replace(mask=rows.mask & ~sets.given)
        scores = kernels.row_stats(logits, rows, want_entropy=want_entropy, softcap=self.softcap)
        if sets is not None:
            for table in arrange(sets).tables(rows, logits.shape[-1]):
                put_scores(scores, table.at, self.of_table(table.of(logits, table.at), table, want_entropy))
        return scores

    def of_table(self, z: Tensor, table: Table, want_entropy: bool) -> Scores:
        """The scores of a table's rows from their logits (n, w)."""
        z = self.capped(z, table).masked_fill(table.certain, 0.0)
        return Sweeps(self.backend).stats(z[None], table.rows, want_entropy)

    def capped(self, z: Tensor, table: Table) -> Tensor:
        """A table's logits (n, w) with the softcap; here, because one of a missing logit, -inf, would be -softcap."""
        if self.softcap is None:
            return z
        return (torch.tanh(z / self.softcap) * self.softcap).masked_fill_(table.ids < 0, -torch.inf)

    def grad(self, logits: Tensor, rows: Rows, scores: Scores, g: Tensor, h: Tensor | None, out: Tensor) -> None:
        """Writes dL/dlogits from g = dL/dlogp and h = dL/dentropy into `out`, which may be the logits, or narrower."""
        kernels, sets = backends.get(self.backend), self._sets(g != 0 if h is None else (g != 0) | (h != 0))
        if sets is None:
            return kernels.row_grad(logits, rows, scores, g, h, out, softcap=self.softcap)
        found = []  # before their logits are overwritten
        for table in arrange(sets).tables(rows, logits.shape[-1]):
            z = table.of(logits, table.at)
            self.d_table(z, table, scores, g, h)
            row, place = table.pairs()
            found.append((table.at[row], table.ids[row, place].long(), z[row, place]))
        g, h = torch.where(sets.given, 0.0, g), None if h is None else torch.where(sets.given, 0.0, h)
        kernels.row_grad(logits, rows, scores, g, h, out, softcap=self.softcap)
        for row, column, dz in found:
            out[row // out.shape[1], row % out.shape[1], column] = dz.to(out.dtype)

    def d_table(self, z: Tensor, table: Table, scores: Scores, g: Tensor, h: Tensor | None) -> None:
        """The gradient of a table's logits (n, w), over them, from what belongs to the N rows of the call."""
        at, rows = table.at, table.rows
        some = Scores._make(None if x is None else x[at] for x in scores)
        z.masked_fill_(table.certain, 0.0)
        slope, c = None, self.softcap
        if c is not None:
            e = torch.exp((z / c).abs_() * -2)  # torch's cosh has other bits at the end of a tensor than within
            slope = 4 * e / (1 + e).square_()
            z.div_(c).tanh_().mul_(c).masked_fill_(table.ids < 0, -torch.inf)
        backends.get(self.backend).row_grad(z[None], rows, some, g[at], None if h is None else h[at], z[None])
        if slope is not None:
            z *= slope

    def _sets(self, rows: Tensor | None) -> KeptSets | None:
        return None if self.kept is None else self.kept.only(rows)

    def token_loss(self, logits: Tensor, how: Fused, want_entropy: bool, out: Tensor | None) -> TokenLoss:
        """Statistics and objective of each row in one pass, and the gradient into `out` if there is one."""
        kernels = backends.get(self.backend)
        return kernels.token_loss(logits, *how, out, want_entropy=want_entropy, softcap=self.softcap)

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        """x *= factor (0-dim), which is not read on the host of a GPU."""
        backends.get(self.backend).scale_(x, factor)


def put_scores(scores: Scores, at: Tensor, some: Scores) -> None:
    """scores[at] = some"""
    for x, values in zip(scores, some, strict=True):
        if x is not None and values is not None:
            x[at] = values


def fuses(o: Objective, backend: str, logits: Tensor, dtype: torch.dtype, softcap: float | None = None) -> bool:
    """Whether a backend's kernels hold the objective between two looks at a row of logits of this dtype."""
    return o.is_fused and _fuses(backend, logits.device.type, logits.device.index, dtype, softcap)


@torch.compiler.assume_constant_result
def _fuses(backend: str, device_type: str, index: int | None, dtype: torch.dtype, softcap: float | None) -> bool:
    return backends.get(backend).refuses(Call(device_type, index, dtype, 1, softcap, fused=True)) is None


class Fused(NamedTuple):
    """An objective of single tokens on some rows, which the kernels hold."""

    rows: Rows
    token: TokenRows
    spec: TokenSpec

    def take(self, at: slice | Tensor) -> Fused:
        """That on some of the rows."""
        if isinstance(at, slice) and at == slice(0, self.rows.ids.shape[0]):
            return self
        ids, mask, inv_temperature = self.rows
        factors, *token = take([inv_temperature, *self.token], at)
        assert mask is not None and factors is not None
        return Fused(Rows(ids[at], mask[at], factors), TokenRows._make(token), self.spec)

    @property
    def h(self) -> Tensor | None:
        """(N,) dL/dentropy; None without an entropy bonus."""
        return self.token.h

    def part(self, at: slice, layout: Layout) -> Fused:
        """That on some of the rows; their layout is of no account."""
        return self.take(at)

    def overwrite(self, logits: Tensor, sweeps: Sweeps, want_entropy: bool, out: Tensor) -> tuple[Scores, Terms]:
        """Scores and terms of logits whose gradient is written over them, to `out`, in one pass."""
        result = sweeps.token_loss(logits, self, want_entropy, out)
        return Scores(result.logp, result.lse, result.entropy), self.terms(result)

    def score(self, logits: Tensor, sweeps: Sweeps, want_entropy: bool) -> tuple[Scores, Terms, Tensor, Tensor | None]:
        """Scores and terms of logits that stay as they are, and (N,) g = dL/dlogp and h = dL/dentropy."""
        result = sweeps.token_loss(logits, self, want_entropy, out=None)
        return Scores(result.logp, result.lse, result.entropy), self.terms(result), result.g, self.h

    def terms(self, result: TokenLoss) -> Terms:
        """The terms of a pass."""
        bonus = None
        if self.token.h is not None:
            assert result.entropy is not None  # as needs_entropy says
            bonus = (self.token.h * result.entropy).sum()
        return Terms(result.loss.sum(), result.ratio, result.kl if self.spec.beta != 0 else None, bonus=bonus)

    def look(self, logp: Tensor, entropy: Tensor | None = None) -> Terms:
        """The terms of rows that do not learn."""
        ratio, bound = torch.ones_like(logp), self.spec.log_ratio_clamp
        if self.token.old is not None:
            ratio = (logp - self.token.old).clamp(-bound, bound).exp()
        return Terms(logp.new_zeros(()), ratio, torch.zeros_like(logp) if self.spec.beta != 0 else None)

    def columns(self) -> list[str]:
        return ["ratio", *["kl"] * (self.spec.beta != 0)]


def fuse(rows: Rows, o: Objective, batch: Batch, weights: Weights, *, skip_zero: bool = False) -> Fused:
    """The objective of a batch as kernels take it; with `skip_zero` rows that cannot learn are not scored."""
    advantages, grouped = batch.advantages, batch.advantages is None
    token = TokenRows(
        weight=weights.loss,
        advantages=advantages,
        rewards=batch.rewards,
        seq=batch.seq() if grouped else None,
        old=batch.old if o.reads_ratio else None,
        ref=batch.ref if o.beta != 0 else None,
        policy_scale=batch.importance_ratio,
        h=weights.entropy,
    )
    assert o.record.kind is not None  # as `fuses` says
    spec = TokenSpec(
        kind=o.record.kind,
        numbers=o.record.numbers(o),
        beta=o.beta,
        bias_correction=o.use_bias_correction_kl,
        log_ratio_clamp=math.inf if o.log_ratio_clamp is None else o.log_ratio_clamp,
        group_size=batch.num_generations,
        scale_by_std=grouped and batch.scale_rewards == "group",
        skip_zero=skip_zero and o.may_be_inert(batch.advantages_per_token),
    )
    return Fused(rows, token, spec)


class Apart(NamedTuple):
    """Any objective on some rows, in torch between two sweeps."""

    rows: Rows
    objective: Objective
    batch: Batch
    weights: Weights
    scored: Tensor | None  # (N,) bool: the rows with scores; None: all

    @property
    def h(self) -> Tensor | None:
        """(N,) dL/dentropy; None without an entropy bonus."""
        return self.weights.entropy

    def take(self, at: slice | Tensor) -> Apart:
        """That on some of the rows, in an order of which `part` makes sequences again."""
        return self.part(at, self.batch.layout)

    def part(self, at: slice | Tensor, layout: Layout) -> Apart:
        """That on some of the rows, all of them scored, which make the sequences of `layout`."""
        rows = Rows._make(None if x is None else x[at] for x in self.rows)
        weights = Weights._make(take(self.weights, at))
        return self._replace(rows=rows, batch=self.batch.take(at, layout), weights=weights, scored=None)

    def overwrite(self, logits: Tensor, sweeps: Sweeps, want_entropy: bool, out: Tensor) -> tuple[Scores, Terms]:
        """Scores and terms of logits whose gradient is written over them, to `out`, in two sweeps."""
        scores, terms, g, h = self.score(logits, sweeps, want_entropy)
        sweeps.grad(logits, self.rows, scores, g, h, out)
        return scores, terms

    def score(self, logits: Tensor, sweeps: Sweeps, want_entropy: bool) -> tuple[Scores, Terms, Tensor, Tensor | None]:
        """Scores and terms of logits that stay as they are, and (N,) g = dL/dlogp and h = dL/dentropy."""
        scores = sweeps.stats(logits, self.rows, want_entropy)
        return scores, *self.coefficients(scores)

    def terms(self, logps: Tensor, entropies: Tensor | None) -> Terms:
        if not self.objective.differentiates_entropy and entropies is not None:
            entropies = entropies.detach()  # a statistic only: no gradient sweep for it
        return compute_terms(self.objective, self.batch, logps, entropies, self.weights, self.scored)

    def look(self, logp: Tensor, entropy: Tensor | None = None) -> Terms:
        """The terms of rows that do not learn."""
        return self.terms(logp, entropy)

    def columns(self) -> list[str]:
        return term_columns(self.objective)

    def coefficients(self, scores: Scores) -> tuple[Terms, Tensor, Tensor | None]:
        """(terms, g = dL/dlogp, h = dL/dentropy or None), g and h (N,), by autograd on vectors."""
        with torch.enable_grad():
            wanted = [scores.logp.detach().requires_grad_()]
            entropies = scores.entropy
            if self.objective.differentiates_entropy:
                assert entropies is not None  # as needs_entropy says
                entropies = entropies.detach().requires_grad_()
                wanted.append(entropies)
            terms = self.terms(wanted[0], entropies)
            g, *h = torch.autograd.grad(terms.loss, wanted, materialize_grads=True)
        return Terms(terms.loss.detach(), *terms[1:]), g, h[0] if h else None


How = Fused | Apart


def upstream(
    scored: Tensor | None, like: Tensor, d_logp: Tensor | None, d_entropy: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(g, h), (N,) each, from the upstream gradients; rows that were not scored have none, whatever comes."""
    g, h = (d if d is None or scored is None else torch.where(scored, d, 0.0) for d in (d_logp, d_entropy))
    return torch.zeros_like(like) if g is None else g.contiguous(), None if h is None else h.contiguous()


def row_span(logits: Tensor) -> int | None:
    """Elements from the first to the last of (B, T, V) logits; None if rows share memory, as expanded ones do."""
    span = logits.size(-1)
    for stride, size in sorted(zip(logits.stride()[:2], logits.shape[:2], strict=True)):
        if size > 1:
            if stride < span:
                return None
            span += stride * (size - 1)
    return span


def empty_gradient(logits: Tensor) -> Tensor:
    """An uninitialised gradient, with the strides of the logits if they are a slice of rows.

    With equal strides every row of both has the same alignment, so the kernels' wide accesses fit both.
    """
    span = row_span(logits)
    if span is not None and span <= 1.25 * logits.numel():
        return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def as_rows(logits: Tensor, inplace: bool = False) -> Tensor:
    """The logits as (B, T, V) with unit stride in V; packed (N, V) becomes (1, N, V)."""
    if not torch.compiler.is_compiling() and logits.is_neg():  # a view that stands for -1 times what lies in memory
        if inplace:
            raise ValueError("logits: expected no view that negates with inplace=True")
        logits = logits.resolve_neg()
    if logits.stride(-1) != 1 and logits.size(-1) > 1:
        if inplace:
            raise ValueError(f"logits: expected unit stride in V with inplace=True, got strides {logits.stride()}")
        logits = logits.contiguous()
    rows = logits if logits.dim() == 3 else logits.unsqueeze(0)
    if inplace and row_span(rows) is None:
        raise ValueError(
            "logits: expected rows that share no memory with inplace=True, got shape "
            f"{tuple(logits.shape)} and strides {logits.stride()}"
        )
    return rows
