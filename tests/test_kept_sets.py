"""Kept sets: rows over the tokens that a sampler kept, against float64; their bits, exact zeros, and what is not read.

The sets come from a nucleus sampler on the case's own logits. Of masked rows the ids are garbage in every case.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from cases import (
    LEVELS,
    OPTIONS,
    assert_close,
    linear_loss_and_grads,
    loss_and_grad,
    objective_for,
    pack,
    softcap_on,
)
from cases import rel_norm as off
from torch import Tensor

from fastgrpo import (
    Objective,
    backends,
    grpo_loss,
    grpo_loss_reference,
    kept_sets,
    linear_grpo_loss,
    linear_grpo_loss_reference,
    linear_logps,
    policy_loss,
    selective_logps,
)
from fastgrpo.objective import LOSS_TYPES

B, T, H, V, ROWS = 4, 5, 24, 90, 97  # the last rows of the weight are padding
N, SURE, OPEN, ALL = B * T, 1, 2, 3  # rows with one token, without a set, and with a set of all tokens
GARBAGE = [-7, 10**9]
STORED = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float64: 1e-6}  # errors of gradients
ISAS = backends.get("cpu").instruction_sets() if backends.get("cpu").unavailable() is None else []


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ids: Tensor  # (B, T)
    inside: Tensor  # (N, V) bool
    lists: list  # of the ids of each row
    head: dict
    loss: dict  # arguments that a loss from logps takes


def nucleus(logits, top_p, gen):
    """(which tokens are kept, one of them), each row by itself."""
    p, order = logits.softmax(-1).sort(-1, descending=True)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, p.cumsum(-1) - p < top_p)
    return inside, torch.multinomial(logits.softmax(-1) * inside, 1, generator=gen)[:, 0]


def of_hidden(hidden, weight, bias=None, *, logit_scale=1.0, softcap=None, vocab_size=None, **_):
    logits = (hidden @ weight.T + (0 if bias is None else bias.double())) * logit_scale
    return (logits if softcap is None else torch.tanh(logits / softcap) * softcap)[..., :vocab_size]


def scores(logits, case):
    """(logps, entropies) (B, T) in float64: what everything here is held against."""
    temperature = case.head.get("temperature", torch.ones(B, T)).double()
    z = (logits.double() / temperature[..., None]).view(N, -1).masked_fill(~case.inside, -math.inf)
    logps = z.log_softmax(-1)
    entropies = -(logps.exp() * torch.where(case.inside, logps, 0.0)).sum(-1)
    return logps.gather(1, case.ids.view(N, 1))[:, 0].view(B, T), entropies.view(B, T)


def make(dtype=torch.float32, extras=("old", "ref"), softcap=9.0, plain=False):
    gen = torch.Generator().manual_seed(4)

    def noise(*shape):
        return torch.randn(*shape, generator=gen)

    spread = torch.linspace(0.3, 1.2, N)[torch.randperm(N, generator=gen)].view(B, T, 1)  # sets of many sizes
    hidden, weight = (noise(B, T, H) * spread).to(dtype), (noise(ROWS, H) * 3 / H**0.5).to(dtype)
    temperature = torch.rand(B, T, generator=gen) * 0.5 + 0.75
    head = dict(bias=noise(ROWS), logit_scale=1.3, softcap=softcap, vocab_size=V, temperature=temperature)
    if plain:
        head = {}
        weight = weight[:V].clone()
    logits = of_hidden(hidden.double(), weight.double(), **head)
    inside, ids = nucleus(logits.view(N, V) / temperature.view(N, 1).double(), 0.9, gen)
    inside[SURE], inside[[OPEN, ALL]] = False, True
    inside[SURE, ids[SURE]] = True
    mask = torch.ones(B, T)
    mask[1, 3:], mask[3] = 0, 0
    lists = [row.nonzero()[:, 0].tolist() for row in inside]
    lists = [GARBAGE if mask.view(-1)[i] == 0 else None if i == OPEN else row for i, row in enumerate(lists)]
    case = Case(hidden, weight, ids.view(B, T), inside | (mask.view(N, 1) == 0), lists, head, {})
    logps = scores(logits, case)[0]
    loss = dict(completion_mask=mask, advantages=noise(B, T) if "token_advantages" in extras else noise(B))
    for name in ("old", "ref", "sampling"):
        if name in extras:
            loss[f"{name}_per_token_logps"] = (logps + 0.2 * noise(B, T)).float()
    if "is_token" in extras or "is_sequence" in extras:
        loss["importance_sampling_ratio"] = (0.3 * noise(B, T if "is_token" in extras else 1)).exp()
    if "num_items" in extras:
        loss["num_items_in_batch"] = 37
    sizes = inside.sum(-1)[mask.view(-1) > 0]
    assert (sizes > 16).sum() > 2 and ((sizes > 1) & (sizes < 16)).sum() > 2
    return case._replace(loss=loss)


def truth(case, objective, upstream=1.0, of_logits=None):
    """(output, gradients) in float64: of hidden states, weight and bias, or of logits."""
    if of_logits is None:
        bias = {k: v for k, v in case.head.items() if k == "bias"}
        leaves = [x.double().requires_grad_() for x in (case.hidden, case.weight, *bias.values())]
        logits = of_hidden(*leaves, **{k: v for k, v in case.head.items() if k != "bias"})
    else:
        leaves = [of_logits.double().requires_grad_()]
        logits = leaves[0]
    logps, entropies = scores(logits, case)
    loss = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.loss.items()}
    output = policy_loss(logps, entropies=entropies, objective=objective, **loss)
    (output.loss * upstream).backward()
    return output, *(x.grad for x in leaves)


def padded(lists, like):
    """(..., k) from a list for each row, -1 behind its ids."""
    width = max(len(x or []) for x in lists) + 1
    return torch.tensor([[*(x or []), *[-1] * (width - len(x or []))] for x in lists]).view(*like.shape, width)


def csr(lists):
    return kept_sets(lists)._asdict()


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def agree(got, want, rel, rows=slice(None), what=""):
    """Outputs and gradients; those of padded rows as packed ones where `rows` says which."""
    for name in ("loss", "per_token_logps", "entropies", "kl"):
        a, b = getattr(got[0], name), getattr(want[0], name)
        if b is not None:
            assert_close(a, b if name == "loss" else b[rows], 2e-5, f"{what} {name}")
    for name, value in want[0].metrics.items():
        if not (isinstance(rows, Tensor) and name == "vespo/phi_seq_mean"):  # of sequences without rows, too
            assert got[0].metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6, nan_ok=True), name
    for i, (a, b) in enumerate(zip(got[1:], want[1:], strict=True)):
        b = b[rows] if i == 0 else b
        assert b.norm() > 1e-4 and off(a, b) < rel, f"{what} gradient {i}: {off(a, b)}"


# ---- against float64


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss(loss_type, level):
    """Padded and packed, from hidden states in chunks of several sizes and from logits, and both references."""
    case = make(extras=("old", "ref", "sampling"))
    objective = objective_for(loss_type, level, dict(beta=0.1, entropy_coef=0.02, off_policy_mask_threshold=0.04))
    want, sets = truth(case, objective, -2.5), csr(case.lists)
    call = dict(objective=objective, **case.loss)
    operands, mask = (case.hidden, case.weight, case.ids, -2.5), case.loss["completion_mask"] > 0
    for backend, chunk_size in (("cpu", None), ("cpu", 1), ("torch", 3)):
        how = dict(backend=backend, chunk_size=chunk_size)
        agree(linear_loss_and_grads(linear_grpo_loss, *operands, **how, **sets, **call, **case.head), want, 1e-5)
    cu_seqlens, flat = pack(mask, dict(hidden=case.hidden, ids=case.ids, kept_ids=padded(case.lists, case.ids),
                                       **case.loss, **case.head))  # fmt: skip
    del flat["completion_mask"]
    hidden, ids = flat.pop("hidden"), flat.pop("ids")
    call = dict(objective=objective, backend="cpu", cu_seqlens=cu_seqlens, **flat)
    agree(linear_loss_and_grads(linear_grpo_loss, hidden, case.weight, ids, -2.5, **call), want, 1e-5, mask, "packed")
    logits = of_hidden(case.hidden.double(), case.weight.double(), **case.head).float()
    want = truth(case, objective, -2.5, logits)
    call = dict(objective=objective, temperature=case.head["temperature"], **case.loss)
    for options in (dict(), dict(inplace=True), dict(backend="torch")):
        got = loss_and_grad(lambda x, *a, **k: grpo_loss(x * 1, *a, **k), logits, case.ids, -2.5, **options, **sets,
                            **call)  # fmt: skip
        agree(got, want, 1e-5, what=str(options))
        assert (got[1].view(N, V)[~case.inside] == 0).all()
    exact = loss_and_grad(grpo_loss_reference, logits.double(), case.ids, -2.5, **sets, **call)
    agree(exact, want, 1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, level):
    """A quantile of entropies, of which some are 0, importance ratios, off-policy masks, numbers of items."""
    options, extras = OPTIONS[option]
    case = make(extras=extras)
    objective = objective_for("grpo", level, options)
    want = truth(case, objective)
    call = dict(objective=objective, **csr(case.lists), **case.loss, **case.head)
    for chunk_size in (None, 3):
        how = dict(backend="cpu", chunk_size=chunk_size)
        got = linear_loss_and_grads(linear_grpo_loss, case.hidden, case.weight, case.ids, **how, **call)
        agree(got, want, 2e-5)
    quiet = linear_loss_and_grads(
        linear_grpo_loss, case.hidden, case.weight, case.ids, backend="cpu", return_stats=False, **call
    )
    assert_close(quiet[0].loss, want[0].loss, 2e-5)
    assert max(off(a, b) for a, b in zip(quiet[1:], want[1:], strict=True)) < 2e-5
    call["bias"] = call["bias"].double()
    exact = linear_loss_and_grads(
        linear_grpo_loss_reference, case.hidden.double(), case.weight.double(), case.ids, **call
    )
    agree(exact, want, 1e-6)


def of_logps(function, leaves, case, ups, **call):
    """(logps, entropies, gradients) of a function from logits or hidden states."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    call |= dict(bias=leaves.pop()) if len(leaves) == 3 else {}
    operands = [*leaves, *([call["bias"]] if "bias" in call else [])]
    mask = case.loss["completion_mask"]
    logps, entropies = function(*leaves, case.ids, mask=mask, return_entropy=True, **call)
    ((logps * ups[0]).sum() + (entropies * ups[1]).sum()).backward()
    return logps.detach(), entropies.detach(), *(x.grad for x in operands)


def check_scores(dtype, backend, device="cpu"):
    """Logps, entropies and their gradients from hidden states and from logits."""
    case = make(dtype, softcap=softcap_on(backend, 9.0))
    ups = torch.randn(2, B, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = case.loss["completion_mask"].double()
    sets, head = on(device, csr(case.lists)), dict(case.head)
    logits = of_hidden(case.hidden.double(), case.weight.double(), **head).to(dtype)
    there = case._replace(ids=case.ids.to(device), loss=on(device, case.loss))
    bias = head.pop("bias")
    head = on(device, head)

    def from_hidden(hidden, weight, bias):
        return scores(of_hidden(hidden, weight, bias, **{k: v for k, v in case.head.items() if k != "bias"}), case)

    for function, leaves, exact, options in (
        (linear_logps, (case.hidden, case.weight, bias), from_hidden, head),
        (selective_logps, (logits,), lambda x: scores(x, case), dict(temperature=head["temperature"])),
    ):
        doubles = [x.clone().double().requires_grad_() for x in leaves]
        want = [x * mask for x in exact(*doubles)]
        grads = torch.autograd.grad((torch.stack(want) * ups).sum(), doubles)
        leaves = [x.to(device) for x in leaves]
        ups_there = ups.float().to(device)
        got = of_logps(function, leaves, there, ups_there, backend=backend, **sets, **options)
        what = f"{backend} {function.__name__}"
        # without a set a row's logits may be of the dtype; with one, none is rounded
        rows = mask.view(-1) > 0
        rows[OPEN] = False
        for a, b in zip(got[:2], want, strict=True):
            assert_close(a.view(-1)[rows.to(device)], b.view(-1)[rows], 1e-5, what)
            assert (a.cpu()[mask == 0] == 0).all()
        for a, b in zip(got[2:], grads, strict=True):
            assert a.dtype == (bias.dtype if a.shape == bias.shape else dtype)
            assert off(a, b) < STORED[dtype], f"{what} {tuple(a.shape)}: {off(a, b)}"


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_scores_and_their_gradients(dtype, backend, device):
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 is plain torch's")
    if backend in ("triton", "cuda") and dtype == torch.float16 and device == "cpu":
        pytest.skip("the kernels of the other cases, which the interpreter would only take its time for again")
    check_scores(dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_logits_of_half_precision(backend, dtype):
    case = make()
    logits = of_hidden(case.hidden, case.weight, **case.head).to(dtype)
    objective = Objective(beta=0.1, entropy_coef=0.02)
    want = truth(case, objective, 256.0, logits)
    for inplace in (False, True):
        call = dict(objective=objective, temperature=case.head["temperature"], backend=backend, inplace=inplace)
        got = loss_and_grad(lambda x, *a, **k: grpo_loss(x * 1, *a, **k), logits, case.ids, 256.0, **call,
                            **csr(case.lists), **case.loss)  # fmt: skip
        assert got[1].dtype == dtype
        agree(got, want, STORED[dtype], what=f"inplace {inplace}")


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_gradients_that_nobody_asks_for_and_autocast(wanted):
    case, objective = make(), Objective(entropy_coef=0.02)
    rounded = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    for autocast, want, rel in ((False, truth(case, objective), 1e-5), (True, truth(rounded, objective), 3e-3)):
        leaves = [x.clone().requires_grad_(need) for x, need in
                  zip((case.hidden, case.weight, case.head["bias"]), wanted, strict=True)]  # fmt: skip
        call = dict(objective=objective, backend="cpu", **csr(case.lists), **case.loss, **case.head)
        call["bias"] = leaves[2]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            linear_grpo_loss(*leaves[:2], case.ids, **call).loss.backward()
        for leaf, need, true in zip(leaves, wanted, want[1:], strict=True):
            assert (leaf.grad is not None) == need
            assert not need or off(leaf.grad, true) < rel


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_of_a_cpu(isa, monkeypatch):
    monkeypatch.setenv("FASTGRPO_CPU_ISA", isa)
    for dtype in (torch.float32, torch.bfloat16):
        check_scores(dtype, "cpu")


# ---- what is exact


def closed(case, *rows):
    """The case with a few tokens in place of all."""
    lists = [*case.lists]
    for row in rows or (OPEN, ALL):
        lists[row] = [*{case.ids.view(-1)[row].item(), 4, 5 + row}]
    return case._replace(lists=lists)


def outcome(case, sets=None, upstream=-2.5, **how):
    """[loss, logps, entropies, gradients of hidden states, weight and bias]"""
    call = dict(objective=Objective(beta=0.1, entropy_coef=0.02), backend="cpu", **case.loss, **case.head) | how
    call |= csr(case.lists) if sets is None else sets
    output, *grads = linear_loss_and_grads(linear_grpo_loss, case.hidden, case.weight, case.ids, upstream, **call)
    return [output.loss.detach(), output.per_token_logps, output.entropies, *grads]


def same(got, want, what=""):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"{what}, result {i}: {(a - b).abs().max()}, {(a != b).nonzero()[:9].tolist()}"


def test_sets_of_one_token(backend, device):
    """Certain tokens have logp, entropy and gradients of exactly 0, and count in the mean."""
    case = make(softcap=softcap_on(backend, 9.0))
    sets = on(device, dict(kept_ids=case.ids[..., None].expand(B, T, 2)))  # twice, which counts once
    ids, mask, advantages = (x.to(device) for x in (case.ids, case.loss["completion_mask"], case.loss["advantages"]))
    call = dict(advantages=advantages, completion_mask=mask, backend=backend, **sets)
    logits = of_hidden(case.hidden, case.weight, **case.head).float().to(device)
    operands, head = (case.hidden.to(device), case.weight.to(device), ids), on(device, case.head)
    objective = Objective(entropy_coef=0.1)
    for got in (
        linear_loss_and_grads(linear_grpo_loss, *operands, objective=objective, **call, **head),
        loss_and_grad(grpo_loss, logits, ids, objective=objective, temperature=head["temperature"], **call),
    ):
        assert got[0].loss.item() == pytest.approx(float(-(advantages[:, None] * mask).sum() / mask.sum()), rel=1e-6)
        for x in (got[0].per_token_logps, got[0].entropies, *got[1:]):
            assert (x == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_set_of_all_tokens_and_the_mass_of_one(backend):
    case = make()
    everything = dict(kept_ids=torch.arange(V).expand(B, T, V).to(torch.uint32))
    for a, b in zip(outcome(case, everything, backend=backend), outcome(case, {}, backend=backend), strict=True):
        assert_close(a, b, 1e-5)
    logits = of_hidden(case.hidden, case.weight, **case.head).float()
    mask, few = case.loss["completion_mask"], case.inside.view(B, T, V)
    call = dict(mask=mask, backend=backend)
    kept_mass = (logits.double().softmax(-1) * few).sum(-1)
    assert (kept_mass < 0.97).sum() > 5
    shifted = selective_logps(logits, case.ids, **csr(case.lists), **call) + kept_mass.log() * mask
    assert_close(shifted, selective_logps(logits, case.ids, **call), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_same_bits_however_sets_are_given(backend, dtype):
    """In any order, as CSR or padded, of any integer dtype, beside padded or packed rows, from any strides."""
    case = make(dtype)
    gen, mask = torch.Generator().manual_seed(0), case.loss["completion_mask"] > 0
    want, masked = outcome(case, backend=backend), [row is GARBAGE for row in case.lists]
    mixed = [row and [row[i] for i in torch.randperm(len(row), generator=gen)] for row in case.lists]
    assert mixed != case.lists
    clean = [None if hidden else row for row, hidden in zip(mixed, masked, strict=True)]  # fits small dtypes
    for name, sets in dict(
        shuffled=csr(mixed),
        padded=dict(kept_ids=padded(case.lists, case.ids)),
        int32={k: v.int() for k, v in csr(mixed).items()},
        int8=dict(kept_ids=padded(clean, case.ids).to(torch.int8)),
        uint16={k: v.to(torch.uint16) for k, v in csr(clean).items()},
        spaced=dict(kept_ids=padded(case.lists, case.ids).repeat_interleave(2, -1)[..., ::2]),
    ).items():
        same(outcome(case, sets, backend=backend), want, name)
    doubled = outcome(case, csr([row and row + row[::2] for row in case.lists]), backend=backend)
    for a, b in zip(doubled, want, strict=True):
        assert_close(a, b, STORED[dtype])
    away = torch.full((T, B, 2 * H), math.nan, dtype=dtype)
    away[..., ::2] = case.hidden.transpose(0, 1)
    strides = case._replace(hidden=away.transpose(0, 1)[..., ::2], weight=case.weight.t().contiguous().t())
    assert not strides.hidden.is_contiguous() and strides.weight.stride(1) != 1
    same(outcome(strides, backend=backend), want, "strides")
    cu_seqlens, flat = pack(mask, dict(hidden=case.hidden, ids=case.ids, kept_ids=padded(case.lists, case.ids),
                                       **case.loss, **case.head))  # fmt: skip
    hidden, ids, sets = flat.pop("hidden"), flat.pop("ids"), dict(kept_ids=flat.pop("kept_ids"))
    sets["cu_seqlens"], flat["completion_mask"] = cu_seqlens, None
    packed = case._replace(hidden=hidden, ids=ids, head={}, loss=flat)
    wanted = [x[mask] if x.shape[:2] == mask.shape else x for x in want]
    same(outcome(packed, sets, backend=backend)[1:], wanted[1:], "packed")  # the loss is a sum of N, zeros included


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bits_of_a_row_do_not_depend_on_its_company(backend, dtype, monkeypatch):
    """Alone, in chunks of any size, beside rows without a set, in tables of a few rows."""
    case = make(dtype)
    ups, mask = torch.randn(2, B, T), case.loss["completion_mask"] > 0
    leaves = case.hidden, case.weight, case.head["bias"]
    head = {k: v for k, v in case.head.items() if k != "bias"}
    call = dict(backend=backend, **csr(case.lists), **head)
    want = of_logps(linear_logps, leaves, case, ups, **call)
    for chunk_size in (1, 7):
        got = of_logps(linear_logps, leaves, case, ups, chunk_size=chunk_size, **call)
        same(got[:3] if backend == "cpu" else got[:2], want[:3] if backend == "cpu" else want[:2], chunk_size)
    few = closed(case, OPEN)
    want = of_logps(linear_logps, leaves, few, ups, backend=backend, **csr(few.lists), **head)
    with monkeypatch.context() as patch:
        patch.setattr("fastgrpo.engine.kept.ELEMENTS", 64)
        same(of_logps(linear_logps, leaves, few, ups, backend=backend, **csr(few.lists), **head), want, "tables")
    for row in mask.view(-1).nonzero()[:, 0].tolist():
        b, t = row // T, slice(row % T, row % T + 1)
        alone = few._replace(ids=case.ids[b : b + 1, t], loss=dict(completion_mask=mask[b : b + 1, t]))
        options = head | dict(temperature=head["temperature"][b : b + 1, t])
        got = of_logps(linear_logps, (case.hidden[b : b + 1, t], *leaves[1:]), alone, ups[:, b : b + 1, t],
                       backend=backend, **csr(few.lists[row : row + 1]), **options)  # fmt: skip
        same(got[:3], [x[b : b + 1, t] for x in want[:3]], row)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_only_the_kept_is_read_and_only_its_gradient_is_not_0(backend):
    """NaN in masked rows, in logits outside of the sets and in rows of the weight that are in none."""
    case = closed(make())
    sets, mask = csr(case.lists), case.loss["completion_mask"] > 0
    used = torch.zeros(N, V, dtype=torch.bool)
    for row in mask.view(-1).nonzero()[:, 0].tolist():
        used[row, case.lists[row]] = True
    unused = ~torch.cat([used.any(0), torch.zeros(ROWS - V, dtype=torch.bool)])
    assert unused[:V].sum() > 5
    logits = of_hidden(case.hidden, case.weight, **case.head).float()
    dirty = case._replace(hidden=case.hidden.masked_fill(~mask[..., None], math.nan))
    dirty = dirty._replace(weight=case.weight.masked_fill(unused[:, None], math.nan))
    dirty.loss.update({k: v.masked_fill(~mask, math.nan) for k, v in case.loss.items() if "logps" in k})
    for options in (dict(), dict(chunk_size=2), dict(return_stats=False, objective=Objective())):
        got, want = (
            linear_loss_and_grads(linear_grpo_loss, x.hidden, x.weight, x.ids, backend=backend, **sets, **options,
                                  **x.loss, **x.head) for x in (dirty, case)
        )  # fmt: skip
        same((got[0].loss, *got[1:]), (want[0].loss, *want[1:]), options)
        assert (got[2][unused] == 0).all() and (got[3][unused] == 0).all() and (got[1][~mask] == 0).all()
        assert (got[2][~unused].abs().sum(-1) > 0).any()
    poisoned = logits.view(N, V).masked_fill(~used, math.nan).view(B, T, V)
    for inplace in (False, True):
        call = dict(backend=backend, inplace=inplace, temperature=case.head["temperature"], **sets, **case.loss)
        got, want = (loss_and_grad(lambda x, *a, **k: grpo_loss(x * 1, *a, **k), x, case.ids, **call)
                     for x in (poisoned, logits))  # fmt: skip
        same((got[0].loss, got[1]), (want[0].loss, want[1]))
        assert (got[1].view(N, V)[~used] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_nothing_to_do(backend):
    """No rows; no set at all, which is no argument; nothing but masked rows."""
    case = make()
    same(outcome(case, csr([None] * N), backend=backend), outcome(case, {}, backend=backend))
    same(outcome(case, dict(kept_ids=torch.empty(B, T, 0).int()), backend=backend), outcome(case, {}, backend=backend))
    case.loss["completion_mask"] = torch.zeros(B, T)
    for x in outcome(case, csr([GARBAGE] * N), backend=backend):
        assert (x == 0).all()
    for shape in ((0, T), (B, 0)):
        hidden, ids = torch.randn(*shape, H), torch.zeros(*shape, dtype=torch.int64)
        for sets in (csr([]), dict(kept_ids=torch.zeros(*shape, 3, dtype=torch.int64))):
            call = dict(advantages=torch.ones(shape[0]), backend=backend, **sets)
            got = linear_loss_and_grads(linear_grpo_loss, hidden, case.weight, ids, **call)
            assert got[0].loss == 0 and (got[2] == 0).all()
            assert loss_and_grad(grpo_loss, hidden, ids, **call)[0].loss == 0
