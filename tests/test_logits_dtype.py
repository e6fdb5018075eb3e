"""fp32 logits of bf16 and fp16 operands: errors against float64 on the same operands, random and realistic heads."""

import functools
import itertools

import pytest
import torch
from cases import linear_loss_and_grads, linear_truth, objective_for, rel_norm, softcap_on

from fastgrpo import Objective, backends, linear_grpo_loss, linear_logps
from fastgrpo.engine import head, projection
from fastgrpo.reference import project

DTYPES = (torch.bfloat16, torch.float16)
# relative errors of gradients that are stored in the dtype, and of fp32 ones: two roundings of 1.7e-3 or 2e-4, and one
STORED, KEPT = ({torch.bfloat16: x, torch.float16: y} for x, y in ((3e-3, 4e-4), (2e-3, 2.6e-4)))
B, T, V, H = 4, 24, 1500, 96  # V is not a multiple of 64


# those that are quick everywhere; Triton's interpreter has a test of its own, with few rows
on_backends = pytest.mark.parametrize("backend", ["torch", "cpu", "cuda"], indirect=True)


def random_head(gen):
    hidden, weight = torch.randn(B, T, H, generator=gen), torch.randn(V, H, generator=gen) * 3 / H**0.5
    return hidden, weight, torch.randint(0, V - 40, (B, T), generator=gen)


def realistic_head(gen):
    """Logits to ±40; most of a row's mass lies on its target, or on it and a few others, as a policy's does."""
    weight = torch.randn(V, H, generator=gen)
    weight = weight / weight.norm(dim=1, keepdim=True)
    ids, other, never = (torch.randint(0, V - 40, (B, T), generator=gen) for _ in range(3))
    gap = torch.linspace(-3, 12, B * T)[torch.randperm(B * T, generator=gen)].view(B, T, 1)  # ln(p / p of the other)
    hidden = 33 * weight[ids] + (33 - gap) * weight[other] - 33 * weight[never]
    return hidden, weight, ids


HEADS = {"random": random_head, "realistic": realistic_head}
OPTIONS = {
    "plain": {},
    "bias": dict(bias=True),
    "softcap": dict(softcap=30.0),
    "scale": dict(logit_scale=0.7),
    "padded": dict(vocab_size=V - 40),
    "temperature": dict(temperature=True),
    "all": dict(bias=True, softcap=30.0, logit_scale=1.3, vocab_size=V - 40, temperature=True),
}


def case(make, option, dtype, *, level="token", backend="torch", device="cpu"):
    """(hidden, weight, ids, options of the head, options of the loss), the operands rounded to the dtype."""
    place = functools.partial(torch.Tensor.to, device=device)
    gen = torch.Generator().manual_seed(11)
    hidden, weight, ids = make(gen)
    hidden, weight, ids, options = place(hidden.to(dtype)), place(weight.to(dtype)), place(ids), dict(OPTIONS[option])
    if "softcap" in options:
        options["softcap"] = softcap_on(backend, options["softcap"])
    if options.pop("bias", False):
        options["bias"] = place(torch.randn(V, generator=gen).to(dtype))
    if options.pop("temperature", False):
        options["temperature"] = place(torch.rand(B, T, generator=gen) * 0.5 + 0.75)
    mask = torch.ones(B, T, device=device)
    mask[1, T // 2 :] = 0
    now = linear_truth(hidden, weight, ids, advantages=torch.ones(B, device=device), completion_mask=mask, **options)[
        0
    ]
    loss = dict(
        completion_mask=mask,
        advantages=place(torch.randn(B, generator=gen)),
        old_per_token_logps=(now.per_token_logps.detach() + 0.1 * place(torch.randn(B, T, generator=gen))).float(),
        objective=objective_for("grpo", level, dict(entropy_coef=0.01)),
    )
    return hidden, weight, ids, options, loss


def worst(got, want):
    return float((got.detach().double() - want.detach().double()).abs().max())


def assert_exact(grads, true_grads, most):
    for name, grad, true in zip(("dhidden", "dweight", "dbias"), grads, true_grads, strict=False):
        assert rel_norm(grad, true) <= most, name


@pytest.mark.parametrize("chunk_size", [None, 30])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@on_backends
def test_loss(backend, device, dtype, name, option, chunk_size):
    """Gradients made in the forward pass, in one chunk and in several, of tokens and of sequences."""
    for level in ("token", "sequence"):
        hidden, weight, ids, options, loss = case(
            HEADS[name], option, dtype, level=level, backend=backend, device=device
        )
        output, *want = linear_truth(hidden, weight, ids, **options, **loss)
        call = dict(backend=backend, chunk_size=chunk_size, logits_dtype=torch.float32, **options, **loss)
        got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
        assert worst(got.per_token_logps, output.per_token_logps) <= 2e-5
        assert worst(got.entropies, output.entropies) <= 2e-5
        assert got.loss.item() == pytest.approx(output.loss.item(), rel=2e-5, abs=2e-5)
        assert all(grad.dtype == dtype for grad in grads)
        assert_exact(grads, want, STORED[dtype])


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@on_backends
def test_gradients_of_fp32_tensors_leave_in_fp32(backend, device, dtype, option):
    """Under autocast, with fp32 hidden states, weight or both: one rounding, that of dL/dlogits, as in no chunk."""
    masters = {"both": (True, True), "weight": (False, True), "hidden": (True, False)}
    for (name, make), (which, wide) in itertools.product(HEADS.items(), masters.items()):
        *tensors, ids, options, loss = case(make, option, dtype, backend=backend, device=device)
        if "bias" in options:
            options["bias"] = options["bias"].float() * 1.001  # no number of the dtype; it is not rounded to it
        output, *want = linear_truth(*tensors, ids, **options, **loss)
        tensors = [x.float() if kept else x for x, kept in zip(tensors, wide, strict=True)]
        for chunk_size in (None, 30):
            call = dict(backend=backend, chunk_size=chunk_size, logits_dtype=torch.float32, **options, **loss)
            with torch.autocast(device, dtype):
                got, *grads = linear_loss_and_grads(linear_grpo_loss, *tensors, ids, **call)
            assert worst(got.per_token_logps, output.per_token_logps) <= 2e-5
            for grad, true, kept in zip(grads, want[:2], wide, strict=False):
                assert grad.dtype == (torch.float32 if kept else dtype)
                assert rel_norm(grad, true) <= (KEPT if kept else STORED)[dtype], (name, which, chunk_size)


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@on_backends
def test_logps(backend, device, dtype, name, option):
    """Gradients that project again, from upstream gradients of logps and entropies; operands' and fp32 gradients."""
    hidden, weight, ids, options, loss = case(HEADS[name], option, dtype, backend=backend, device=device)
    ups = torch.randn(2, B, T, generator=torch.Generator().manual_seed(5)).to(device)

    def run(call, tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        logps, entropies = call(*leaves)
        ((logps * ups[0]).sum() + (entropies * ups[1]).sum()).backward()
        return logps, entropies, *(leaf.grad for leaf in leaves)

    def exact(hidden, weight):
        made = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        vocab, temperature = made.pop("vocab_size", V), made.pop("temperature", torch.ones(B, T, device=device))
        bias = made.pop("bias", torch.zeros(V, device=device).double())
        z = project(hidden, weight[:vocab], bias[:vocab], **made) / temperature[..., None]
        logps = z.log_softmax(-1)
        return logps.gather(-1, ids[..., None])[..., 0], -(logps.exp() * logps).sum(-1)

    want = run(exact, (hidden.double(), weight.double()))
    for autocast, chunk_size in itertools.product((False, True), (None, 30)):
        call = dict(return_entropy=True, backend=backend, chunk_size=chunk_size, logits_dtype=torch.float32, **options)
        tensors = [x.float() if autocast else x for x in (hidden, weight)]
        with torch.autocast(device, dtype, enabled=autocast):
            got = run(functools.partial(linear_logps, completion_ids=ids, **call), tensors)
        assert max(worst(got[0], want[0]), worst(got[1], want[1])) <= 2e-5
        for grad, true in zip(got[2:], want[2:], strict=True):
            assert rel_norm(grad, true) <= (KEPT if autocast else STORED)[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@on_backends
def test_rounded_logits_are_the_error_that_goes(backend, device, dtype):
    """On a realistic head in bf16, rounding the logits costs ten times as much as all that is left."""
    hidden, weight, ids, options, loss = case(realistic_head, "plain", dtype, backend=backend, device=device)
    output, *want = linear_truth(hidden, weight, ids, **loss)
    errors = []
    for logits_dtype in (dtype, torch.float32):
        call = dict(backend=backend, logits_dtype=logits_dtype, **loss)
        got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call)
        logps = worst(got.per_token_logps, output.per_token_logps)
        errors.append([logps, *(rel_norm(a, b) for a, b in zip(grads, want, strict=True))])
    rounded, exact = errors
    assert rounded[0] > 100 * exact[0]
    assert all(a > (8 if dtype == torch.bfloat16 else 2) * b for a, b in zip(rounded[1:], exact[1:], strict=True))


@on_backends
def test_a_frozen_weight_and_frozen_hidden_states(backend, device):
    hidden, weight, ids, _, loss = case(realistic_head, "plain", torch.bfloat16, backend=backend, device=device)
    _, *want = linear_truth(hidden, weight, ids, **loss)
    for which in (0, 1):
        leaves = [x.clone().requires_grad_(i == which) for i, x in enumerate((hidden, weight))]
        call = dict(backend=backend, chunk_size=30, logits_dtype=torch.float32, **loss)
        linear_grpo_loss(*leaves, ids, **call).loss.backward()
        assert leaves[1 - which].grad is None
        assert rel_norm(leaves[which].grad, want[which]) <= 3e-3


@pytest.mark.parametrize("name", HEADS)
@on_backends
def test_the_ratio_of_a_first_step_is_1(backend, device, name):
    """Old logps scored one completion at a time, in chunks and row by row: within 1e-5 of those in the loss."""
    hidden, weight, ids, _, loss = case(HEADS[name], "plain", torch.bfloat16, backend=backend, device=device)
    call = dict(backend=backend, logits_dtype=torch.float32)
    for size, chunk_size in ((1, None), (2, 7), (B, 30), (1, 1)):  # one row alone takes another order of sums
        with torch.no_grad():
            parts = zip(hidden.split(size), ids.split(size), strict=True)
            old = torch.cat([linear_logps(h, weight, i, chunk_size=chunk_size, **call) for h, i in parts])
        leaf = hidden.clone().requires_grad_()
        now = linear_grpo_loss(leaf, weight, ids, **call, **loss | dict(old_per_token_logps=old)).per_token_logps
        ratio = (now - old)[loss["completion_mask"].bool()].double().exp()
        assert (ratio - 1).abs().max() <= 1e-5


def test_one_buffer_holds_logits_and_gradients(monkeypatch):
    """The gradient of a row lies in the second half of its memory, as far from its start as a sweep needs it."""
    hidden, weight, _, _, _ = case(random_head, "plain", torch.bfloat16)
    for logits_dtype in (torch.float32, torch.bfloat16):
        made = head.make_head(hidden, weight, logits_dtype=logits_dtype)
        held = projection.Projection(hidden, made, 10)
        logits, d_logits = held.logits(slice(0, 7)), held.d_logits()
        assert logits.dtype == logits_dtype and d_logits.dtype == torch.bfloat16
        assert logits.shape == d_logits.shape == (1, 7, V) and d_logits.stride(-1) == 1
        assert d_logits.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        row = logits.stride(1) * logits.element_size()
        assert row == d_logits.stride(1) * d_logits.element_size() and row % 128 == 0
        between = d_logits.data_ptr() - logits.data_ptr()
        assert between % 128 == 0
        if logits_dtype == torch.bfloat16:
            assert between == 0
        else:
            assert 2 * V <= between <= row - 2 * V


def test_a_chunk_takes_the_bytes_of_its_logits():
    hidden, weight, _, _, _ = case(random_head, "plain", torch.bfloat16)
    fp32, bf16 = (head.make_head(hidden, weight, logits_dtype=x).chunk for x in (torch.float32, torch.bfloat16))
    assert fp32 == head.CPU_BYTES // (4 * V) and bf16 == head.CPU_BYTES // (2 * V)
    with torch.autocast("cpu", torch.bfloat16):
        made = head.make_head(hidden.float(), weight.float(), logits_dtype=torch.float32)
    assert (made.dtype, made.logits_dtype, made.chunk) == (torch.bfloat16, torch.float32, fp32)


def test_the_backend_is_chosen_by_the_logits(monkeypatch):
    hidden, weight, _, _, _ = case(random_head, "plain", torch.bfloat16)
    asked = []
    monkeypatch.setattr(head.backends, "select", lambda x, name, dtype, **rest: asked.append(dtype) or "torch")
    for logits_dtype in (torch.float32, torch.bfloat16):
        head.make_head(hidden, weight, logits_dtype=logits_dtype)
    assert asked == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("level", ["token", "sequence"])
@on_backends
def test_compile_fullgraph(backend, device, level):
    hidden, weight, ids, _, loss = case(
        random_head, "plain", torch.bfloat16, level=level, backend=backend, device=device
    )

    def step(hidden, weight, ids, **loss):
        call = dict(backend=backend, chunk_size=50, logits_dtype=torch.float32)
        logps = linear_logps(hidden, weight, ids, **call)
        return linear_grpo_loss(hidden * 1, weight, ids, **call, **loss).loss + 0.1 * logps.mean()

    def grads(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        total = function(*leaves, ids, **loss)
        total.backward()
        return total, *(leaf.grad for leaf in leaves)

    torch._dynamo.reset()
    want, got = grads(step), grads(torch.compile(step, fullgraph=True))
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-6)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == b.dtype and rel_norm(a, b) <= 3e-3  # a sum of two gradients may be rounded once or twice


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton(dtype):
    """One completion: its loss, and logps whose gradients project again."""
    if (why := backends.get("triton").unavailable()) is not None:
        pytest.skip(f"backend triton: {why}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, ids, options, loss = case(realistic_head, "all", dtype, backend="triton", device=device)
    few = slice(1, 2)  # the completion with masked tokens
    hidden, ids, options["temperature"] = hidden[few], ids[few], options["temperature"][few]
    loss = {k: v[few] if isinstance(v, torch.Tensor) else v for k, v in loss.items()}
    output, *want = linear_truth(hidden, weight, ids, **options, **loss)
    call = dict(backend="triton", logits_dtype=torch.float32, **options)
    got, *grads = linear_loss_and_grads(linear_grpo_loss, hidden, weight, ids, **call, **loss)
    assert worst(got.per_token_logps, output.per_token_logps) <= 2e-5
    assert_exact(grads, want, STORED[dtype])
    leaf = hidden.clone().requires_grad_()
    logps = linear_logps(leaf, weight, ids, mask=loss["completion_mask"], **call)
    assert torch.equal(logps, got.per_token_logps)
    true = hidden.double().requires_grad_()
    linear_truth_logps(true, weight.double(), ids, options)[loss["completion_mask"].bool()].sum().backward()
    logps.sum().backward()
    assert rel_norm(leaf.grad, true.grad) <= STORED[dtype]


def linear_truth_logps(hidden, weight, ids, options):
    made = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    vocab, temperature, bias = made.pop("vocab_size"), made.pop("temperature"), made.pop("bias")
    z = project(hidden, weight[:vocab], bias[:vocab], **made) / temperature[..., None]
    return z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def test_an_objective_that_holds_it():
    from fastgrpo import LinearGRPOLoss

    hidden, weight, ids, _, loss = case(random_head, "plain", torch.bfloat16)
    module = LinearGRPOLoss(Objective(), logits_dtype=torch.float32, backend="torch")
    want = linear_grpo_loss(hidden, weight, ids, loss["advantages"], logits_dtype=torch.float32, backend="torch")
    assert torch.equal(module(hidden, weight, ids, loss["advantages"]).loss, want.loss)
    other = module(hidden, weight, ids, loss["advantages"], logits_dtype=torch.bfloat16)
    assert not torch.equal(other.per_token_logps, want.per_token_logps)
