"""A row has the same logp whatever is asked of the cuda backend, so that the ratio of a first update is exactly 1. On
the machine of cuda_host, or on a GPU."""

from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path

import cuda_host
import pytest
import torch
from cases import make_inputs
from cuda_rows import DTYPES, make, rows_of

from fastgrpo import Objective, grpo_loss, linear_grpo_loss, linear_logps, selective_logps
from fastgrpo.backends import Call, Rows, TokenSpec, cuda


def every_way(logits, ids, mask, inv_temperature):
    """{how: Scores or TokenLoss} of all calls that give logps of these rows."""
    rows, n, device = Rows(ids, mask, inv_temperature), ids.numel(), logits.device
    token = rows_of(n, device, advantages=torch.ones(n, device=device))
    base, offset = logits._base, logits.storage_offset()
    found = {}
    for entropy in (False, True):
        found["row_stats", entropy] = cuda.row_stats(logits, rows, want_entropy=entropy)
        for h in (None, torch.ones(n, device=device)):
            same = base.clone().as_strided(logits.shape, logits.stride(), offset)
            apart = base.repeat(2).as_strided(logits.shape, logits.stride(), offset + 64)
            elsewhere = base.repeat(2).as_strided(logits.shape, logits.stride(), offset + 1)  # modulo 16 bytes
            for name, out in (("none", None), ("in place", same), ("apart", apart), ("elsewhere", elsewhere)):
                read = same if out is same else logits
                found[name, entropy, h is None] = cuda.token_loss(
                    read, rows, token._replace(h=h), TokenSpec(), out, want_entropy=entropy
                )
            for half in (torch.bfloat16, torch.float16) if logits.dtype == torch.float32 else ():
                found[half, entropy, h is None] = cuda.token_loss(
                    logits, rows, token._replace(h=h), TokenSpec(), logits.to(half), want_entropy=entropy
                )
    return found


def differing(found):
    """The calls whose logps or lse are not, bit for bit, those of the first."""
    first, *_ = found.values()
    return [how for how, x in found.items() if not (torch.equal(x.logp, first.logp) and torch.equal(x.lse, first.lse))]


# Clusters of 1, 2 and 8 blocks are chosen for these in bf16; no cluster holds the last.
@pytest.mark.parametrize("V, T", [(61, 5), (32_003, 3), (151_936, 1), (1_300_003, 1)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_call_gives_the_same_logps(dtype, V, T, cuda_anywhere):
    assert differing(every_way(*make(1, T, V, dtype, offset=3, device=cuda_anywhere))) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, whose kernels have the room they have")
@pytest.mark.parametrize("first", [False, True], ids=["entropy last", "entropy first"])
@pytest.mark.parametrize("dtype, crowded", [("bf16", 0), ("bf16", 1), *(("fp32", kernel) for kernel in range(6))])
def test_where_one_kernel_has_less_room(dtype, crowded, first, cuda_host_library, tmp_path):
    """If a kernel for such logits, with the entropy or without, or one of a narrow gradient, cannot run clusters of 8,
    none does, whoever asks first."""
    dtype = DTYPES[dtype]
    with cuda_host.backend(Path(shutil.copy(cuda_host_library, tmp_path))) as machine:
        machine.fastgrpo_host_largest_cluster_of(crowded, 4)
        logits, ids, mask, inv_temperature = make(1, 12 if dtype == torch.bfloat16 else 2, 100_003, dtype)
        assert cuda._choices.get().cluster == 0
        scores = [cuda.row_stats(logits, Rows(ids, mask, inv_temperature), want_entropy=e) for e in (first, not first)]
        assert torch.equal(scores[0].logp, scores[1].logp) and torch.equal(scores[0].lse, scores[1].lse)
        assert cuda.shape(100_003, dtype, 0).cluster == 4


@pytest.fixture
def auto_is_cuda(cuda_anywhere, monkeypatch):
    """backend="auto" finds an NVIDIA GPU; gives the device."""
    if cuda_anywhere == "cpu":
        module = sys.modules["fastgrpo.backends.select"]
        chosen = module._select
        monkeypatch.setattr(module, "_select", lambda backend, device, *call: chosen(backend, "cuda", *call))
        monkeypatch.setattr(cuda, "_DEVICE_TYPE", "cuda")
    assert cuda.refuses(Call("cuda", 0, torch.bfloat16, 1003, one_pass=True)) is None
    return cuda_anywhere


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_first_update_has_ratio_one_with_auto(level, dtype, auto_is_cuda):
    """From logits and from hidden states, in place or not, with statistics of the policy or without."""
    logits, ids, kwargs = make_inputs(vocab=1003, dtype=dtype, device=auto_is_cuda)
    mask = kwargs["completion_mask"] != 0
    old = selective_logps(logits, ids)
    assert torch.equal(old, selective_logps(logits, ids, return_entropy=True)[0])
    for inplace, entropy_coef in itertools.product((False, True), (0.0, 0.1)):
        objective = Objective(importance_sampling_level=level, entropy_coef=entropy_coef)
        leaf = logits.clone().requires_grad_()
        out = grpo_loss(leaf, ids, old_per_token_logps=old, objective=objective, inplace=inplace, **kwargs)
        assert torch.equal(out.per_token_logps, old * mask), objective
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, 16, generator=generator).to(auto_is_cuda, dtype) for shape in (ids.shape, (1003,))
    )
    kwargs["completion_mask"] = torch.ones_like(mask)  # both multiply the same rows
    old = linear_logps(hidden, weight, ids)
    objective = Objective(importance_sampling_level=level)
    out = linear_grpo_loss(
        hidden.requires_grad_(), weight, ids, old_per_token_logps=old, objective=objective, **kwargs
    )
    assert torch.equal(out.per_token_logps, old)
