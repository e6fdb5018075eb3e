"""What users bring: end tokens by several routes, adapters with a past, streamed datasets, options that change."""

import warnings

import datasets
import pytest
import torch
import trl
from datasets import Dataset
from test_sft import make_trainer as make_sft
from test_sft import with_added_end
from test_trainer import Scripted, even_digits, make_config, make_trainer, one_thread, small_model, step_logs

from fastgrpo.recipes import sums, word_problems
from fastgrpo.trainer import GRPOTrainer
from fastgrpo.trainer.groups import RepeatedRows, RepeatSampler
from fastgrpo.trainer.rollout import tokenize_prompts

peft = pytest.importorskip("peft")

__all__ = ["one_thread"]
TOKENIZER = sums.make_tokenizer()
PROMPTS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
DATA = Dataset.from_list(PROMPTS)
LORA = dict(r=4, target_modules=["q_proj", "v_proj"])


def scripted(trainer):
    script = Scripted(TOKENIZER)
    trainer._generate = lambda prompt_ids, mask: script(prompt_ids)
    return trainer


# End tokens: whatever generate() will use

ENDS = list(range(5, 12))  # more than half of the digits
ROUTES = ("the model's generation_config", "generation_kwargs")


@pytest.mark.parametrize("ends", [ENDS, [TOKENIZER.eos_token_id, *ENDS], 7])
def test_end_tokens_by_two_routes(ends, tmp_path):
    seen = {}
    for name in ROUTES:
        model = small_model(TOKENIZER)
        model.lm_head.weight.data.div_(20)
        options, ids = {}, []
        if name == "generation_kwargs":
            options["generation_kwargs"] = {"eos_token_id": ends}
        else:
            model.generation_config.eos_token_id = ends

        def judge(completions, completion_ids, ids=ids, **_):
            ids.extend(completion_ids)
            return [float(len(row)) for row in completion_ids]

        trainer = make_trainer(
            model, TOKENIZER, DATA, tmp_path, judge, mask_truncated_completions=True, max_steps=1,
            per_device_train_batch_size=16, **options,
        )  # fmt: skip
        trainer.train()
        (log,) = step_logs(trainer)
        used = [ends] if isinstance(ends, int) else ends
        used = used if name == "generation_kwargs" else [TOKENIZER.eos_token_id, *used]
        cut = sum(row[-1] not in used for row in ids) / len(ids)
        assert log["completions/clipped_ratio"] == pytest.approx(cut, abs=1e-6) and cut < 1
        assert not any(token in used for row in ids for token in row[:-1])
        assert log["grad_norm"] > 0
        seen[name] = log
    if TOKENIZER.eos_token_id in (ends if isinstance(ends, list) else []):
        first, second = ({k: v for k, v in log.items() if k != "step_time"} for log in seen.values())
        assert first == second


def test_no_end_token(tmp_path):
    trainer = make_trainer(
        small_model(TOKENIZER), TOKENIZER, DATA, tmp_path, max_steps=1, generation_kwargs={"eos_token_id": None}
    )
    trainer.train()
    (log,) = step_logs(trainer)
    assert log["completions/mean_length"] == 6 and log["completions/clipped_ratio"] == 1


# Adapters with a past


def trained(config, seed=1, **names):
    """A PEFT model whose adapter is far from what it starts as."""
    model = peft.get_peft_model(small_model(TOKENIZER), config, **names)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


PROMPT = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
ADAPTERS = {
    "LoRA": lambda: trained(peft.LoraConfig(**LORA)),
    "LoRA of another name": lambda: trained(peft.LoraConfig(**LORA), adapter_name="mine"),
    # a name that modules of the model have too
    "LoRA named model": lambda: trained(peft.LoraConfig(**LORA), adapter_name="model"),
    "LoRA named layers": lambda: trained(peft.LoraConfig(**LORA), adapter_name="layers"),
    "LoRA on embeddings": lambda: trained(peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])),
    "a head of its own": lambda: trained(peft.LoraConfig(**LORA, modules_to_save=["lm_head"])),
    "IA3": lambda: trained(peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "prompt tuning": lambda: trained(peft.PromptTuningConfig(**PROMPT)),
    "prompt encoder": lambda: trained(peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=16)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_reference_is_the_model_as_it_was_passed(name, tmp_path):
    model = ADAPTERS[name]()
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    active = list(model.active_adapters)
    trainer = scripted(make_trainer(model, TOKENIZER, DATA, tmp_path, beta=0.1, max_steps=3, num_iterations=2))
    trainer.train()
    kl = [entry["kl"] for entry in step_logs(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-6
    assert list(model.active_adapters) == active
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == learning


def test_reference_equals_trl(tmp_path):
    rows, options = DATA, dict(beta=0.1, max_steps=3, num_iterations=3, learning_rate=1e-3)
    logs = []
    for theirs in (True, False):
        model = trained(peft.LoraConfig(**LORA))
        if theirs:
            args = make_config(tmp_path, **options).to_dict()
            wanted = {field for field in trl.GRPOConfig.__dataclass_fields__ if field in args}
            wanted -= {"generation_batch_size", "deepspeed_plugin"}
            args = trl.GRPOConfig(**{name: args[name] for name in wanted})
            trainer = trl.GRPOTrainer(model, even_digits, args, rows, processing_class=TOKENIZER)
            script = Scripted(TOKENIZER)
            trainer._generate_single_turn = lambda ids, *_, script=script, **__: (script(ids), None)
        else:
            trainer = scripted(make_trainer(model, TOKENIZER, rows, tmp_path, **options))
        trainer.train()
        logs.append([(entry["kl"], entry["grad_norm"], entry["loss"]) for entry in step_logs(trainer)])
    assert logs[0][0][0] == 0 and logs[0][2][0] > 1e-4
    for ours, theirs in zip(*reversed(logs), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_resumed_with_a_reference(tmp_path):
    options = dict(beta=0.1, num_iterations=3, max_steps=4, save_strategy="steps", save_steps=2)
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = trained(peft.LoraConfig(**LORA))
        trainer = make_trainer(model, TOKENIZER, DATA, tmp_path, **options)
        trainer.train(resume_from_checkpoint=resume)
        logs = [{k: v for k, v in entry.items() if k != "step_time"} for entry in step_logs(trainer)]
        ends.append((logs, {name: value.clone() for name, value in model.named_parameters()}))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_second_trainer_has_a_reference_of_its_own(tmp_path):
    model = trained(peft.LoraConfig(**LORA))
    for _ in range(2):
        trainer = scripted(make_trainer(model, TOKENIZER, DATA, tmp_path, beta=0.1, max_steps=2))
        trainer.train()
        kl = [entry["kl"] for entry in step_logs(trainer)]
        assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 0
    assert set(model.peft_config) == {"default", "ref", "ref2"}


def frozen_adapter(folder):
    trained(peft.LoraConfig(**LORA)).save_pretrained(folder / "adapter")
    return peft.PeftModel.from_pretrained(small_model(TOKENIZER), folder / "adapter")


@pytest.mark.parametrize("frozen", [frozen_adapter, lambda _: small_model(TOKENIZER).requires_grad_(False)])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_nothing_to_train_is_said_before_the_first_step(frozen, beta, tmp_path):
    trainer = make_trainer(frozen(tmp_path), TOKENIZER, DATA, tmp_path, beta=beta)
    trainer._generate = None  # not asked for
    with pytest.raises(ValueError, match="model: expected parameters to train, got none that requires a gradient"):
        trainer.train()


# Datasets that can only be iterated


def streamed(rows=PROMPTS):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


class Plain(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(PROMPTS)


class NoTorch:
    __iter__ = Plain.__iter__


def test_rows_come_in_the_order_of_the_sampler():
    options = dict(group_size=2, batch_size=3, repeat_count=2)
    sampler = RepeatSampler(range(8), shuffle=False, **options)
    assert [row["prompt"] for row in RepeatedRows(PROMPTS[:8], **options)] == [PROMPTS[i]["prompt"] for i in sampler]


@pytest.mark.parametrize("make", [streamed, Plain, NoTorch])
def test_iterable_dataset_trains_as_a_list_does(make, tmp_path):
    options = dict(gradient_accumulation_steps=2, num_iterations=2, max_steps=4, shuffle_dataset=False)
    logs = []
    for data in (make(), DATA):
        trainer = scripted(make_trainer(small_model(TOKENIZER), TOKENIZER, data, tmp_path, **options))
        trainer.train()
        logs.append([{k: v for k, v in e.items() if k not in ("step_time", "epoch")} for e in step_logs(trainer)])
    assert len(logs[0]) == 4 and logs[0] == logs[1]


def test_iterable_dataset_is_shuffled_and_resumed(tmp_path):
    options = dict(num_iterations=3, max_steps=6, save_strategy="steps", save_steps=4)
    seen, ends = [], []

    def judge(prompts, **_):
        seen.append(prompts[0])
        return [float(i) for i in range(len(prompts))]

    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = small_model(TOKENIZER)
        make_trainer(model, TOKENIZER, streamed(), tmp_path, judge, **options).train(resume_from_checkpoint=resume)
        ends.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*ends) and seen[:2] != [row["prompt"] for row in PROMPTS[:2]]


def test_iterable_dataset_is_read_by_one_worker(tmp_path):
    with pytest.warns(UserWarning, match="is read by one worker, not by 2"):
        trainer = make_trainer(small_model(TOKENIZER), TOKENIZER, streamed(), tmp_path, dataloader_num_workers=2)
    trainer.train()
    with pytest.raises(ValueError, match="dispatch_batches: expected False"):
        make_trainer(
            small_model(TOKENIZER), TOKENIZER, streamed(), tmp_path, accelerator_config={"dispatch_batches": True}
        )


def test_iterable_dataset_in_evaluation(tmp_path):
    args = make_config(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1, num_generations_eval=2,
                       per_device_eval_batch_size=4)  # fmt: skip
    groups = []

    def judge(prompts, trainer_state, **_):
        groups.append(prompts)
        return [1.0] * len(prompts)

    trainer = GRPOTrainer(small_model(TOKENIZER), judge, args, DATA, streamed(PROMPTS[:4]), TOKENIZER)
    trainer.train()
    assert groups[1:] == [[row["prompt"] for row in PROMPTS[i : i + 2] for _ in range(2)] for i in (0, 2)]


@pytest.mark.parametrize(
    "data, message",
    [
        (iter(PROMPTS), "train_dataset: expected a dataset with rows by index, or one to iterate over again"),
        (7, "train_dataset: expected a dataset with rows by index"),
        (streamed([{"x": "1"}]), "train_dataset: expected a column 'prompt', got the columns x"),
    ],
)
def test_datasets_that_are_refused(data, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer(small_model(TOKENIZER), TOKENIZER, data, tmp_path)


def test_iterable_dataset_of_sft(tmp_path):
    tokenizer = word_problems.make_tokenizer()
    rows = [{"prompt": "Tom has 3?", "completion": "3"}, {"prompt": "Thank Ann.", "completion": "Thanks Ann!"}]
    losses = []
    for stream in (True, False):
        trainer = make_sft(tokenizer, tmp_path, rows, max_steps=2, logging_steps=1, per_device_train_batch_size=2)
        if stream:
            other = type(trainer)(trainer.model, trainer.args, streamed(rows), tokenizer)
            trainer = other
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 2


# Options that change between runs

ROUND = dict(num_iterations=2, steps_per_generation=2, gradient_accumulation_steps=1)
CHANGES = {
    "steps_per_generation": (dict(steps_per_generation=4), "steps_per_generation=2.*with steps_per_generation=4"),
    "one step": (dict(steps_per_generation=1), "steps_per_generation=2.*with steps_per_generation=1"),
    "num_iterations": (dict(num_iterations=3), "num_iterations=2.*with num_iterations=3"),
    "accumulation": (dict(gradient_accumulation_steps=2), "gradient_accumulation_steps=1.*accumulation_steps=2"),
    "beta": (dict(beta=0.2), r"beta=0.0.*with beta=0.2"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with a checkpoint after each of four steps; a round of sampling takes all four."""
    folder = tmp_path_factory.mktemp("stopped")
    options = dict(save_strategy="steps", save_steps=1, max_steps=4, **ROUND)
    make_trainer(small_model(TOKENIZER), TOKENIZER, DATA, folder, **options).train()
    return folder


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("step", [1, 3, 4])
def test_options_that_change_within_a_round(step, name, stopped, tmp_path):
    changed, message = CHANGES[name]
    trainer = make_trainer(small_model(TOKENIZER), TOKENIZER, DATA, tmp_path, max_steps=6, **{**ROUND, **changed})
    checkpoint = str(stopped / f"checkpoint-{step}")
    if step == 4:  # between two rounds
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 6
    else:
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*checkpoint-{step} .*{message}"):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_other_options_may_change(stopped, tmp_path):
    options = {**ROUND, "learning_rate": 1e-3, "logging_steps": 2, "max_steps": 5}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "resume_from_checkpoint|.*a round of sampling begins|.*is passed over")
        trainer = make_trainer(small_model(TOKENIZER), TOKENIZER, DATA, tmp_path, **options)
        trainer.train(resume_from_checkpoint=str(stopped / "checkpoint-3"))
    assert trainer.state.global_step == 5


# Prompts


def test_prompts_do_not_end(tmp_path):
    """A tokenizer that puts the end token behind every text must not end the prompt before it is answered."""
    ending = with_added_end(sums.make_tokenizer())
    assert ending("1+")["input_ids"][-1] == ending.eos_token_id
    plain = TOKENIZER("1+")["input_ids"]
    assert tokenize_prompts(ending, ["1+", "", "1+<eos>"]) == [plain, [], [*plain, ending.eos_token_id]]
