"""`statistics` of selective_logps and linear_logps, against float64."""

import pytest
import torch
from cases import assert_close, make_inputs, make_linear_inputs, softcap_on
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo import LogpsOutput, backends, kept_sets, linear_logps, selective_logps
from fastgrpo.backends import eager
from fastgrpo.engine.statistics import NAMES
from fastgrpo.reference import project

HEAD = dict(logit_scale=0.7, softcap=6.0, vocab_size=50)
BOUNDS = {"sum_pi_squared": 2e-6, "log_sum_sq_probs": 2e-6, "mean_logits": 2e-6}


def textbook(logits, ids, mask=None, temperature=1.0, sets=None):
    """Every statistic in float64; `sets` (..., V) bool: what a row is over."""
    logits, ids = logits.detach().double().cpu(), ids.cpu()
    temperature = torch.as_tensor(temperature).double().cpu().expand(ids.shape)
    inside = torch.ones_like(logits, dtype=torch.bool) if sets is None else sets
    z = (logits / temperature[..., None]).masked_fill(~inside, -torch.inf)
    p = z.softmax(-1)
    found = dict(
        sum_pi_squared=p.square().sum(-1),
        log_sum_sq_probs=(2 * z.log_softmax(-1)).logsumexp(-1),
        mean_logits=torch.where(inside, z, 0.0).sum(-1) / inside.sum(-1),
        is_top1=z.argmax(-1) == ids,
    )
    scored = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu() != 0
    return {name: torch.where(scored, x, torch.zeros_like(x)) for name, x in found.items()}


def assert_are(found, want, bounds=BOUNDS):
    assert list(found) == list(NAMES)
    for name, x in found.items():
        assert not x.requires_grad
        if name == "is_top1":
            assert x.dtype == torch.bool and torch.equal(x.cpu(), want[name])
        else:
            assert_close(x, want[name], bounds[name], name)


def some_greedy(ids, logits):
    """The ids, every other one that with the largest logit."""
    every_other = torch.arange(ids.numel(), device=ids.device).view(ids.shape) % 2 == 0
    return torch.where(every_other, logits.argmax(-1), ids)


def some_sets(ids, vocab, seed=3):
    """(lists of ids with the target among them, in each four rows one alone and one None), and as (..., V) bool."""
    gen = torch.Generator().manual_seed(seed)
    lists, inside = [], torch.ones(ids.numel(), vocab, dtype=torch.bool)
    for n, target in enumerate(ids.flatten().tolist()):
        size = 0 if n % 4 == 1 else int(torch.randint(0, 20, (1,), generator=gen))
        kept = [target, *torch.randperm(vocab, generator=gen)[:size].tolist()]
        lists.append(None if n % 4 == 3 else kept[::-1])
        if lists[-1] is not None:
            inside[n] = False
            inside[n, kept] = True
    return lists, inside.view(*ids.shape, vocab)


CASES = {
    "padded": dict(),
    "a slice of rows": dict(shifted=True),
    "packed": dict(packed=True),
    "masked": dict(masked=True),
    "temperature of each token": dict(hot=True),
    "bf16": dict(dtype=torch.bfloat16),
    "fp16, masked": dict(dtype=torch.float16, masked=True),
    "kept": dict(kept=True),
    "kept, packed, bf16": dict(kept=True, packed=True, dtype=torch.bfloat16),
    "kept, masked, hot": dict(kept=True, masked=True, hot=True),
}


INTERPRETED = ("masked", "bf16", "kept, masked, hot")  # some 20 ms a row and sweep


def of(case, backend, device):
    if backend == "triton" and device == "cpu" and case not in INTERPRETED:
        pytest.skip("seconds in the interpreter; what the case has is not the kernels'")
    return CASES[case]


def arguments(ids, vocab, kwargs, masked=False, hot=False, kept=False, packed=False, **_):
    """(ids, arguments of a call, those of the textbook's)."""
    device = ids.device
    call, truth = {}, {}
    if masked:
        call["mask"] = truth["mask"] = kwargs["completion_mask"]
    if hot:
        call["temperature"] = truth["temperature"] = torch.rand(ids.shape, device=device) + 0.5
    if kept:
        lists, truth["sets"] = some_sets(ids, vocab)
        call |= kept_sets(lists, device=device)._asdict()
    if packed:
        ids = ids.flatten()
        truth = {name: x.reshape(len(ids), *x.shape[2:]) for name, x in truth.items()}
    return ids, call, truth


@pytest.mark.parametrize("case", CASES)
def test_from_logits(case, backend, device):
    case = of(case, backend, device)
    dtype = case.get("dtype", torch.float32)
    logits, ids, kwargs = make_inputs(batch=3, length=3, dtype=dtype, device=device, backend=backend)
    ids = some_greedy(ids, logits)
    ids, call, truth = arguments(ids, logits.shape[-1], kwargs, **case)
    want = textbook(logits.flatten(0, 1) if case.get("packed") else logits, ids, **truth)
    if case.get("masked"):
        logits[kwargs["completion_mask"] == 0] = torch.nan
    if case.get("packed"):
        logits = logits.flatten(0, 1)
    if case.get("shifted"):
        logits = torch.cat([logits, torch.full_like(logits[:, :1], torch.nan)], 1)[:, :-1]
    found = selective_logps(logits, ids, statistics=NAMES, backend=backend, **call)
    assert_are(found.statistics, want)
    assert found.entropies is None and found.logps.shape == ids.shape
    assert want["is_top1"].any() and not want["is_top1"].all()


@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "bias, scale, cap, padding"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "a slice of rows"])
def test_from_hidden_states(case, head, backend, device):
    case = of(case, backend, device)
    dtype = case.get("dtype", torch.float32)
    hidden, weight, ids, kwargs = make_linear_inputs(
        batch=3, length=3, dtype=dtype, device=device, backend=backend, vocab=61
    )
    head = {name: softcap_on(backend, x) if name == "softcap" else x for name, x in head.items()}
    vocab = head.get("vocab_size", 61)
    bias = torch.randn(61, device=device).to(dtype) if head else None
    cut = (hidden, weight[:vocab], None if bias is None else bias[:vocab])
    inputs = (None if x is None else x.cpu().double() for x in cut)
    logits = project(*inputs, head.get("logit_scale", 1.0), head.get("softcap"))
    ids = some_greedy(ids.clamp(max=vocab - 1).cpu(), logits).to(device)
    ids, call, truth = arguments(ids, vocab, kwargs, **case)
    if case.get("packed"):
        hidden, logits = hidden.flatten(0, 1), logits.flatten(0, 1)
    want = textbook(logits, ids, **truth)
    call |= dict(bias=bias, backend=backend, logits_dtype=torch.float32, **head)
    wholes = linear_logps(hidden, weight, ids, statistics=NAMES, **call)
    assert_are(wholes.statistics, want, {name: 2e-5 for name in BOUNDS})
    chunks = linear_logps(hidden, weight, ids, statistics=NAMES, chunk_size=2, **call)
    assert_are(chunks.statistics, wholes.statistics, {name: 1e-5 for name in BOUNDS})


def test_logits_rounded_to_bf16():
    """By the rounding of the logits, 2^-9 of up to 15, no more."""
    hidden, weight, ids, _ = make_linear_inputs(width=64, vocab=300, dtype=torch.bfloat16)
    want = textbook(hidden.double() @ weight.double().t(), ids)
    found = linear_logps(hidden, weight, ids, statistics=NAMES, logits_dtype=torch.bfloat16).statistics
    bounds = dict(sum_pi_squared=0.03, log_sum_sq_probs=0.03, mean_logits=0.01)
    for name, bound in bounds.items():
        assert_close(found[name], want[name], bound, name)


def test_float64():
    logits, ids, _ = make_inputs()
    found = selective_logps(logits.double(), ids, statistics=NAMES).statistics
    assert all(found[name].dtype == torch.float64 for name in BOUNDS)
    assert_are(found, textbook(logits, ids), {name: 1e-13 for name in BOUNDS})


@pytest.mark.parametrize("offset", [0.0, -90.0, 200.0])
def test_peaked_rows(offset, backend, device):
    """Σp² = 1 - 2e-6 and nearer, whatever the size of the logits: to a few roundings of 1."""
    logits = (torch.randn(1, 4, 257, generator=torch.Generator().manual_seed(0)) / 2).round(decimals=2)
    logits[..., 100] = torch.tensor([12.0, 19.0, 20.0, 25.0])
    logits = (logits + offset).to(device)
    for ids in (torch.full((1, 4), 100, device=device), torch.tensor([[3, 100, 5, 100]], device=device)):
        found = selective_logps(logits, ids, statistics=NAMES, backend=backend).statistics
        want = textbook(logits, ids)
        assert torch.equal(found["is_top1"].cpu(), want["is_top1"])
        got = {name: found[name].double().cpu() for name in ("sum_pi_squared", "log_sum_sq_probs")}
        for name, x in got.items():
            assert (x - want[name]).abs().max() < 5e-7, name
        if backend == "cpu":  # whose logps have all of their digits at p = 1, too
            assert ((got["log_sum_sq_probs"] / want["log_sum_sq_probs"]) - 1).abs().max() < 2e-6


def test_squares_are_those_of_the_gradient():
    """1 - 2p + Σp², the weight of the optimal token baseline, is the squared norm of dlogp/dlogits."""
    logits, ids, _ = make_inputs()
    leaf = logits.requires_grad_()
    found = selective_logps(leaf, ids, statistics=("sum_pi_squared",))
    found.logps.sum().backward()
    norms = 1 - 2 * found.logps.detach().exp() + found.statistics["sum_pi_squared"]
    assert_close(norms, leaf.grad.square().sum(-1), 1e-6)


def test_of_equal_logits_the_first_is_on_top(backend, device):
    logits = torch.zeros(1, 4, 40, device=device)
    logits[..., [7, 21, 30]] = 2.0
    ids = torch.tensor([[7, 21, 30, 3]], device=device)
    first = [True, False, False, False]
    for sets in ({}, kept_sets([[30, 21, 7, 3]] * 4, device=device)._asdict()):
        found = selective_logps(logits, ids, statistics=["is_top1"], backend=backend, **sets).statistics
        assert found["is_top1"][0].tolist() == first


def test_a_softcap_makes_equal_ones(backend, device):
    """Logits far beyond it are all the softcap: in float64, too."""
    logits = torch.linspace(-1.0, 1.0, 40)
    logits[[7, 21, 30]] = torch.tensor([50.0, 60.0, 55.0])
    hidden, weight = torch.ones(1, 4, 1, device=device), logits[:, None].to(device)
    ids = torch.tensor([[7, 21, 30, 3]], device=device)
    softcap = softcap_on(backend, 2.0)
    want = textbook(project(hidden.double().cpu(), weight.double().cpu(), softcap=softcap), ids)
    assert want["is_top1"].tolist() == [[softcap is not None, softcap is None, False, False]]
    call = dict(statistics=NAMES, softcap=softcap, backend=backend)
    for sets in ({}, kept_sets([[*range(40)]] * 4, device=device)._asdict()):
        assert_are(linear_logps(hidden, weight, ids, **call, **sets).statistics, want)


def test_ruled_out_tokens_and_bad_rows(backend, device):
    """-inf logits have p = 0, and stand in the mean; NaN stays in its row."""
    logits, ids, _ = make_inputs(batch=1, length=3, device=device, backend=backend)
    logits[0, 0, 5:9] = -torch.inf
    logits[0, 1, 4] = torch.nan
    ids[0, 0] = 2
    found = selective_logps(logits, ids, statistics=NAMES, backend=backend).statistics
    want = textbook(logits, ids)
    assert found["mean_logits"][0, 0] == -torch.inf
    assert_close(found["sum_pi_squared"], want["sum_pi_squared"], 1e-6)
    assert found["sum_pi_squared"].isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(shape, device):
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    hidden, weight = torch.zeros(*shape, 4, device=device), torch.zeros(7, 4, device=device)
    for found in (
        selective_logps(torch.zeros(*shape, 7, device=device), ids, statistics=NAMES),
        linear_logps(hidden, weight, ids, statistics=NAMES),
    ):
        assert all(x.shape == shape for x in found.statistics.values())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("from_hidden", [False, True])
def test_the_rest_is_as_without(from_hidden, kept, backend, device):
    """Logps, entropies and gradients have the same bits; types are what they were."""
    vocab = 4100 if backend == "cpu" else 61  # on a CPU long rows of a head are scored without logits in memory
    hidden, weight, ids, kwargs = make_linear_inputs(vocab=vocab, batch=2, length=3, device=device, backend=backend)
    call = dict(mask=kwargs["completion_mask"], temperature=0.8, backend=backend)
    if kept:
        call |= kept_sets(some_sets(ids, vocab)[0], device=device)._asdict()

    def run(**options):
        leaf = hidden.clone().requires_grad_()
        first = (leaf, weight) if from_hidden else (leaf @ weight.t(),)
        result = (linear_logps if from_hidden else selective_logps)(*first, ids, **call, **options)
        logps, entropies = (result, None) if torch.is_tensor(result) else result[:2]
        ((logps * torch.arange(3.0, device=device)).sum() + (0 if entropies is None else entropies.sum())).backward()
        return result, logps, entropies, leaf.grad

    for options, kind in ((dict(), torch.Tensor), (dict(return_entropy=True), tuple)):
        result, *plain = run(**options)
        assert type(result) is kind
        for statistics in ((), ["mean_logits"], NAMES):
            result, *others = run(statistics=statistics, **options)
            assert type(result) is LogpsOutput and list(result.statistics) == list(statistics)
            for a, b in zip(plain, others, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def test_only_the_sweeps_that_are_asked_for(monkeypatch, backend, device):
    """Squares take one more of the rows whose token is not on top, and one of all."""
    logits, ids, kwargs = make_inputs(batch=2, length=3, device=device, backend=backend)
    ids = some_greedy(ids, logits)
    on_top = int((logits.argmax(-1) == ids).sum())
    kernels, seen = backends.get(backend), []
    stats = kernels.row_stats

    def spy(logits, rows, **options):
        seen.append(int(rows.mask.sum()))
        return stats(logits, rows, **options)

    monkeypatch.setattr(kernels, "row_stats", spy)
    for statistics, sweeps in ((("is_top1", "mean_logits"), [6]), (("sum_pi_squared",), [6, 6 - on_top, 6])):
        seen.clear()
        selective_logps(logits, ids, statistics=statistics, backend=backend)
        assert seen == sweeps


def test_logits_stay_one_chunk(monkeypatch):
    """No tensor is larger than a chunk of bf16 logits, nor an fp32 copy of one."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(eager, "_BYTES", 4 * 640)  # of a copy: one row
    hidden, weight, ids, _ = make_linear_inputs(batch=8, length=8, vocab=640, dtype=torch.bfloat16)
    call = dict(statistics=NAMES, softcap=9.0, chunk_size=32, logits_dtype=torch.bfloat16)
    with Largest() as seen:
        linear_logps(hidden, weight, ids, **call)
    assert seen.size == 32 * 640 * 2


@pytest.mark.parametrize("from_hidden", [False, True])
def test_in_a_compiled_graph(from_hidden, device):
    hidden, weight, ids, _ = make_linear_inputs(device=device)
    call, first = (linear_logps, (hidden, weight)) if from_hidden else (selective_logps, (hidden @ weight.t(),))

    def step(*first):
        found = call(*first, ids, statistics=NAMES)
        return found.logps * 2, found.statistics

    want, got = step(*first), torch.compile(step, backend="eager")(*first)
    assert torch.equal(want[0], got[0])
    assert all(torch.equal(x, got[1][name]) for name, x in want[1].items())


@pytest.mark.parametrize("statistics", ["is_top1", ("top1",), [None], 3, torch.ones(2)], ids=str)
def test_other_names_are_refused(statistics):
    for call in (
        lambda: selective_logps(torch.ones(1, 2, 3), torch.ones(1, 2).long(), statistics=statistics),
        lambda: linear_logps(torch.ones(1, 2, 3), torch.ones(5, 3), torch.ones(1, 2).long(), statistics=statistics),
    ):
        with pytest.raises(ValueError, match="statistics: expected a sequence of names out of sum_pi_squared, "):
            call()
