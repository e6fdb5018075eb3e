"""What torch and Python let a caller rely on: saved tensors and their hooks, views, subclasses, signatures."""

import inspect
import subprocess
import sys
import weakref

import pytest
import torch

from fastgrpo import Objective, grpo_loss, linear_grpo_loss, linear_logps, selective_logps

B, T, V, H = 4, 5, 33, 6
SEQUENCE = Objective(loss_type="grpo", importance_sampling_level="sequence")


@pytest.fixture
def x():
    g = torch.Generator().manual_seed(0)
    return dict(
        logits=torch.randn(B, T, V, generator=g),
        hidden=torch.randn(B, T, H, generator=g),
        weight=torch.randn(V, H, generator=g),
        ids=torch.randint(V, (B, T), generator=g),
        advantages=torch.tensor([1.0, -1.0, 0.5, 0.0]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_another_operation_saved_are_not_read_as_their_gradient(x, dtype):
    leaf = x["logits"].to(dtype).requires_grad_()
    logits = leaf * 1
    other = (logits * logits).sum().float()
    loss = grpo_loss(logits, x["ids"], x["advantages"], inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logps_can_be_changed_in_place(x, dtype):
    """Before the backward pass, which reads the logps that there were."""

    def gradients(change):
        hidden = x["hidden"].detach().to(dtype).requires_grad_()
        logits = (hidden @ x["weight"].to(dtype).T).detach().requires_grad_()
        change(linear_logps(hidden, x["weight"].to(dtype), x["ids"])).sum().backward()
        change(selective_logps(logits, x["ids"])).sum().backward()
        found = [hidden.grad, logits.grad]
        for inplace in (False, True):
            leaf = logits.detach().clone().requires_grad_()
            out = grpo_loss(leaf * 1, x["ids"], x["advantages"], inplace=inplace)
            change(out.per_token_logps)
            found += torch.autograd.grad(out.loss, leaf)
        return found

    for got, want in zip(gradients(lambda logps: logps.mul_(2)), gradients(lambda logps: logps * 2), strict=True):
        assert torch.equal(got, want)


def test_logps_of_a_compiled_graph_can_be_changed_in_place(x):
    def gradients(change):
        hidden = x["hidden"].detach().requires_grad_()
        logits = (hidden @ x["weight"].T).detach().requires_grad_()
        scored = torch.compile(
            lambda: (linear_logps(hidden, x["weight"], x["ids"]), selective_logps(logits, x["ids"])),
            fullgraph=True, backend="aot_eager",
        )()  # fmt: skip
        sum(change(logps).sum() for logps in scored).backward()
        return hidden.grad, logits.grad

    for got, want in zip(gradients(lambda logps: logps.mul_(2)), gradients(lambda logps: logps * 2), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("loss", ["logps", "loss"])
def test_backward_frees_a_weight_that_is_made_for_the_call(x, loss):
    hidden, made = x["hidden"].requires_grad_(), x["weight"].requires_grad_() * 1
    gone = weakref.ref(made)
    if loss == "logps":
        out = linear_logps(hidden, made, x["ids"]).sum()
    else:
        out = linear_grpo_loss(hidden, made, x["ids"], x["advantages"], objective=SEQUENCE, chunk_size=3).loss
    del made
    out.backward()
    assert gone() is None


def test_saved_tensor_hooks_decide_which_weight_backward_reads(x):
    """As those of activation offloading and checkpointing do."""
    hidden, made = x["hidden"].requires_grad_(), x["weight"].requires_grad_() * 1
    gone = weakref.ref(made)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = linear_logps(hidden, made, x["ids"]).sum()
    del made
    assert gone() is None
    out.backward()


@pytest.mark.parametrize("length, scored", [(3, 0), (0, 1)], ids=["all masked", "no tokens"])
def test_metrics_have_the_same_names_without_a_loss_token(length, scored):
    """Processes put their metrics side by side by name, and one of them may have a micro-batch without loss tokens."""
    objective = Objective(entropy_coef=0.1)
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.full((2, length), scored)
    hidden, weight = torch.randn(2, length, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    options = dict(completion_mask=mask, objective=objective)
    of_hidden = linear_grpo_loss(hidden, weight, ids, torch.ones(2), **options).metrics
    of_logits = grpo_loss(torch.randn(2, length, 9, requires_grad=True), ids, torch.ones(2), **options).metrics
    assert of_hidden.keys() == of_logits.keys()
    assert of_hidden["policy_loss"] == 0


DTENSOR = """
import sys, tempfile, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from fastgrpo import grpo_loss, selective_logps
store = dist.FileStore(tempfile.mktemp(), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
logits, ids, a = torch.randn(2, 3, 17), torch.zeros(2, 3, dtype=torch.long), torch.tensor([1.0, -1.0])
spread = lambda x: distribute_tensor(x, mesh, [Replicate()])
calls = dict(
    logps=lambda: selective_logps(spread(logits), ids),
    loss=lambda: grpo_loss(spread(logits), ids, a),
    advantages=lambda: grpo_loss(logits, ids, spread(a)),
    old=lambda: grpo_loss(logits, ids, a, old_per_token_logps=spread(torch.zeros(2, 3))),
)
try:
    calls[sys.argv[1]]()
except (RuntimeError, ValueError) as error:
    print("refused:", error)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("call", ["logps", "loss", "advantages", "old"])
def test_a_distributed_tensor_is_refused(call):
    """It has no memory of its own, which the kernels would read."""
    done = subprocess.run([sys.executable, "-c", DTENSOR, call], capture_output=True, text=True)
    assert done.returncode == 0 and "refused:" in done.stdout, (done.returncode, done.stdout, done.stderr[-300:])


def test_a_view_that_negates_is_read_as_negated(x):
    got = selective_logps(torch._neg_view(x["logits"]), x["ids"])
    assert torch.equal(got, selective_logps(-x["logits"], x["ids"]))


@pytest.mark.parametrize("function", [grpo_loss, linear_grpo_loss])
def test_an_unknown_keyword_is_refused_by_the_name_of_the_function(function, x):
    tensors = [x["logits"]] if function is grpo_loss else [x["hidden"], x["weight"]]
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'foo'"):
        function(*tensors, x["ids"], x["advantages"], foo=1)


def test_the_order_of_a_signature():
    names = list(inspect.signature(grpo_loss).parameters)
    assert names.index("temperature") < names.index("cu_seqlens") < names.index("objective")


def test_rows_are_projected_in_their_own_order_where_none_learns(x, monkeypatch):
    """Without gradients, rows of advantage 0 are rows like others: no other order, and no count of them."""
    from fastgrpo.engine import plan

    asked = []
    monkeypatch.setattr(plan, "_count", lambda n, roles, layout=None: asked.append(roles) or plan._Counts(n, n, []))
    linear_grpo_loss(x["hidden"], x["weight"], x["ids"], x["advantages"])
    assert all(roles.alike for roles in asked)
