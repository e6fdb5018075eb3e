"""GRPOTrainer: the same numbers as TRL's, the fused kernels underneath, accumulation, resuming, rewards, heads."""

import json
import math

import own_losses  # noqa: F401 (registers names)
import pytest
import torch
import transformers
from datasets import Dataset
from test_head import tiny_model

from fastgrpo import advantages, backends, grpo_loss, rewards
from fastgrpo.objective import LOSS_TYPES
from fastgrpo.recipes import sums
from fastgrpo.reference import project
from fastgrpo.trainer import GRPOConfig, GRPOTrainer, completion, rollout
from fastgrpo.trainer.config import CHECKPOINTING
from fastgrpo.trainer.groups import RepeatSampler
from fastgrpo.trainer.logs import MetricLog

QUIET = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return sums.make_tokenizer()


def small_model(tokenizer, **options):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **options,
    )
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():  # sharper than the usual start, so that log probabilities are worth comparing
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer)


@pytest.fixture
def dataset():
    return Dataset.from_list([{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)])


def even_digits(completions, **_):
    return [float(sum(character in "02468" for character in completion)) for completion in completions]


def make_config(output_dir, **options):
    sizes = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=2)
    rest = dict(logging_steps=1, save_strategy="no", learning_rate=1e-2, seed=7)
    return GRPOConfig(str(output_dir), **{**QUIET, CHECKPOINTING: False, **sizes, **rest, **options})


def make_trainer(model, tokenizer, dataset, output_dir, reward_funcs=even_digits, **options):
    args = make_config(output_dir, **options)
    return GRPOTrainer(model, reward_funcs, args, dataset, processing_class=tokenizer)


def step_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# The same numbers as TRL's


class Scripted:
    """Completions that do not depend on the model, so that two trainers can be given the same ones."""

    def __init__(self, tokenizer):
        self.random, self.eos = torch.Generator().manual_seed(3), tokenizer.eos_token_id

    def __call__(self, prompts):
        lengths = torch.randint(1, 7, (len(prompts),), generator=self.random).tolist()
        rows = [torch.randint(2, 12, (n,), generator=self.random).tolist() for n in lengths]
        return [row if len(row) == 6 else [*row, self.eos] for row in rows]


PARITY_CASES = {
    "dapo": dict(),
    "dapo accumulated, two passes": dict(gradient_accumulation_steps=2, num_iterations=2),
    "misaligned generation": dict(steps_per_generation=4, gradient_accumulation_steps=2, max_steps=3),
    "grpo with a reference": dict(loss_type="grpo", beta=0.1, num_iterations=2, learning_rate=1e-3),
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", num_iterations=2, epsilon=3e-4),
    "dr_grpo, unscaled": dict(loss_type="dr_grpo", scale_rewards="none", gradient_accumulation_steps=2),
    "cispo": dict(loss_type="cispo", epsilon_high=2.0, num_iterations=2),
    "vespo": dict(loss_type="vespo", num_iterations=2),
    "truncated masked": dict(mask_truncated_completions=True, temperature=0.7),
    "entropy bonus": dict(entropy_coef=0.05, gradient_accumulation_steps=2),
    "GDPO": dict(multi_objective_aggregation="normalize_then_sum", reward_weights=[1.0, 0.5]),
    # 0.2: at other quantiles entropies of this model tie to the last bit, and whoever rounds otherwise takes others
    "top entropy": dict(top_entropy_quantile=0.2, loss_type="bnpo"),
}


@pytest.mark.parametrize("name", PARITY_CASES)
def test_logs_equal_trl(name, model, tokenizer, dataset, tmp_path):
    trl = pytest.importorskip("trl")
    model.save_pretrained(tmp_path / "model")
    funcs = [even_digits, rewards.exact]
    options = dict(
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-2,
        seed=7,
        **QUIET,
    )
    options = {**options, CHECKPOINTING: False, **PARITY_CASES[name]}

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    theirs = trl.GRPOTrainer(
        load(), funcs, trl.GRPOConfig(str(tmp_path), **options), dataset, processing_class=tokenizer
    )
    script = Scripted(tokenizer)
    theirs._generate_single_turn = lambda prompt_ids, *_, **__: (script(prompt_ids), None)
    theirs.train()
    ours = GRPOTrainer(load(), funcs, GRPOConfig(str(tmp_path), **options), dataset, processing_class=tokenizer)
    again = Scripted(tokenizer)
    ours._generate = lambda prompt_ids, mask: again(prompt_ids)
    ours.train()

    assert len(step_logs(ours)) == options["max_steps"]
    for expected, got in zip(step_logs(theirs), step_logs(ours), strict=True):
        assert set(got) == set(expected)
        for key in set(expected) - {"step_time"}:
            if expected[key] is None or got[key] is None:
                assert expected[key] == got[key], key
            else:
                assert math.isclose(float(got[key]), float(expected[key]), rel_tol=1e-4, abs_tol=2e-6), (
                    key, got[key], expected[key],
                )  # fmt: skip


# The kernels, and what is asked of them


def test_loss_goes_through_the_kernels(model, tokenizer, dataset, tmp_path, monkeypatch):
    """Would fail if the trainer fell back to plain torch, or made the gradient in a second pass."""
    kernels = backends.get("cpu")
    if kernels.unavailable() is not None:
        pytest.skip(f"no CPU kernels: {kernels.unavailable()}")
    calls = {"token_loss": 0, "row_stats": 0, "in place": 0}

    def counting(name, original):
        def call(*args, **options):
            calls[name] += 1
            calls["in place"] += name == "token_loss" and args[4] is not None
            return original(*args, **options)

        return call

    for name in ("token_loss", "row_stats"):
        monkeypatch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    options = dict(num_iterations=2, beta=0.1, gradient_accumulation_steps=2)
    make_trainer(model, tokenizer, dataset, tmp_path, **options).train()
    assert calls["token_loss"] == calls["in place"] == 4  # two steps of two micro-batches
    assert calls["row_stats"] == 4  # one round: two chunks, for old and for reference logps


ESTIMATORS = {name: None for name in advantages.ESTIMATORS if name != "pass_at_k"}
ESTIMATORS |= {"pass_at_k": {"k": 2}, "reinforce_plus_plus": '{"gamma": 0.5}'}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_of_advantages_trains(name, model, tokenizer, dataset, tmp_path, monkeypatch):
    """The loss gets the estimator's advantages of the round's rewards."""
    given, calls = [], []

    def judge(completions, **_):
        given.append(torch.tensor(even_digits(completions)) + torch.arange(len(completions)) % 3)
        return given[-1].tolist()

    original = completion.linear_grpo_loss
    monkeypatch.setattr(
        completion, "linear_grpo_loss", lambda *a, **k: calls.append((a[3], k["completion_mask"])) or original(*a, **k)
    )
    options = dict(advantage_estimator=name, advantage_kwargs=ESTIMATORS[name], log_completions=True)
    options |= dict(per_device_train_batch_size=8, max_steps=2)
    trainer = make_trainer(model, tokenizer, dataset, tmp_path, judge, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr("fastgrpo.trainer.grpo_trainer.shuffle_rows", lambda batch: batch)
    trainer.train()
    assert any((x != y).any() for x, y in zip(before, trainer.model.parameters(), strict=True))
    kwargs = trainer.args.advantage_kwargs or {}
    for scores, (got, mask) in zip(given, calls, strict=True):
        want = advantages.estimate(name, scores, 4, completion_mask=mask, **kwargs)
        assert got.shape == (mask.shape if name == "reinforce_plus_plus" else scores.shape)
        torch.testing.assert_close(got, want)
    (entry, _) = step_logs(trainer)
    assert math.isfinite(entry["loss"]) and entry["frac_reward_zero_std"] == 0


@pytest.mark.parametrize("length", [3, 4, 6])
def test_advantages_of_tokens_have_the_length_of_their_process(length):
    """The longest completion of all processes may be longer than one's own, or shorter than one that is masked."""
    mask = torch.arange(length) < torch.tensor([3, 1])[:, None]
    of_all = torch.randn(2, 4) * (torch.arange(4) < torch.tensor([3, 1])[:, None])
    own, mean = rollout.own_advantages(of_all, mask)
    assert own.shape == mask.shape and torch.equal(own[:, :3], of_all[:, :3]) and (own[:, 3:] == 0).all()
    torch.testing.assert_close(mean, torch.stack([of_all[0, :3].mean(), of_all[1, 0]]))
    assert torch.equal(rollout.gather_mask(mask), mask[:, :3])


def largest_allocation(tokenizer, dataset, tmp_path, **options):
    """(largest allocation of a training step, of all its logits) in bytes; 8 completions of 8 tokens, V = 4096."""
    config = transformers.Qwen2Config(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    options = dict(per_device_train_batch_size=8, max_completion_length=8, max_steps=1, beta=0.1, **options)
    model = transformers.Qwen2ForCausalLM(config)
    trainer = make_trainer(model, tokenizer, dataset, tmp_path, num_iterations=2, **options)
    trainer._generate = lambda prompt_ids, mask: [[2 + i] * 8 for i in range(len(prompt_ids))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train()
    return max(event.self_cpu_memory_usage for event in profile.events()), 8 * 8 * 4096 * 4


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_logits_are_never_formed(level, tokenizer, dataset, tmp_path, monkeypatch):
    """No allocation of a training step, old and reference logps included, has room for B·T·V elements."""
    options = dict(importance_sampling_level=level, chunk_size=16)
    largest, logits = largest_allocation(tokenizer, dataset, tmp_path, **options)
    assert 16 * 4096 * 4 <= largest <= logits / 2  # the buffer of a chunk, and weights, are seen

    def with_all_logits(hidden, weight, ids, advantages, **options):
        of_head = [options.pop(name) for name in ("bias", "logit_scale", "softcap")]
        del options["chunk_size"], options["logits_dtype"], options["column_tolerance"]
        return grpo_loss(project(hidden, weight, *of_head), ids, advantages, **options)

    monkeypatch.setattr(completion, "linear_grpo_loss", with_all_logits)
    assert largest_allocation(tokenizer, dataset, tmp_path, **options)[0] >= logits


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "own_losses:with_entropy", "mine-of-sequences"])
def test_every_loss_type_trains(loss_type, model, tokenizer, dataset, tmp_path):
    before = model.lm_head.weight.detach().clone()
    trainer = make_trainer(
        model, tokenizer, dataset, tmp_path, loss_type=loss_type, beta=0.05, max_steps=1, per_device_train_batch_size=8
    )
    trainer.train()
    (log,) = step_logs(trainer)
    assert math.isfinite(log["loss"]) and log["grad_norm"] > 0
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_accumulation_equals_one_batch(loss_type, tokenizer, dataset, tmp_path, model):
    """Two micro-batches of two and one of four, of the same completions: the same gradient and the same step."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for accumulation in (1, 2):
        model.load_state_dict(weights)
        trainer = make_trainer(
            model,
            tokenizer,
            dataset,
            tmp_path,
            loss_type=loss_type,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        script = Scripted(tokenizer)
        trainer._generate = lambda prompt_ids, mask, script=script: script(prompt_ids)
        trainer.train()
        ends.append((step_logs(trainer)[0], model.lm_head.weight.detach().clone()))
    (one, weight), (two, other) = ends
    assert one["grad_norm"] > 0
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-6)
    assert two["reward"] == one["reward"] and two["entropy"] == pytest.approx(one["entropy"], rel=0.05)
    torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)


def test_second_iteration_has_ratio(model, tokenizer, dataset, tmp_path):
    trainer = make_trainer(model, tokenizer, dataset, tmp_path, num_iterations=2, epsilon=1e-5, max_steps=2)
    trainer.train()
    first, second = step_logs(trainer)
    assert first["clip_ratio/region_mean"] == 0
    assert second["clip_ratio/region_mean"] > 0
    assert "reward" in first and "reward" not in second  # one round of sampling


def test_reference_stays(model, tokenizer, dataset, tmp_path):
    trainer = make_trainer(model, tokenizer, dataset, tmp_path, beta=0.1, max_steps=3)
    before = trainer.ref_model.lm_head.weight.clone()
    trainer.train()
    kl = [entry["kl"] for entry in step_logs(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-6
    assert torch.equal(before, trainer.ref_model.lm_head.weight)


def test_checkpointed_activations_give_the_same_step(model, tokenizer, dataset, tmp_path):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    norms = []
    for checkpointing in (False, True):
        model.load_state_dict(weights)
        trainer = make_trainer(model, tokenizer, dataset, tmp_path, max_steps=1, **{CHECKPOINTING: checkpointing})
        trainer.train()
        norms.append(step_logs(trainer)[0]["grad_norm"])
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("save_head", [False, True])
def test_peft(save_head, model, tokenizer, dataset, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"] if save_head else None
    )
    args = make_config(tmp_path, beta=0.1, max_steps=3, **{CHECKPOINTING: True})
    base = model.lm_head.weight.detach().clone()
    trainer = GRPOTrainer(model, even_digits, args, dataset, processing_class=tokenizer, peft_config=adapter)
    assert trainer.ref_model is None
    trainer.train()
    logs = step_logs(trainer)
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[2]["kl"] > 1e-6
    head = trainer.model.get_base_model().lm_head
    assert torch.equal(base, head.original_module.weight if save_head else head.weight)
    if save_head:
        assert not torch.equal(base, head.modules_to_save["default"].weight)


def test_peft_adapter_on_the_head_is_refused(model, tokenizer, dataset, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapter on the language-model head"):
        GRPOTrainer(
            model, even_digits, make_config(tmp_path), dataset, processing_class=tokenizer, peft_config=adapter
        )


# Resuming and evaluating


@pytest.mark.parametrize(
    "options",
    [
        dict(gradient_accumulation_steps=2),
        dict(num_iterations=3, beta=0.1),  # the checkpoint falls into a round
        dict(steps_per_generation=20, gradient_accumulation_steps=1),  # and past an epoch's end
    ],
)
def test_resumed_run_equals_uninterrupted(options, model, tokenizer, dataset, tmp_path):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rest = dict(max_steps=6, save_strategy="steps", save_steps=4, **options)

    def fresh():
        model.load_state_dict(weights)
        return make_trainer(model, tokenizer, dataset, tmp_path, **rest)

    whole = fresh()
    whole.train()
    expected = model.lm_head.weight.detach().clone()
    resumed = fresh()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(expected, model.lm_head.weight)
    for a, b in zip(step_logs(whole), step_logs(resumed), strict=True):
        assert {**a, "step_time": 0} == {**b, "step_time": 0}


def test_evaluation(model, tokenizer, dataset, tmp_path):
    args = make_config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
    )
    trainer = GRPOTrainer(model, rewards.exact, args, dataset, dataset.select(range(4)), tokenizer)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {"eval_reward", "eval_entropy", "eval_rewards/exact/mean", "eval_completions/mean_length"} <= set(log)
    assert math.isfinite(log["eval_loss"])


def test_tables_of_completions(model, tokenizer, dataset, tmp_path):
    """Those of an evaluation stand beside those of the step."""
    options = dict(per_device_eval_batch_size=8, eval_strategy="steps", eval_steps=1)
    args = make_config(tmp_path, max_steps=1, log_completions=True, **options)
    GRPOTrainer(model, rewards.exact, args, dataset, dataset.select(range(2)), tokenizer).train()
    names = ["completions_00001.parquet", "eval_completions_00001.parquet"]
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == names
    tables = [Dataset.from_parquet(str(tmp_path / "completions" / name)) for name in names]
    assert [len(table) for table in tables] == [4, 8] and set(tables[1]["prompt"]) == set(dataset[:2]["prompt"])


def test_what_is_no_number_is_left_out_of_a_mean_and_infinity_is_not():
    log = MetricLog()
    for step in ({"a": 1.0, "b": math.nan}, {"a": math.nan, "c": math.inf}, {"a": 3.0, "c": 1.0}):
        log.add("train", step)
    assert log.take("train") == {"a": 2.0, "b": None, "c": math.inf} and log.take("train") == {}


def test_model_by_path(model, tokenizer, dataset, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = make_config(tmp_path, max_steps=1, log_completions=True)
    trainer = GRPOTrainer(str(tmp_path / "model"), even_digits, args, dataset)
    assert trainer.processing_class.padding_side == "left"
    trainer.train()
    table = Dataset.from_parquet(str(tmp_path / "completions" / "completions_00001.parquet"))
    assert len(table) == 4 and {"prompt", "completion", "even_digits", "advantage"} <= set(table.column_names)


# Rewards


def test_reward_function_gets_columns_and_may_abstain(model, tokenizer, dataset, tmp_path):
    seen = []

    def judge(prompts, completions, completion_ids, answer, trainer_state, log_metric, **_):
        seen.append((prompts, answer, completion_ids, trainer_state.global_step))
        log_metric("judged", 2.0)
        return [None] * len(prompts)

    trainer = make_trainer(model, tokenizer, dataset, tmp_path, judge, max_steps=1)
    with pytest.warns(UserWarning, match="no reward function scored"):
        trainer.train()
    prompts, answer, ids, step = seen[0]
    assert prompts == [prompts[0]] * 4 and answer == [answer[0]] * 4 and len(ids) == 4 and step == 0
    (log,) = step_logs(trainer)
    assert log["grad_norm"] == 0 and log["reward"] is None and log["judged"] == 2.0


def test_abstaining_functions_are_left_out_of_the_sum():
    nan = math.nan
    scores = torch.tensor([[1.0, nan], [nan, 2.0], [nan, nan], [1.0, 1.0]])
    reward, advantages, zero_std = rewards.combine_rewards(
        scores, torch.tensor([1.0, 0.5]), 4, "none", "sum_then_normalize"
    )
    assert torch.equal(reward.nan_to_num(-1), torch.tensor([1.0, 1.0, -1.0, 1.5]))
    torch.testing.assert_close(advantages, torch.tensor([-1 / 6, -1 / 6, 0.0, 1 / 3]))
    assert not zero_std.any()


@pytest.mark.parametrize("result", [[1.0], [1.0] * 5, None, 1.0])
def test_wrong_number_of_rewards(result, model, tokenizer, dataset, tmp_path):
    def judge(completions, **_):
        return result

    with pytest.raises(ValueError, match="reward function 'judge': expected 4 rewards"):
        make_trainer(model, tokenizer, dataset, tmp_path, judge).train()


@pytest.mark.parametrize(
    "function, completion, answer, expected",
    [
        (rewards.exact, " 12 ", "12", 1.0),
        (rewards.exact, "12.", "12", 0.0),
        (rewards.contains, "it is 12.", "12", 1.0),
        (rewards.numeric, "so 1,234.50", "#### 1234.5", 1.0),
        (rewards.numeric, "-3", "3", 0.0),
        (rewards.numeric, "none", "3", 0.0),
        (rewards.exact, [{"role": "assistant", "content": "yes"}], "yes", 1.0),
        (rewards.exact, "x", None, None),
    ],
)
def test_built_in_rewards(function, completion, answer, expected):
    assert function(completions=[completion], answer=[answer]) == [expected]


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_generations=3), "num_generations: expected a divisor"),
        (dict(num_generations=1), "num_generations: expected at least 2"),
        (dict(steps_per_generation=2, generation_batch_size=8), "expected one of them"),
        (dict(generation_batch_size=6), "generation_batch_size: expected a multiple"),
        (dict(scale_rewards="x"), "scale_rewards"),
        (dict(advantage_estimator="x"), "advantage_estimator: expected one of group, rloo, .*'x'"),
        (dict(advantage_estimator="rloo", advantage_kwargs=dict(gamma=1.0)), "gamma: expected one of no options"),
        (dict(advantage_estimator="rloo", advantage_kwargs="gamma"), "advantage_kwargs: expected a dict.*'gamma'"),
        (dict(advantage_estimator="rloo", scale_rewards="none"), "scale_rewards: expected 'group'.*'rloo'.*'none'"),
        (dict(advantage_kwargs=dict(scale_rewards="none")), "advantage_kwargs: .*option of its own"),
        (dict(advantage_estimator="pass_at_k"), "k: expected a value"),
        (dict(advantage_estimator="pass_at_k", advantage_kwargs=dict(k=4)), "k: .*below the size of a group, 4"),
        (
            dict(advantage_estimator="reinforce_plus_plus", advantage_kwargs=dict(gamma=2)),
            "gamma: expected a number in",
        ),
        (
            dict(advantage_estimator="opo", multi_objective_aggregation="normalize_then_sum"),
            "advantage_estimator: expected 'group'.*'opo'",
        ),
        (dict(loss_type="x"), "loss_type"),
        (dict(loss_type=print), "loss_type: .*'module:function' in a config"),
        (dict(average="prompt-mean"), "average: .*tokens or sequences.*'prompt-mean'"),
        (dict(temperature=0.0), "temperature"),
        (
            dict(logits_dtype="float64"),
            "logits_dtype: expected one of auto, float32, bfloat16, float16, got 'float64'",
        ),
        (dict(logits_dtype=torch.int8), "logits_dtype: expected one of auto, .*, got torch.int8"),
        (
            dict(bf16=True, logits_dtype="float16"),
            "logits_dtype: expected one of auto, float32, bfloat16, because hidden states are bfloat16, got 'float16'",
        ),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_bad_arguments(model, tokenizer, dataset, tmp_path):
    args = make_config(tmp_path)
    with pytest.raises(ValueError, match="expected a column 'prompt'"):
        GRPOTrainer(model, even_digits, args, dataset.rename_column("prompt", "x"), processing_class=tokenizer)
    with pytest.raises(ValueError, match="reward_weights: expected 1"):
        make_trainer(model, tokenizer, dataset, tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(TypeError, match="reward_funcs: expected functions"):
        GRPOTrainer(model, "a/reward-model", args, dataset, processing_class=tokenizer)


OPERANDS = {  # training options: what logits may be
    "fp32": (dict(), ["auto", "float32", torch.float32], ["bfloat16", "float16"]),
    "bf16 autocast": (dict(bf16=True), ["auto", "float32", "bfloat16", torch.bfloat16], []),
    "bf16 weights": (
        dict(model_init_kwargs={"dtype": "bfloat16"}),
        ["auto", torch.float32, "bfloat16"],
        ["float16"],
    ),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_logits_dtype_is_that_of_every_pass(name, tokenizer, dataset, tmp_path, monkeypatch):
    """Policy, old and reference logps; a dtype that hidden states do not have is refused before a model is loaded."""
    options, possible, refused = OPERANDS[name]
    small_model(tokenizer).save_pretrained(tmp_path)
    sizes = dict(num_iterations=2, beta=0.1, max_steps=1)
    seen = []

    def seeing(function):
        original = getattr(completion, function)
        monkeypatch.setattr(completion, function, lambda *a, **k: seen.append(k["logits_dtype"]) or original(*a, **k))

    for function in ("linear_grpo_loss", "linear_logps"):
        seeing(function)
    for given in possible:
        args = make_config(tmp_path / "out", logits_dtype=given, **options, **sizes)
        GRPOTrainer(str(tmp_path), even_digits, args, dataset, processing_class=tokenizer).train()
        expected = given if isinstance(given, torch.dtype) or given == "auto" else getattr(torch, given)
        assert seen == [expected] * 3
        seen.clear()
        json.dumps(args.to_dict())
    for given in refused:
        args = make_config(tmp_path / "out", logits_dtype=given, **options)
        hidden = options.get("model_init_kwargs", {}).get("dtype", "float32")
        with pytest.raises(ValueError, match=f"logits_dtype: .* because hidden states are {hidden}, got '{given}'"):
            GRPOTrainer("nowhere/at-all", even_digits, args, dataset, processing_class=tokenizer)


# Heads and samplers


def test_unknown_logit_transformation_is_caught(tokenizer, dataset, tmp_path):
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    odd = Odd(tiny_model("Llama").config)
    with pytest.raises(ValueError, match="logits of Odd are not"):
        make_trainer(odd, tokenizer, dataset, tmp_path)


def test_sampler_keeps_groups_and_depends_on_the_epoch_only():
    sampler = RepeatSampler(range(7), group_size=2, batch_size=3, repeat_count=2, shuffle=False)
    assert list(sampler) == [0, 0, 1, 1, 2, 2] * 2 + [3, 3, 4, 4, 5, 5] * 2
    assert len(sampler) == 24
    shuffled = RepeatSampler(range(50), group_size=1, seed=3)
    first = list(shuffled)
    assert first == list(shuffled) and sorted(first) == list(range(50))
    shuffled.set_epoch(1)
    assert list(shuffled) != first


def test_the_order_of_every_epoch_is_trls():
    theirs = pytest.importorskip("trl.trainer.utils", reason="TRL is the oracle (pip install '.[test]')").RepeatSampler
    their, our = (dict(mini_repeat_count=2), dict(group_size=2))
    both = dict(batch_size=3, repeat_count=2, seed=5)
    want, got = theirs(range(11), **their, **both), RepeatSampler(range(11), **our, **both)
    for epoch in range(3):
        got.set_epoch(epoch)
        assert list(got) == list(want), epoch


def test_conversations_go_through_the_chat_template(model, tokenizer, tmp_path):
    templated = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    templated.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+1"}]} for i in range(4)])
    seen = []

    def judge(prompts, completions, **_):
        seen.extend(completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = make_trainer(model, templated, data, tmp_path, judge, max_steps=1)
    trainer.train()
    assert all(message["role"] == "assistant" for (message,) in seen)
    assert trainer.state.num_input_tokens_seen > 4 * 4  # "i+1=" is four tokens
