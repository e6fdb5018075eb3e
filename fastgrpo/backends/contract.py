"""What a backend is: functions on rows of logits, which know neither loss types nor layouts.

A backend is a module with the functions of `Backend`. Logits are (B, T, V), with unit stride in V and any other
strides; everything per row is (N,) with N = B·T, contiguous, and fp32 (float64 in the backend "torch", from float64
logits) unless said otherwise. With a softcap c the logits are c·tanh(logit/c), and gradients those of the raw ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a backend is asked whether it can take."""

    device_type: str
    device_index: int | None  # None: the first
    dtype: torch.dtype  # of the logits
    vocab: int
    softcap: float | None = None
    fused: bool = False  # token_loss is wanted, too
    one_pass: bool = False  # only if a row is held whole: one read of the logits and, in place, one write


class Rows(NamedTuple):
    """What is read beside each row of logits."""

    ids: Tensor  # (N,) int64, the target; one outside of [0, V) has logp NaN
    # (N,) bool: the rows that are read; the others may hold NaN, and their results are 0. `row_grad` may get None
    mask: Tensor | None
    inv_temperature: Tensor  # (N,), the factor of the logits


class Scores(NamedTuple):
    """The statistics of each row: what an objective is made of, and what `row_grad` needs."""

    logp: Tensor  # (N,)
    lse: Tensor  # (N,), of the logits over the temperature
    entropy: Tensor | None  # (N,), in nats; None: not wanted


class TokenRows(NamedTuple):
    """What the fused objective reads per row; (N,) fp32 unless said otherwise."""

    weight: Tensor  # factor of the row's loss: mask and normaliser
    advantages: Tensor | None  # or None, and then the next two
    rewards: Tensor | None  # (S,) fp32, one per sequence, in contiguous groups of spec.group_size
    seq: Tensor | None  # (N,) int32: the sequence of each row
    old: Tensor | None  # logps of the policy that sampled; None: the current ones, detached
    ref: Tensor | None  # logps of the reference policy; None when beta is 0
    policy_scale: Tensor | None  # factor of the policy term alone (importance sampling); None: 1
    h: Tensor | None  # dL/dentropy; None: 0


class TokenSpec(NamedTuple):
    """The numbers of the fused objective."""

    kind: int = 0  # the loss of a token, as csrc/objective.h numbers them
    # the kind's own, at most 4; here those of a ratio that is clipped between the first two
    numbers: tuple[float, ...] = (0.8, 1.2, math.inf, math.inf)
    beta: float = 0.0
    bias_correction: bool = False
    log_ratio_clamp: float = math.inf
    group_size: int = 0  # of rewards
    scale_by_std: bool = False  # advantages of a group, by its standard deviation
    skip_zero: bool = False  # rows without an advantage are not read; only where nothing else (beta, h) has a gradient


class TokenLoss(NamedTuple):
    """The results of the fused objective, (N,) each; 0 for rows that are not read."""

    loss: Tensor
    logp: Tensor
    lse: Tensor
    entropy: Tensor | None  # None: not wanted
    kl: Tensor  # 0 when beta is 0
    ratio: Tensor  # before it is clipped
    g: Tensor  # dL/dlogp


class Columns(NamedTuple):
    """The columns that carry the gradient of each row: those in K, and what row_grad would write there."""

    ids: Tensor  # (N, w) int32 with w <= room, rising; -1 behind the row's own
    dz: Tensor  # (N, w), dL/dlogits there; 0 behind the row's own
    sizes: Tensor  # (N,) int32, |K|; more than `room`: the row did not fit, and has no ids here


@runtime_checkable
class Backend(Protocol):
    """The functions of a backend's module."""

    def unavailable(self) -> str | None:
        """None, or why this backend cannot run on this machine."""

    def refuses(self, call: Call) -> str | None:
        """None, or why this backend cannot take such a call: its device, dtype, softcap, fused objective, or one pass
        over rows of that length."""

    def row_stats(self, logits: Tensor, rows: Rows, *, want_entropy: bool, softcap: float | None = None) -> Scores:
        """The statistics of every row; 0 where the mask is False, and there nothing is read.

        A row has the same bits in any company, with and without the entropy, and in `token_loss`.
        """

    def row_grad(
        self,
        logits: Tensor,
        rows: Rows,
        scores: Scores,
        g: Tensor,
        h: Tensor | None,
        out: Tensor,
        *,
        softcap: float | None = None,
    ) -> None:
        """Writes dL/dlogits into `out`, (B, T, V) in the dtype of the logits; from fp32 logits, also in bf16 or fp16.

        `out` may be `logits` itself. A narrower one may lie in the memory of the logits, in the second half of each
        row: a row of `out` then begins at least 2V bytes after its logits. Written from its end to its start, it
        overwrites nothing that is still to be read.

        The target's element is made of logp, which keeps the digits of 1 - p where p is near 1, as lse does not; the
        others are made of lse.

        Rows where g = dL/dlogp and h = dL/dentropy (None: 0) are both 0 are not read, and get zeroes. Of `rows` the
        mask is not read, and of `scores` the entropy only if there is an h.
        """

    def token_loss(
        self,
        logits: Tensor,
        rows: Rows,
        token: TokenRows,
        spec: TokenSpec,
        out: Tensor | None,
        *,
        want_entropy: bool,
        softcap: float | None = None,
    ) -> TokenLoss:
        """`row_stats` and the fused objective of every row and, if `out` is given, the gradient as `row_grad` has it.

        The logits are passed over once, group-normalised advantages included.
        """

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        """x *= factor, for (B, T, V) x and a factor of one element; x may be left alone when it is 1."""


@runtime_checkable
class ColumnBackend(Protocol):
    """The functions on a few columns of each row, of the module that `select.columns` gives.

    A table of ids (n, w) int32 holds row i's columns in any places of its row; -1 is a place without one. What a row
    gives has the same bits in any company and for any w: sums go in the order of the places, and a place without a
    column adds nothing. All ids are in [-1, V). Hidden states and weights are bf16, fp16 or fp32 (float64 in the
    backend "torch"), of one dtype, with unit stride in H; sums are in fp32 (float64).

    Statistics and gradients of such rows are those of the sweeps over the (1, n, w) table of their logits, with the
    place of the target for its id.
    """

    def column_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        """The logits (n, w) in fp32 of the columns alone: hidden_i . weight_id + bias_id, and -inf where id is -1.

        Args:
            hidden (n, H), weight (V, H), bias (V,) fp32, ids (n, w) int32 contiguous.
        """

    def column_d_hidden(self, dz: Tensor, ids: Tensor, weight: Tensor, out: Tensor) -> None:
        """out_i = sum over k of dz_ik * weight_id, with id = ids_ik; dz is not used where the id is -1.

        Args:
            dz (n, w) fp32, ids (n, w) int32: contiguous.
            weight (V, H).
            out (n, H): fp32, or of the dtype of weight.
        """

    def column_d_weight(
        self, dz: Tensor, ids: Tensor, rows: Tensor, hidden: Tensor, out: Tensor, d_bias: Tensor | None
    ) -> None:
        """out_id += sum of dz * hidden_row, and d_bias_id += sum of dz, over the pairs of each id that is not -1.

        An id's pairs are summed in their order here, and the sum is added to `out` once. Rows of `out` that no pair
        names are not touched.

        Args:
            dz (P,) fp32, ids (P,) int32, rows (P,) int32: contiguous; rows in [0, n) where the id is not -1.
            hidden (n, H).
            out (V, H): fp32, bf16 or fp16.
            d_bias (V,) fp32.
        """

    def select_columns(
        self,
        logits: Tensor,
        rows: Rows,
        scores: Scores,
        g: Tensor,
        h: Tensor | None,
        tolerance: float,
        room: int,
        *,
        softcap: float | None = None,
    ) -> Columns:
        """The columns K of each row that carry its gradient, as `row_grad` would write it in fp32.

        What is dropped is small: the sum of |dz| over the columns outside of K is at most `tolerance` times the sum
        over all columns. The target is in K whatever its dz, if its id is in [0, V).

        The rule: |dz| falls into bins by its exponent and the first three bits of its mantissa in fp32. Bins are
        dropped from the smallest on, and of the first that does not fit the columns in their order, as long as they
        fit. So K is about as small as it can be, whatever the tail. Sums are a backend's own, to a few roundings.

        Rows where g and h (None: 0) are both 0 are not read, and have the size 0. A row whose K is larger than `room`
        has a size above `room`, and no ids; so has one whose gradient is not finite somewhere, whatever its K. Of
        `rows` and `scores` the same is read as by `row_grad`.
        """
