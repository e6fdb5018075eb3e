"""The plan of a call from hidden states: who learns, who is only scored, and where chunks end. No GEMM is made."""

import itertools

import pytest
import torch

from fastgrpo import Objective
from fastgrpo.batch.inputs import make_batch
from fastgrpo.batch.layout import Packed
from fastgrpo.engine.plan import Roles, cut, cut_sequences, plan_loss, plan_rows, roles

TOKEN, SEQUENCE = Objective(), Objective(loss_type="grpo", importance_sampling_level="sequence")
QUANTILE = Objective(top_entropy_quantile=0.5)


def batch_of(lengths, advantages, mask=None):
    """A packed batch."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    inputs = dict(cu_seqlens=cu_seqlens)
    if mask is not None:
        inputs["completion_mask"] = torch.tensor(mask)
    ids, advantages = torch.zeros(sum(lengths), dtype=torch.int64), torch.tensor(advantages)
    return make_batch(ids, advantages, inputs, dtype=torch.float32)


def rows_of(plan, chunk):
    """The rows of the batch in a chunk."""
    at = plan.at(chunk)
    return list(range(at.start, at.stop)) if isinstance(at, slice) else at.tolist()


def check(plan, learn, score, chunk):
    """Each row of `learn` and `score` is in one chunk of its kind, in order, and no chunk is too long."""
    assert [row for part in plan.learn for row in rows_of(plan, part.rows)] == learn
    assert [row for part in plan.score for row in rows_of(plan, part)] == score
    assert plan.longest <= chunk and plan.learners == len(learn)
    for part in plan.learn:
        assert part.layout.num_sequences > 0 and part.rows.stop > part.rows.start


def test_cuts():
    assert cut(2, 9, 3) == [slice(2, 4), slice(4, 6), slice(6, 9)]
    parts = cut_sequences([7, 6, 5, 0, 11], 11)
    assert parts == [(slice(0, 7), slice(0, 1)), (slice(7, 18), slice(1, 4)), (slice(18, 29), slice(4, 5))]
    assert cut_sequences([0, 0], 4) == cut(0, 0, 4) == []


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 12, 100])
@pytest.mark.parametrize("seed", range(6))
def test_rows_that_do_not_depend_on_each_other(seed, chunk):
    generator = torch.Generator().manual_seed(seed)
    scored = torch.rand(12, generator=generator) < (0.0, 0.3, 0.6, 0.9, 1.0, 0.5)[seed]
    learn = scored & (torch.rand(12, generator=generator) < 0.5)
    learns, scores = learn.nonzero()[:, 0].tolist(), (scored & ~learn).nonzero()[:, 0].tolist()
    check(plan_rows(12, Roles(scored, learn), chunk), learns, scores, chunk)
    check(plan_rows(12, Roles(None, learn), chunk), learns, [row for row in range(12) if row not in learns], chunk)
    check(plan_rows(12, Roles(scored, None), chunk), sorted(learns + scores), [], chunk)
    check(plan_rows(12, Roles(scored, None), chunk, learn=False), [], sorted(learns + scores), chunk)
    check(plan_rows(12, Roles(None, None), chunk), [*range(12)], [], chunk)


def test_nothing_is_ordered_where_all_rows_are_alike():
    assert plan_rows(4, Roles(None, None), 2).order is None
    assert plan_rows(4, Roles(torch.ones(4, dtype=torch.bool), None), 2).order is None
    assert plan_rows(0, Roles(None, None), 2).longest == 0


def test_who_learns():
    mask = [1, 1, 0, 1, 1, 1]
    batch = batch_of([3, 3], [0.0, 1.0], mask)
    scored, learn = roles(TOKEN, batch, statistics=True)
    assert scored.tolist() == [bool(m) for m in mask] and learn.tolist() == [False] * 3 + [True] * 3
    alone = roles(TOKEN, batch, statistics=False)
    assert torch.equal(alone.scored, learn) and alone.learn is None
    assert roles(Objective(beta=0.1), batch, True).learn is None  # the KL has a gradient everywhere
    assert roles(Objective(entropy_coef=0.1), batch, True).learn is None
    everything = roles(Objective(beta=0.1), batch_of([3, 3], [0.0, 1.0]), True)
    assert everything.alike


def test_advantages_of_tokens_leave_no_row_of_a_sequence_out():
    """At sequence level a token's gradient needs the ratio of all tokens, also of those without an advantage."""
    batch = batch_of([2, 2], [0.0, 1.0, 0.0, 0.0])
    assert roles(SEQUENCE, batch, True).learn is None
    assert roles(TOKEN, batch, True).learn.tolist() == [False, True, False, False]


@pytest.mark.parametrize("chunk", [4, 5, 7, 9, 20])
def test_sequences_stay_whole(chunk):
    lengths = [4, 3, 0, 2, 4, 1]
    batch = batch_of(lengths, [1.0, 0.0, 1.0, 2.0, 1.0, 0.0])
    plan = plan_loss(SEQUENCE, batch, roles(SEQUENCE, batch, True), chunk)
    learns = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    check(plan, learns, [4, 5, 6, 13], chunk)
    seq = batch.seq().tolist()
    for part in plan.learn:
        assert isinstance(part.layout, Packed)
        mine = rows_of(plan, part.rows)
        edges = part.layout.cu_seqlens.tolist()
        held = [mine[a:b] for a, b in itertools.pairwise(edges) if b > a]
        assert held == [[*group] for _, group in itertools.groupby(mine, key=lambda row: seq[row])]
        assert part.layout.to_rows(torch.arange(part.layout.num_sequences)).shape == (len(mine),)
        for sequence in held:
            assert len(sequence) == lengths[seq[sequence[0]]]
    rest = plan.rest.layout.cu_seqlens.diff().tolist()
    assert rest == [0, 3, 0, 0, 0, 1] and rows_of(plan, plan.rest.rows) == [4, 5, 6, 13]


def test_what_does_not_fit_is_scored():
    batch = batch_of([4, 3, 2], [1.0, 0.0, 1.0])
    who = roles(SEQUENCE, batch, True)
    plan = plan_loss(SEQUENCE, batch, who, 3)
    assert (
        not plan.fits
        and plan.learn == []
        and [rows_of(plan, part) for part in plan.score]
        == [
            [0, 1, 2],
            [3, 4, 5],
            [6, 7, 8],
        ]
    )
    assert plan_loss(TOKEN, batch, who, 3).fits
    assert not plan_loss(QUANTILE, batch, roles(QUANTILE, batch, True), 8).fits  # the quantile is of all rows
    assert plan_loss(QUANTILE, batch, roles(QUANTILE, batch, True), 9).fits
