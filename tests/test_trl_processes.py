"""fastgrpo in TRL's trainer over two processes: the numbers of TRL there, and of one process with both shares."""

import contextlib
import gc
import os
import random
import socket
import time
import warnings

import pytest
import test_trl
import torch
from test_trl import assert_same, fast, grpo_run, logged, trl

folder = test_trl.folder

SHARE = 4  # completions in a process's micro-batch, where there are two
CASES = {
    "dapo": dict(loss_type="dapo"),
    "groups over both processes": dict(loss_type="dapo", num_generations=8),
    "nothing but masked in one": dict(loss_type="dapo", mask_truncated_completions=True),
    "grpo, several times": dict(loss_type="grpo", num_iterations=2, beta=0.1),
    "dr_grpo, half of what is generated": dict(loss_type="dr_grpo", steps_per_generation=4),
    "sequences": dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2),
    "cispo": dict(loss_type="cispo", epsilon_high=1.02, num_iterations=2),
    "vespo": dict(loss_type="vespo", num_iterations=2),
    "evaluation": dict(eval_strategy="steps", eval_steps=1),
    "quantile": dict(top_entropy_quantile=0.4),
    "bnpo": dict(loss_type="bnpo"),
    "entropy bonus": dict(entropy_coef=0.05, num_iterations=2, beta=0.1),
    # the target is between the entropies of the two processes in the last step
    "adaptive entropy": dict(entropy_coef=0.01, use_adaptive_entropy=True, entropy_target=4.8453),
}
TRL_DIFFERS = {"bnpo", "entropy bonus", "adaptive entropy"}  # means over the tokens of each process
WAYS = ["trl", "patch", "subclass"]


class Scripted:
    """Completions that depend on the step and on the place in the batch of all processes, not on the model."""

    def _generate_single_turn(self, prompt_ids, *_):
        first = self.accelerator.process_index * len(prompt_ids)
        return [self._completion(place) for place in range(first, first + len(prompt_ids))], None

    def _completion(self, place):
        draw, end = random.Random(f"{self.state.global_step} {place}"), 1
        if place % 16 in range(4, 8):  # one reward for the whole share
            return [end]
        if place % 16 in range(8, 12) or draw.random() < 0.2:  # a share that is all truncated
            end = 5
        return [draw.randrange(3, 43) for _ in range(draw.randrange(12))] + [end]


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def in_shares(values):
    """In place of a shuffle: one process's micro-batches are what two have at a time."""
    parts = 2 // world_size()
    return {
        k: v.unflatten(0, (parts, -1, SHARE)).transpose(0, 1).reshape(v.shape) if v.ndim else v
        for k, v in values.items()
    }


def train(way, folder, options):
    base = fast.GRPOTrainer if way == "subclass" else trl.GRPOTrainer
    batch = 2 * SHARE // world_size()
    sizes = dict(per_device_train_batch_size=batch, per_device_eval_batch_size=batch // 2)
    trainer = type("Trainer", (Scripted, base), {})
    with fast.patch() if way == "patch" else contextlib.nullcontext():
        return logged(grpo_run, folder, os.path.join(folder, "out"), trainer, **sizes, **options)


def worker(rank, world, port, folder):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    gc.freeze()  # every training collects garbage, and the modules are most of what it would look through
    warnings.filterwarnings("error", "fastgrpo leaves this to TRL: (?!.*quantile)")
    trl.trainer.grpo_trainer.shuffle_sequence_dict = in_shares
    ways = WAYS if world > 1 else ["trl"]
    results = {name: {way: train(way, folder, options) for way in ways} for name, options in CASES.items()}
    torch.save(results, os.path.join(folder, f"{world}-{rank}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()
        os._exit(0)  # threads left of the process group abort some runs at the interpreter's end


def start(world, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return torch.multiprocessing.spawn(worker, (world, port, folder), nprocs=world, join=False, daemon=True)


@pytest.fixture(scope="module")
def results(folder):
    """{processes: [results of each process]}"""
    deadline = time.monotonic() + 300
    for running in [start(world, folder) for world in (1, 2)]:
        while not running.join(timeout=5):
            assert time.monotonic() < deadline, "the processes wait for each other"
    files = {world: [os.path.join(folder, f"{world}-{rank}.pt") for rank in range(world)] for world in (1, 2)}
    return {world: [torch.load(file, weights_only=True) for file in paths] for world, paths in files.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_what_one_logs(name, results):
    """Every number and the final weights: TRL's on two processes against one's, then fastgrpo's against TRL's."""
    near = 1e-5 if name in ("vespo", "cispo") else 2e-6  # terms are advantage times logp, about 5
    (one,), (two, other) = ([result[name] for result in results[world]] for world in (1, 2))
    if name not in TRL_DIFFERS:
        assert_same(two["trl"], one["trl"], near)
    for way in WAYS:
        assert_same(two[way], two["trl"], near)
        assert_same(other[way], two[way], near)
