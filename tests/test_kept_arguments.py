"""Kept sets as arguments: how they are made, what is refused, what nobody checks; a step, memory, compilation."""

import math

import pytest
import torch
from cases import assert_close, linear_loss_and_grads, loss_and_grad
from test_kept_sets import (
    OPEN,
    B,
    H,
    N,
    T,
    V,
    closed,
    csr,
    make,
    nucleus,
    of_hidden,
    outcome,
    padded,
    same,
    truth,
)

from fastgrpo import (
    GRPOLoss,
    LinearGRPOLoss,
    Objective,
    grpo_loss,
    grpo_loss_reference,
    kept_sets,
    linear_grpo_loss,
    linear_grpo_loss_reference,
    linear_logps,
    selective_logps,
)
from fastgrpo.backends import cpu
from fastgrpo.batch import inputs, kept
from fastgrpo.engine import projection

LISTS = [[[5, 2], None, []], [[9], [1, 1, 0], torch.tensor([3])]]
FLAT, COUNTS = [5, 2, 9, 1, 1, 0, 3], [2, 0, 0, 1, 3, 1]
MASK = torch.zeros(2, 2, 4, dtype=torch.bool)
MASK[0, 0, [1, 3]], MASK[0, 1], MASK[1, 1, 2] = True, True, True

MADE = {
    "sequences of rows": ((LISTS,), FLAT, COUNTS),
    "rows": ((LISTS[0] + LISTS[1],), FLAT, COUNTS),
    "rows as tuples": ((tuple(map(tuple, ([4, 2], [3]))),), [4, 2, 3], [2, 1]),
    "of numpy": (
        ([list(torch.tensor([4, 2]).numpy()), torch.tensor([3]).numpy()],),
        [4, 2, 3],
        [2, 1],
    ),
    "an empty one beside sequences": (([[], [[1], [2]], (), [None]],), [1, 2], [1, 1, 0]),
    "no rows": (([],), [], []),
    "no sets": (([None, [], None],), [], [0, 0, 0]),
    "flat": ((torch.tensor(FLAT, dtype=torch.int32), torch.tensor(COUNTS).view(2, 3)), FLAT, COUNTS),
    "flat lists": ((FLAT, COUNTS), FLAT, COUNTS),
    "flat, of nothing": (([], [0, 0]), [], [0, 0]),
    "mask": ((MASK,), [1, 3, 2], [2, 0, 0, 1]),
    "mask of rows": ((MASK[0],), [1, 3], [2, 0]),
}


@pytest.mark.parametrize("name", MADE)
def test_making_sets(name):
    arguments, ids, counts = MADE[name]
    made = kept_sets(*arguments)
    assert made._fields == ("kept_ids", "kept_offsets")
    assert made.kept_ids.tolist() == ids
    assert made.kept_offsets.tolist() == [sum(counts[:i]) for i in range(len(counts) + 1)]
    assert made.kept_offsets.dtype == torch.int64 and not made.kept_ids.is_floating_point()
    assert kept_sets(*arguments, device="meta").kept_ids.device.type == "meta"


NOT_MADE = {
    "one flat list": (([1, 2, 3],), "sets: .*ids of each row.*got 1"),
    "floats": (([[1.5]],), r"sets: .*integers.*got 1\.5"),
    "bools": (([[True, False]],), r"sets: .*integers.*\[True, False\]"),
    "words": ((["ab"],), "sets: .*'a"),
    "a float tensor": ((torch.zeros(2, 3),), "sets: .*bool.*float32"),
    "integers without counts": ((torch.zeros(2, 3, dtype=torch.int64),), "sets: .*bool.*int64"),
    "one row of a mask": ((torch.ones(3, dtype=torch.bool),), r"sets: .*\(3,\)"),
    "rows of two dimensions": (([torch.zeros(2, 3).long()],), r"sets: .*\(2, 3\)"),
    "none": ((None,), "sets: .*None"),
    "None beside a sequence": (([[[1], [2]], None],), "sets: .*sequence of rows in each place.*got None"),
    "a row beside a sequence": (([[3, 4], [[1], [2]]],), r"sets: .*sequence of rows in each place.*got \[3, 4\]"),
    "a tensor beside a sequence": (([torch.ones(0), [None]],), r"sets: .*sequence of rows in each place.*\(0,\)"),
    "too few counts": ((FLAT, [1, 2]), "counts: .*sum is 7"),
    "a negative count": ((FLAT, [8, -1]), "counts: .*>= 0"),
    "float counts": ((FLAT, [7.0]), "counts: .*integers"),
    "ids of two dimensions": (([FLAT], [7]), r"sets: .*\(M,\) with counts"),
}


@pytest.mark.parametrize("name", NOT_MADE)
def test_sets_that_cannot_be_made(name):
    arguments, message = NOT_MADE[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        kept_sets(*arguments)


def test_metrics_of_sets_without_any():
    """The names are those of a call that gives sets, also where no row has one."""
    logits, ids = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.int64)
    names = []
    for sets in ([[1, 4]] + [None] * 5, [None] * 6):
        calls = (lambda **k: grpo_loss(logits, ids, torch.ones(2), **k),
                 lambda **k: linear_grpo_loss(logits, torch.eye(8), ids, torch.ones(2), **k))  # fmt: skip
        for call in calls:
            metrics = call(**kept_sets(sets)._asdict()).metrics
            names.append([*metrics])
            assert metrics["kept/mean"] == (2 if sets[0] else 0)
            assert metrics["kept/without"].item() == pytest.approx(5 / 6 if sets[0] else 1)
            assert not any(name.startswith("kept/") for name in call().metrics)
    assert all(these == names[0] for these in names)


def changed(row, *ids):
    """The sets of the case, one of them another."""
    lists = [*make().lists]
    lists[row] = [*ids]
    return lists


Y = make().ids.view(-1).tolist()
OTHER = [(Y[4] + 1) % V, (Y[4] + 2) % V]
WIDE = padded(make().lists, make().ids)
IDS, OFFSETS = csr(make().lists).values()
FALLING = OFFSETS.clone()
FALLING[4] = FALLING[6]
BAD = {
    "target": (csr(changed(4, *OTHER)), rf"kept_ids: .*sampled token {Y[4]} among .* flat position 4, got 2"),
    "target, padded": (dict(kept_ids=padded(changed(4, *OTHER), WIDE[..., 0])), f"kept_ids: .*sampled token {Y[4]}"),
    "negative": (csr(changed(4, Y[4], -1)), rf"kept_ids: .*\[0, {V}\), got -1 at flat position 4"),
    "too large": (csr(changed(4, Y[4], V)), rf"kept_ids: .*\[0, {V}\), got {V} at"),
    "hole": (dict(kept_ids=padded(changed(4, -1, Y[4]), WIDE[..., 0])), r"kept_ids: .*-1 only behind them, got -1"),
    "falling": (dict(kept_ids=IDS, kept_offsets=FALLING), "kept_offsets: .*never falling"),
    "late start": (dict(kept_ids=IDS, kept_offsets=OFFSETS.clamp(min=1)), "kept_offsets: .*from 0"),
    "end": (dict(kept_ids=IDS[:-1], kept_offsets=OFFSETS), f"kept_offsets: .*up to {len(IDS) - 1}"),
    "length": (dict(kept_ids=IDS, kept_offsets=OFFSETS[1:]), rf"kept_offsets: .*\({N + 1},\).*\({N},\)"),
    "offsets alone": (dict(kept_offsets=OFFSETS), "kept_offsets: .*None without kept_ids"),
    "float offsets": (dict(kept_ids=IDS, kept_offsets=OFFSETS.double()), "kept_offsets: .*integer dtype.*float64"),
    "float ids": (dict(kept_ids=IDS.double(), kept_offsets=OFFSETS), "kept_ids: .*integer dtype.*float64"),
    "bool ids": (dict(kept_ids=WIDE > 0), "kept_ids: .*integer dtype.*bool"),
    "lists": (dict(kept_ids=IDS.tolist(), kept_offsets=OFFSETS), r"kept_ids: .*shape \(M,\)"),
    "lists, padded": (dict(kept_ids=WIDE.tolist()), r"kept_ids: .*shape \(4, 5, 'k'\)"),
    "offsets as a list": (dict(kept_ids=IDS, kept_offsets=OFFSETS.tolist()), "kept_offsets: .*shape"),
    "flat without offsets": (dict(kept_ids=IDS), r"kept_ids: .*\(4, 5, 'k'\), or \(M,\) with kept_offsets"),
    "padded with offsets": (dict(kept_ids=WIDE, kept_offsets=OFFSETS), r"kept_ids: .*\(M,\) with kept_offsets"),
    "other rows": (dict(kept_ids=WIDE[:, 1:]), r"kept_ids: .*\(4, 5, 'k'\)"),
    "device of ids": (dict(kept_ids=IDS.to("meta"), kept_offsets=OFFSETS), "kept_ids: .*device cpu"),
    "device of padded ids": (dict(kept_ids=WIDE.to("meta")), "kept_ids: .*device cpu"),
    "device of offsets": (dict(kept_ids=IDS, kept_offsets=OFFSETS.to("meta")), "kept_offsets: .*device cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sets(name):
    """Every function says which argument is wrong."""
    sets, message = BAD[name]
    case = make()
    mask = dict(mask=case.loss["completion_mask"])
    logits = of_hidden(case.hidden, case.weight, **case.head).float()
    rows, advantages = (case.hidden, case.weight, case.ids), case.loss["advantages"]
    head = {k: v for k, v in case.head.items() if k != "temperature"}
    masked = dict(completion_mask=mask["mask"])
    for call in (
        lambda: linear_grpo_loss(*rows, advantages, **masked, **sets, **head),
        lambda: linear_grpo_loss_reference(*rows, advantages, **masked, **sets, **head),
        lambda: grpo_loss(logits, case.ids, advantages, **masked, **sets),
        lambda: grpo_loss_reference(logits, case.ids, advantages, **masked, **sets),
        lambda: linear_logps(*rows, **mask, **sets, **head),
        lambda: selective_logps(logits, case.ids, **mask, **sets),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def wrong_offset(value):
    """Where row 4 ends and row 5 begins; and the last id of all would be right for row 4."""
    ids, offsets = IDS.clone(), OFFSETS.clone()
    ids[-1], offsets[5] = Y[4], value
    return dict(kept_ids=ids, kept_offsets=offsets)


# (sets, the rows that they make NaN)
UNCHECKED = {
    "target": (csr(changed(4, *OTHER)), [4]),
    "negative": (csr(changed(4, Y[4], -7)), [4]),
    "too large": (csr(changed(4, Y[4], V)), [4]),
    "far too large": (csr(changed(4, 10**9, Y[4])), [4]),
    "padded": (dict(kept_ids=padded(changed(4, 10**9, Y[4]), WIDE[..., 0])), [4]),
    "nothing right": (csr(changed(4, 10**9, -1)), [4]),
    "offsets beyond": (wrong_offset(10**12), [4, 5]),
    "negative offsets": (wrong_offset(-(10**12)), [4, 5]),
    "ids that are not there": (dict(kept_ids=IDS[: OFFSETS[4]], kept_offsets=OFFSETS), [*range(4, N)]),
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", UNCHECKED)
def test_values_that_are_not_checked(name, backend, monkeypatch):
    """As on a GPU: a row with a wrong set is NaN, no other row changes, and nothing is read out of bounds."""
    monkeypatch.setattr(kept, "values_can_be_checked", lambda x: False)
    sets, rows = UNCHECKED[name]
    case = make()
    mask, ups = case.loss["completion_mask"] > 0, torch.randn(B, T)
    logits = of_hidden(case.hidden, case.weight, **case.head).float()
    head = {k: v for k, v in case.head.items() if k != "temperature"}
    bad = torch.zeros(N, dtype=torch.bool)
    bad[rows] = True
    bad = bad.view(B, T) & mask
    for function, leaves, options in (
        (linear_logps, (case.hidden, case.weight), head),
        (selective_logps, (logits,), {}),
    ):
        got, want = [], []
        for found, given in ((want, csr(case.lists)), (got, sets)):
            x, *others = (leaf.clone().requires_grad_() for leaf in leaves)
            logps, entropies = function(x, *others, case.ids, mask=mask, return_entropy=True, backend=backend, **given,
                                        **options)  # fmt: skip
            (logps * ups).sum().backward()
            found += [logps, entropies, x.grad]
        assert got[0][bad].isnan().all()
        same([x[~bad] for x in got], [x[~bad] for x in want], function.__name__)
    output, d_hidden, *_ = linear_loss_and_grads(
        linear_grpo_loss, case.hidden, case.weight, case.ids, backend=backend, **sets, **case.loss, **head
    )
    assert output.loss.isnan() and d_hidden[~bad].isfinite().all()
    assert (output.per_token_logps.isnan() == bad).all()


@pytest.mark.parametrize("target", [V, -1, -100, 2**31 - 1, 2**40])
def test_targets_that_are_not_checked(target, monkeypatch):
    for module in (kept, inputs):
        monkeypatch.setattr(module, "values_can_be_checked", lambda x: False)
    case = make()
    case.ids[0, 4] = target
    logits = of_hidden(case.hidden, case.weight, **case.head).float()
    logps = selective_logps(logits, case.ids, **csr(case.lists), backend="cpu")
    assert logps.view(-1).isnan().nonzero().tolist()[0] == [4] and logps[0, :4].isfinite().all()


# ---- in use


def test_rows_with_a_set_enter_no_gemm(monkeypatch):
    case, products = closed(make()), []
    for module, name in ((projection, "product"), (cpu, "head_stats")):
        monkeypatch.setattr(module, name, lambda *operands, **_: products.append(operands))
    outcome(case)
    assert not products


def test_the_ratio_of_a_first_update_is_1():
    """Old logps of a packed batch, over the sets of a nucleus sampler, against those of the loss; bf16."""
    gen = torch.Generator().manual_seed(7)
    V = 2000
    hidden, weight = torch.randn(B, T, H, generator=gen).bfloat16(), torch.randn(V, H, generator=gen).bfloat16()
    inside, ids = nucleus(of_hidden(hidden.double(), weight.double()).view(N, V) / 0.8, 0.9, gen)
    ids, sets = ids.view(B, T), kept_sets(inside)._asdict()
    assert 5 < inside.sum(-1).double().mean() < V / 4
    call = dict(advantages=torch.randn(B, generator=gen), temperature=0.8)
    old = linear_logps(hidden.view(N, H), weight, ids.view(N), temperature=0.8, chunk_size=3, **sets).view(B, T)
    for objective in (Objective(), Objective(loss_type="grpo", importance_sampling_level="sequence")):
        for given, least, most in ((sets, 0, 1e-5), ({}, 0.02, math.inf)):
            leaf = hidden.clone().requires_grad_()
            got = linear_grpo_loss(leaf, weight, ids, objective=objective, old_per_token_logps=old, **given, **call)
            ratio = (got.per_token_logps - old).exp()
            assert least <= (ratio - 1).abs().max() <= most
    sampled = of_hidden(hidden.double(), weight.double()).view(N, V) / 0.8
    sampled = sampled.masked_fill(~inside, -math.inf).log_softmax(-1).gather(1, ids.view(N, 1)).view(B, T)
    assert_close(old, sampled, 1e-5)


def test_rows_without_a_set_take_the_tolerance_of_columns():
    case = make(plain=True)
    objective, tolerance = Objective(), 0.2
    call = dict(objective=objective, upstream=1.0)
    dense, few = (outcome(case, **call, column_tolerance=x)[3] for x in (0.0, tolerance))
    row = torch.arange(N).view(B, T) == OPEN
    assert torch.equal(few[~row], dense[~row])
    error = (few - dense)[row].norm()
    logits = of_hidden(case.hidden.double(), case.weight.double())
    dz = truth(case, objective, of_logits=logits)[1][row].abs().sum()
    assert 1e-3 * dense[row].norm() < error <= tolerance * dz * case.weight.norm(dim=1).max()


def peak(function):
    """Bytes above what there was, at the peak of a call's tensors."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    sizes = [e.nbytes() for e in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
             if e.name() == "[memory]"]  # fmt: skip
    return int(torch.tensor(sizes).cumsum(0).max())


def test_memory_holds_nothing_of_n_times_v():
    n, v, k, gen = 256, 50_000, 32, torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 16, generator=gen), torch.randn(v, 16, generator=gen)
    ids = torch.randint(v, (n, k), generator=gen)
    call = dict(advantages=torch.ones(1), cu_seqlens=torch.tensor([0, n]), kept_ids=ids)
    with torch.no_grad():
        assert peak(lambda: linear_logps(hidden, weight, ids[:, 0], kept_ids=ids)) < 40 * n * k * 4
    gradient = weight.nbytes
    made = peak(lambda: linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids[:, 0], **call))
    copies = weight.nbytes  # of the leaves
    assert gradient < made < copies + 1.5 * gradient < n * v * 4 / 3
    call["kept_ids"] = None
    dense = peak(lambda: linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids[:, 0], **call))
    assert dense > n * v * 4


def test_compiled_calls_break_the_graph_and_agree():
    case = make()
    sets = csr(case.lists)
    logits = of_hidden(case.hidden, case.weight, **case.head).float()
    call = dict(objective=Objective(beta=0.1, entropy_coef=0.02), backend="cpu", **sets, **case.loss)

    def from_hidden(hidden, weight, ids, **kwargs):
        return linear_grpo_loss(hidden * 1, weight, ids, **kwargs)

    def from_logits(logits, ids, **kwargs):
        return grpo_loss(logits * 1, ids, **kwargs)

    for step, run, operands, options in (
        (from_hidden, linear_loss_and_grads, (case.hidden, case.weight), case.head),
        (from_logits, loss_and_grad, (logits,), {}),
        (from_logits, loss_and_grad, (logits,), dict(inplace=True)),
    ):
        torch._dynamo.reset()
        want = run(step, *operands, case.ids, **call, **options)
        got = run(torch.compile(step, backend="eager"), *operands, case.ids, **call, **options)
        for a, b in zip((got[0].loss, got[0].per_token_logps, *got[1:]),
                        (want[0].loss, want[0].per_token_logps, *want[1:]), strict=True):  # fmt: skip
            assert_close(a, b, 1e-6)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            run(torch.compile(step, backend="eager", fullgraph=True), *operands, case.ids, **call, **options)


def test_modules_take_sets_in_calls_and_hold_them():
    case = make()
    sets, objective = csr(case.lists), Objective(entropy_coef=0.02)
    logits = of_hidden(case.hidden, case.weight, **case.head).float()
    for module, function, operands in (
        (GRPOLoss, grpo_loss, (logits, case.ids)),
        (LinearGRPOLoss, linear_grpo_loss, (case.hidden, case.weight, case.ids)),
    ):
        want = function(*operands, objective=objective, **sets, **case.loss).loss
        assert torch.equal(module(objective)(*operands, **sets, **case.loss).loss, want)
        assert torch.equal(module(objective, **sets)(*operands, **case.loss).loss, want)
        assert not torch.equal(module(objective)(*operands, **case.loss).loss, want)
