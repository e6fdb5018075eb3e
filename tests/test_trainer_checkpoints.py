"""Checkpoints: whole or not at all, those cut short passed over, a full disk, other options at resume."""

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import warnings
from pathlib import Path

import pytest
import test_train_command
import torch
from datasets import Dataset
from safetensors import SafetensorError
from test_trainer import QUIET, even_digits, make_config, make_trainer, one_thread, small_model
from transformers import TrainingArguments

from fastgrpo.recipes import sums
from fastgrpo.trainer import GRPOTrainer
from fastgrpo.trainer.checkpoints import (
    DiskFull,
    append_whole,
    last_whole_checkpoint,
    whole_folder,
    why_incomplete,
    write_whole,
)
from fastgrpo.trainer.sft import SFTTrainer

__all__ = ["one_thread"]
local_files, small_run = test_train_command.local_files, test_train_command.small_run
TOKENIZER = sums.make_tokenizer()
DATA = Dataset.from_list([{"prompt": f"{i}+{i}=", "answer": str(2 * i), "completion": str(2 * i)} for i in range(40)])
SAVED = dict(save_strategy="steps", save_steps=1, max_steps=3)


def grpo(folder, **options):
    return make_trainer(small_model(TOKENIZER), TOKENIZER, DATA, folder, **{**SAVED, **options})


def sft(folder, **options):
    rest = dict(remove_unused_columns=False, logging_steps=1, per_device_train_batch_size=4, seed=7)
    args = TrainingArguments(str(folder), **{**QUIET, **SAVED, **rest, **options})
    return SFTTrainer(small_model(TOKENIZER), args, DATA, TOKENIZER)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of three steps with three checkpoints, and their final weights."""
    runs = {}
    for kind in (grpo, sft):
        folder = tmp_path_factory.mktemp(kind.__name__)
        trainer = kind(folder)
        trainer.train()
        runs[kind] = folder, trainer.model.lm_head.weight.detach().clone()
    return runs


def emptied(path):
    path.write_bytes(b"")


def halved(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "killed before trainer_state.json": ("trainer_state.json", os.remove),
    "trainer_state.json halved": ("trainer_state.json", halved),
    "optimizer.pt halved": ("optimizer.pt", halved),
    "optimizer.pt empty": ("optimizer.pt", emptied),
    "scheduler.pt empty": ("scheduler.pt", emptied),
    "rng_state.pth halved": ("rng_state.pth", halved),
    "weights halved": ("model.safetensors", halved),
    "weights empty": ("model.safetensors", emptied),
    "no weights": ("model.safetensors", os.remove),
    "no file of the process": ("grpo_state_0.pt", os.remove),
    "file of the process halved": ("grpo_state_0.pt", halved),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("kind", [grpo, sft])
def test_resume_passes_over_what_is_incomplete(kind, name, finished, tmp_path):
    file, damage = DAMAGE[name]
    if kind is sft and file.startswith("grpo"):
        pytest.skip("a file of GRPO's")
    source, weight = finished[kind]
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-3" / file)
    damage(tmp_path / "checkpoint-2" / file)
    trainer = kind(tmp_path)
    if name != "no file of the process":  # a checkpoint of another trainer's, if it is named
        with pytest.raises(ValueError, match="resume_from_checkpoint: .*checkpoint-3 is incomplete: "):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.warns(UserWarning) as warned:
        trainer.train(resume_from_checkpoint=True)
    over = [str(w.message) for w in warned if "is passed over, since it is incomplete: " in str(w.message)]
    assert [f"checkpoint-{i}" in text for i, text in zip((3, 2), over, strict=True)] == [True, True]
    assert torch.equal(trainer.model.lm_head.weight, weight)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # mended on the way
    assert all(why_incomplete(tmp_path / name) is None for name in names(tmp_path))


def safetensors(header, length=None):
    header = json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header


BROKEN = {
    "a pointer to a file elsewhere": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "a length beyond all integers": b"\xff" * 8,
    "a length beyond the file": safetensors({}, length=1 << 40),
    "shorter than its length": b"\x00" * 4,
    "a list": safetensors([]),
    "a number": safetensors(3),
    "an entry that is no object": safetensors({"x": 3}),
    "an entry without offsets": safetensors({"x": {"dtype": "F32"}}),
    "offsets of another kind": safetensors({"x": {"data_offsets": ["0", "4"]}}),
    "nested too deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_are_none(name, finished, tmp_path):
    shutil.copytree(finished[sft][0] / "checkpoint-1", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(BROKEN[name])
    assert why_incomplete(tmp_path / "checkpoint-1") == "model.safetensors is cut short"


@pytest.mark.parametrize(
    "index, problem",
    [
        ({"metadata": {}}, "model.safetensors.index.json has no weight_map"),
        ([], "model.safetensors.index.json has no weight_map"),
        ({"weight_map": [1]}, "model.safetensors.index.json has no weight_map"),
        ({"weight_map": {"x": ["a"]}}, "['a'] is missing"),
        ({"weight_map": {"x": "model.safetensors"}}, None),
    ],
)
def test_index_of_weights(index, problem, finished, tmp_path):
    shutil.copytree(finished[sft][0] / "checkpoint-1", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert why_incomplete(tmp_path / "checkpoint-1") == problem


def with_options(path, **options):
    state = torch.load(path, weights_only=True)
    state["options"].update(options)
    torch.save(state, path)


def test_more_processes_than_before(finished, tmp_path):
    """A process that the saved run did not have needs no file there; one that it had does."""
    shutil.copytree(finished[grpo][0] / "checkpoint-1", tmp_path / "checkpoint-1")
    checkpoint = str(tmp_path / "checkpoint-1")

    def needed(index):
        return last_whole_checkpoint(tmp_path, lambda path: GRPOTrainer.files_of_process(path, index))

    assert [needed(index) for index in (0, 1, 3)] == [checkpoint] * 3
    with_options(tmp_path / "checkpoint-1" / "grpo_state_0.pt", world_size=2)
    with pytest.warns(UserWarning, match="grpo_state_1.pt is missing"):
        assert needed(1) is None
    assert needed(2) == checkpoint


@pytest.mark.parametrize("saved, message", [(2, "world_size=2, and cannot go on with world_size=1"),
                                            (1, "and has no state of process 1")])  # fmt: skip
def test_a_process_joins_within_a_round(saved, message, tmp_path, monkeypatch):
    """It says what those say that were there before, and does not wait for them."""
    options = dict(max_steps=1, num_iterations=2)
    grpo(tmp_path, **options).train()
    with_options(tmp_path / "checkpoint-1" / "grpo_state_0.pt", world_size=saved)
    trainer = grpo(tmp_path, **options)
    monkeypatch.setattr(type(trainer.args), "process_index", 1)
    with pytest.raises(ValueError, match=message):
        trainer._check_resume(str(tmp_path / "checkpoint-1"))


def test_no_whole_checkpoint(finished, tmp_path):
    shutil.copytree(finished[grpo][0] / "checkpoint-1", tmp_path / "checkpoint-1")
    os.remove(tmp_path / "checkpoint-1" / "trainer_state.json")
    with pytest.warns(UserWarning, match="trainer_state.json is missing"):
        assert last_whole_checkpoint(tmp_path) is None
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no whole checkpoint in"):
        grpo(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_trainer_may_be_named(finished, tmp_path):
    shutil.copytree(finished[grpo][0] / "checkpoint-2", tmp_path / "checkpoint-2")
    os.remove(tmp_path / "checkpoint-2" / "grpo_state_0.pt")
    trainer = grpo(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-2 has no state of this process"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3


class Killed(BaseException):
    """Nothing tidies up after it."""


@pytest.mark.parametrize("saved", range(1, 5))
@pytest.mark.parametrize("kind", [grpo, sft])
def test_killed_while_saving(kind, saved, finished, tmp_path, monkeypatch):
    """At each of torch's files of the second checkpoint: it is not there, and the run goes on from the first."""
    trainer, save, calls = kind(tmp_path), torch.save, []

    def counting(*args, **kwargs):
        if trainer.state.global_step == 2:
            calls.append(args)
            if len(calls) == saved:
                raise Killed
        return save(*args, **kwargs)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(torch, "save", counting)
        trainer.train()
    assert calls and "checkpoint-1" in names(tmp_path)
    if len(calls) == saved:
        assert "checkpoint-2" not in names(tmp_path)
    resumed = kind(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "is passed over")
        resumed.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert torch.equal(resumed.model.lm_head.weight, finished[kind][1])


def test_killed_while_replacing(tmp_path, monkeypatch):
    """Between the old folder's leaving and the new one's coming: the next folder that is written brings it back."""
    with whole_folder(tmp_path / "model") as part:
        write_whole(Path(part) / "file", "old")
    replace, calls = os.replace, []

    def second_is_killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        replace(*args)

    with monkeypatch.context() as patch, contextlib.suppress(Killed), whole_folder(tmp_path / "model"):
        patch.setattr(os, "replace", second_is_killed)
    assert len(calls) == 2 and names(tmp_path) == ["unfinished"]
    with whole_folder(tmp_path / "other"):
        assert (tmp_path / "model" / "file").read_text() == "old"
    assert names(tmp_path) == ["model", "other"]


def test_a_checkpoint_holds_all_that_it_did(finished):
    for kind, own in ((grpo, {"grpo_state_0.pt"}), (sft, set())):
        files = {path.name for path in (finished[kind][0] / "checkpoint-3").iterdir()}
        usual = {"config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "tokenizer.json",
                 "trainer_state.json", "training_args.bin"}  # fmt: skip
        assert usual | own <= files


def test_best_and_newest_checkpoints_are_kept(tmp_path):
    scores = iter([0.0, 1.0, 0.5, 0.25])
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="reward")
    options = dict(max_steps=4, save_total_limit=1, per_device_eval_batch_size=4, **best)
    args = make_config(tmp_path, **{**SAVED, **options})
    trainer = GRPOTrainer(small_model(TOKENIZER), even_digits, args, DATA, DATA.select(range(4)), TOKENIZER)
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_reward": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-2"]  # transformers removes all others at the end
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_limit_counts_whole_checkpoints(finished, tmp_path):
    """A newer one that is cut short must not push out the one that a run goes on from."""
    shutil.copytree(finished[grpo][0] / "checkpoint-1", tmp_path / "checkpoint-1")
    shutil.copytree(finished[grpo][0] / "checkpoint-3", tmp_path / "checkpoint-9")
    os.remove(tmp_path / "checkpoint-9" / "trainer_state.json")
    trainer = grpo(tmp_path, save_total_limit=2, max_steps=2)
    with pytest.warns(UserWarning, match="checkpoint-9 is passed over"):
        trainer.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


# A full disk


FAILURES = {
    "torch": (torch, "save", OSError(errno.ENOSPC, "No space left on device")),
    "torch's writer": (
        torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    ),
    "quota": (torch, "save", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "safetensors": (
        "transformers.modeling_utils", "safe_save_file",
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("kind", [grpo, sft])
def test_full_disk_while_saving(kind, name, tmp_path, monkeypatch):
    owner, attribute, error = FAILURES[name]
    trainer = kind(tmp_path, max_steps=1)
    trainer.train()
    again = kind(tmp_path, max_steps=2)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner if not isinstance(owner, str) else __import__(owner, fromlist="x"), attribute, fail)
        with pytest.raises(DiskFull, match=r"checkpoint-2: no space to write it, [\d,.]+ MB are free on the disk"):
            again.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-1"] and why_incomplete(tmp_path / "checkpoint-1") is None


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, but):
    """Leave `but` bytes."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        while (rest := shutil.disk_usage(folder).free - but) > 0:
            file.write(bytes(min(rest, 1 << 16)))


def test_command_on_a_full_disk(local_files, small_disk, capsys):
    output = small_disk / "out"
    data = ["--dataset", local_files / "data.jsonl", "--save-steps", 1]
    assert small_run(local_files, output, *data, "--steps", 1) == 0
    shutil.rmtree(output / "model")
    before = (output / "checkpoint-1" / "optimizer.pt").read_bytes()
    fill(small_disk, 1 << 16)
    capsys.readouterr()
    assert small_run(local_files, output, *data, "--steps", 3, "--resume") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("fastgrpo train: error: ")]
    assert "Traceback" not in error and f"{output}/checkpoint-2: no space to write it, 0.1 MB are free" in line
    assert names(output) == ["checkpoint-1"] and (output / "checkpoint-1" / "optimizer.pt").read_bytes() == before
    steps = [entry["step"] for entry in test_train_command.read_metrics(output) if "reward" in entry]
    assert steps == [1, 2]
    os.remove(small_disk / "ballast")
    assert small_run(local_files, output, *data, "--steps", 3, "--resume") == 0
    steps = [entry["step"] for entry in test_train_command.read_metrics(output) if "reward" in entry]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("write", [write_whole, append_whole])
def test_a_file_is_unharmed(write, small_disk):
    path = small_disk / "metrics.jsonl"
    write_whole(path, "one\n")
    append_whole(path, "two\n")
    fill(small_disk, 0)
    with pytest.raises(DiskFull, match="metrics.jsonl: no space to write it, 0.0 MB are free on the disk"):
        write(path, "three\n" * 10_000)
    assert path.read_text() == "one\ntwo\n"
    assert sorted(os.listdir(small_disk)) == ["ballast", "metrics.jsonl"]


def test_command_resumes_from_the_last_whole_one(local_files, tmp_path, capsys):
    output, data = tmp_path / "out", ["--dataset", local_files / "data.jsonl", "--save-steps", 1]
    assert small_run(local_files, output, *data, "--steps", 1) == 0
    shutil.copytree(output / "checkpoint-1", output / "checkpoint-2")
    os.remove(output / "checkpoint-2" / "trainer_state.json")
    with pytest.warns(UserWarning, match="checkpoint-2 is passed over"):
        assert small_run(local_files, output, *data, "--steps", 3, "--resume") == 0
    shutil.rmtree(output / "checkpoint-3")
    (output / "checkpoint-3").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-3 is passed over"):
        assert small_run(local_files, output, *data, "--steps", 4, "--resume") == 2
    assert "--resume: no checkpoint in" in capsys.readouterr().err


# Two processes


def _one_of_two(rank, port, folder, alone):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    joined = grpo(alone, max_steps=2)  # of a run of one process
    joined.train(resume_from_checkpoint=True)
    assert joined.state.global_step == 2 and joined.last_checkpoint() == str(alone / "checkpoint-2")
    whole = grpo(folder, max_steps=3)
    whole.train()
    weight = whole.model.lm_head.weight.detach().clone()
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    torch.distributed.barrier()
    if rank == 1:  # what one process lacks is passed over by both
        os.remove(folder / "checkpoint-3" / "grpo_state_1.pt")
        halved(folder / "checkpoint-2" / "rng_state_1.pth")
    torch.distributed.barrier()
    resumed = grpo(folder, max_steps=3)
    with pytest.warns(UserWarning, match="grpo_state_1.pt is missing"):
        resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.model.lm_head.weight, weight)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # what is left of the process group may wait for ever where Python frees it


def test_every_process_has_its_files(finished, tmp_path_factory):
    tmp_path, alone = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    shutil.copytree(finished[grpo][0] / "checkpoint-1", alone / "checkpoint-1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, tmp_path, alone), nprocs=2, daemon=True)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for name in names(tmp_path):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"grpo_state_0.pt", "grpo_state_1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
        assert why_incomplete(tmp_path / name) is None
