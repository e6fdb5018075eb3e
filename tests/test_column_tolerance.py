"""column_tolerance: gradients from few columns of each row, against float64, the bound, and the dense ones' bits."""

import functools
import math

import pytest
import torch
from cases import linear_loss_and_grads, linear_truth, objective_for, pack, rel_norm
from test_logits_dtype import STORED, B, H, T, V, case, realistic_head
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo import LinearGRPOLoss, Objective, backends, linear_grpo_loss, linear_logps
from fastgrpo.backends import eager
from fastgrpo.engine import columns
from fastgrpo.objective.metrics import column_metrics, reduce_metrics

FINE, FINER = 2**-10, 2**-12
MOST = {FINE: 1e-3, FINER: 3e-4}  # errors by norm where gradients leave in fp32
N = B * T


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    """Triton's interpreter is slow: `test_gpu_backends` has small cases for it."""
    if (why := backends.get(request.param).unavailable()) is not None:
        pytest.skip(f"backend {request.param}: {why}")
    return request.param


@pytest.fixture
def large_room(monkeypatch):
    """Room for every row of `realistic_head`, as a large vocabulary has it."""
    monkeypatch.setattr(columns, "room", lambda *_: 768)


def flat(make, gen):
    """The same heads, but every second row has logits near 0: all of its columns carry its gradient."""
    hidden, weight, ids = make(gen)
    hidden.view(-1, H)[::2] *= 0.02
    return hidden, weight, ids


mixed_head = functools.partial(flat, realistic_head)


def flat_head(gen):
    hidden, weight, ids = realistic_head(gen)
    return hidden * 0.02, weight, ids


def of_columns(output):
    return {name: value.item() for name, value in output.metrics.items() if name.startswith("columns/")}


def logps_and_grads(hidden, weight, ids, ups, bias=None, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    if bias is not None:
        options["bias"] = leaves[2]
    logps, entropies = linear_logps(*leaves[:2], ids, return_entropy=True, **options)
    ((logps * ups[0]).sum() + (entropies * ups[1]).sum()).backward()
    return logps, [leaf.grad for leaf in leaves]


def upstream(dtype=torch.float32):
    return torch.randn(2, B, T, generator=torch.Generator().manual_seed(5)).to(dtype) * torch.tensor([1.0, 0.1])[
        :, None, None
    ].to(dtype)


# ---- the argument


@pytest.mark.parametrize("value", [-1e-9, 1, 1.0, 2, math.nan, math.inf, True, "0.1", None, torch.tensor(0.1)])
def test_a_bad_tolerance(value):
    hidden, weight, ids, _, loss = case(realistic_head, "plain", torch.float32)
    for call in (
        lambda: linear_grpo_loss(hidden, weight, ids, **loss, column_tolerance=value),
        lambda: linear_logps(hidden, weight, ids, column_tolerance=value),
        lambda: LinearGRPOLoss(column_tolerance=value)(hidden, weight, ids, loss["advantages"]),
    ):
        with pytest.raises(ValueError, match=r"column_tolerance: expected a number in \[0, 1\), got"):
            call()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_zero_is_dense(level, monkeypatch):
    """The bits of a call that names none, and nothing of columns is asked for."""
    hidden, weight, ids, options, loss = case(realistic_head, "all", torch.bfloat16, level=level)
    want = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **options, **loss)
    scored = logps_and_grads(hidden, weight, ids, upstream(), **options)
    monkeypatch.setattr(columns.FewColumns, "__init__", lambda *_: pytest.fail("columns without a tolerance"))
    got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, column_tolerance=0, **options, **loss)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
    assert set(got[0].metrics) == set(want[0].metrics)
    again = logps_and_grads(hidden, weight, ids, upstream(), column_tolerance=0.0, **options)
    assert all(torch.equal(a, b) for a, b in zip(again[1], scored[1], strict=True))


def test_the_room():
    """The break-even of the cost model; ids and values take at most an eighth of the logits' bytes."""
    fp32, bf16 = torch.float32, torch.bfloat16
    assert columns.room(151936, fp32, "cpu") == columns.room(151936, bf16, "cpu") == 4096
    assert columns.room(128256, fp32, "cpu") == 3456 and columns.room(256000, fp32, "cpu") == 6912
    assert columns.room(151936, fp32, "cuda") == 640 and columns.room(32000, fp32, "cuda") == 256
    for vocab in (2048, 4096, 32000, 151936, 262144):
        for dtype in (fp32, bf16):
            for device in ("cpu", "cuda"):
                room = columns.room(vocab, dtype, device)
                assert room % 64 == 0 and 64 <= room and 8 * room <= vocab * dtype.itemsize / 8


# ---- errors


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("tolerance", MOST)
def test_loss(backend, tolerance, option, level, large_room):
    """fp32 gradients, of fp32 operands and of bf16 ones under autocast, in one chunk and in several."""
    hidden, weight, ids, options, loss = case(realistic_head, option, torch.bfloat16, level=level)
    if "bias" in options:
        options["bias"] = options["bias"].float()
    output, *want = linear_truth(hidden, weight, ids, **options, **loss)
    for autocast in (False, True):
        for chunk_size in (None, 30):
            call = dict(backend=backend, chunk_size=chunk_size, logits_dtype=torch.float32, **options, **loss)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got, *grads = linear_loss_and_grads(
                    linear_grpo_loss, hidden.float(), weight.float(), ids, column_tolerance=tolerance, **call
                )
            assert got.loss.item() == pytest.approx(output.loss.item(), rel=2e-5, abs=2e-5)
            for name, grad, true in zip(("dhidden", "dweight", "dbias"), grads, want, strict=False):
                assert rel_norm(grad, true) <= MOST[tolerance], (name, autocast, chunk_size)
            counted = of_columns(got)
            assert counted["columns/dense"] < 0.05 and 1 < counted["columns/mean"] < 200
            assert counted["columns/rows"] == 84  # of the mask


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("tolerance", MOST)
def test_logps(backend, tolerance, option, large_room):
    """Gradients that project again, from upstream gradients of logps and entropies."""
    hidden, weight, ids, options, _ = case(realistic_head, option, torch.float32)
    double = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    _, want = logps_and_grads(hidden.double(), weight.double(), ids, upstream(torch.float64), **double)
    for chunk_size in (None, 30):
        call = dict(backend=backend, chunk_size=chunk_size, column_tolerance=tolerance)
        _, grads = logps_and_grads(hidden, weight, ids, upstream(), **call, **options)
        for grad, true in zip(grads, want, strict=True):
            assert rel_norm(grad, true) <= MOST[tolerance], chunk_size


@pytest.mark.parametrize("make", [realistic_head, mixed_head, flat_head])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients(dtype, make, backend):
    """Those of bf16 and fp16 tensors, and mixed batches, where a gradient is rounded once more where it is stored."""
    hidden, weight, ids, options, loss = case(make, "plain", dtype)
    _, *want = linear_truth(hidden, weight, ids, **options, **loss)
    for chunk_size in (None, 30):
        call = dict(backend=backend, chunk_size=chunk_size, logits_dtype=torch.float32, column_tolerance=FINER)
        got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **loss)
        for grad, true in zip(grads, want, strict=True):
            assert grad.dtype == dtype and rel_norm(grad, true) <= STORED[dtype]
        dense = of_columns(got)["columns/dense"]
        assert dense == 1 if make is flat_head else dense > 0.4 if make is mixed_head else dense < 0.5


def certain_head(gen):
    """Of most targets 1 - p lies between 1e-9 and 1e-4: nearly all of what lse holds is their own share."""
    hidden, weight, ids = realistic_head(gen)
    gap = torch.linspace(9, 16, N)[torch.randperm(N, generator=gen)].view(B, T, 1)
    other = torch.randint(0, V - 40, (B, T), generator=gen)
    return 33 * weight[ids] + (33 - gap) * weight[other] - 33 * weight[ids - 1], weight, ids


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rows_that_are_nearly_certain(backend, level, large_room):
    """What is left of the target's gradient comes from its logp, because fp32 holds lse to 2e-6 alone."""
    hidden, weight, ids, _, _ = case(certain_head, "plain", torch.bfloat16)
    logps = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    even = -1 / torch.expm1(logps).float()  # so that every row has its part in the norm
    loss = dict(advantages=even, objective=objective_for("grpo", level, {}))
    if level == "sequence":
        loss["advantages"] = torch.ones(B)
    _, *of_loss = linear_truth(hidden, weight, ids, **loss)
    ups = torch.stack([even, torch.zeros(B, T)])
    _, of_logps = logps_and_grads(hidden.double(), weight.double(), ids, ups.double())
    hidden, weight = hidden.float(), weight.float()
    for chunk_size in (None, 30):
        call = dict(backend=backend, chunk_size=chunk_size, column_tolerance=FINER)
        _, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **loss)
        assert max(rel_norm(a, b) for a, b in zip(grads, of_loss, strict=True)) <= MOST[FINER]
        _, grads = logps_and_grads(hidden, weight, ids, ups, **call)
        assert max(rel_norm(a, b) for a, b in zip(grads, of_logps, strict=True)) <= MOST[FINER]


def sums_of_gradients(hidden, weight, ids, ups, softcap=None):
    """Σ|dL/dlogit| of each row, float64."""
    leaf = (hidden @ weight.T).detach().requires_grad_()
    z = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    logps = z.log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    ((logps.gather(-1, ids[..., None])[..., 0] * ups[0]).sum() + (entropies * ups[1]).sum()).backward()
    return leaf.grad.abs().sum(-1)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("tolerance", [2**-4, 2**-8, FINER])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_bound(dtype, tolerance, softcap, monkeypatch):
    """Row by row for dL/dhidden, and in the Frobenius norm for dL/dweight."""
    monkeypatch.setattr(columns, "room", lambda *_: V)
    gen = torch.Generator().manual_seed(3)
    for make in (realistic_head, mixed_head):
        hidden, weight, ids = make(gen)
        hidden, weight, ups = (
            hidden.double(),
            weight.double() * (1 + torch.rand(V, 1, generator=gen)),
            upstream().double(),
        )
        sums = sums_of_gradients(hidden, weight, ids, ups, softcap)
        _, want = logps_and_grads(hidden, weight, ids, ups, softcap=softcap)
        call = dict(softcap=softcap, column_tolerance=tolerance)
        _, got = logps_and_grads(hidden.to(dtype), weight.to(dtype), ids, ups.to(dtype), **call)
        of_hidden, of_weight = ((a.double() - b) for a, b in zip(got, want, strict=True))
        # what rounding adds: fp32 logits of 40 move a probability by 1e-5 of itself
        most = tolerance * sums + (1e-12 if dtype == torch.float64 else 1e-5) * ups.abs().sum(0)
        assert (of_hidden.norm(dim=-1) <= most * weight.norm(dim=1).max()).all()
        assert of_weight.norm() <= (most * hidden.norm(dim=-1)).sum()
        if dtype == torch.float64:  # something was dropped
            assert of_hidden.norm() > 1e-4 * tolerance * want[0].norm()


# ---- rows that overflow


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_flat_policy_has_the_dense_bits(backend, level):
    hidden, weight, ids, options, loss = case(flat_head, "plain", torch.bfloat16, level=level)
    loss["objective"] = objective_for("grpo", level, {})
    for chunk_size in (None, 30):
        call = dict(backend=backend, chunk_size=chunk_size, logits_dtype=torch.float32, **options)
        _, *want = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **loss)
        got, *grads = linear_loss_and_grads(
            linear_grpo_loss, hidden, weight, ids, column_tolerance=FINER, **call, **loss
        )
        assert of_columns(got) == {"columns/mean": 0, "columns/dense": 1, "columns/rows": 84}
        for grad, dense in zip(grads, want, strict=True):
            if backend == "torch" or level == "sequence":
                assert torch.equal(grad, dense)
            else:  # the one pass holds the sum itself where the gradient sweep has its rounded logarithm
                assert rel_norm(grad, dense) <= 2e-4
        _, want = logps_and_grads(hidden, weight, ids, upstream(), **call)
        _, grads = logps_and_grads(hidden, weight, ids, upstream(), column_tolerance=FINER, **call)
        assert all(torch.equal(grad, dense) for grad, dense in zip(grads, want, strict=True))


def test_where_no_row_overflows_no_logit_gets_a_gradient(monkeypatch, large_room):
    hidden, weight, ids, _, loss = case(realistic_head, "plain", torch.float32)
    swept = []
    kernel = eager.row_grad
    monkeypatch.setattr(eager, "row_grad", lambda x, *a, **k: swept.append(x.shape[1]) or kernel(x, *a, **k))
    output, *_ = linear_loss_and_grads(
        linear_grpo_loss, hidden, weight, ids, backend="torch", column_tolerance=2**-6, **loss
    )
    assert swept == [] and output.metrics["columns/dense"] == 0


def test_only_rows_that_overflow_are_swept(monkeypatch):
    hidden, weight, ids, _, loss = case(mixed_head, "plain", torch.float32)
    swept = []
    kernel = eager.row_grad
    monkeypatch.setattr(eager, "row_grad", lambda x, *a, **k: swept.append(x.shape[1]) or kernel(x, *a, **k))
    call = dict(backend="torch", column_tolerance=FINE, chunk_size=30, **loss)
    output, *_ = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
    assert sum(swept) == round(84 * output.metrics["columns/dense"].item()) and 42 <= sum(swept) < 60


def test_few_rows_without_a_gradient_stay_among_those_that_overflow(monkeypatch):
    """They fill up the GEMM's last rows, and cost less than moving the others."""
    hidden, weight, ids, _, loss = case(flat_head, "plain", torch.float32)
    logps = linear_logps(hidden, weight, ids)
    old = logps.clone()
    old[:, :2] -= loss["advantages"][:, None].sign()  # clipped
    swept, kernel = [], eager.row_grad
    monkeypatch.setattr(eager, "row_grad", lambda x, *a, **k: swept.append(x.shape[1]) or kernel(x, *a, **k))
    objective = objective_for("grpo", "token", dict(entropy_coef=0.0))  # an entropy has a gradient everywhere
    call = dict(loss, old_per_token_logps=old, objective=objective, backend="torch")
    _, *want = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
    swept.clear()
    output, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, column_tolerance=FINER, **call)
    assert 50 < output.metrics["columns/rows"] < 84 and output.metrics["columns/dense"] == 1 and swept == [84]
    for grad, dense in zip(grads, want, strict=True):
        assert rel_norm(grad, dense) < 1e-6


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_rows_move_to_the_front(share):
    gen = torch.Generator().manual_seed(1)
    dense = torch.rand(300, generator=gen) < share
    logits = torch.randn(300, 40, generator=gen)
    was = logits.clone()
    order = columns._bring_forward(logits, dense)
    assert sorted(order.tolist()) == dense.nonzero()[:, 0].tolist()
    assert torch.equal(logits[: len(order)], was[order])


class _Allocations(TorchDispatchMode):
    """The largest tensor, in elements, that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("make", [realistic_head, mixed_head, flat_head])
def test_nothing_is_larger_than_a_chunk(make):
    hidden, weight, ids, _, loss = case(make, "plain", torch.float32)
    seen = _Allocations()
    with seen:
        linear_loss_and_grads(
            linear_grpo_loss, hidden, weight, ids, backend="cpu", column_tolerance=FINE, chunk_size=30, **loss
        )
    assert seen.largest <= max(30 * -(-V // 64) * 64, V * H)


def test_nan_comes_through(backend):
    """A row with NaN overflows, so that its gradient is NaN as without a tolerance; other rows keep theirs."""
    hidden, weight, ids, _, _ = case(realistic_head, "plain", torch.float32)
    call = dict(backend=backend, column_tolerance=FINER)
    _, (want, _) = logps_and_grads(hidden, weight, ids, upstream(), **call)
    hidden[1, 2, 3] = torch.nan
    _, (got, d_weight) = logps_and_grads(hidden, weight, ids, upstream(), **call)
    assert got[1, 2].isnan().all() and d_weight.isnan().any()
    got[1, 2] = want[1, 2]
    assert torch.equal(got, want)


# ---- bits


@pytest.mark.parametrize("make", [realistic_head, mixed_head])
def test_bits_do_not_depend_on_company(backend, make):
    """dL/dhidden of a row alone, in any batch and chunk; and two runs agree."""
    hidden, weight, ids, _, _ = case(make, "plain", torch.bfloat16)
    call = dict(backend=backend, logits_dtype=torch.float32, column_tolerance=FINER)
    ups = upstream()
    _, (want, d_weight) = logps_and_grads(hidden, weight, ids, ups, **call)
    _, (again, d_weight_again) = logps_and_grads(hidden, weight, ids, ups, **call)
    assert torch.equal(want, again) and torch.equal(d_weight, d_weight_again)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    for at, chunk_size in ((order, 7), (order[:2], None), (order[:1], 1)):
        _, (got, _) = logps_and_grads(hidden[at], weight, ids[at], ups[:, at], chunk_size=chunk_size, **call)
        assert torch.equal(got, want[at]), chunk_size


@pytest.mark.parametrize("make", [realistic_head, mixed_head])
def test_packed_rows_have_the_bits_of_padded_ones(make):
    """dL/dhidden; dL/dweight differs by the order of its sum."""
    hidden, weight, ids, _, loss = case(make, "plain", torch.bfloat16)
    mask, call = loss["completion_mask"], dict(backend="cpu", column_tolerance=FINER)
    _, want, _ = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **loss)
    del loss["completion_mask"]
    cu_seqlens, packed = pack(mask, dict(hidden=hidden, ids=ids, **loss))
    rows = packed.pop("hidden").clone().requires_grad_()
    linear_grpo_loss(rows, weight, packed.pop("ids"), cu_seqlens=cu_seqlens, **call, **packed).loss.backward()
    assert torch.equal(rows.grad, want[mask.bool()])


# ---- what a head may be


@pytest.mark.parametrize("make", [realistic_head, mixed_head])
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_frozen_tensors(needs, make, backend):
    hidden, weight, ids, options, loss = case(make, "plain", torch.float32)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(4))
    _, *want = linear_truth(hidden, weight, ids, bias=bias, **loss)
    leaves = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs, strict=True)]
    call = dict(backend=backend, chunk_size=30, column_tolerance=FINER, **loss)
    linear_grpo_loss(*leaves[:2], ids, bias=leaves[2], **call).loss.backward()
    for leaf, true, need in zip(leaves, want, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert rel_norm(leaf.grad, true) <= MOST[FINER]


def test_strides_and_padding(backend):
    """A weight whose columns lie together, hidden states cut out of others, and rows of the weight that are none."""
    hidden, weight, ids, options, loss = case(mixed_head, "padded", torch.float32)
    _, *want = linear_truth(hidden, weight, ids, **options, **loss)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight.t().contiguous())]
    wider = torch.cat([leaves[0], leaves[0]], dim=1).transpose(0, 1).contiguous().transpose(0, 1)[:, :T]
    call = dict(backend=backend, column_tolerance=FINER, **options, **loss)
    linear_grpo_loss(wider, leaves[1].t(), ids, **call).loss.backward()
    assert rel_norm(leaves[0].grad, want[0]) <= MOST[FINER]
    assert rel_norm(leaves[1].grad.t(), want[1]) <= MOST[FINER]
    assert (leaves[1].grad.t()[options["vocab_size"] :] == 0).all()


def test_packed(backend):
    hidden, weight, ids, _, loss = case(mixed_head, "plain", torch.float32, level="sequence")
    mask = loss.pop("completion_mask")
    _, *want = linear_truth(hidden, weight, ids, completion_mask=mask, **loss)
    cu_seqlens, packed = pack(mask, dict(hidden=hidden, ids=ids, **loss))
    leaves = [x.clone().requires_grad_() for x in (packed.pop("hidden"), weight)]
    call = dict(backend=backend, cu_seqlens=cu_seqlens, column_tolerance=FINER, chunk_size=40)
    linear_grpo_loss(*leaves, packed.pop("ids"), **packed, **call).loss.backward()
    assert rel_norm(leaves[0].grad, want[0][mask.bool()]) <= MOST[FINER]
    assert rel_norm(leaves[1].grad, want[1]) <= MOST[FINER]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compile_fullgraph(level):
    hidden, weight, ids, _, loss = case(mixed_head, "plain", torch.bfloat16, level=level)

    def step(hidden, weight, ids, **loss):
        call = dict(chunk_size=100, logits_dtype=torch.float32, column_tolerance=FINER)
        logps = linear_logps(hidden, weight, ids, **call)
        output = linear_grpo_loss(hidden * 1, weight, ids, **call, **loss)
        return output.loss + 0.1 * logps.mean(), output.metrics

    def grads(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        total, metrics = function(*leaves, ids, **loss)
        total.backward()
        return metrics, *(leaf.grad for leaf in leaves)

    torch._dynamo.reset()
    want, got = grads(step), grads(torch.compile(step, fullgraph=True))
    for name in ("columns/mean", "columns/dense", "columns/rows"):
        assert got[0][name] == want[0][name] > 0
    for a, b in zip(got[1:], want[1:], strict=True):
        assert rel_norm(a, b) <= 3e-3


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends(name, request, monkeypatch):
    """A few rows, of which some overflow: the columns of both are Triton's, and errors as elsewhere."""
    if name == "cuda":
        device = request.getfixturevalue("cuda_anywhere")
    elif (why := backends.get(name).unavailable()) is not None:
        pytest.skip(f"backend {name}: {why}")
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    assert backends.columns(name) is backends.get("triton")
    monkeypatch.setattr(columns, "room", lambda *_: 256)
    hidden, weight, ids, _, loss = case(mixed_head, "plain", torch.float32)
    rows, few = slice(0, 2), 600  # of V
    weight, ids = weight[:few].contiguous(), ids[rows, :4] % few
    hidden = hidden[rows, :4] * 0.02
    hidden[:, ::2] = 20 * weight[ids[:, ::2]] + 19 * weight[ids[:, ::2] - 1] - 20 * weight[ids[:, ::2] - 2]
    loss = {k: x[rows, :4] if k.startswith("old") else x[rows] for k, x in loss.items() if isinstance(x, torch.Tensor)}
    loss["old_per_token_logps"] = loss["old_per_token_logps"] * 0 - 5
    del loss["completion_mask"]
    for level in ("token", "sequence"):
        loss["objective"] = objective_for("grpo", level, dict(entropy_coef=0.01))
        _, *want = linear_truth(hidden, weight, ids, **loss)
        on = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in loss.items()}
        call = dict(backend=name, chunk_size=4, column_tolerance=FINER, **on)
        got, *grads = linear_loss_and_grads(linear_grpo_loss, *(x.to(device) for x in (hidden, weight, ids)), **call)
        assert of_columns(got)["columns/dense"] == 0.5
        for grad, true in zip(grads, want, strict=True):
            assert rel_norm(grad, true) <= MOST[FINER]


# ---- metrics


def test_metrics(backend):
    """They count what `select_columns` gives; zeroes where no gradient was made; none without a tolerance."""
    hidden, weight, ids, _, loss = case(mixed_head, "plain", torch.float32)
    loss["objective"] = objective_for("grpo", "sequence", {})
    call = dict(backend=backend, column_tolerance=FINE, **loss)
    output, *_ = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
    counted = of_columns(output)
    assert counted["columns/rows"] == 84 and 0.5 <= counted["columns/dense"] < 0.7 and counted["columns/mean"] > 1
    nothing = {"columns/mean": 0, "columns/dense": 0, "columns/rows": 0}
    later, *_ = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, chunk_size=5, **call)
    assert of_columns(later) == of_columns(linear_grpo_loss(hidden, weight, ids, **call)) == nothing
    assert of_columns(linear_grpo_loss(hidden, weight, ids, **call | dict(column_tolerance=0.0))) == {}
    assert linear_grpo_loss(hidden, weight, ids, return_stats=False, **call).metrics is None


def test_metrics_of_several_processes():
    """Means over the rows of all of them, whatever the loss tokens of each are."""
    counts = torch.tensor([[300, 30, 10], [10, 5, 45], [0, 0, 0]])
    made = [columns_of | {"kl": torch.tensor(0.5)} for columns_of in map(column_metrics, counts)]
    masks = [torch.ones(1, n) for n in (100, 7, 50)]

    class Others:
        def gather(self, mine):
            every = [torch.stack([*metrics.values(), mask.sum()]) for metrics, mask in zip(made, masks, strict=True)]
            assert torch.equal(mine, every[0])
            return torch.cat(every)

    reduced = reduce_metrics(Others(), Objective(), made[0], masks[0], 1)
    assert set(reduced) == {"columns/mean", "columns/dense", "kl"} and reduced["kl"].item() == pytest.approx(0.5)
    assert reduced["columns/mean"].item() == pytest.approx(310 / 35)
    assert reduced["columns/dense"].item() == pytest.approx(55 / 90)


# ---- the trainers


def test_trainers_hand_it_on(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    import test_sft
    import test_trainer
    from datasets import Dataset

    from fastgrpo.recipes import word_problems
    from fastgrpo.trainer import completion, sft

    seen, tokenizer = [], word_problems.make_tokenizer()
    for module, name in ((completion, "linear_grpo_loss"), (sft, "linear_logps")):
        function = getattr(module, name)

        def spy(*args, function=function, **options):
            seen.append((function.__name__, options["column_tolerance"]))
            return function(*args, **options)

        monkeypatch.setattr(module, name, spy)
    rows = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)])
    model = word_problems.make_model(tokenizer, seed=0)
    options = dict(column_tolerance=FINER, use_cpu=True, bf16=False, max_steps=1)
    trainer = test_trainer.make_trainer(model, tokenizer, rows, tmp_path, **options)
    trainer.train()
    log = test_trainer.step_logs(trainer)[0]
    assert {"columns/mean", "columns/dense"} <= set(log) and "columns/rows" not in log
    args = test_sft.make_trainer(tokenizer, tmp_path).args
    examples = Dataset.from_list(test_sft.ROWS)
    supervised = sft.SFTTrainer(model, args, examples, tokenizer, column_tolerance=FINE)
    supervised.compute_loss(model, sft.collate(tokenizer, test_sft.ROWS)).backward()
    assert set(seen) == {("linear_grpo_loss", FINER), ("linear_logps", FINE)}
    for call in (
        lambda: test_trainer.make_config(tmp_path, column_tolerance=1.0),
        lambda: sft.SFTTrainer(model, args, examples, tokenizer, column_tolerance=1.0),
    ):
        with pytest.raises(ValueError, match=r"column_tolerance: expected a number in \[0, 1\)"):
            call()
