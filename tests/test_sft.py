"""SFTTrainer against torch's cross-entropy in float64."""

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import TrainingArguments

from fastgrpo.recipes import word_problems
from fastgrpo.recipes.template import R1_ZERO_CHAT_TEMPLATE, r1_zero_prompt
from fastgrpo.trainer import sft
from fastgrpo.trainer.sft import SFTTrainer, collate

ROWS = [
    {"prompt": "Tom has 3+7+4?", "completion": "<think>now 10, now 14</think><answer>14</answer>"},
    {"prompt": "明有3+7+4?", "completion": "8"},
    {"prompt": "Thank Ann.", "completion": "Thanks Ann!"},
    {"prompt": "感谢红。", "completion": ""},
]


@pytest.fixture
def tokenizer():
    return word_problems.make_tokenizer()


def with_added_end(tokenizer):
    """A tokenizer that puts the end token behind every text."""
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return tokenizer


def make_trainer(tokenizer, folder, rows=ROWS, arguments={}, **options):  # noqa: B006 (read)
    model = word_problems.make_model(tokenizer, seed=0)
    settings = dict(remove_unused_columns=False, report_to="none", use_cpu=True, save_strategy="no")
    settings |= dict(dataloader_pin_memory=False, disable_tqdm=True, max_grad_norm=0.0)
    args = TrainingArguments(str(folder), **{**settings, **options})
    return SFTTrainer(model, args, Dataset.from_list(rows), tokenizer, **arguments)


def float64_loss(model, tokenizer, rows):
    """Each row alone, without padding, all logits."""
    total, count = 0.0, 0
    for row in rows:
        start = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([start + tokenizer(row["completion"] + "<eos>")["input_ids"]])
        logits = model(input_ids=ids).logits[0, len(start) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, len(start) :], reduction="sum")
        count += ids.shape[1] - len(start)
    return total / count


def test_loss_and_gradients(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    model, truth = trainer.model, word_problems.make_model(tokenizer, seed=0).double()
    expected = float64_loss(truth, tokenizer, ROWS)
    loss = trainer.compute_loss(model, collate(tokenizer, ROWS))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-3)
        assert error < 1e-5, f"{name}: {error}"


def test_logits_dtype_reaches_the_head(tokenizer, tmp_path, monkeypatch):
    seen, original = [], sft.linear_logps
    monkeypatch.setattr(sft, "linear_logps", lambda *a, **k: seen.append(k["logits_dtype"]) or original(*a, **k))
    for given, options, expected in (
        ("auto", {}, "auto"), ("float32", {}, torch.float32), ("bfloat16", dict(bf16=True), torch.bfloat16)
    ):  # fmt: skip
        trainer = make_trainer(tokenizer, tmp_path, arguments=dict(logits_dtype=given), max_steps=1, **options)
        trainer.train()
        assert seen.pop() == expected and not seen
    with pytest.raises(ValueError, match="logits_dtype: .* because hidden states are float32, got 'bfloat16'"):
        make_trainer(tokenizer, tmp_path, arguments=dict(logits_dtype="bfloat16"))


def test_step_is_over_tokens_not_micro_batches(tokenizer, tmp_path):
    """Micro-batches of very different lengths: the step is that of the whole batch, and so is the logged loss."""
    steps = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tokenizer,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            logging_steps=1,
        )
        before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
        trainer.train()
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        steps.append((torch.nn.utils.parameters_to_vector(trainer.model.parameters()) - before, logged))
    (whole, loss), (parts, sum_of_losses) = steps
    assert whole.norm() > 0
    assert (whole - parts).norm() < 1e-4 * whole.norm()
    assert loss == pytest.approx(sum_of_losses, rel=1e-5)


def test_head_makes_no_logits(tokenizer, tmp_path):
    trainer, shapes = make_trainer(tokenizer, tmp_path), []
    trainer.model.get_output_embeddings().register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    batch = collate(tokenizer, ROWS)
    trainer.compute_loss(trainer.model, batch)
    assert shapes == [(*batch["input_ids"].shape, 1)]


def test_prompts_are_not_learnt(tokenizer):
    batch = collate(tokenizer, ROWS)
    learnt = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learnt == [row["completion"] + "<eos>" for row in ROWS]
    assert batch["completion_mask"].sum() == (batch["labels"] != -100).sum()


def test_conversation_goes_through_the_template(tokenizer):
    tokenizer.chat_template = R1_ZERO_CHAT_TEMPLATE
    seen = []

    class Recorder(type(tokenizer)):
        def __call__(self, text=None, **options):
            seen.append((text, options))
            return super().__call__(text, **options)

    tokenizer.__class__ = Recorder
    for completion in ("8", [{"role": "assistant", "content": "8"}]):
        seen.clear()
        collate(tokenizer, [{"prompt": [{"role": "user", "content": "3+5"}], "completion": completion}])
        assert [text for text, _ in seen] == [r1_zero_prompt("3+5"), " 8<eos>"]
        assert all(options == {"add_special_tokens": False} for _, options in seen)


def test_template_that_drops_the_prompt(tokenizer):
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="chat_template: expected the conversation to begin with its prompt"):
        collate(tokenizer, [{"prompt": [{"role": "user", "content": "3+5"}], "completion": "8"}])


# Ends, starts and rows that are no texts

THANKS = "Thanks Ann!"


@pytest.mark.parametrize("completion", [THANKS, THANKS + "<eos>", THANKS + "<eos><eos>", "", "<eos>"])
@pytest.mark.parametrize("adds_end", [False, True])
def test_one_end_token(tokenizer, completion, adds_end):
    """As TRL: behind a completion that does not end in it already; never between prompt and completion."""
    plain = tokenizer("Thank Ann.")["input_ids"]
    if adds_end:
        tokenizer = with_added_end(tokenizer)
        assert tokenizer("Thank Ann.")["input_ids"] == [*plain, tokenizer.eos_token_id]
    batch = collate(tokenizer, [{"prompt": "Thank Ann.", "completion": completion}])
    expected = completion if completion.endswith("<eos>") else completion + "<eos>"
    assert tokenizer.decode(batch["completion_ids"][0]) == expected
    assert batch["input_ids"][0].tolist() == plain + batch["completion_ids"][0].tolist()


def test_end_tokens_equal_trl(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    rows = [{"prompt": "Thank Ann.", "completion": text} for text in (THANKS, THANKS + "<eos>", "", "<eos>")]
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", completion_only_loss=True)
    model = word_problems.make_model(tokenizer, seed=0)
    trainer = trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        assert collate(tokenizer, [row])["input_ids"][0].tolist() == list(theirs["input_ids"])


def test_empty_prompts(tokenizer, tmp_path):
    """Nothing comes before the first token, so it is not learnt; beside other rows as alone."""
    rows = [{"prompt": "", "completion": "Thanks Ann!"}, {"prompt": "", "completion": "8"}]
    trainer = make_trainer(tokenizer, tmp_path)
    truth = word_problems.make_model(tokenizer, seed=0).double()
    moved = [{"prompt": row["completion"][0], "completion": row["completion"][1:]} for row in rows]
    for batch, same in ((rows, moved), ([*rows, ROWS[0]], [*moved, ROWS[0]])):
        tensors = collate(tokenizer, batch)
        assert all(x.dtype == torch.long for x in tensors.values())
        loss = trainer.compute_loss(trainer.model, tensors)
        assert loss.item() == pytest.approx(float64_loss(truth, tokenizer, same).item(), rel=1e-6)
    nothing = collate(tokenizer, [{"prompt": "", "completion": ""}] * 2)
    assert trainer.compute_loss(trainer.model, nothing).item() == 0


MESSAGES = [{"role": "user", "content": "3+5"}]


@pytest.mark.parametrize(
    "prompt, completion, message",
    [
        ("3+5", None, r"completion: expected a text, got None in the row with the prompt '3\+5'"),
        ("3+5", 8, "completion: expected a text, got 8"),
        ("3+5", [{"role": "assistant", "content": "8"}], r"completion: expected a text, got \[\{'role"),
        (MESSAGES, None, "completion: expected a text or a list of messages, got None"),
        (MESSAGES, [], r"completion: expected a text or a list of messages, got \[\]"),
        (None, "8", "prompt: expected a text or a list of messages, got None"),
        ([], "8", r"prompt: expected a text or a list of messages, got \[\]"),
    ],
)
def test_rows_that_are_no_texts(tokenizer, prompt, completion, message):
    tokenizer.chat_template = R1_ZERO_CHAT_TEMPLATE
    with pytest.raises(ValueError, match=message):
        collate(tokenizer, [{"prompt": prompt, "completion": completion}])


def test_mistakes(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="train_dataset: expected a column 'completion', got the columns prompt"):
        make_trainer(tokenizer, tmp_path, [{"prompt": "3"}])
    with pytest.raises(ValueError, match="remove_unused_columns: expected False"):
        make_trainer(tokenizer, tmp_path, remove_unused_columns=True)


def test_several_gpus_in_one_process_are_refused(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ValueError, match="SFTTrainer runs one process per GPU"):
        make_trainer(tokenizer, tmp_path)
