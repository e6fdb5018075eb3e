"""fastgrpo inside TRL's own trainers: real runs on a tiny model, the same numbers with and without."""

import functools
import json

import own_losses
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fastgrpo import Objective

trl = pytest.importorskip("trl", reason="TRL is what is patched (pip install '.[test]')")
trl_utils = pytest.importorskip("trl.trainer.utils")
fast = pytest.importorskip("fastgrpo.integrations.trl")

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +=?."
TIMES = ("step_time", "runtime", "per_second", "_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers and a character tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special).save_pretrained(path)
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def common(tmp_path, **options):
    return dict(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", max_steps=3, logging_steps=1, learning_rate=0.3, optim="sgd", seed=1, disable_tqdm=True,
        **options,
    )  # fmt: skip


def reward(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / 12 for text in completions]


def grpo_run(folder, tmp_path, trainer=None, **options):
    defaults = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
                    gradient_accumulation_steps=2)  # fmt: skip
    args = trl.GRPOConfig(**common(tmp_path, **{**defaults, **options}))
    data = Dataset.from_dict({"prompt": ["a+b=?", "hello ", "1+2=", "what is x. ", "zz ", "9"] * 2})
    return (trainer or trl.GRPOTrainer)(
        model=folder, reward_funcs=reward, args=args, train_dataset=data, eval_dataset=data.select(range(4)),
    )  # fmt: skip


def rloo_run(folder, tmp_path, **options):
    args = trl.RLOOConfig(**common(tmp_path, per_device_train_batch_size=4, num_generations=4,
                                   max_completion_length=12, **options))  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a+b=?", "hello ", "1+2=", "zz "] * 2})
    return trl.RLOOTrainer(model=folder, reward_funcs=reward, args=args, train_dataset=data)


def dpo_run(folder, tmp_path, **options):
    args = trl.DPOConfig(**common(tmp_path, per_device_train_batch_size=4, max_length=48, **options))
    rows = dict(prompt=["a+b=", "1+2=", "zz ", "hello "] * 4, chosen=["c", "3", "z", "world"] * 4,
                rejected=["ddd", "4 or 5", "y", "w"] * 4)  # fmt: skip
    return trl.DPOTrainer(model=folder, args=args, train_dataset=Dataset.from_dict(rows))


def sft_run(folder, tmp_path, **options):
    args = trl.SFTConfig(**common(tmp_path, per_device_train_batch_size=4, max_length=48, **options))
    data = Dataset.from_dict({"text": ["a+b=c", "1+2=3 or so", "hello world", "zz top"] * 4})
    return trl.SFTTrainer(model=folder, args=args, train_dataset=data)


def logged(run, *args, **options):
    """(what a run logs but times, its final weights)."""
    trainer = run(*args, **options)
    trainer.train()
    history = [{k: v for k, v in entry.items() if not any(time in k for time in TIMES)}
               for entry in trainer.state.log_history]  # fmt: skip
    return history, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(got, want, near=2e-6):
    """`near`: how far a loss of that size is from 0 by rounding alone; policy losses are sums that nearly cancel."""
    assert len(got[0]) == len(want[0]) > 3
    for a, b in zip(got[0], want[0], strict=True):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=1e-4, abs=near, nan_ok=True), (name, json.dumps([a, b]))
    for name, weight in want[1].items():
        torch.testing.assert_close(got[1][name], weight, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


CHUNKED = hasattr(trl_utils, "add_fused_lm_head")  # TRL 1.15 and later
only_grpo = pytest.mark.skipif(not CHUNKED, reason="before TRL 1.15, patch() is for GRPO and RLOO")


@pytest.mark.parametrize("run", [grpo_run, rloo_run, *(pytest.param(r, marks=only_grpo) for r in (dpo_run, sft_run))])
def test_trainers_log_the_same_under_patch(run, folder, tmp_path):
    want = logged(run, folder, tmp_path)
    with fast.patch():
        got = logged(run, folder, tmp_path)
    assert_same(got, want)


def test_unpatch_gives_the_originals_back():
    places = [(trl_utils, "_ChunkedLogProbFunction")] if CHUNKED else [
        (trainer, "_get_per_token_logps_and_entropies") for trainer in (trl.GRPOTrainer, trl.RLOOTrainer)
    ]  # fmt: skip

    def found():
        return [vars(owner)[name] for owner, name in places]

    originals = found()
    with pytest.raises(KeyError):
        with fast.patch():
            assert not any(a is b for a, b in zip(found(), originals, strict=True))
            raise KeyError
    assert all(a is b for a, b in zip(found(), originals, strict=True))
    fast.patch()
    fast.patch()
    fast.unpatch()
    assert all(a is b for a, b in zip(found(), originals, strict=True))
    fast.unpatch()


@pytest.mark.skipif(not CHUNKED, reason="TRL before 1.15 has another place to patch")
def test_a_seam_that_moved_is_refused(monkeypatch):
    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels):
            return hidden

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Moved)
    with pytest.raises(
        RuntimeError, match=r"fastgrpo 0\.\S+ fits TRL 1.10 to 1.16; TRL 1\.\S+ differs.*takes hidden, weight, l"
    ):
        fast.patch()
    assert trl_utils._ChunkedLogProbFunction is Moved
    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match="_ChunkedLogProbFunction"):
        fast.patch()


GRPO = {
    "grpo": dict(loss_type="grpo"),
    "bnpo": dict(loss_type="bnpo"),
    "dr_grpo": dict(loss_type="dr_grpo"),
    "dapo-kl": dict(loss_type="dapo", beta=0.1, num_iterations=2),
    "luspo-sequence": dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2),
    "cispo": dict(loss_type="cispo", epsilon_high=1.5, num_iterations=2),
    "sapo": dict(loss_type="sapo", num_iterations=2),
    "vespo": dict(loss_type="vespo", num_iterations=2),
    "sequence-delta": dict(
        importance_sampling_level="sequence", loss_type="grpo", delta=1.2, num_iterations=2, beta=0.1
    ),
    "entropy": dict(entropy_coef=0.01),
    "adaptive-entropy": dict(entropy_coef=0.01, use_adaptive_entropy=True, entropy_target=3.0),
    "quantile": dict(top_entropy_quantile=0.4, entropy_coef=0.01),
    "off-policy": dict(off_policy_mask_threshold=0.01, num_iterations=2),
    "steps-per-generation": dict(steps_per_generation=4, gradient_accumulation_steps=2),
    "evaluation": dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4),
    "compiled": dict(torch_compile=True, torch_compile_backend="eager", beta=0.1),
    "liger": dict(use_liger_kernel=True, liger_kernel_config=dict(rope=False, rms_norm=False, swiglu=False)),
}


@pytest.mark.parametrize("name", GRPO)
def test_grpo_logs_the_same_three_ways(name, folder, tmp_path, recwarn):
    """TRL alone, TRL patched, and the subclass: every logged number and the final weights."""
    if name == "liger":
        pytest.importorskip("liger_kernel")
    want = logged(grpo_run, folder, tmp_path, **GRPO[name])
    near = 1e-5 if name in ("vespo", "cispo") else 2e-6  # terms are advantage times logp, about 5
    with fast.patch():
        assert_same(logged(grpo_run, folder, tmp_path, **GRPO[name]), want, near)
    assert_same(logged(grpo_run, folder, tmp_path, fast.GRPOTrainer, **GRPO[name]), want, near)
    assert not [str(w.message) for w in recwarn if "fastgrpo leaves" in str(w.message)]


OWN = {
    "a function": (dict(loss_type=own_losses.clipped), dict()),
    "of sequences": (dict(loss_type=own_losses.of_sequences), dict(importance_sampling_level="sequence")),
    "built in": (dict(loss_type="grpo", beta=0.1), dict(loss_type="grpo", beta=0.1)),
}


@pytest.mark.parametrize("name", OWN)
def test_an_objective_of_ones_own(name, folder, tmp_path):
    """Equal to the config's loss where it is the same one; what it cannot do is not left to TRL."""
    own, options = OWN[name]
    options = dict(options, num_iterations=2)
    given = functools.partial(fast.GRPOTrainer, objective=Objective(**own))
    config = options if name == "built in" else dict(num_iterations=2, loss_type="luspo")
    got, want = logged(grpo_run, folder, tmp_path, given, **config), logged(grpo_run, folder, tmp_path, **options)
    clip = {key for entry in want[0] for key in entry if "clip_ratio" in key and "completions" not in key}
    for history in (got[0], want[0]):
        for entry in history:
            for key in clip:
                entry.pop(key, None)  # a function logs none
    assert_same(got, want, 1e-5)


def test_a_tolerance_of_columns(folder, tmp_path, monkeypatch):
    """TRL's numbers, but for what the tolerance lets go, and how many columns were kept."""
    monkeypatch.setattr("fastgrpo.engine.columns.room", lambda *_: 128)  # the rows of so small a V would go dense
    given = functools.partial(fast.GRPOTrainer, column_tolerance=2**-14)
    got, want = logged(grpo_run, folder, tmp_path, given), logged(grpo_run, folder, tmp_path)
    for entry in got[0]:
        kept = {key: entry.pop(key) for key in [*entry] if "columns/" in key}
        assert {key.partition("columns/")[2] for key in kept} in (set(), {"mean", "dense"})
        assert [*kept.values()] == [pytest.approx(100, abs=28), 0] if "loss" in entry else not kept
    assert_same(got, want, 1e-3)
    with pytest.raises(ValueError, match=r"column_tolerance: expected a number in \[0, 1\), got 1"):
        grpo_run(folder, tmp_path, functools.partial(fast.GRPOTrainer, column_tolerance=1))


def test_an_objective_that_cannot_be_had(folder, tmp_path):
    with pytest.raises(ValueError, match="objective: expected an Objective or None, got 'dapo'"):
        grpo_run(folder, tmp_path, functools.partial(fast.GRPOTrainer, objective="dapo"))
    needs_ref = functools.partial(fast.GRPOTrainer, objective=Objective(loss_type=own_losses.with_reference))
    with pytest.raises(ValueError, match="objective: .*no reference policy, because the config's beta is 0"):
        grpo_run(folder, tmp_path, needs_ref)
    prompts = functools.partial(fast.GRPOTrainer, objective=Objective(average="prompt-mean"))
    with pytest.raises(ValueError, match="average: .*'prompt-mean'"):
        grpo_run(folder, tmp_path, prompts)
