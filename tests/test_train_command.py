"""`fastgrpo train`: the run without arguments, a small real run from local files, and mistakes in the arguments."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
from datasets import Dataset

from fastgrpo.cli import main
from fastgrpo.commands.train.files import load_rows
from fastgrpo.recipes import sums


def run_command(*arguments, cwd, timeout):
    """In a folder of its own: from a checkout, `-m fastgrpo` would be the sources there, which hold no library."""
    return subprocess.run(
        [sys.executable, "-m", "fastgrpo", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_default_run_learns(tmp_path):
    """The demonstration itself: accuracy on held-out sums rises by 0.3 or more and ends above 0.8."""
    output = tmp_path / "run"
    result = run_command("train", "--output-dir", output, cwd=tmp_path, timeout=240)
    assert "torch stands in" not in result.stderr, "the kernels were not used"
    assert result.returncode == 0, result.stderr[-3000:]
    last = result.stdout.rstrip("\n").splitlines()[-1]
    match = re.fullmatch(r"accuracy (\d\.\d\d) -> (\d\.\d\d)", last)
    assert match, last
    before, after = map(float, match.groups())
    assert after >= before + 0.3
    assert after > 0.8
    assert "warm start" in result.stderr and "GRPO" in result.stderr  # progress bars

    metrics = [entry for entry in read_metrics(output) if "reward" in entry]
    assert [entry["step"] for entry in metrics] == list(range(1, len(metrics) + 1))
    assert {"loss", "grad_norm", "entropy", "completions/mean_length", "rewards/exact/mean"} <= set(metrics[0])
    assert (output / "reward.png").read_bytes().startswith(b"\x89PNG")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert tokenizer.decode(tokenizer("1+2+3=")["input_ids"]) == "1+2+3="
    assert model.config.vocab_size == len(tokenizer)


def test_embedded_questions_are_disjoint():
    train, held_out = sums.make_datasets(seed=3)
    assert len(held_out) == sums.HELD_OUT
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert all(sum(map(int, row["prompt"].rstrip("=").split("+"))) == int(row["answer"]) for row in held_out)


@pytest.fixture(scope="module")
def local_files(tmp_path_factory):
    """A model folder, and one dataset as JSONL and Parquet."""
    folder = tmp_path_factory.mktemp("local")
    tokenizer = sums.make_tokenizer()
    sums.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = Dataset.from_list([{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)])
    data.to_json(folder / "data.jsonl")
    data.to_parquet(folder / "data.parquet")
    return folder


def small_run(local_files, output, *arguments):
    sizes = ["--steps", 2, "--batch-size", 8, "--num-generations", 4, "--max-completion-length", 4]
    files = ["--model", local_files / "model", "--output-dir", output]
    return main(["train", *map(str, [*files, *sizes, *arguments])])


@pytest.mark.parametrize("file", ["data.jsonl", "data.parquet"])
def test_local_model_and_dataset(local_files, tmp_path, capsys, file):
    arguments = ["--dataset", local_files / file, "--reward", "numeric", "--beta", 0.1, "--loss-type", "grpo"]
    assert small_run(local_files, tmp_path / "out", *arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"accuracy \d\.\d\d -> \d\.\d\d", last)
    assert [entry["step"] for entry in read_metrics(tmp_path / "out") if "kl" in entry] == [1, 2]
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_resume(local_files, tmp_path, capsys):
    data = ["--dataset", local_files / "data.jsonl", "--save-steps", 1]
    assert small_run(local_files, tmp_path / "out", *data) == 0
    assert small_run(local_files, tmp_path / "out", *data, "--steps", 4, "--resume") == 0
    steps = [entry["step"] for entry in read_metrics(tmp_path / "out") if "reward" in entry]
    assert steps == [1, 2, 3, 4]


def count_threes(completions, **_):
    return [float(completion.count("3")) for completion in completions]


def test_reward_of_ones_own(local_files, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    assert small_run(local_files, tmp_path / "out", "--reward", "test_train_command:count_threes") == 0
    assert re.fullmatch(r"reward \d\.\d\d -> \d\.\d\d", capsys.readouterr().out.splitlines()[-1])


def test_reward_without_answers(local_files, tmp_path, capsys):
    Dataset.from_list([{"prompt": f"{i}+1="} for i in range(40)]).to_json(tmp_path / "prompts.jsonl")
    arguments = ["--dataset", tmp_path / "prompts.jsonl", "--reward", "tag_count"]
    assert small_run(local_files, tmp_path / "out", *arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "reward 0.00 -> 0.00"


def test_a_column_may_take_the_place_of_another(tmp_path):
    rows = [{"prompt": f"{i}", "answer": "a long one", "final": str(i)} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = argparse.Namespace(dataset=str(tmp_path / "rows.jsonl"), dataset_config=None, split="train")
    options.prompt_column, options.answer_column = "prompt", "final"
    assert load_rows(options, ["answer"], "--reward exact").to_list() == [
        {"prompt": str(i), "answer": str(i)} for i in range(3)
    ]
