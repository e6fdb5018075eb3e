"""What the CUDA backend asks of a device, once, and what a caller may choose: on the machine of cuda_host, which says
what it was asked, with a library that has asked nothing before. Where there is a GPU, these do not run."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import cuda_host
import pytest
import torch
from cuda_rows import DTYPES, make, rows_of

from fastgrpo import cli, grpo_loss
from fastgrpo.backends import Call, Rows, Scores, TokenSpec, cuda, native

cuda_unavailable = cuda.unavailable  # the true one: cuda_host puts another in its place
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which answers for itself")


@pytest.fixture
def new_machine(cuda_host_library, tmp_path):
    """The machine of cuda_host, and the backend on it with a library that has asked the driver nothing yet."""
    with cuda_host.backend(Path(shutil.copy(cuda_host_library, tmp_path))) as machine:
        yield machine


def _stats(logits, *rows, want_entropy=True, **choices):
    with cuda.using(**choices):
        return cuda.row_stats(logits, Rows(*rows), want_entropy=want_entropy)


def _loss(logits, *rows, token, out, **choices):
    with cuda.using(**choices):
        return cuda.token_loss(logits, Rows(*rows), token, TokenSpec(group_size=2), out, want_entropy=True)


def _one_pass(vocab, dtype):
    """Blocks of the cluster that holds such a row; 0, and a refusal: two passes."""
    blocks = cuda.shape(vocab, dtype, 0).cluster
    assert (cuda.refuses(Call("cpu", 0, dtype, vocab, one_pass=True)) is None) == (blocks > 0)
    return blocks


def test_choices_that_cannot_run(new_machine):
    """Each says what was chosen, why it cannot be, and what can; nothing takes two passes unasked."""
    for name, value in (("cluster", 3), ("cluster", 32), ("buffers", 5), ("blocks", 3), ("evict_first", 2),
                        ("multiprocessors", -1)):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
            with cuda.using(**{name: value}):
                pass
    logits, ids, mask, inv_t = make(1, 1, 32_000, torch.bfloat16)

    def stats(**choices):
        return _stats(logits, ids, mask, inv_t, **choices)[1]

    fits = "cluster=1, blocks=1 with up to 3 buffers; cluster=1, blocks=2 with up to 1 buffers; cluster=2, blocks=1"
    for choices in (dict(cluster=1, blocks=2), dict(cluster=1, buffers=4), dict(cluster=1, blocks=2, buffers=3)):
        with pytest.raises(ValueError, match="no room") as error:
            stats(**choices)
        assert fits in str(error.value) and all(f"{k}={v}" in str(error.value) for k, v in choices.items())
    want = stats(cluster=1)
    for choices in (dict(cluster=1, blocks=2, buffers=1), dict(cluster=1, buffers=3), dict(blocks=1, buffers=2)):
        assert torch.equal(stats(**choices), want)  # what is said to fit does, and blocks=1 is of one block too
    new_machine.fastgrpo_host_largest_cluster(4)
    with pytest.raises(ValueError, match="cannot run a cluster of so many blocks") as error:
        _stats(*make(1, 1, 31_999), cluster=8)  # another length: answers are remembered
    fits = str(error.value).split("logits (")[1]
    assert "cluster=4, " in fits and "cluster=8, " not in fits


def test_choices_end_with_their_block():
    with cuda.using(cluster=8, buffers=2):
        with pytest.raises(ZeroDivisionError), cuda.using(blocks=1):
            assert cuda._choices.get() == cuda.OnePass(cluster=8, buffers=2, blocks=1)
            told = cuda._as_choice(cuda._choices.get())
            assert [getattr(told, name) for name, _ in told._fields_] == [8, 2, 1, 1, 0]
            raise ZeroDivisionError
        assert cuda._choices.get() == cuda.OnePass(cluster=8, buffers=2)
    assert cuda._choices.get() == cuda.OnePass()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "fp32 to bf16"])
def test_multiprocessors_that_are_left_to_others(out_dtype, new_machine):
    """The grid is of as many blocks as the others hold, and of one cluster at least; the bits are the same."""
    new_machine.fastgrpo_host_active_clusters(16)
    logits, ids, mask, inv_t = make(12, 1, 1000)
    rows, found = rows_of(12, "cpu", advantages=torch.ones(12)), []
    for limit, blocks, clusters in ((0, 2, 12), (1, 2, 1), (3, 2, 3), (3, 1, 1), (100, 2, 12)):
        out = torch.empty_like(logits, dtype=out_dtype)
        _loss(logits, ids, mask, inv_t, token=rows, out=out, cluster=2, blocks=blocks, multiprocessors=limit)
        assert new_machine.fastgrpo_host_blocks() == 2 * clusters, (limit, blocks)
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bulk_copies(dtype, new_machine):
    """They go between places that are the same modulo 128 bytes, wherever a row is; their lines are the first to go
    from the cache, if so chosen."""
    for offset in (0, 8, 24, 33):
        for V, stride in ((1000, 1000), (2051, 2063)):
            logits, ids, mask, inv_t = make(3, 1, V, dtype, offset=offset, stride=stride)
            rows = rows_of(3, "cpu", advantages=torch.ones(3))
            for choices in (dict(), dict(evict_first=False)):
                _loss(logits, ids, mask, inv_t, token=rows, out=logits, cluster=2, **choices)
                counts = (ctypes.c_int64 * 3)()
                new_machine.fastgrpo_host_copies(counts)
                copies = 2 * 2 * 3  # in and out, of two blocks, three rows
                assert tuple(counts) == (copies, 0, 0 if choices else copies)


def test_a_smaller_cluster_where_a_large_one_finds_no_room(new_machine):
    new_machine.fastgrpo_host_largest_cluster(8)
    assert _one_pass(262_145, torch.bfloat16) == 8
    new_machine.fastgrpo_host_largest_cluster(2)
    assert _one_pass(262_146, torch.bfloat16) == 0
    new_machine.fastgrpo_host_largest_cluster(16)
    assert _one_pass(262_147, torch.bfloat16) == 16
    assert _one_pass(4096, torch.float32) == 1


def test_answers_are_remembered_and_failures_are_not(new_machine):
    """Of the driver, in the library and in Python: one error is no reason for two passes from then on, and no room is
    no reason to ask again."""
    out_of_memory = 2
    new_machine.fastgrpo_host_fail_occupancy(out_of_memory)
    with pytest.warns(RuntimeWarning, match="asking cuda:0 for clusters: out of memory; asked again"):
        assert "out of memory" in cuda.refuses(Call("cpu", 0, torch.bfloat16, 32_000, one_pass=True))
    assert _one_pass(32_000, torch.bfloat16) == 2
    logits, ids, mask, inv_t = make(1, 1, 1000)
    new_machine.fastgrpo_host_fail_occupancy(out_of_memory)
    with pytest.raises(RuntimeError, match=r"row_stats of logits of shape \(1, 1, 1000\) on cpu: out of memory"):
        cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    one_pass = cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
    assert all(map(torch.equal, one_pass, cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)))
    assert cuda.shape(1000, torch.float32, 0).cluster == 1

    new_machine.fastgrpo_host_largest_cluster(0)
    assert _one_pass(2000, torch.bfloat16) == 0
    new_machine.fastgrpo_host_largest_cluster(16)
    calls = new_machine.fastgrpo_host_calls()
    assert _one_pass(2000, torch.bfloat16) == 0
    assert new_machine.fastgrpo_host_calls() == calls


def test_calls_of_the_runtime(new_machine, monkeypatch):
    """After its first call, a kernel costs two: which device is this thread's, and the launch; advantages of groups
    are one launch more. Choosing a backend costs none."""
    real = cuda_unavailable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    logits, ids, mask, inv_t = make(2, 1, 1000, torch.bfloat16)
    rows = rows_of(2, "cpu", advantages=torch.ones(2))
    groups = rows_of(2, "cpu", rewards=torch.ones(2), seq=torch.arange(2, dtype=torch.int32))
    one_pass = Call("cpu", 0, torch.bfloat16, 1000, one_pass=True)
    out, g, lse = torch.empty_like(logits), torch.ones(2), torch.zeros(2)
    calls = {
        "choosing": (0, lambda: (real(), cuda.refuses(one_pass))),
        "row_stats": (2, lambda: cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=False)),
        "token_loss": (
            2,
            lambda: cuda.token_loss(logits, Rows(ids, mask, inv_t), rows, TokenSpec(), out, want_entropy=True),
        ),
        "row_grad": (2, lambda: cuda.row_grad(logits, Rows(ids, None, inv_t), Scores(lse, lse, lse), g, None, out)),
        "scale_": (2, lambda: cuda.scale_(logits, torch.tensor(0.5))),
        "groups": (3, lambda: _loss(logits, ids, mask, inv_t, token=groups, out=out)),
        "two passes": (3, lambda: _loss(logits, ids, mask, inv_t, token=rows, out=out, cluster=-1)),
    }
    found = {}
    for name, (_, call) in calls.items():
        call()
        before = new_machine.fastgrpo_host_calls()
        call()
        found[name] = new_machine.fastgrpo_host_calls() - before
    assert found == {name: count for name, (count, _) in calls.items()}


def test_a_factor_of_one_starts_few_blocks(new_machine):
    """Not one per row: dW has as many rows as the vocabulary."""
    for factor in (1.0, 2.0):
        x = torch.ones(1, 1000, 8, dtype=torch.bfloat16)
        cuda.scale_(x, torch.tensor(factor))
        assert (x == factor).all() and new_machine.fastgrpo_host_blocks() == 4 * 2  # four of each multiprocessor


def test_how_rows_are_held_is_shown(new_machine, monkeypatch, capsys):
    """By `fastgrpo env`: per GPU and dtype, clusters at once and the shapes of usual rows; or why there are none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    new_machine.fastgrpo_host_largest_cluster(8)
    new_machine.fastgrpo_host_active_clusters(5)
    assert cli.main(["env"]) == 0
    said = capsys.readouterr().out
    for line in (
        "cuda:0 bfloat16, 2 a multiprocessor: clusters at once by their blocks: "
        "5 of 1, 5 of 2, 5 of 4, 5 of 8, 0 of 16",
        "cuda:0 float16, rows of 151936: 5 clusters of 8, 2 a multiprocessor, 3 buffers",
        "cuda:0 float32, rows of 262144: two passes: the device cannot run a cluster of so many blocks",
        "cuda:0 float32, gradients in bfloat16, rows of 32000: 5 clusters of 4, 2 a multiprocessor, 3 buffers",
        "cuda:0 float32, gradients in float16, 1 a multiprocessor: clusters at once by their blocks: "
        "5 of 1, 5 of 2, 5 of 4, 5 of 8, 0 of 16",
    ):
        assert f"{line}\n" in said
    lines = list(cuda.describe(1))
    assert lines[0].startswith("cuda:1 bfloat16: backend 'cuda': asking cuda:1 for clusters: invalid device")


def test_two_passes_below_9_0(new_machine):
    new_machine.fastgrpo_host_capability(8, 0)
    assert _one_pass(32001, torch.bfloat16) == 0
    assert "9.0" in cuda.shape(32001, torch.bfloat16, 0).why
    with pytest.raises(ValueError, match=r"OnePass\(cluster=2, .*\(none\), but it takes a GPU of .* 9.0"):
        _stats(*make(1, 1, 50), cluster=2)


def test_what_it_cannot_do(cuda_host_library, tmp_path, monkeypatch):
    """A machine without a GPU, one with an old GPU, and a launch that fails: each says why."""
    path = native.library_path("fastgrpo_cuda")
    assert ("does not exist" in cuda.unavailable()) == (not path.exists())
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: "):
        grpo_loss(torch.randn(1, 2, 8), torch.zeros(1, 2).long(), torch.ones(1), backend="cuda")
    for capability, why in (((7, 5), "below 8.0"), ((8, 6), "torch sees no NVIDIA GPU")):
        # each a library of its own: what a device can do is asked once
        copy = Path(shutil.copy(cuda_host_library, tmp_path / f"{capability[0]}.so"))
        with cuda_host.backend(copy) as machine:
            machine.fastgrpo_host_capability(*capability)
            assert why in cuda_unavailable()
            machine.fastgrpo_host_devices(0)
            assert "no CUDA-capable device" in cuda_unavailable()
    with cuda_host.backend(cuda_host_library) as machine:
        with pytest.raises(ValueError, match="cannot take these logits: .*float64"):
            grpo_loss(torch.randn(1, 2, 8).double(), torch.zeros(1, 2).long(), torch.ones(1), backend="cuda")
        logits, ids, mask, inv_t = make(2, 1, 50)
        monkeypatch.setattr(cuda, "_place", lambda device: machine.fastgrpo_host_forget() or (0, 0))
        with pytest.raises(RuntimeError, match=r"row_stats of logits of shape \(2, 1, 50\) on cpu: out of bounds"):
            cuda.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=True)
