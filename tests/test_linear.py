"""linear_grpo_loss on every backend, against the reference and TRL in float64; what it skips, holds and refuses."""

import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from cases import (
    LEVELS,
    OPTIONS,
    TRL_LOSS_TYPES,
    assert_close,
    linear_loss_and_grads,
    linear_truth,
    loss_and_grad,
    make_linear_inputs,
    objective_for,
    pack,
    rel_norm,
    softcap_on,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo import (
    LinearGRPOLoss,
    Objective,
    backends,
    grpo_loss,
    linear_grpo_loss,
    linear_grpo_loss_reference,
    linear_logps,
)
from fastgrpo.backends import cpu
from fastgrpo.batch import inputs
from fastgrpo.engine import gemm, projection
from fastgrpo.objective import LOSS_TYPES
from fastgrpo.reference import project

TABLE = list(itertools.product(LOSS_TYPES, LEVELS, ("plain", "old", "beta", "beta-old")))


def some_rows(ids):
    """A chunk that holds one or two of a case's sequences, which are T, T-1, T-2 tokens long."""
    return ids.shape[1] * 5 // 3


def assert_agrees(got, want, rel, packed_by=None):
    """Output and gradients; of a packed batch when the mask that packed it is given."""
    (output, *grads), (true, *true_grads) = got, want
    rows = (lambda x: x) if packed_by is None else (lambda x: x[packed_by])
    assert_close(output.loss, true.loss, rel, "loss")
    assert_close(grads[0], rows(true_grads[0]), rel, "dhidden")
    for name, grad, true_grad in zip(("dweight", "dbias"), grads[1:], true_grads[1:], strict=False):
        assert_close(grad, true_grad, rel, name)
    assert_close(output.per_token_logps, rows(true.per_token_logps), rel, "logps")
    assert_close(output.entropies, rows(true.entropies), rel, "entropies")
    assert set(output.metrics) == set(true.metrics)
    for name, value in true.metrics.items():
        if packed_by is not None and name == "vespo/phi_seq_mean":
            continue  # a sequence without rows has no phi to count when packed
        assert output.metrics[name].item() == pytest.approx(value.item(), rel=2e-5, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("loss_type, level, option", TABLE)
def test_parity(loss_type, level, option, backend, device):
    """The loss from logits' table, loss type x level x beta x old: padded and packed, in one chunk and in several."""
    options, extras = OPTIONS[option]
    objective = objective_for(loss_type, level, options)
    hidden, weight, ids, kwargs = make_linear_inputs(extras, seed=3, device=device, backend=backend)
    want = linear_truth(hidden, weight, ids, objective=objective, **kwargs)
    if level != "sequence_token":
        _assert_trl_agrees(want, hidden, weight, ids, objective, kwargs)
    assert want[1].norm() > 1e-3 and want[2].norm() > 1e-3
    call = dict(objective=objective, backend=backend)
    rel = 2e-5 if loss_type == "vespo" else 1e-5  # exp(k log w - λ w) multiplies the rounding of the logps
    chunk_size = some_rows(ids)
    for chunk in (None, chunk_size, 2) if backend != "triton" else (chunk_size,):  # 2: less than a sequence
        call["chunk_size"] = chunk
        got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **kwargs)
        assert_agrees(got, want, rel)
    mask = kwargs.pop("completion_mask").bool()
    cu_seqlens, packed = pack(mask, dict(hidden=hidden, ids=ids, **kwargs))
    hidden, ids = packed.pop("hidden"), packed.pop("ids")
    call |= dict(chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **packed)
    assert_agrees(got, want, rel, packed_by=mask.cpu())


def _assert_trl_agrees(want, hidden, weight, ids, objective, kwargs):
    if objective.loss_type not in TRL_LOSS_TYPES:
        return
    pytest.importorskip("trl", reason="TRL is the oracle (pip install '.[test]')")
    from fastgrpo.bench.trl_loss import trl_loss_of_logits

    leaves = [x.cpu().double().requires_grad_() for x in (hidden, weight)]
    loss = trl_loss_of_logits(objective, project(*leaves), ids, **kwargs)
    assert_close(loss, want[0].loss, 1e-9, "TRL's loss")
    for grad, true in zip(torch.autograd.grad(loss, leaves), want[1:], strict=True):
        assert_close(grad, true, 1e-8, "TRL's gradient")


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("plain", "old", "beta", "beta-old")])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_options(level, loss_type, option, backend, device):
    if backend == "triton" and (loss_type in ("dapo", "sapo") or level == "sequence"):
        pytest.skip("the kernels of the other cases, which the interpreter would only take its time for again")
    options, extras = OPTIONS[option]
    objective = objective_for(loss_type, level, options)
    hidden, weight, ids, kwargs = make_linear_inputs(extras, seed=5, device=device, backend=backend)
    call = dict(objective=objective, loss_scale=0.5, **kwargs)
    want = linear_truth(hidden, weight, ids, 2.5, **call)
    for chunk_size in (None, some_rows(ids), 2):
        got = linear_loss_and_grads(
            linear_grpo_loss, hidden, weight, ids, 2.5, backend=backend, chunk_size=chunk_size, **call
        )
        assert_agrees(got, want, 3e-5)  # the loss is a sum that nearly cancels


HEADS = {
    "bias": dict(bias=True),
    "scale": dict(logit_scale=0.3),
    "softcap": dict(softcap=4.0),
    "temperature": dict(temperature=0.7),
    "temperature-per-sequence": dict(temperature="sequence"),
    "temperature-per-token": dict(temperature="token"),
    "padded-vocabulary": dict(vocab_size=50),
    "all": dict(bias=True, logit_scale=1.5, softcap=3.0, temperature="token", vocab_size=50),
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", HEADS)
def test_head_options(name, level, backend, device):
    torch.manual_seed(0)
    objective = objective_for("grpo", level, dict(beta=0.1, entropy_coef=0.02))
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), device=device, backend=backend)
    head = dict(HEADS[name])
    if "softcap" in head:
        head["softcap"] = softcap_on(backend, head["softcap"])
    if head.pop("bias", False):
        head["bias"] = torch.randn(len(weight), device=device)
    if (temperature := head.get("temperature")) in ("sequence", "token"):
        shape = ids.shape if temperature == "token" else ids.shape[:1]
        head["temperature"] = (torch.rand(shape) + 0.5).to(device)
    ids = ids.clamp(max=head.get("vocab_size", len(weight)) - 1)
    want = linear_truth(hidden, weight, ids, objective=objective, **head, **kwargs)
    for chunk_size in (None, some_rows(ids)):
        call = dict(objective=objective, backend=backend, chunk_size=chunk_size, **head)
        got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **kwargs)
        assert_agrees(got, want, 3e-5)  # a sequence's mean nearly cancels
        if "vocab_size" in head:
            assert (got[2][50:] == 0).all()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type, level, softcap", [("dapo", "token", None), ("grpo", "sequence", 5.0)])
def test_half_precision_errs_at_most_twice_as_much(loss_type, level, softcap, dtype, cut, backend, device):
    objective = objective_for(loss_type, level, dict(beta=0.1, entropy_coef=0.01))
    hidden, weight, ids, kwargs = make_linear_inputs(
        ("old", "ref"), vocab=130, dtype=dtype, device=device, backend=backend
    )
    softcap = softcap_on(backend, softcap)
    call = dict(objective=objective, softcap=softcap, **kwargs)
    want = linear_truth(hidden, weight, ids, **call)

    def plain(hidden, weight, ids, softcap, **kw):  # logits in half precision, fp32 from there on
        logits = project(hidden, weight).float()
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return linear_grpo_loss_reference(logits, torch.eye(len(weight), device=logits.device), ids, **kw)

    eager = linear_loss_and_grads(plain, hidden, weight, ids, **call)
    call |= dict(backend=backend, chunk_size=some_rows(ids) if cut else None, logits_dtype=dtype)
    got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
    errors = [abs(x[0].loss.item() - want[0].loss.item()) for x in (got, eager)]
    assert errors[0] <= 2 * errors[1] + 1e-5
    for grad, eager_grad, true in zip(got[1:], eager[1:], want[1:], strict=True):
        assert grad.dtype == dtype
        assert rel_norm(grad, true) <= 2 * rel_norm(eager_grad, true)


def rounded(hidden, weight):
    """The logits that the head's own GEMM writes in the operands' dtype."""
    logits = torch.empty(*hidden.shape[:2], len(weight), dtype=hidden.dtype)
    gemm.product(hidden.flatten(0, 1), weight.t(), logits.view(-1, len(weight)))
    return logits


@pytest.mark.parametrize("chunks", [1, 2, 256])
def test_dweight_in_bf16_is_as_accurate_in_many_chunks_as_in_one(chunks):
    """Against the exact product of the same dL/dlogits; the rounding of the result alone is 1.6e-3."""
    hidden, weight, ids, kwargs = make_linear_inputs(
        ("old",), batch=16, length=32, vocab=200, width=64, dtype=torch.bfloat16
    )
    kwargs["completion_mask"] = torch.ones_like(ids)
    for backend in ("torch", "cpu"):
        if backends.get(backend).unavailable() is None:
            _, d_logits = loss_and_grad(grpo_loss, rounded(hidden, weight), ids, backend=backend, **kwargs)
            want = d_logits.flatten(0, 1).double().T @ hidden.flatten(0, 1).double()
            call = dict(chunk_size=512 // chunks, backend=backend, logits_dtype=torch.bfloat16, **kwargs)
            _, _, got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
            assert rel_norm(got, want) <= 2.5e-3


def test_grad_scaler_keeps_small_fp16_gradients(backend, device):
    """With a loss scale of 2^16, gradients far below fp16's smallest number arrive, also beside an entropy bonus."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), dtype=torch.float16, device=device, backend=backend)
    kwargs["num_items_in_batch"] = 1e6
    for level, chunk_size in itertools.product(("token", "sequence"), (None, some_rows(ids))):
        call = dict(objective=objective_for("dapo", level, dict(entropy_coef=1e-6)), **kwargs)
        _, *want = linear_truth(hidden, weight, ids, 65536.0, **call)
        call |= dict(backend=backend, chunk_size=chunk_size)
        _, *got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, 65536.0, **call)
        assert max(rel_norm(a, b) for a, b in zip(got, want, strict=True)) < 4e-3


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_fp16_keeps_its_range_whatever_the_advantages_are(size):
    """Small probabilities times small advantages, and large ones: as good as fp16 logits and a GradScaler."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), vocab=20_000, batch=2, dtype=torch.float16)
    kwargs["advantages"] = torch.tensor([1.0, -2.0]) * size
    for objective in (Objective(), Objective(loss_type="grpo")):
        call = dict(objective=objective, backend="torch", **kwargs)
        upstream = 65536.0 if size < 1 else 1.0
        _, d_logits = loss_and_grad(grpo_loss, rounded(hidden, weight), ids, upstream, **call)
        want = (d_logits.double() @ weight.double(), d_logits.flatten(0, 1).double().T @ hidden.flatten(0, 1).double())
        call["logits_dtype"] = torch.float16
        _, *got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, upstream, **call)
        assert max(rel_norm(a, b) for a, b in zip(got, want, strict=True)) < 2e-3


class Spy:
    """Counts rows and FLOPs of the GEMMs."""

    def __init__(self, monkeypatch):
        self.flops, self.projected, self.learned, self.casts = 0, 0, 0, 0
        product, project, add = projection.product, projection.Projection.project, projection.Gradients.add_weight
        head_stats = cpu.head_stats

        def spy_product(a, b, out, **options):
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            product(a, b, out, **options)

        def spy_project(this, *part):
            result = project(this, *part)
            self.projected += result.shape[1]
            return result

        def spy_add(this, dz, h):
            self.learned += len(h)
            return add(this, dz, h)

        def spy_head_stats(h, weight, *args, **options):
            self.flops += 2 * h.numel() * len(weight)
            self.projected += len(h)
            return head_stats(h, weight, *args, **options)

        monkeypatch.setattr(cpu, "head_stats", spy_head_stats)
        monkeypatch.setattr(projection, "product", spy_product)
        monkeypatch.setattr(projection.Projection, "project", spy_project)
        monkeypatch.setattr(projection.Gradients, "add_weight", spy_add)

    def take(self):
        seen = (self.projected, self.learned, self.flops)
        self.flops = self.projected = self.learned = 0
        return seen


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rows_that_do_not_count_enter_no_gemm(level, monkeypatch, backend, device):
    """Masked rows nowhere, rows of advantage 0 only where their statistics are wanted; FLOPs counted."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    mask = kwargs["completion_mask"]
    kwargs["advantages"][1] = 0.0
    n, loss_rows, learners = ids.numel(), int(mask.sum()), int(mask.sum() - mask[1].sum())
    objective, hv = objective_for("grpo", level, {}), hidden.shape[-1] * len(weight)
    spy = Spy(monkeypatch)
    for chunk_size in (None, some_rows(ids)):
        call = dict(objective=objective, backend=backend, chunk_size=chunk_size, **kwargs)
        want = linear_truth(hidden, weight, ids, objective=objective, **kwargs)
        spy.take()
        got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
        assert spy.take() == (loss_rows, learners, 2 * loss_rows * hv + 4 * learners * hv)
        assert_agrees(got, want, 1e-5)
        quiet = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, return_stats=False, **call)
        assert spy.take() == (learners, learners, 6 * learners * hv)
        assert quiet[0][1:] == (None,) * 4
        for a, b in zip((quiet[0].loss, *quiet[1:]), (want[0].loss, *want[1:]), strict=True):
            assert_close(a, b, 1e-5)
        leaf = hidden.clone().requires_grad_()
        linear_grpo_loss(leaf, weight, ids, **call).loss.backward()
        assert spy.take() == (loss_rows, learners, 2 * (loss_rows + learners) * hv)  # a frozen weight
        assert_close(leaf.grad, want[1], 1e-5)
        with torch.no_grad():
            assert_close(linear_grpo_loss(hidden, weight, ids, **call).loss, want[0].loss, 1e-5)
        assert spy.take() == (loss_rows, 0, 2 * loss_rows * hv)
    everything = {k: v for k, v in kwargs.items() if k != "completion_mask"}
    everything["advantages"] = torch.ones(len(ids), device=device)
    linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, objective=objective, backend=backend, **everything)
    assert spy.take()[:2] == (n, n)


def test_skipping_changes_nothing_but_rounding(backend, device):
    """An advantage too small to move anything keeps its rows in the pass: the same loss and gradients."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    for level in LEVELS:
        call = dict(objective=objective_for("grpo", level, {}), backend=backend, chunk_size=some_rows(ids), **kwargs)
        results = []
        for nothing in (0.0, 1e-30):
            call["advantages"] = torch.where(torch.arange(len(ids), device=device) == 1, nothing, kwargs["advantages"])
            output, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
            results.append((output.loss, output.per_token_logps, *grads))
        for skipped, kept in zip(*results, strict=True):
            assert_close(skipped, kept, 2e-6)


def test_recomputed_gradients_skip_rows_too(monkeypatch, backend, device):
    """Where logits are made twice, rows whose coefficient came out zero are not made the second time."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    objective = Objective(top_entropy_quantile=0.3)
    want = linear_truth(hidden, weight, ids, objective=objective, **kwargs)
    spy = Spy(monkeypatch)
    call = dict(objective=objective, backend=backend, chunk_size=some_rows(ids), **kwargs)
    got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
    loss_rows, kept = int(kwargs["completion_mask"].sum()), int((want[1].abs().sum(-1) > 0).sum())
    assert 0 < kept < loss_rows / 2
    assert spy.take()[:2] == (loss_rows + kept, kept)
    assert_agrees(got, want, 1e-5)


class Launches(TorchDispatchMode):
    """Names the operations of a call that would be kernels on a GPU: all but views, empty results and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        made = [x for x in (results if isinstance(results, tuple) else [results]) if isinstance(x, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        free = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift_fresh")
        if not view and any(x.numel() for x in made) and not name.startswith(free):
            self.names.append(name)
        return results


@pytest.mark.parametrize(
    ("options", "before", "around"),  # before the first GEMM, and in all but the GEMMs and the kernels of the backend
    [(dict(), 21, 47), (dict(return_stats=False), 21, 25), (dict(beta=0.04, entropy_coef=0.01), 24, 56)],
)
def test_few_small_kernels_around_the_gemms(options, before, around, monkeypatch):
    """The host needs 5 to 10 microseconds for each. One of them is a CPU's alone: the zeros in dW."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), dtype=torch.bfloat16)
    kwargs |= {key: options[key] for key in ("return_stats",) if key in options}
    objective = Objective(**{key: value for key, value in options.items() if key != "return_stats"})
    monkeypatch.setattr(inputs, "values_can_be_checked", lambda x: False)  # as on a GPU
    product = projection.product
    with Launches() as launches:

        def counted(*args, **options):  # one kernel, whatever makes it up here
            before = len(launches.names)
            product(*args, **options)
            launches.names[before:] = ["gemm"]

        monkeypatch.setattr(projection, "product", counted)
        linear_grpo_loss(hidden.requires_grad_(), weight.requires_grad_(), ids, objective=objective, **kwargs)
    gemms = [i for i, name in enumerate(launches.names) if name == "gemm"]
    assert len(gemms) == 3
    assert gemms[0] <= before and len(launches.names) - 3 <= around, launches.names


def test_nan_in_rows_that_are_left_out_reaches_nothing(backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), device=device, backend=backend)
    masked = kwargs["completion_mask"] == 0
    poisoned = torch.where(masked[..., None], torch.nan, hidden)
    dirty = {k: torch.where(masked, torch.nan, v) if "logps" in k else v for k, v in kwargs.items()}
    for level, chunk_size in itertools.product(("token", "sequence"), (None, some_rows(ids), 2)):
        objective = objective_for("grpo", level, dict(beta=0.1, entropy_coef=0.1))
        call = dict(objective=objective, backend=backend, chunk_size=chunk_size)
        want = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **kwargs)
        got = linear_loss_and_grads(linear_grpo_loss, poisoned, weight, ids, **call, **dirty)
        for a, b in zip((got[0].loss, *got[1:]), (want[0].loss, *want[1:]), strict=True):
            assert torch.equal(a, b)
        assert (got[1][masked] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_upstream_gradients(level, backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), device=device, backend=backend)
    objective = objective_for("grpo", level, dict(beta=0.1))
    for upstream in (1.0, 0.0, -3.5, 65536.0, torch.tensor(0.25, device=device)):
        want = linear_truth(hidden, weight, ids, float(upstream), objective=objective, **kwargs)
        got = linear_loss_and_grads(
            linear_grpo_loss, hidden, weight, ids, upstream, objective=objective, backend=backend, **kwargs
        )
        assert_agrees(got, want, 1e-5)


def test_gradients_that_nobody_asks_for(backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    bias = torch.zeros(len(weight), device=device)
    _, *want = linear_truth(hidden, weight, ids, bias=bias, **kwargs)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight, bias), wanted, strict=True)]
        loss = linear_grpo_loss(
            *leaves[:2], ids, bias=leaves[2], backend=backend, chunk_size=some_rows(ids), **kwargs
        ).loss
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for leaf, need, true in zip(leaves, wanted, want, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                assert_close(leaf.grad, true, 1e-5)


def test_tied_weights_collect_both_gradients(backend, device):
    """A weight that is also the embedding of what leads to hidden."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)

    def grad(function, weight, **options):
        leaf = weight.clone().requires_grad_()
        function(torch.nn.functional.embedding(ids, leaf).tanh(), leaf, ids, **options, **kwargs).loss.backward()
        return leaf.grad

    want = grad(linear_grpo_loss_reference, weight.double())
    assert_close(grad(linear_grpo_loss, weight, backend=backend, chunk_size=some_rows(ids)), want, 1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_autocast_casts_the_weight_once(cut, monkeypatch, backend, device):
    """fp32 weights and hidden states under autocast: the numbers of bf16 inputs, fp32 gradients."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    hidden, weight = hidden.bfloat16().float(), weight.bfloat16().float()
    call = dict(backend=backend, chunk_size=some_rows(ids) if cut else None, **kwargs)
    want = linear_loss_and_grads(linear_grpo_loss, hidden.bfloat16(), weight.bfloat16(), ids, **call)
    made, large = [], projection._large
    monkeypatch.setattr(projection, "_large", lambda *a, **k: made.append(a) or large(*a, **k))
    with torch.autocast(device, torch.bfloat16):
        got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
    assert sum(a[:3] == (*weight.shape, torch.bfloat16) for a in made) == 1
    assert torch.equal(got[0].loss, want[0].loss)
    for grad, half in zip(got[1:], want[1:], strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, half, 2**-7)


def test_strided_hidden_states(backend, device):
    """hidden[:, -T-1:-1] of a longer sequence, batches along the second dimension; rows to leave out, and none."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    b, t, width = hidden.shape
    for mask in (kwargs.pop("completion_mask"), None):
        want = linear_truth(hidden, weight, ids, completion_mask=mask, **kwargs)
        for storage, view in (
            (torch.randn(b, 2 * t, width, device=device), lambda x: x[:, -t - 1 : -1]),
            (torch.randn(t, b, width, device=device), lambda x: x.transpose(0, 1)),
        ):
            view(storage).copy_(hidden)
            leaf = storage.clone().requires_grad_()
            call = dict(backend=backend, chunk_size=some_rows(ids), completion_mask=mask)
            output = linear_grpo_loss(view(leaf), weight, ids, **call, **kwargs)
            output.loss.backward()
            assert_close(view(leaf.grad), want[1], 1e-5)
            assert_close(output.loss, want[0].loss, 1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_and_all_masked_batches(shape, dtype, backend, device):
    weight = torch.randn(11, 4, dtype=dtype, device=device, requires_grad=True)
    for level, masked in itertools.product(("token", "sequence"), (False, True)):
        size = (3, 5) if masked else shape
        hidden = torch.randn(*size, 4, dtype=dtype, device=device, requires_grad=True)
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        mask = torch.zeros(size, device=device) if masked else None
        advantages = torch.ones(size[0], device=device)
        for chunk_size in (None, 2):
            weight.grad = hidden.grad = None
            call = dict(objective=objective_for("grpo", level, {}), backend=backend, chunk_size=chunk_size)
            output = linear_grpo_loss(hidden, weight, ids, advantages, completion_mask=mask, **call)
            output.loss.backward()
            assert output.loss == 0 and output.per_token_logps.shape == size
            assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_rewards_are_normalised_here_too(backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), batch=4, device=device, backend=backend)
    kwargs |= dict(advantages=None, rewards=torch.tensor([1.0, 0.0, 2.0, 2.0], device=device), num_generations=2)
    for scale_rewards in ("group", "batch", "none"):
        call = dict(scale_rewards=scale_rewards, **kwargs)
        want = linear_truth(hidden, weight, ids, **call)
        got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, backend=backend, **call)
        assert_agrees(got, want, 1e-5)


def test_one_sequence_with_rewards(backend, device):
    """What is one number per sequence has to stand on every row, also when there is one sequence only."""
    hidden, weight, ids, kwargs = make_linear_inputs(("ref",), batch=1, length=5, device=device, backend=backend)
    call = dict(rewards=torch.tensor([1.0], device=device), num_generations=1, objective=Objective(beta=0.1))
    call |= dict(ref_per_token_logps=kwargs["ref_per_token_logps"])
    want = linear_truth(hidden, weight, ids, **call)
    got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, backend=backend, **call)
    assert_agrees(got, want, 1e-5)
    logits = project(hidden, weight)
    for inplace in (False, True):
        output, _ = loss_and_grad(grpo_loss, logits, ids, backend=backend, inplace=inplace, **call)
        assert_close(output.loss, want[0].loss, 1e-5)


def test_float64_goes_through_torch():
    hidden, weight, ids, kwargs = make_linear_inputs(("old",))
    want = linear_truth(hidden, weight, ids, **kwargs)
    for chunk_size in (None, some_rows(ids)):
        _, *grads = linear_loss_and_grads(
            linear_grpo_loss, hidden.double(), weight.double(), ids, chunk_size=chunk_size, **kwargs
        )
        for grad, true in zip(grads, want[1:], strict=True):
            assert_close(grad, true, 1e-12)


def test_a_second_backward_is_refused(backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    leaf = hidden.clone().requires_grad_()
    loss = linear_grpo_loss(leaf, weight, ids, backend=backend, **kwargs).loss
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward.*linear_logps"):
        torch.autograd.grad(loss, leaf)
    for chunk_size in (None, 2):  # made in the forward pass, made in the backward pass
        call = dict(objective=objective_for("grpo", "sequence", {}), chunk_size=chunk_size, backend=backend)
        loss = linear_grpo_loss(leaf, weight, ids, **call, **kwargs).loss
        with pytest.raises(RuntimeError, match="double backward"):
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            grad.sum().backward()


def test_module_holds_objective_and_options(backend, device):
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    objective = Objective(loss_type="grpo")
    call = dict(softcap=softcap_on(backend, 5.0), backend=backend)
    module = LinearGRPOLoss(objective, **call)
    want = linear_grpo_loss(hidden, weight, ids, objective=objective, **call, **kwargs)
    assert torch.equal(module(hidden, weight, ids, **kwargs).loss, want.loss)
    with pytest.raises(ValueError, match="inplace: expected a keyword argument of linear_grpo_loss"):
        LinearGRPOLoss(inplace=True)


PEAK = """
import sys, torch
from fastgrpo import linear_grpo_loss
from fastgrpo.backends import eager
from fastgrpo.engine import head
tokens, logits_dtype, backend, vocab, width = int(sys.argv[1]), *sys.argv[2:], 16001, 32
head.CPU_BYTES, eager._BYTES = 20 << 20, 1 << 20
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
hidden = torch.randn(tokens // 64, 64, width).to(torch.bfloat16).requires_grad_()
weight = torch.randn(vocab, width).to(torch.bfloat16).requires_grad_()
ids = torch.randint(0, vocab, hidden.shape[:2])
def run(n):
    call = dict(backend=backend, logits_dtype=getattr(torch, logits_dtype))
    linear_grpo_loss(hidden[:n], weight, ids[:n], torch.ones(n), **call).loss.backward()
    hidden.grad = weight.grad = None
run(1)  # libraries load
before = peak()
run(len(hidden))
print(peak() - before)
"""


PEAKS = [("bfloat16", "cpu"), ("float32", "cpu"), ("float32", "torch")]  # logits, and a backend that takes them


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("logits_dtype, backend", PEAKS)
def test_peak_memory_does_not_grow_with_the_batch(logits_dtype, backend, tmp_path):
    """In fresh processes, 8 times the rows: one chunk of logits of the same bytes, whatever batch and dtype."""
    if (why := backends.get(backend).unavailable()) is not None:
        pytest.skip(f"backend {backend}: {why}")

    def peak(tokens):
        command = [sys.executable, "-c", PEAK, str(tokens), logits_dtype, backend]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True,
            cwd=tmp_path,  # elsewhere, so that the installed package is the one
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back to the system
        )  # fmt: skip
        return int(done.stdout)

    small, large, buffer = peak(1280), peak(8 * 1280), 20 << 20  # 1280 rows make two full chunks in bf16, four in fp32
    assert 0.9 * buffer <= small < 1.4 * buffer
    assert large - small <= 0.25 * buffer  # dL/dhidden, 1 MB, and row vectors; all logits would be 15 more buffers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_syncs_on_a_gpu():
    """None where nothing is to be dropped, one where a mask or advantages of 0 may drop rows."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old", "ref"), dtype=torch.bfloat16, device="cuda")
    mask = kwargs.pop("completion_mask")

    def syncs(**call):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                linear_grpo_loss(*leaves, ids, chunk_size=some_rows(ids), **call, **kwargs).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in seen)

    for level in ("token", "sequence"):
        objective = objective_for("dapo", level, dict(beta=0.1))
        syncs(objective=objective)  # compiles
        assert syncs(objective=objective) == 0
        assert syncs(objective=objective, completion_mask=mask) == 1


def test_agrees_with_the_loss_from_logits(backend, device):
    """The same objective behind both entries: the loss and the gradient that leads through the logits."""
    hidden, weight, ids, kwargs = make_linear_inputs(("old",), device=device, backend=backend)
    got = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, backend=backend, **kwargs)
    logits = project(hidden, weight)
    output, d_logits = loss_and_grad(grpo_loss, logits, ids, backend=backend, **kwargs)
    assert_close(got[0].loss, output.loss, 1e-6)
    assert_close(got[1], d_logits @ weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_any_strides_of_weight_and_bias(backend, device, dtype):
    """Every second column, every second element, one element for all: as their contiguous copies."""
    gen = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=gen) for s in ((2, 5, 8), (33, 16), (66,)))
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)[:, ::2]
    ids, advantages = torch.randint(33, (2, 5), generator=gen).to(device), torch.ones(2, device=device)
    for given in (bias.to(device)[::2], bias.to(device)[:1].expand(33)):
        results = []
        for w, b in ((weight, given), (weight.contiguous(), given.contiguous())):
            leaves = [x.clone().requires_grad_() for x in (hidden, w, b)]
            call = dict(bias=leaves[2], backend=backend, logits_dtype=torch.float32)
            scored = linear_logps(hidden, w, ids, **call | dict(bias=b))
            linear_grpo_loss(*leaves[:2], ids, advantages, **call).loss.backward()
            results.append((scored, *(x.grad for x in leaves)))
        for got, want in zip(*results, strict=True):
            assert_close(got, want, 1e-5)
