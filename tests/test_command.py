"""The command: mistakes take one line, the help shows each default once, env says what to do."""

import errno
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from fastgrpo import backends, cli
from fastgrpo.cli import main
from fastgrpo.commands import env, errors
from fastgrpo.commands.train.mistakes import mistakes_are_shown
from fastgrpo.recipes import sums
from fastgrpo.trainer.config import GRPOConfig

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", 4, "--batch-size", 8, "--num-generations", 4, "--max-completion-length", 4, "--save-steps", 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, rows, and files with mistakes in them."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = sums.make_tokenizer()
    for name in ("model", "cut", "no-tokenizer"):
        sums.make_model(tokenizer, seed=0).save_pretrained(folder / name)
        if name != "no-tokenizer":
            tokenizer.save_pretrained(folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "empty").mkdir()
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    lines = [json.dumps(row) for row in rows]
    for name, third in {
        "broken": b'{"prompt": "1+1=", "answer"',
        "list": b'["1+1=", "2"]',
        "latin": '{"prompt": "1+1=", "answer": "é"}'.encode("latin-1"),
        "kinds": b'{"prompt": "1+1=", "answer": 2}',
        "null": b'{"prompt": null, "answer": "2"}',
        "unanswered": b'{"prompt": "1+1="}',
        "number": b'{"prompt": 3, "answer": "2"}',
    }.items():
        new = [line.encode() for line in lines]
        new[2] = third
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(new) + b"\n")
    (folder / "array.json").write_text('[\n{"prompt": "1+1=", "answer": "2"},\n{"prompt": }\n]')
    (folder / "nothing.jsonl").write_text("\n")
    (folder / "one.jsonl").write_text(lines[0] + "\n")
    (folder / "rows.csv").write_text("prompt,answer\n1+1=,2\n")
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    results = folder / "results" / "machine"
    results.mkdir(parents=True)
    row = dict.fromkeys(("commit", "case", "on", "impl", "backend", "mode"))
    (results / "rows.jsonl").write_text(json.dumps({"op": "loss", **row}) + '\n{"op": \n')
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where a command that should have failed writes nothing of ours."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    try:
        return main([*map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code


def check_mistake(error, command, message):
    (line,) = error.splitlines()
    assert line.startswith(f"fastgrpo {command}: error: ".replace(" :", ":")) and re.search(message, line), line


WITH_MODEL = ["train", "--model", "{files}/model"]
MISTAKES = [
    ([], "required: env|bench|train"),
    (["fly"], "invalid choice: 'fly'"),
    (["train", "--stepz", "3"], "unrecognized arguments: --stepz 3; did you mean --steps?"),
    (["train", "--num_generations", "4"], "--num_generations 4; did you mean --num-generations?"),
    *(
        (["train", option, value], f"argument {option}: expected {expected}, got '{value}'")
        for option, value, expected in (
            ("--steps", "0", "a whole number of at least 1"),
            ("--steps", "many", "a whole number of at least 1"),
            ("--batch-size", "-1", "a whole number of at least 1"),
            ("--batch-size", "1.5", "a whole number of at least 1"),
            ("--gradient-accumulation-steps", "0", "a whole number of at least 1"),
            ("--num-generations", "1", "a whole number of at least 2"),
            ("--num-iterations", "0", "a whole number of at least 1"),
            ("--max-completion-length", "0", "a whole number of at least 1"),
            ("--held-out", "0", "a whole number of at least 1"),
            ("--save-steps", "-1", "a whole number of at least 0"),
            ("--seed", "-1", "a whole number of at least 0"),
            ("--temperature", "0", "a number above 0"),
            ("--temperature", "nan", "a number above 0"),
            ("--learning-rate", "-0.001", "a number of at least 0"),
            ("--learning-rate", "inf", "a number of at least 0"),
            ("--beta", "-1", "a number of at least 0"),
            ("--column-tolerance", "-0.1", "a number of at least 0"),
            ("--sft-learning-rate", "x", "a number of at least 0"),
        )
    ),
    (["train", "--logits-dtype", "float64"], "argument --logits-dtype: invalid choice: 'float64'"),
    (["train", "--column-tolerance", "1"], r"column_tolerance: expected a number in \[0, 1\), got 1"),
    (["train", "--advantage-estimator", "x"], "argument --advantage-estimator: invalid choice: 'x'"),
    (["train", "--advantage-estimator", "pass_at_k"], "k: expected a value"),
    *(
        (["train", "--advantage-kwargs", value], f"argument --advantage-kwargs: expected a JSON object, got '{value}'")
        for value in ("k=4", "4")
    ),
    (["train", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
    (["train", "--recipe", "r2"], "argument --recipe: invalid choice: 'r2'"),
    (["train", "--loss-type", "ppo"], "loss_type: expected one of .*got 'ppo'"),
    (["train", "--loss-type", "own_losses:nothing"], "loss_type: 'own_losses:nothing' cannot be imported"),
    (["train", "--num-generations", "3"], "num_generations: expected a divisor"),
    (["train", "--logits-dtype", "bfloat16"], "logits_dtype: .*, because hidden states are float32, got 'bfloat16'"),
    (["train", "--backend", "cuda"], "--backend: cuda cannot be used here: "),
    (["train", "--batch-size", "10000"], "--batch-size: expected no more completions in a round than 800 training"),
    (["train", "--held-out", "501"], "--held-out: expected between 1 and 500"),
    (["train", "--reward", "nothing"], "reward: expected one of"),
    (["train", "--reward", "json:nothing"], "cannot be imported"),
    (["train", "--reward", "no.such.module:f"], "cannot be imported"),
    (["train", "--reward", "code"], "--reward code needs a --dataset with the column test_cases"),
    (["train", "--reward-model", "x"], "--reward-model needs --recipe r1"),
    (["train", "--resume"], "--resume: no checkpoint"),
    (["train", "--dataset", "{files}/rows.jsonl"], "--dataset needs --model"),
    (["train", "--output-dir", "{files}/rows.jsonl"], "--output-dir: .*rows.jsonl cannot be made: File exists"),
    (["train", "--output-dir", "x" * 300], "--output-dir: x+ cannot be made: File name too long"),
    (["train", "--output-dir", "x" * 300, "--resume"], "--output-dir: x+: File name too long"),
    (["train", "--output-dir", "{files}/rows.jsonl/x"], "--output-dir: .* cannot be made: Not a directory"),
    (["train", "--recipe", "r1-zero", "--general", "x"], "--general needs --recipe r1"),
    (["train", "--recipe", "r1-zero", "--general", "x", "--model", "{files}/model", "--dataset", "{files}/rows.jsonl"],
     "--general needs --recipe r1"),
    (["train", "--recipe", "r1", "--reward", "exact"], "--reward: a recipe has its own rewards"),
    (["train", "--recipe", "r1", "--model", "{files}/model"], "needs a --dataset"),
    (["train", "--recipe", "r1", "--output-dir", "{files}/rows.jsonl"], "--output-dir: .* cannot be made"),
    (["train", "--recipe", "r1-zero", "--model", "{files}/model", "--dataset", "{files}/broken.jsonl"], "line 3: "),
    (["train", "--model", "{files}/nowhere"], "--model: no such folder: "),
    (["train", "--model", "no-such-owner/no-such-model"], "--model: no-such-owner/no-such-model cannot be loaded"),
    (["train", "--model", "{files}/empty"], "--model: .*empty cannot be loaded"),
    (["train", "--model", "{files}/cut"], "--model: .*cut cannot be loaded"),
    (["train", "--model", "{files}/no-tokenizer"], "--model: .*no-tokenizer cannot be loaded"),
    *(
        ([*WITH_MODEL, "--dataset", f"{{files}}/{name}"], message)
        for name, message in {
            "nowhere.jsonl": "--dataset: no such file: .*nowhere.jsonl",
            "x" * 300: "--dataset: no such file: .*x",
            "nowhere": "--dataset: no such file: .*nowhere",
            "rows.csv": r"--dataset: expected a file that ends in .jsonl, .json, .parquet, got .*rows.csv",
            "empty": "--dataset: .*empty cannot be loaded",
            "broken.jsonl": "broken.jsonl, line 3: expected a JSON object, got '{\"prompt\": \"1.1=\", \"answer\"'",
            "list.jsonl": "list.jsonl, line 3: expected a JSON object, got '\\[",
            "latin.jsonl": "latin.jsonl, line 3: expected UTF-8 text",
            "kinds.jsonl": "kinds.jsonl, line 3: expected 'answer' to be a text as in line 1, got a number",
            "null.jsonl": "null.jsonl, row 3: expected a text as prompt, got None",
            "unanswered.jsonl": "unanswered.jsonl, row 3: no 'answer' \\(for ",
            "number.jsonl": "number.jsonl, line 3: expected 'prompt' to be a text as in line 1, got a number",
            "array.json": "array.json, line 3: expected JSON: Expecting value",
            "nothing.jsonl": "expected rows in .*nothing.jsonl, found none",
            "one.jsonl": "expected at least 2 rows",
            "broken.parquet": "--dataset: .*broken.parquet cannot be loaded",
        }.items()
    ),
    ([*WITH_MODEL, "--dataset", "no-such-owner/no-such-rows"], "--dataset: .*no-such-rows cannot be loaded"),
    ([*WITH_MODEL, "--dataset", "{files}/rows.jsonl", "--dataset-config", "x"], "--dataset-config: expected a hub"),
    ([*WITH_MODEL, "--dataset", "{files}/rows.jsonl", "--split", "test"], "--split: expected a hub dataset"),
    ([*WITH_MODEL, "--dataset", "{files}/rows.jsonl", "--answer-column", "x"], "no column 'x'"),
    ([*WITH_MODEL, "--dataset", "{files}/rows.jsonl", "--prompt-column", "q"], "no column 'q'"),
    ([*WITH_MODEL, "--dataset", "{files}/rows.jsonl", "--reward", "code"], "no column 'test_cases'"),
    ([*WITH_MODEL, "--dataset", "{files}/rows.jsonl", "--held-out", "40"], "--held-out: expected between 1 and 39"),
    ([*WITH_MODEL, "--dataset", "{files}/rows.jsonl", "--batch-size", "512"], "than 36 training prompts"),
    (["bench", "--op", "nothing"], "argument --op: invalid choice"),
    (["bench", "--seconds", "0"], "argument --seconds: expected a number above 0, got '0'"),
    (["bench", "--inactive", "x"], "argument --inactive: expected a number of at least 0"),
    (["bench", "--shape", "N=8"], "--shape: shape: expected B=8"),
    (["bench", "--json", "nowhere/rows.jsonl"], "--json: no such folder: nowhere"),
    (["bench", "--json", "x" * 300], "--json: x+ cannot be written: File name too long"),
    (["bench", "--json", "{files}"], "--json: expected a file, got the folder "),
    (["bench", "--plot", "{files}/empty"], "--plot: expected a file, got the folder "),
    (["bench", "--plot", "x.jpg"], "--plot: expected a file that ends in .svg or .png"),
    (["bench", "--report", "{files}/nowhere"], "--report: "),
    (["bench", "--report", "{files}/results"], "--report: .*rows.jsonl, line 2: expected a row of the bench"),
    pytest.param(["bench", "--device", "cuda"], "--device: cuda is not available here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is here")),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_take_one_line(files, capfd, arguments, message):
    arguments = [argument.format(files=files) for argument in arguments]
    assert run(*arguments) == 2
    command = arguments[0] if arguments and arguments[0] in ("train", "bench") else ""
    check_mistake(capfd.readouterr().err, command, message)


def test_mistakes_take_one_line_in_a_process(files, tmp_path):
    """With what libraries log while they are loaded."""
    command = [sys.executable, "-m", "fastgrpo", "train", "--model", str(files / "cut")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 2
    check_mistake(result.stderr, "train", "cannot be loaded")


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forbidden():
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out/metrics.jsonl")


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


@pytest.mark.parametrize(
    "fails, message",
    [
        (full_disk, "No space left on device"),
        (out_of_memory, "out of GPU memory; smaller sizes need less: CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_what_the_machine_lacks_takes_one_line(capfd, fails, message):
    assert errors.run("train", fails) == 2
    assert capfd.readouterr().err == f"fastgrpo train: error: {message}\n"


def test_output_that_nobody_reads(monkeypatch):
    """As in `fastgrpo env | head -1`: no error, and no traceback at the interpreter's end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(["env"]) == 1


def test_a_full_disk_takes_one_line(files, capfd, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda *_, **__: full_disk())
    sizes = ["--steps", 1, "--num-generations", 4, "--max-completion-length", 2]
    assert run("train", "--model", files / "model", *sizes) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("fastgrpo train: error: ")


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, KeyError, FileNotFoundError, RuntimeError])
def test_other_errors_keep_their_traceback(error):
    def fails():
        raise error("ours")

    with pytest.raises(error, match="ours"):
        errors.run("train", fails)


OF_THE_DISK = [
    (errno.EACCES, "out/metrics.jsonl", "--output-dir: out/metrics.jsonl: Permission denied"),
    (errno.ENOSPC, "out/x/y", r"--output-dir: out/x/y: no space to write it, [\d,.]+ MB are free on the disk"),
    (errno.EROFS, b"out", "--output-dir: out: Read-only file system"),
    (errno.ENAMETOOLONG, "{cwd}/out/x", "--output-dir: .*/out/x: File name too long"),
    (errno.ENOSPC, "/elsewhere/cache", "/elsewhere/cache: No space left on device"),
    (errno.ENOSPC, "outside", "outside: No space left on device"),
    (errno.EDQUOT, None, "Disk quota exceeded"),
    (errno.EACCES, "/elsewhere/secret", None),
    (errno.ENAMETOOLONG, "x" * 300, None),
    (errno.EROFS, None, None),
    (errno.EACCES, 3, None),
    (errno.ENOENT, "out/x", None),
]


@pytest.mark.parametrize("number, file, message", OF_THE_DISK)
def test_the_output_folder_is_blamed_for_its_own_files(number, file, message, capfd, tmp_path):
    file = file.format(cwd=tmp_path) if isinstance(file, str) else file
    error = OSError(number, os.strerror(number), file)

    def fails():
        with mistakes_are_shown("out"):
            raise error

    if message is None:  # with its traceback
        with pytest.raises(OSError) as raised:
            errors.run("train", fails)
        assert raised.value is error
    else:
        assert errors.run("train", fails) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert re.fullmatch(f"fastgrpo train: error: {message}", line)


def test_a_reward_function_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "WARM_START_MAX_STEPS", 3)
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    with pytest.raises(PermissionError, match="secret"):
        run("train", "--reward", "test_command:secretive", *SMALL, "--output-dir", tmp_path / "out")


def secretive(completions, **_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "secret")


def test_interrupted(capfd):
    def fails():
        raise KeyboardInterrupt

    assert errors.run("train", fails) == 130
    assert capfd.readouterr().err == "fastgrpo train: interrupted\n"


# help


def parser_of(command, monkeypatch):
    """The parser of a command."""
    found = []
    monkeypatch.setattr(cli.Parser, "parse_args", lambda self, *_: found.append(self) or sys.exit(0))
    with pytest.raises(SystemExit):
        main([])
    (commands,) = (action for action in found[0]._actions if action.dest == "command")
    return commands.choices[command]


@pytest.mark.parametrize(
    "command, groups",
    [
        ("train", ["model and data", "reward and loss", "sampling", "optimisation", "output", "DeepSeek-R1's stages"]),
        ("bench", ["which sizes", "what is measured", "output"]),
    ],
)
def test_options_are_in_groups_with_each_default_once(command, groups, monkeypatch):
    parser = parser_of(command, monkeypatch)
    shown = [group for group in parser._action_groups if group._group_actions]
    assert [group.title.split(",")[0] for group in shown] == ["options", *groups]
    assert [action.dest for action in shown[0]._group_actions] == ["help"]
    monkeypatch.setenv("COLUMNS", "100")
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 100
    blocks = re.split(r"\n  (?=-)", text)[1:]
    options = {re.match(r"(?:-h, )?(--[a-z-]+)", block)[1]: block for block in blocks}
    for action in parser._actions:
        block = " ".join(options[action.option_strings[-1]].split())
        assert block.count("default") <= 1, block
        if action.nargs != 0 and action.default is not None:
            assert f"(default: {action.default})" in block


def test_defaults_are_those_of_the_config(monkeypatch, tmp_path):
    """Those that the trainer has too; the others are the command's own."""
    actions = {action.dest: action.default for action in parser_of("train", monkeypatch)._actions}
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    names = ("beta", "loss_type", "num_iterations", "num_generations", "temperature", "backend", "logits_dtype")
    for name in (*names, "column_tolerance"):
        assert actions[name] == getattr(config, name), name
    source = (ROOT / "fastgrpo" / "commands" / "train" / "__init__.py").read_text()
    assert not re.search(r"\(default: [^{]", source.replace('(default: "\n', "")), "a default typed by hand"


# env


def test_env_names_every_backend(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(f"backend {name}: " in out for name in backends.NAMES)


def test_env_says_what_to_do(capsys, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr("fastgrpo.backends.native.library_path", lambda name: Path("nowhere"))
    for name in ("cpu", "cuda", "triton"):
        monkeypatch.setattr(backends.get(name), "unavailable", lambda: "a reason")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for drivers, todo in ((("/nowhere",), "nothing on a machine without a GPU"), (("/",), "torch|nvidia-smi")):
        monkeypatch.setattr(env, "_DRIVERS", drivers)
        assert main(["env"]) == 0
        lines = capsys.readouterr().out.splitlines()
        for name in ("transformers", "accelerate", "datasets", "matplotlib"):
            assert f"{name}: not installed; to do: pip install 'fastgrpo[train]'" in lines
        assert "trl: not installed; to do: pip install 'fastgrpo[trl]'" in lines
        after = {line: lines[i + 1] for i, line in enumerate(lines) if i + 1 < len(lines)}
        assert re.search(r"to do: apt install g\+\+; then.*pip install", after["backend cpu: unavailable: a reason"])
        for what in ("GPUs: none", "backend cuda: unavailable: a reason", "backend triton: unavailable: a reason"):
            assert re.search(f"to do: .*({todo})", after[what]), after[what]
    missing_lines = [line for line in lines if re.search("not installed|unavailable|GPUs: none", line)]
    assert len(missing_lines) == sum("to do: " in line for line in lines) > 10


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_env_says_to_rebuild_a_library_that_does_not_load(name, tmp_path, monkeypatch):
    old = tmp_path / "old.so"
    old.write_text("no library")
    monkeypatch.setattr("fastgrpo.backends.native.library_path", lambda name: old)
    backends.get(name)._load.cache_clear()
    monkeypatch.setattr(backends.get("cuda"), "_works", False)
    try:
        why = env._why_not(name)
    finally:
        backends.get(name)._load.cache_clear()
    assert re.search(r"old.so cannot be loaded.*\n +to do.*: pip install --force-reinstall --no-deps \.$", why), why


def test_env_names_the_extra_that_brings_a_package():
    project = pytest.importorskip("tomllib", reason="Python 3.11").loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for package, brought_by in env._PACKAGES.items():
        if match := re.fullmatch(r"fastgrpo\[(.*)\]", brought_by):
            assert package in [re.match(r"[a-z0-9-]+", each)[0] for each in extras[match[1]]], package
