"""The machine that stands in for a GPU finds planted faults, and nothing in the same kernels without them."""

import ctypes
import re

import cuda_host
import pytest
import torch

SEEDS = range(8)
FAILED = 719

GLOBAL_RACE = r"race: .*global_(load|store) of 4 bytes at address .* was (written|read) by thread"
OVERWRITTEN = r"(copy source: |race: .* read by a copy that completed on|race: .*bulk_load .* was written by)"
# kernel: (blocks, out[i] = in[i ^ this], what the violation says)
KERNELS = {
    "missing_arrival": (1, 33, r"deadlock: .*\n  block 0: 32 threads \(first 0\): sync_threads\(0, 64\)"),
    "divergent_warp": (1, 1, r"divergent warp: block 0, thread \d+: (warp_sum|sync_warp), while thread"),
    "divergent_threads": (
        1,
        33,
        r"divergent warp: block 0, thread \d+: sync_threads\(\d, 32\) got 16 lanes of warp 0",
    ),
    "exited_lane": (1, 1, r"deadlock: (.*\n)+  block 0: 31 threads \(first 0\): sync_warp"),
    "unequal_counts": (1, 33, r"sync_threads: .*, while thread \d+ waits there for (32|64) threads"),
    "exited_block": (2, 33, r"deadlock: .*\n  block 0: 64 threads \(first 0\): cluster_sync\n  block 1: 64 .*exited"),
    "unwritten": (1, 33, r"unwritten: block 0, thread 38: shared_load of 4 bytes at offset 28"),
    "shared_bounds": (1, 0, r"out of bounds: block 0, thread 63: shared_store of 4 bytes at offset 1024"),
    "global_bounds": (1, 0, r"out of bounds: block 0, thread 63: global_load of 4 bytes at address 0x"),
    "misaligned": (1, 1, r"misaligned: block 0, thread \d+: shared_load of 16 bytes at offset \d+"),
    "write_read_race": (1, 33, r"(race: .* was written by thread \d+ of block 0)|(unwritten)"),
    "read_write_race": (1, 33, r"race: .*shared_(store.* was read|load.* was written) by thread \d+ of block 0"),
    "write_write_race": (1, 0, r"race: .*shared_store of 4 bytes.* was written by thread \d+ of block 0"),
    "reduction_is_no_sync": (1, 1, r"race: .*shared_load of 4 bytes.* was written by thread \d+ of block 0"),
    "shuffle_is_no_sync": (1, 1, r"race: .*shared_load of 4 bytes.* was written by thread \d+ of block 0"),
    "divergent_shuffle": (1, 1, r"deadlock: .*\n(.*\n)*.*32 threads \(first 0\): warp_across"),
    "foreign_lane": (1, 1, r"lane: block 0, thread \d+: warp_from: 32 of 32 lanes"),
    "shared_readers": (
        1,
        0,
        r"race: .*shared_store of 4 bytes.* was read by thread \d+ of block 0|race: .*written by",
    ),
    "lost_arrival": (1, 33, r"deadlock: .*\n  block 0: 64 threads \(first 0\): barrier_wait\(512, 0\)"),
    "too_many_arrivals": (1, 33, r"barrier: .*barrier_(arrive|expect).*: more than its 2 arrivals|deadlock"),
    "arrival_before_write": (1, 33, r"race: |unwritten: "),
    "no_barrier": (1, 33, r"barrier: .*barrier_arrive.*: no barrier_init there"),
    "unseen_barrier": (1, 33, r"barrier: .*: no (synchronisation since the )?barrier_init"),
    "overwritten_barrier": (1, 33, r"barrier: block 0, thread 9: shared_store.* belongs to a barrier"),
    "load_not_awaited": (1, 33, r"in flight: |race: .*a copy that completed on the barrier at offset 512|unwritten: "),
    "load_awaited_by_another": (1, 33, r"in flight: |race: .*a copy that completed on the barrier|unwritten: "),
    "wrong_bytes": (1, 33, r"deadlock: .*\n  block 0: 64 threads \(first 0\): barrier_wait\(512, 0\)"),
    "load_over_readers": (1, 33, r"race: .*bulk_load of 256.* was (read|written) by|in flight: "),
    "load_over_unfenced": (1, 33, r"missing fence: block 0, thread 0: bulk_load of 256 bytes"),
    "misaligned_load": (1, 33, r"misaligned: block 0, thread 0: bulk_load of 256 bytes at offset 8"),
    "policy_of_nobody": (1, 33, r"policy: block 0, thread 0: bulk_load: 0x1"),
    "load_bounds": (1, 33, r"out of bounds: block 0, thread 0: bulk_load of 256 bytes at address"),
    "missing_fence": (1, 33, r"missing fence: block 0, thread 0: bulk_store.* written by thread 40"),
    "fence_before_write": (1, 33, r"missing fence: block 0, thread 0: bulk_store of 256 bytes"),
    "store_source_reused": (1, 0, r"copy source: .*shared_store of 4 bytes"),
    "store_not_awaited": (1, 0, r"lost store: block 0, thread 0: exits without bulk_wait_read"),
    "remote_uninitialised": (
        2,
        "swap",
        r"barrier: block 0, thread 0: remote_store.*: no barrier_init there|barrier: ",
    ),
    "remote_unsynced": (2, "swap", r"barrier: .*remote_store.*: no (synchronisation since the )?barrier_init"),
    "remote_wait_scope": (2, "swap", r"barrier: .* so it takes barrier_wait_cluster"),
    "remote_to_exited": (2, 0, r"block gone: "),
    "global_write_read_race": (1, 0, GLOBAL_RACE),
    "global_read_write_race": (1, 0, GLOBAL_RACE),
    "narrow_stores_race": (1, 0, r"race: .*global_store of 2 bytes at address .* was written by thread (40|41) of"),
    "store_over_load": (1, 0, OVERWRITTEN),
    "store_over_load_of_another_block": (2, 0, OVERWRITTEN),
    "store_after_bulk_store": (1, 0, r"in flight: .*global_store of 4 bytes at address .*: a copy to address"),
    "remote_place_reused": (2, 0, r"in flight: .*remote_store|race: .*remote_store"),
}


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    why = cuda_host.unavailable()
    if why is not None:
        pytest.skip(why)
    sources = [cuda_host.HERE / "faults.cu", cuda_host.HERE / "pipeline.cu"]
    return cuda_host.library(cuda_host.build(tmp_path_factory.mktemp("cuda_host"), sources))


@pytest.fixture(autouse=True)
def in_order(lib):
    yield
    lib.fastgrpo_host_seed(0)
    lib.fastgrpo_host_forget()
    lib.fastgrpo_host_active_clusters(2)


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def run(lib, name, fault, seed):
    """(error, input, output) of a kernel in faults.cu."""
    x = torch.rand(KERNELS[name][0] * 64)
    y = torch.full_like(x, -1)
    cuda_host.allow(lib, x[:64] if name in ("load_bounds", "global_bounds") else x, y)
    lib.fastgrpo_host_seed(seed)
    return getattr(lib, name)(int(fault), pointer(x), pointer(y)), x, y


@pytest.mark.parametrize("name", KERNELS)
def test_fault_is_found(lib, name):
    for seed in SEEDS:
        error, _, _ = run(lib, name, True, seed)
        said = cuda_host.violation(lib)
        assert error == FAILED, seed
        assert re.search(KERNELS[name][2], said), f"seed {seed}: {said}"


@pytest.mark.parametrize("name", KERNELS)
def test_correct_twin_runs(lib, name):
    flip = KERNELS[name][1]
    for seed in SEEDS:
        error, x, y = run(lib, name, False, seed)
        assert error == 0, f"{seed}: {cuda_host.violation(lib)}"
        expected = x.clone()
        if flip == "swap":
            expected[[0, 64]] = x[[64, 0]]
        else:
            expected = x[torch.arange(len(x)) ^ flip]
        assert torch.equal(y, expected), seed


@pytest.mark.parametrize("cluster", [1, 4, 16])
@pytest.mark.parametrize("tiles", [1, 2, 3, 5])
def test_pipeline(lib, cluster, tiles):
    rows, tile_bytes = 5, 4096 + 16 * 3
    for seed in SEEDS:
        x = torch.randint(-8, 9, (rows, cluster * tiles * tile_bytes // 4)).float()
        y = torch.full_like(x, torch.nan)
        cuda_host.allow(lib, x, y)
        lib.fastgrpo_host_seed(seed)
        lib.fastgrpo_host_active_clusters(1 + seed % 3)
        error = lib.pipeline(pointer(x), pointer(y), ctypes.c_int64(rows), cluster, tiles, tile_bytes)
        assert error == 0, f"{seed}: {cuda_host.violation(lib)}"
        assert torch.equal(y, x + x.sum(1, keepdim=True)), seed


OK, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9


@pytest.mark.parametrize(
    "blocks, threads, cluster, shared_bytes, prepared, error",
    [
        (1, 32, 1, 48 << 10, False, OK),
        (1, 32, 1, 49 << 10, False, INVALID_VALUE),
        (1, 32, 1, 227 << 10, True, OK),
        (1, 32, 1, (227 << 10) + 16, True, INVALID_VALUE),
        (8, 32, 8, 0, False, OK),
        (16, 32, 16, 0, False, INVALID_CONFIGURATION),
        (16, 32, 16, 0, True, OK),
        (32, 32, 32, 0, True, INVALID_CONFIGURATION),
        (6, 32, 4, 0, True, INVALID_CONFIGURATION),
        (0, 32, 1, 0, True, INVALID_CONFIGURATION),
        (1, 1056, 1, 0, True, INVALID_CONFIGURATION),
    ],
)
def test_launch_limits(lib, blocks, threads, cluster, shared_bytes, prepared, error):
    assert lib.shape(blocks, threads, cluster, shared_bytes, int(prepared)) == error


def test_clusters_need_sm_90(lib):
    lib.fastgrpo_host_capability(8, 0)
    try:
        for cluster, error in ((0, OK), (1, INVALID_CONFIGURATION), (2, INVALID_CONFIGURATION)):
            assert lib.shape(2, 32, cluster, 0, 1) == error
    finally:
        lib.fastgrpo_host_capability(9, 0)


def test_numbers(lib):
    special = torch.tensor([0.0, -0.0, 1, -1, 65519, 65520, 2**-24, 2**-25, 1e-30, 1e30, -130, -126])
    special = torch.cat([special, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    a, b = torch.cartesian_prod(special, special).T
    a = torch.cat([a, torch.randn(4096) * 100]).contiguous()
    b = torch.cat([b, torch.randn(4096)]).contiguous()
    n = len(a)
    words = torch.zeros(4, n, dtype=torch.int32)
    floats = torch.zeros(4, n)
    lib.numbers(n, pointer(a), pointer(b), pointer(words), pointer(floats))

    def check(actual, expected):
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True)

    def larger(x, y):  # torch.maximum leaves the sign of a zero open
        return torch.where((x == 0) & (y == 0), x + y, torch.maximum(x, y))

    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        x, y = a.to(dtype), b.to(dtype)
        check(words[i].view(dtype).view(n, 2), torch.stack([x, y], 1))
        largest = words[i + 2].view(torch.int16).view(n, 2)
        nan = x.isnan() | y.isnan()
        assert (largest[nan] == 0x7FFF).all()
        expected = larger(x, y)
        for half in largest.T:
            assert torch.equal(half[~nan], expected.view(torch.int16)[~nan])
    check(floats[0], a.half())
    check(floats[1], b.half())
    nan = a.isnan() | b.isnan()
    assert torch.equal(floats[2].view(torch.int32)[~nan], larger(a, b).view(torch.int32)[~nan])
    assert floats[2][nan].isnan().all()
    torch.testing.assert_close(floats[3], torch.exp2(a).where(~(a < -126), 0), equal_nan=True)
