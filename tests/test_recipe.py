"""`fastgrpo train --recipe`: the embedded task, the stages, resuming, mistakes; the full runs are marked slow."""

import json
import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForSequenceClassification

from fastgrpo.cli import main
from fastgrpo.commands.train import recipe, tasks
from fastgrpo.recipes import r1, word_problems
from fastgrpo.recipes.template import R1_ZERO_CHAT_TEMPLATE
from fastgrpo.rewards import accuracy_reward, call_reward_func, format_reward
from fastgrpo.rewards.text import TAGS
from fastgrpo.trainer.config import CHECKPOINTING, GRPOConfig
from fastgrpo.trainer.evaluate import Samples
from fastgrpo.trainer.grpo_trainer import GRPOTrainer

STAGES = ["base", "cold-start", "reasoning-rl", "rejection-sft", "all-scenarios-rl"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_table(folder):
    return {entry["stage"]: entry["held_out"] for entry in read_metrics(folder) if "held_out" in entry}


# the embedded task


def test_no_held_out_numbers_in_training():
    questions, held_out = word_problems.make_questions(seed=1)
    assert len(held_out) == word_problems.HELD_OUT

    def numbers(rows):
        return {tuple(re.findall(r"\d", row["prompt"])) for row in rows}

    assert not numbers(questions) & numbers(held_out)
    for row in held_out:
        assert int(row["answer"]) == sum(map(int, *numbers([row])))
    assert sorted(set(held_out["language"])) == ["en", "zh"]
    requests, held_out_requests = word_problems.make_requests(seed=1)
    assert not set(requests["prompt"]) & set(held_out_requests["prompt"])


def test_documents_are_of_every_kind():
    tokenizer = word_problems.make_tokenizer()
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in TAGS)
    questions, _ = word_problems.make_questions(seed=0)
    requests, _ = word_problems.make_requests(seed=0)
    documents = word_problems.documents(questions, requests, 4000, seed=0)
    answers = dict(zip(questions["prompt"], questions["answer"], strict=True))
    solved = [row for row in documents if row["prompt"] in answers]
    texts = [row["completion"] for row in solved]
    for text in documents["completion"]:
        ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
        assert tokenizer.decode(ids) == text + tokenizer.eos_token
        assert len(ids) <= word_problems.MAX_COMPLETION_LENGTH
    right = accuracy_reward(texts, [answers[row["prompt"]] for row in solved])
    assert 0.2 < sum(right) / len(right) < 0.5
    assert 0.3 < sum(format_reward(texts)) / len(texts) < 0.6
    assert any(not any(tag in text for tag in TAGS) for text in texts)
    assert set(documents["prompt"]) - set(answers) <= set(requests["prompt"])


def test_cold_start_examples_are_right():
    questions, _ = word_problems.make_questions(seed=0)
    examples = word_problems.cold_start_examples(questions, 50, seed=0)
    answers = dict(zip(questions["prompt"], questions["answer"], strict=True))
    assert accuracy_reward(examples["completion"], [answers[p] for p in examples["prompt"]]) == [1.0] * 50
    assert format_reward(examples["completion"]) == [1.0] * 50


@pytest.mark.parametrize(
    "prompt, completion, score",
    [
        ("Thank Tom.", "Thanks Tom!", 1),
        ("Thank Tom.", "Thanks Tom", 2 / 3),
        ("Thank Tom.", "Thanks Ann!", 2 / 3),
        ("Thank Tom.", "Hello Tom!", 2 / 3),
        ("Thank Tom.", "谢谢Tom", 1 / 3),
        ("感谢明。", "谢谢明!", 1),
        ("感谢明。", "", 0),
    ],
)
def test_courtesy(prompt, completion, score):
    assert word_problems.courtesy_reward([prompt], [completion]) == [pytest.approx(score)]


# the stages


def test_rejection_sampling_keeps_what_is_right_and_readable(monkeypatch):
    good = "<think>now 12, now 8</think><answer>8</answer>"
    texts = [
        good,
        good,
        good.replace("8</a", "9</a"),
        good.replace("now 8", "得8"),
        good + "8",
        "<think></think><answer>8</answer>",  # no words, so in no language
    ]
    questions = Dataset.from_list([{"prompt": "q", "answer": "8", "language": "en"}])
    calls = []

    def fake_sample(model, tokenizer, rows, rewards, length, **options):
        calls.append(options)
        columns = {"answer": ["8"] * 6, "language": ["en"] * 6}
        scores = {name: call_reward_func(f, name, texts, **columns) for name, f in rewards.items()}
        return Samples([rows[0]] * 6, texts, [9] * 6, scores)

    monkeypatch.setattr(r1, "sample", fake_sample)
    args = GRPOConfig("out", use_cpu=True, bf16=False, temperature=0.7, seed=5, **{CHECKPOINTING: False})
    kept = r1.rejection_sample(None, None, questions, args, num_samples=6, batch_size=4)
    assert kept.to_list() == [{"prompt": "q", "completion": good}]
    assert calls == [{"temperature": 0.7, "samples": 6, "batch_size": 4, "seed": 5}]
    mixed = Dataset.from_list([{"prompt": "q", "answer": "8", "language": None}, {"prompt": "r", "language": "en"}])
    scores = dict(accuracy=[1, 1], language=[math.nan] * 2)  # a row without a language is not measured by it
    monkeypatch.setattr(r1, "sample", lambda *_, **__: Samples([*mixed], [good] * 2, [9] * 2, scores))
    kept = r1.rejection_sample(None, None, mixed, args, num_samples=1, batch_size=4)
    assert kept.to_list() == [{"prompt": "q", "completion": good}]
    monkeypatch.setattr(r1, "sample", fake_sample)
    texts[:2] = ["", ""]
    with pytest.raises(ValueError, match="questions: expected some to be answered well, got none of 6"):
        r1.rejection_sample(None, None, questions, args, num_samples=6, batch_size=4)


def test_rules_and_judge_score_their_own_rows(monkeypatch, tmp_path):
    """In the last stage each function has a say about its own scenario, and requests are a third of the rows."""
    made = {}

    class Recorder:
        def __init__(self, model, reward_funcs, args, rows, processing_class):
            made.update(rows=rows, rewards={f.__name__: f for f in reward_funcs})

    monkeypatch.setattr(r1, "GRPOTrainer", Recorder)
    monkeypatch.setattr(r1, "_train", lambda *_: None)
    questions = Dataset.from_list([{"prompt": f"{i}", "answer": "8", "language": "en"} for i in range(12)])
    requests = Dataset.from_list([{"prompt": p, "completion": "x"} for p in ("Thank Tom.", "Greet Ann.")])
    r1.all_scenarios_rl(None, None, questions, requests, word_problems.courtesy_reward, None)
    assert made["rows"]["scenario"] == ["reasoning"] * 12 + ["general"] * 6
    columns = {name: [made["rows"][i][name] for i in (0, 12)] for name in ("answer", "language", "scenario")}
    completions = ["<think>now 8</think><answer>8</answer>", "Thanks Tom!"]
    scores = {
        name: f(completions=completions, prompts=["0", "Thank Tom."], **columns) for name, f in made["rewards"].items()
    }
    assert scores == {
        "accuracy": [1.0, None],
        "format": [1.0, None],
        "language": [1.0, None],
        "general": [None, 1.0],
    }


# the command


def small_run(output, *arguments):
    sizes = ["--steps", 3, "--batch-size", 16, "--held-out", 2, "--save-steps", 1, "--max-completion-length", 8]
    return main(["train", "--output-dir", str(output), *map(str, [*sizes, *arguments])])


@pytest.fixture
def small(monkeypatch):
    """A warm start of two steps, a cold start of three, and samples that such a model would never give."""
    monkeypatch.setattr(tasks, "WARM_START_STEPS", 2)
    monkeypatch.setitem(recipe._COLD_START, "num_train_epochs", 1)
    kept = Dataset.from_list([{"prompt": "明有3+5+4?", "completion": "<think>得8,得12</think><answer>12</answer>"}])
    monkeypatch.setattr(r1, "rejection_sample", lambda *_, **__: kept)


def test_r1_zero_smoke(small, tmp_path, capsys):
    assert small_run(tmp_path, "--recipe", "r1-zero") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"accuracy \d\.\d\d -> \d\.\d\d", lines[-1])
    assert "stage               accuracy    format  language    length" in lines
    metrics = read_metrics(tmp_path)
    assert metrics[0] == {"recipe": "r1-zero", "seed": 0, "model": None}
    rl = [entry for entry in metrics if entry.get("stage") == "reasoning-rl" and "reward" in entry]
    assert [entry["step"] for entry in rl] == [1, 2, 3]
    assert {"rewards/accuracy/mean", "rewards/format/mean"} <= set(rl[0])
    assert "rewards/language/mean" not in rl[0]  # R1-Zero may mix languages
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")
    samples = (tmp_path / "samples.txt").read_text()
    assert "After base:" in samples and "After reasoning-rl:" in samples
    assert (tmp_path / "reasoning-rl" / "model" / "config.json").exists()


class Interrupted(Exception):
    pass


def test_resumed_r1_is_the_same_run(small, tmp_path, monkeypatch):
    """Interrupted in the second step of a stage, and gone on with, it ends with the weights of a run in one piece."""
    assert small_run(tmp_path / "whole", "--recipe", "r1") == 0
    assert list(read_table(tmp_path / "whole")) == STAGES
    steps, training_step = [], GRPOTrainer.training_step

    def interrupt(self, *args, **kwargs):
        steps.append(self)
        if len(steps) == 3:
            raise Interrupted
        return training_step(self, *args, **kwargs)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "training_step", interrupt)
        with pytest.raises(Interrupted):
            small_run(parts, "--recipe", "r1")
    assert list(read_table(parts)) == STAGES[:2]
    first = (parts / "base" / "model" / "model.safetensors").stat().st_mtime_ns
    assert small_run(parts, "--recipe", "r1", "--resume") == 0
    assert (parts / "base" / "model" / "model.safetensors").stat().st_mtime_ns == first

    def keys(folder):
        return [(entry.get("stage"), entry.get("step")) for entry in read_metrics(folder)]

    assert keys(parts) == keys(tmp_path / "whole")
    assert read_table(parts) == read_table(tmp_path / "whole")
    whole, resumed = (
        AutoModelForCausalLM.from_pretrained(folder / STAGES[-1] / "model") for folder in (tmp_path / "whole", parts)
    )
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name

    assert small_run(parts, "--recipe", "r1", "--resume") == 0  # finished already: nothing is trained
    assert keys(parts) == keys(tmp_path / "whole")


@pytest.fixture(scope="module")
def local_files(tmp_path_factory):
    """A base model whose tokenizer has no chat template, a classifier, and the three files."""
    folder = tmp_path_factory.mktemp("local")
    tokenizer = word_problems.make_tokenizer()
    tokenizer.model_max_length = 1024
    model = word_problems.make_model(tokenizer, seed=0)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, num_labels=1, pad_token_id=0, **sizes)
    Qwen2ForSequenceClassification(config).save_pretrained(folder / "classifier")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    tokenizer.save_pretrained(folder / "classifier")
    questions, _ = word_problems.make_questions(seed=0)
    requests, _ = word_problems.make_requests(seed=0)
    questions.select(range(40)).remove_columns("steps").to_json(folder / "questions.jsonl")
    word_problems.cold_start_examples(questions, 10, seed=0).to_json(folder / "cold.jsonl")
    word_problems.general_samples(requests, 40, seed=0).to_json(folder / "general.jsonl")
    return folder


FILES = ["--model", "{}/model", "--dataset", "{}/questions.jsonl"]
R1_FILES = [
    *FILES,
    "--cold-start",
    "{}/cold.jsonl",
    "--general",
    "{}/general.jsonl",
    "--reward-model",
    "{}/classifier",
]


@pytest.mark.parametrize("name, files", [("r1-zero", FILES), ("r1", R1_FILES)])
def test_recipes_of_files(local_files, tmp_path, monkeypatch, name, files):
    conversation = [{"role": "user", "content": "3+5?"}]
    kept = Dataset.from_list([{"prompt": conversation, "completion": "<think>now 8</think><answer>8</answer>"}])
    monkeypatch.setattr(r1, "rejection_sample", lambda *_, **__: kept)
    arguments = [argument.format(local_files) for argument in files]
    small = ["--steps", 1, "--num-generations", 4, "--max-completion-length", 8, "--batch-size", 8]
    assert main(["train", "--recipe", name, "--output-dir", str(tmp_path), *arguments, *map(str, small)]) == 0
    table = read_table(tmp_path)
    assert list(table) == (STAGES if name == "r1" else ["base", "reasoning-rl"])
    assert all(("general" in scores) == (name == "r1") for scores in table.values())
    last = tmp_path / list(table)[-1] / "model"
    assert (last / "chat_template.jinja").read_text() == R1_ZERO_CHAT_TEMPLATE
    assert not (tmp_path / "base" / "model").exists()  # it is the user's own


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--reward", "numeric"], "--reward: a recipe has its own rewards"),
        (["--dataset", "x.jsonl"], "--dataset needs --model"),
        (["--reward-model", "x"], "--reward-model needs --model"),
        (["--held-out", "5000"], "--held-out: expected between 1 and 400"),
        (["--num-generations", "3"], "num_generations: expected a divisor"),
        (["--resume"], "--resume: no run in"),
        (["--model", "{}/model"], "--recipe with --model needs a --dataset"),
        (["--model", "{}/model", "--dataset", "{}/cold.jsonl"], "has no column 'answer' (for --recipe)"),
        (FILES, "--recipe r1 with --model needs --cold-start"),
        (R1_FILES[:-2], "--recipe r1 with --model needs --reward-model"),
        (
            [*FILES, "--cold-start", "{}/questions.jsonl"],
            "--cold-start: {}/questions.jsonl has no column 'completion'",
        ),
        ([*R1_FILES[:-1], "{}/nowhere"], "--reward-model: no such folder"),
    ],
)
def test_mistakes_are_named(local_files, tmp_path, capsys, arguments, message):
    arguments = [argument.format(local_files) for argument in arguments]
    assert main(["train", "--recipe", "r1", "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message.format(local_files) in error and "Traceback" not in error


def test_resume_of_another_run(small, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"recipe": "r1-zero", "seed": 0, "model": null}\n')
    assert small_run(tmp_path, "--recipe", "r1", "--resume") == 2
    assert 'is not one of {"recipe": "r1", "seed": 0, "model": null}' in capsys.readouterr().err


# the demonstrations, at full length: `pytest -m slow`

SEEDS = [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_r1_zero_learns(tmp_path, seed):
    assert main(["train", "--recipe", "r1-zero", "--output-dir", str(tmp_path), "--seed", str(seed)]) == 0
    base, rl = read_table(tmp_path).values()
    assert rl["accuracy"] >= base["accuracy"] + 0.3
    assert rl["format"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_every_stage_of_r1_improves_what_it_is_for(tmp_path, seed):
    assert main(["train", "--recipe", "r1", "--output-dir", str(tmp_path), "--seed", str(seed)]) == 0
    base, cold, rl, sampled, last = read_table(tmp_path).values()
    assert cold["format"] >= base["format"] + 0.2
    assert rl["accuracy"] >= cold["accuracy"] + 0.1
    assert sampled["language"] > rl["language"] + 0.005 and sampled["format"] >= rl["format"] - 0.005
    assert sampled["accuracy"] >= rl["accuracy"] - 0.02
    assert last["general"] >= sampled["general"] + 0.1
    assert last["language"] >= 0.95 and last["format"] >= 0.9
