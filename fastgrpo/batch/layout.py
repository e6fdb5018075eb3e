"""How N rows make S sequences: padded (B, T) or packed (N,), with the same few operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padded:
    """(B, T): row r is token r % T of sequence r // T."""

    num_sequences: int
    length: int

    def seq_sum(self, x: Tensor) -> Tensor:  # (N, ...) -> (S, ...)
        return x.view(self.num_sequences, self.length, *x.shape[1:]).sum(1)

    def to_rows(self, s: Tensor) -> Tensor:  # (S,) -> (N,)
        return s[:, None].expand(-1, self.length).reshape(-1).contiguous()  # one sequence would give a view

    def lengths(self) -> list[int]:
        return [self.length] * self.num_sequences


@dataclass(frozen=True)
class Packed:
    """(N,) with cu_seqlens (S+1,): sequence i is rows cu_seqlens[i] to cu_seqlens[i+1]."""

    num_sequences: int
    cu_seqlens: Tensor
    seq: Tensor  # (N,) int64: the sequence of each row

    def seq_sum(self, x: Tensor) -> Tensor:  # (N, ...) -> (S, ...)
        return torch.segment_reduce(x, "sum", offsets=self.cu_seqlens, unsafe=True, initial=0)

    def to_rows(self, s: Tensor) -> Tensor:  # (S,) -> (N,)
        return s[self.seq]

    def lengths(self) -> list[int]:
        """The length of every sequence; waits for the device."""
        return self.cu_seqlens.diff().tolist()

    def part(self, rows: slice, sequences: slice) -> Packed:
        """Some whole sequences, `rows` being theirs."""
        edges = self.cu_seqlens[sequences.start : sequences.stop + 1] - rows.start
        return Packed(sequences.stop - sequences.start, edges, self.seq[rows] - sequences.start)


Layout = Padded | Packed


def in_order(seq: Tensor, num_sequences: int) -> Packed:
    """The layout of rows that stand in the order of their sequences, `seq` (N,) int64 naming each row's."""
    counted = seq.new_zeros(num_sequences).index_add_(0, seq, torch.ones_like(seq))
    return Packed(num_sequences, torch.cat([counted.new_zeros(1), counted.cumsum(0)]), seq)
