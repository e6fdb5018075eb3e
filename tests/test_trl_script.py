"""`python -m fastgrpo.integrations.trl`: scripts and TRL's own command, beside TRL alone."""

import json
import os
import signal
import subprocess
import sys

import pytest
import test_trl
import torch
from test_trl import TIMES, assert_same, fast

from fastgrpo.integrations.trl import places, script

folder = test_trl.folder

OURS = ["-m", "fastgrpo.integrations.trl"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE_OPTIONS = ["--cpu", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE = ["-m", "accelerate.commands.launch", *ACCELERATE_OPTIONS]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

TRAINING = """
import json
import os
import sys

import torch
import trl
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def reward(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / 12 for text in completions]


if __name__ == "__main__":
    model, output = sys.argv[1:]
    args = GRPOConfig(
        output_dir=output, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", max_steps=3,
        save_strategy="no", logging_steps=1, learning_rate=0.3, optim="sgd", seed=1, disable_tqdm=True, beta=0.1,
        num_iterations=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
    )
    data = Dataset.from_dict({"prompt": ["a+b=?", "hello ", "1+2=", "what is x. "]})
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=data)
    trainer.train()
    facts = {"logs": trainer.state.log_history, "trainer": type(trainer).__module__}
    facts["weights"] = {name: p.tolist() for name, p in trainer.model.named_parameters() if "norm" in name}
    facts["trainers"] = [x.GRPOTrainer.__module__ for x in (trl, trl.trainer, trl.trainer.grpo_trainer)]
    with open(f"{output}-{trainer.accelerator.process_index}.json", "w") as file:
        json.dump(facts, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # at the interpreter's end, threads left of torch's process group abort one run in twenty
"""

# where a script finds itself, and how it ends; without TRL, because Python alone is what this is compared with
FACTS = '''"""A script's own text."""
import os, pickle, sys
import beside

class Mine:
    pass

main = sys.modules["__main__"]
print(sys.argv, sys.path[0], __file__, __name__, __doc__, __package__, __spec__, type(__loader__).__name__)
print(sorted(globals()), vars(main) is globals(), type(pickle.loads(pickle.dumps(Mine()))) is Mine, beside.here)
'''
ENDINGS = {
    "status": "sys.exit(3)",
    "exception": "raise ValueError('mine')",
    "no Python": "1 +",
}


def run(*arguments, cwd):
    """(status, stdout, stderr) of Python, outside the checkout: from there, `-m fastgrpo` would be the sources."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **ENVIRONMENT}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's children too
        raise
    return process.returncode, out, err


def announcements(err):
    return [line for line in err.splitlines() if line.startswith("fastgrpo ") and ": replaced " in line]


def numbers(facts):
    """What `assert_same` compares."""
    logs = [{k: v for k, v in entry.items() if not any(time in k for time in TIMES)} for entry in facts["logs"]]
    return logs, {name: torch.tensor(values) for name, values in facts["weights"].items()}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """{processes: what TRL alone logs}"""
    path = tmp_path_factory.mktemp("alone")
    (path / "train.py").write_text(TRAINING)
    found = {}
    for processes, launcher in ((1, []), (2, TORCHRUN)):
        status, _, err = run(*launcher, "train.py", folder, path / f"out{processes}", cwd=path)
        assert status == 0, err[-3000:]
        found[processes] = json.loads((path / f"out{processes}-0.json").read_text())
    assert found[1]["trainer"] == "trl.trainer.grpo_trainer"
    return {processes: numbers(facts) for processes, facts in found.items()}


FORMS = {
    "python": (OURS, 1),
    "accelerate launch": ([*ACCELERATE, *OURS, "--subclass"], 1),
    "torchrun": ([*TORCHRUN, *OURS, "--subclass"], 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_script_logs_what_it_logs_alone(form, folder, alone, tmp_path):
    arguments, processes = FORMS[form]
    (tmp_path / "train.py").write_text(TRAINING)
    status, _, err = run(*arguments, "train.py", folder, tmp_path / "out", cwd=tmp_path)
    assert status == 0, err[-3000:]
    (said,) = announcements(err)  # by one process
    assert "_ChunkedLogProb" in said or "_get_per_token_logps_and_entropies" in said
    assert ("trl.GRPOTrainer" in said.split(", ")) == ("--subclass" in arguments)
    for rank in range(processes):
        facts = json.loads((tmp_path / f"out-{rank}.json").read_text())
        module = "fastgrpo.integrations.trl.trainer" if "--subclass" in arguments else "trl.trainer.grpo_trainer"
        assert facts["trainers"] == [module] * 3 and facts["trainer"] == module
        if rank == 0:
            assert_same(numbers(facts), alone[processes])


# TRL's command; its reward function is a module in the folder
PROBE = """
import json
import os
import sys

import trl


def reward(completions, **_):
    with open("seen.json", "w") as file:
        json.dump([trl.GRPOTrainer.__module__, os.path.basename(sys.argv[0])], file)
    return [float(len(text)) for text in completions]
"""
CONFIG = """
dataset_name: data
reward_funcs: [probe.reward]
use_cpu: true
bf16: false
gradient_checkpointing: false
report_to: none
max_steps: 1
save_strategy: "no"
per_device_train_batch_size: 4
num_generations: 4
max_completion_length: 4
"""


def test_command_of_trl(folder, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a+b=?"}\n{"prompt": "1+2="}\n' * 2)
    options = ["--config", "config.yaml", "--model_name_or_path", folder, "--output_dir", "out"]
    status, _, err = run(*OURS, "--subclass", "grpo", *options, *ACCELERATE_OPTIONS, cwd=tmp_path)
    assert status == 0, err[-3000:]
    assert len(announcements(err)) == 1
    assert json.loads((tmp_path / "seen.json").read_text()) == ["fastgrpo.integrations.trl.trainer", "grpo.py"]
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("launcher", ["RANK", "OMPI_COMM_WORLD_RANK", "ACCELERATE_MIXED_PRECISION", None])
def test_command_of_trl_is_launched_once(launcher, monkeypatch, capsys):
    for name in script._LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "no" if launcher.startswith("ACCELERATE") else "0")
    done = []
    monkeypatch.setattr(script, "_launch", lambda *arguments: done.append(arguments) or 7)
    monkeypatch.setattr(script, "_run", lambda *arguments: done.append(arguments))
    try:
        status = script.main(["grpo", "--config", "x"])
    finally:
        fast.unpatch()
    if launcher:
        file = os.path.join(os.path.dirname(test_trl.trl.__file__), "scripts", "grpo.py")
        assert (status, done) == (0, [(file, ["--config", "x"])])
    else:
        assert (status, done) == (7, [("grpo", ["--config", "x"], [])])


@pytest.mark.parametrize("ending", ENDINGS)
def test_script_finds_itself_as_under_python(ending, tmp_path):
    """Its arguments, path, module, exit status, output and exception; options after it are its own."""
    (tmp_path / "in a folder").mkdir()
    (tmp_path / "in a folder" / "beside.py").write_text("here = 'beside'")
    script = os.path.join("in a folder", "script.py")
    (tmp_path / script).write_text(FACTS + ENDINGS[ending])
    arguments = [script, "--subclass", "-m", "x y", "--config=z"]
    want, got = (run(*before, *arguments, cwd=tmp_path) for before in ([], OURS))
    assert got[:2] == want[:2]
    (said,) = announcements(got[2])
    lines = [line for line in got[2].splitlines() if line != said]
    assert lines[-3:] == want[2].splitlines()[-3:]  # the script's own frame, and the error


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "got nothing"),
        (["--subclass"], "got --subclass"),
        (["--sub-class", "x.py"], "got --sub-class x.py"),
        (["nowhere.py"], "no such file: nowhere.py"),
        (["grop", "--config", "x.yaml"], "expected a script or one of TRL's"),
        ([os.curdir], "no such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert script.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m fastgrpo.integrations.trl: error: ") and message in line


def test_trl_that_differs_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse():
        raise RuntimeError("TRL 9.9 differs")

    (tmp_path / "script.py").write_text("")
    monkeypatch.setattr(places, "patch", refuse)
    assert script.main([str(tmp_path / "script.py")]) == 2
    assert capsys.readouterr().err == "python -m fastgrpo.integrations.trl: error: TRL 9.9 differs\n"


def test_help(capsys):
    assert script.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m fastgrpo.integrations.trl [--subclass] SCRIPT|COMMAND")
