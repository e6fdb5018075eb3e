"""One's own losses: `register_loss`, and what a function needs, found out by trying it on a few tokens."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.batch.checks import describe
from fastgrpo.batch.layout import Padded
from fastgrpo.objective.averages import AVERAGES, Options
from fastgrpo.objective.record import LOSSES, Loss, TokenLoss, Tokens

F = TypeVar("F", bound=TokenLoss)

_AVERAGE = "dapo"  # of a function that names none: the default objective's
DEFAULTS: list[Options] = []  # the default Objective; `fastgrpo.objective` puts it here
_RECORDS: dict[Hashable, Loss] = {}  # of functions, and of the names "module:function"
_NAMES: dict[Hashable, str] = {}  # of registered functions


@overload
def register_loss(
    name: str,
    token: F,
    *,
    average: str = ...,
    needs_sequences: bool | None = ...,
    needs_entropy: bool | None = ...,
    needs_ref: bool | None = ...,
) -> F: ...
@overload
def register_loss(
    name: str,
    *,
    average: str = ...,
    needs_sequences: bool | None = ...,
    needs_entropy: bool | None = ...,
    needs_ref: bool | None = ...,
) -> Callable[[F], F]: ...


def register_loss(
    name: str,
    token: Any = None,
    *,
    average: str = _AVERAGE,
    needs_sequences: bool | None = None,
    needs_entropy: bool | None = None,
    needs_ref: bool | None = None,
) -> Any:
    """Give a loss of one's own a name, which `loss_type` then takes everywhere; also as a decorator.

    The function gets `Tokens`, vectors of N rows, and returns (N,) the loss of each token, differentiable in t.logp or
    t.entropy. It may look at other rows through `t.seq_mean` and `t.seq_sum` alone. What it needs is found out by
    trying it on a few tokens, on the CPU; what is given here is not found out. A function that cannot be tried there
    is not, if all three needs are given.

    Args:
        name: for `Objective(loss_type=name)`, `GRPOConfig` and `fastgrpo train --loss-type`.
        token: the function; None: `register_loss` is used as a decorator.
        average: how tokens are averaged where `Objective.average` is None.
        needs_sequences: it calls t.seq_mean or t.seq_sum.
        needs_entropy: it reads t.entropy.
        needs_ref: it reads t.ref_logp.

    Returns:
        The function.

    Raises:
        ValueError: a name that is taken or has a colon or space, an unknown average, or a function that returns
            another shape, has no gradient, or looks at other rows.
    """
    if token is None:
        needs = dict(needs_sequences=needs_sequences, needs_entropy=needs_entropy, needs_ref=needs_ref)
        return lambda function: register_loss(name, function, average=average, **needs)
    if not isinstance(name, str) or not name or not name.isprintable() or set(name) & set(": ") or name == "-":
        raise ValueError(f"name: expected a text without colons and spaces, but '-', got {name!r}")
    if name in LOSSES and LOSSES[name].token is not token:
        raise ValueError(f"name: expected one that no loss has, got {name!r}")
    if average not in AVERAGES:
        raise ValueError(f"average: expected one of {', '.join(AVERAGES)}, got {average!r}")
    given = zip(_NEEDS, (needs_sequences, needs_entropy, needs_ref), strict=True)
    LOSSES[name] = _record(token, average, {need: value for need, value in given if value is not None})
    _NAMES[token] = name
    _RECORDS.pop(token, None)  # of its time without a name
    return token


def record_of(loss_type: str | TokenLoss) -> Loss:
    """The record of a loss that is not in LOSSES: of a function, or of one by the name "module:function".

    Raises:
        ValueError: there is none, or its function may not be one.
    """
    if loss_type not in _RECORDS:
        function = _imported(loss_type) if isinstance(loss_type, str) else loss_type
        named = function if isinstance(function, str) else _NAMES.get(function)
        _RECORDS[loss_type] = LOSSES[named] if named in LOSSES else _record(function, _AVERAGE, {})
    return _RECORDS[loss_type]


def name_of(loss_type: str | TokenLoss) -> str | None:
    """The name by which a loss is found anywhere; None: a function without one."""
    return loss_type if isinstance(loss_type, str) else _NAMES.get(loss_type)


def _imported(name: str) -> Any:
    """What "module:function" names: a function, or the name of a loss that the module registers."""
    module, colon, attribute = name.partition(":")
    if not colon:
        expected = f"one of {', '.join(LOSSES)}, a function, or 'module:function'"
        raise ValueError(f"loss_type: expected {expected}, got {name!r}")
    try:
        found = importlib.import_module(module)
        function = attribute if attribute in LOSSES else getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss_type: {name!r} cannot be imported: {error}") from error
    return function


# ---- trying a function


class _Tried(Tokens):
    """Tokens that note what is read of them."""

    def _read(self, what: str, declared: bool) -> None:
        need = {"ref_logp": "needs_ref", "entropy": "needs_entropy"}.get(what, "whole_sequences")
        self.objective.seen.add(need)


class _Seen:
    """The default options, for a function that reads t.objective, and what it was seen to read."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(DEFAULTS[0], name)


_LOG_RATIOS = (0.0, 0.01, 0.1, 0.18, 0.25, 0.5, 0.7, 1.0, 2.0, 3.0, 5.0, 11.0, 21.0, 60.0, 200.0, 1000.0)
_NEEDS = ("whole_sequences", "needs_entropy", "needs_ref")  # fields of Loss
_VECTORS = ("logp", "old", "sampling", "ref", "advantages", "entropy")


def _record(function: Any, average: str, given: dict[str, Any]) -> Loss:
    """The record of a function; what is not given of its needs is found out.

    Raises:
        ValueError: it cannot be the loss of a token.
    """
    if not callable(function):
        raise ValueError(f"loss_type: expected a function, got {describe(function)}")
    name = title(function)
    if len(given) == len(_NEEDS):
        return dataclasses.replace(Loss(function, average, inert=False), **given)
    options = _Seen()
    with torch.device("cpu"):  # whatever the default device is
        near, mask = _inputs(6, 5, [0.0, 0.01, -0.01, 0.1, -0.1, 0.3, -0.3])
        loss, leaves = _try(function, name, options, near, mask)
        check_gradient(loss, name, leaves[0])
        needs: dict[str, Any] = {need: need in options.seen for need in _NEEDS}
        needs |= given
        _check_rows(function, name, near, mask, needs["whole_sequences"])
        return dataclasses.replace(Loss(function, average, inert=_is_inert(function, name)), **needs)


def title(function: Any) -> str:
    """What a function is called in an error."""
    return getattr(function, "__qualname__", None) or repr(function)


def _inputs(sequences: int, length: int, log_ratios: list[float]) -> tuple[dict[str, Tensor], Tensor]:
    """Vectors of some tokens, (N,) float64 each, and their mask (N,): sequences of many lengths, one without any."""
    gen = torch.Generator().manual_seed(0)
    n = sequences * length

    def noise() -> Tensor:
        return torch.randn(n, generator=gen, dtype=torch.float64)

    logp = -0.1 - noise().abs()
    apart = torch.tensor(log_ratios, dtype=torch.float64).repeat(-(-n // len(log_ratios)))[:n]
    vectors = [logp, logp - apart, logp - apart + 0.05 * noise(), logp + 0.2 * noise(), noise(), noise().abs()]
    lengths = torch.arange(sequences) * length // max(sequences - 1, 1)
    mask = torch.arange(length) < lengths[:, None]
    return dict(zip(_VECTORS, vectors, strict=True)), mask.view(-1)


def _try(
    function: TokenLoss, name: str, options: _Seen, vectors: dict[str, Tensor], mask: Tensor, length: int = 5
) -> tuple[Tensor, list[Tensor]]:
    """(the function's loss of some tokens, the leaves logp and entropy); always with the same random numbers."""
    logp, entropy = (vectors[name].clone().requires_grad_() for name in ("logp", "entropy"))
    layout = Padded(len(mask) // length, length)
    ids = torch.zeros(len(mask), dtype=torch.int64)
    batch = Batch(layout, ids.shape, ids, mask, True, torch.ones_like(logp), vectors["advantages"])
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        tokens = _Tried(
            objective=options,
            batch=batch,
            logp=logp,
            old_logp=vectors["old"],
            sampling_logp=vectors["sampling"],
            log_ratio=logp - vectors["old"],
            advantages=vectors["advantages"],
            mask=mask.to(logp.dtype),
            reference=vectors["ref"],
            entropies=entropy,
        )
        loss = function(tokens)
    check_loss(loss, name, logp)
    assert isinstance(loss, Tensor)
    return loss, [logp, entropy]


def check_loss(loss: Any, name: str, logp: Tensor) -> None:
    """Raise a ValueError unless a function returned the loss of each row."""
    if not isinstance(loss, Tensor) or loss.shape != logp.shape or not loss.is_floating_point():
        expected = f"a floating point tensor {tuple(logp.shape)}, the loss of each row"
        raise ValueError(f"loss_type: expected {name} to return {expected}, got {describe(loss)}")


def check_gradient(loss: Tensor, name: str, wanted: Tensor) -> None:
    """Raise a ValueError if a function's loss has no gradient, although it is wanted: `wanted` has one."""
    if torch.is_grad_enabled() and wanted.requires_grad and not loss.requires_grad:
        raise ValueError(
            f"loss_type: expected {name} to return a loss with a gradient in t.logp or t.entropy, got one without: "
            "detach(), item() or no_grad() stands between them"
        )


def _check_rows(function: TokenLoss, name: str, vectors: dict[str, Tensor], mask: Tensor, sequences: bool) -> None:
    """Raise a ValueError if loss or gradient of a row changes with other rows; with `sequences`, with other ones."""
    n, length = len(mask), 5
    unit = torch.arange(n) // length if sequences else torch.arange(n)
    others, _ = _inputs(n // length, length, [0.05, -0.2, 0.15, -0.07])
    others = {key: x.flip(0) for key, x in others.items()}
    split = [((unit >> bit) & 1) == side for bit in range(int(unit.max()).bit_length()) for side in (0, 1)]
    want, _ = _try(function, name, _Seen(), vectors, mask)
    for changed in [*split, ~mask]:
        changed_vectors = {key: torch.where(changed, others[key], x) for key, x in vectors.items()}
        loss, leaves = _try(function, name, _Seen(), changed_vectors, mask)
        kept = ~changed & mask
        same = torch.allclose(loss[kept], want[kept], rtol=1e-10, atol=1e-12, equal_nan=True)
        found = torch.autograd.grad(loss[kept].sum(), leaves, allow_unused=True) if loss.requires_grad else ()
        if same and all(x is None or bool((x[changed] == 0).all()) for x in found):
            continue
        allowed = "its own sequence" if sequences else "its own row, or t.seq_mean and t.seq_sum of its sequence"
        raise ValueError(
            f"loss_type: expected {name} to make the loss of a token of {allowed}; it changes with others"
        )


def _is_inert(function: TokenLoss, name: str) -> bool:
    """Whether tokens of advantage 0 were seen to have loss and gradients of exactly 0, whatever their ratios."""
    ratios = [sign * x for x in _LOG_RATIOS for sign in (1, -1)]
    vectors, mask = _inputs(4 * len(ratios), 1, ratios)
    vectors["advantages"] = torch.zeros_like(vectors["advantages"])
    vectors["logp"] = vectors["logp"] * torch.linspace(0.01, 20, len(mask), dtype=torch.float64)
    apart = torch.tensor(ratios, dtype=torch.float64).repeat(4)
    vectors["old"] = vectors["logp"] - apart
    vectors["entropy"] = vectors["entropy"] * 4
    loss, leaves = _try(function, name, _Seen(), vectors, torch.ones_like(mask), length=1)
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True) if loss.requires_grad else ()
    near = apart.abs() < 50
    # what has overflowed, as exp(1000) · 0 does, says nothing
    return all(x is None or bool(((x == 0) | (x.isnan() & ~near)).all()) for x in (loss, *found))
