"""GRPOTrainer with its model sharded over two CPU processes, by FSDP2 and by ZeRO-3: the same steps as under DDP."""

import importlib.util
import os
import socket
import time

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, gather
from datasets import Dataset
from test_trainer import QUIET, Scripted, even_digits, small_model, step_logs

from fastgrpo.recipes import sums
from fastgrpo.trainer import GRPOConfig, GRPOTrainer

CASES = {
    "untied": dict(),
    "tied, with a reference": dict(tied=True, beta=0.1),
    "weight needed again in the backward pass": dict(top_entropy_quantile=0.5, chunk_size=8),
    "old logps": dict(steps_per_generation=4, gradient_accumulation_steps=2),
    "head trained by PEFT": dict(peft=True, beta=0.1),
    "sampled, lengths differ": dict(
        scripted=False, per_device_train_batch_size=1, num_generations=2, max_completion_length=12
    ),
    "advantages of tokens, groups over both": dict(
        per_device_train_batch_size=2, advantage_estimator="reinforce_plus_plus", advantage_kwargs=dict(gamma=0.5)
    ),
}
FSDP2 = dict(  # as set by `accelerate launch`
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD="true",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
)
ZERO3 = dict(
    zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0),  # nothing is too small to be partitioned
    train_micro_batch_size_per_gpu="auto",
    gradient_accumulation_steps="auto",
    gradient_clipping="auto",
    zero_allow_untested_optimizer=True,
)


def train(rank, kind, folder, tied=False, peft=False, scripted=True, **options):
    """(the log of each step, the whole weight of the head after them)."""
    sizes = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=3)
    rest = dict(logging_steps=1, save_strategy="no", learning_rate=1e-3, seed=7)
    if kind == "zero3":
        rest |= dict(deepspeed=ZERO3, use_cpu=False)  # use_cpu: accelerate leaves DeepSpeed out then
    args = GRPOConfig(str(folder), **{**QUIET, **sizes, **rest, **options})
    if kind == "fsdp2":  # accelerate leaves FSDP out on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    adapter = None
    if peft:
        from peft import LoraConfig

        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    tokenizer = sums.make_tokenizer()
    dataset = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(40)])
    model = str(folder / ("tied" if tied else "untied"))
    trainer = GRPOTrainer(model, even_digits, args, dataset, processing_class=tokenizer, peft_config=adapter)
    if scripted:
        script = Scripted(tokenizer)
        script.random.manual_seed(rank)
        trainer._generate = lambda prompt_ids, mask: script(prompt_ids)
    if args.advantage_estimator == "reinforce_plus_plus":
        watch_statistics(trainer)
    trainer.train()
    head = trainer.model.get_output_embeddings()
    weight = head.modules_to_save.default.weight if peft else head.weight
    if kind == "fsdp2":
        weight = weight.full_tensor()
    elif kind == "zero3":
        assert weight.numel() == 0  # partitioned
        weight.all_gather()
    return step_logs(trainer), weight.detach().clone()


def watch_statistics(trainer):
    """Over the loss tokens of both processes advantages have mean 0 and variance 1, with Bessel's correction."""
    score = trainer._score

    def watched(*arguments):
        got = score(*arguments)
        mask = arguments[4]
        assert got.shape == mask.shape and (got[mask == 0] == 0).all()
        own = torch.tensor([got.sum(), got.square().sum(), mask.sum() - 0.5])  # two halves: the correction
        total, square, number = gather(own[None]).sum(0)
        torch.testing.assert_close(total, torch.zeros(()), rtol=0, atol=1e-4)
        torch.testing.assert_close(square, number, rtol=1e-4, atol=0)
        return got

    trainer._score = watched


def worker(rank, kind, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    if kind == "fsdp2":
        os.environ.update(FSDP2)
    elif kind == "zero3":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
        # accelerate knows no backend for DeepSpeed on CPUs
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    results = {name: train(rank, kind, folder, **case) for name, case in CASES.items()}
    if rank == 0:
        torch.save(results, folder / f"{kind}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads left of the process group abort some runs at the interpreter's end


def run(kind, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = torch.multiprocessing.spawn(worker, (kind, port, folder), nprocs=2, join=False, daemon=True)
    deadline = time.monotonic() + 300
    while not processes.join(timeout=5):
        assert time.monotonic() < deadline, "the processes wait for each other"
    return torch.load(folder / f"{kind}.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("peft")
    folder, tokenizer = tmp_path_factory.mktemp("sharded"), sums.make_tokenizer()
    for tied in (False, True):
        small_model(tokenizer, tie_word_embeddings=tied).save_pretrained(folder / ("tied" if tied else "untied"))
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return run("ddp", folder)


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_steps_equal_ddp(kind, folder, expected):
    if kind == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    results = run(kind, folder)
    for name, (logs, weight) in expected.items():
        got_logs, got_weight = results[name]
        assert len(logs) == len(got_logs) == 3
        for log, got in zip(logs, got_logs, strict=True):
            for key in {"loss", "grad_norm", "kl", "entropy", "reward"} & set(log):
                assert float(got[key]) == pytest.approx(float(log[key]), rel=1e-3, abs=1e-5), (name, key)
        torch.testing.assert_close(got_weight, weight, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)
    sampled = expected["sampled, lengths differ"][0][0]  # a process that is done must go on with the other
    assert sampled["completions/min_length"] < sampled["completions/max_length"]
