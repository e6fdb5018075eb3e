"""The model's head under whatever else patches, wraps, compiles or copies a model: the numbers of the plain run."""

import copy
import types

import pytest
import torch
import transformers
from datasets import Dataset
from test_head import tiny_model
from test_trainer import QUIET, Scripted, even_digits, make_config, one_thread, small_model, step_logs

from fastgrpo import linear_logps
from fastgrpo.models.head import check_completion_head, run_completion_head
from fastgrpo.recipes import sums
from fastgrpo.trainer import GRPOTrainer
from fastgrpo.trainer.sft import SFTTrainer

__all__ = ["one_thread"]
TOKENIZER = sums.make_tokenizer()
ROWS = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(40)]


def grpo(model, folder, adapter=None, **options):
    args = make_config(folder, **{"beta": 0.1, "num_iterations": 2, **options})
    data = Dataset.from_list(ROWS)
    trainer = GRPOTrainer(model, even_digits, args, data, processing_class=TOKENIZER, peft_config=adapter)
    script = Scripted(TOKENIZER)
    trainer._generate = lambda prompt_ids, mask: script(prompt_ids)
    return trainer


def sft(model, folder, **options):
    rest = dict(remove_unused_columns=False, max_steps=2, logging_steps=1, save_strategy="no", learning_rate=1e-2)
    args = transformers.TrainingArguments(str(folder), seed=7, **{**QUIET, **rest, **options})
    return SFTTrainer(model, args, Dataset.from_list(ROWS), TOKENIZER)


def numbers(trainer):
    """(what a run logs, its final weights)."""
    trainer.train()
    times = {"step_time"}
    logs = [{key: value for key, value in entry.items() if key not in times} for entry in step_logs(trainer)]
    return logs, {name: value.clone() for name, value in whole_weights(trainer.model).items()}


def whole_weights(model):
    return {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}


def assert_same(got, want):
    assert len(got[0]) == len(want[0]) == 2 and all(entry["grad_norm"] > 0 for entry in want[0])
    for ours, theirs in zip(got[0], want[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_head(model):
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    return model


def bound_method(model):
    own = type(model).forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: own(self, *args, **kwargs), model)
    return model


def head_of_ones_own(model):
    layer = model.lm_head
    layer.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), layer.weight.float())
    return model


def observed(model):
    model.lm_head.register_forward_pre_hook(lambda _, args: None)
    model.lm_head.register_forward_hook(lambda _, args, output: output.float())
    model.register_forward_hook(lambda _, args, output: None)
    return model


LIGER = dict(
    use_liger_kernel=True, liger_kernel_config=dict(rope=False, rms_norm=False, swiglu=False)
)  # the rest: GPU
OTHERS = {
    "torch_compile=True": (lambda model: model, dict(torch_compile=True, torch_compile_backend="eager")),
    "model.compile()": (compiled_in_place, {}),
    "torch.compile(model)": (lambda model: torch.compile(model, backend="eager"), {}),
    "its head compiled": (compiled_head, {}),
    "use_liger_kernel=True": (lambda model: model, LIGER),
    "forward on the instance": (bound_method, {}),
    "head's forward on the instance": (head_of_ones_own, {}),
    "hooks that change nothing": (observed, {}),
    "a copy": (copy.deepcopy, {}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return {kind: numbers(kind(small_model(TOKENIZER), tmp_path_factory.mktemp("plain"))) for kind in (grpo, sft)}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", [grpo, sft])
def test_numbers_of_the_plain_run(kind, name, plain, tmp_path):
    if "liger" in name:
        pytest.importorskip("liger_kernel")
    change, options = OTHERS[name]
    assert_same(numbers(kind(change(small_model(TOKENIZER)), tmp_path, **options)), plain[kind])


@pytest.mark.parametrize("kind", [grpo, sft])
def test_patched_after_the_trainer_is_made(kind, plain, tmp_path):
    trainer = kind(small_model(TOKENIZER), tmp_path)
    bound_method(trainer.model)
    assert_same(numbers(trainer), plain[kind])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [grpo, sft])
def test_nothing_is_left_on_the_model(kind, bf16, tmp_path):
    """A twin has its own weights, and its head is an ordinary layer, during training and after it."""
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            seen.append((type(model.lm_head), dict(vars(model.lm_head))))

    model = small_model(TOKENIZER)
    before = (type(model), type(model.lm_head), set(vars(model.lm_head)))
    trainer = kind(model, tmp_path, bf16=bf16)
    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 2 and all(own is torch.nn.Linear and set(rest) == before[2] for own, rest in seen)
    assert (type(model), type(model.lm_head), set(vars(model.lm_head))) == before
    assert bf16 or "forward" not in vars(model)  # under bf16 accelerate leaves its own
    twin, ids = copy.deepcopy(model), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        logits = model(ids).logits
        twin.lm_head.weight.zero_()
        assert torch.equal(model(ids).logits, logits) and not twin(ids).logits.any()
        model.lm_head.weight.zero_()
        torch.testing.assert_close(copy.deepcopy(trainer.model)(ids).logits, torch.zeros_like(logits))


# What the head computes


def logps_here(model, ids, length):
    return run_completion_head(
        model, ids, torch.ones_like(ids), length,
        lambda hidden, head: linear_logps(hidden, head.weight, ids[:, -length:], **head.options),
    )  # fmt: skip


def logps_of_logits(model, ids, length):
    logits = model(input_ids=ids).logits[:, -length - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]


class Float32Head(torch.nn.Linear):
    def forward(self, hidden):
        return torch.nn.functional.linear(hidden.float(), self.weight.float())


def float32_class(model):
    model.lm_head.__class__ = Float32Head


def float32_instance(model):
    head_of_ones_own(model)


def float32_weight(model):
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))


def float32_weight_of_class(model):
    model.lm_head.float()
    model.lm_head.__class__ = Float32Head


def scaled_input(model):
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


@pytest.mark.parametrize(
    "change", [float32_class, float32_instance, float32_weight, float32_weight_of_class, scaled_input]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_own_forward_and_hooks_count(change, dtype):
    """Against the model's own logits; without the cast a bf16 model is off by 1e-2."""
    model, ids = tiny_model("Llama").to(dtype), torch.randint(2, 50, (3, 9))
    change(model)
    check_completion_head(model)
    want = logps_of_logits(model, ids, 4)
    got = logps_here(model, ids, 4)
    tolerance = 5e-2 if change is scaled_input and dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    weight = model.lm_head.weight
    (expected,) = torch.autograd.grad(want.sum(), weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(got.sum(), weight)
    assert (gradient - expected).double().norm() < (1e-5 if weight.dtype == torch.float32 else 2e-2) * expected.norm()


HIDDEN_CHANGES = {
    "hook on the head": lambda model: model.lm_head.register_forward_hook(lambda _, args, logits: logits * 0.5),
    "hook on the model": lambda model: model.register_forward_hook(
        lambda _, args, output: type(output)(logits=output.logits * 0.5)
    ),
    "head that is not linear": lambda model: setattr(
        model.lm_head, "forward", lambda hidden: torch.tanh(hidden @ model.lm_head.weight.T)
    ),
    "head that is not called": lambda model: setattr(
        model, "forward", lambda input_ids, **_: types.SimpleNamespace(
            logits=model.model(input_ids).last_hidden_state @ model.lm_head.weight.T
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN_CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [grpo, sft])
def test_what_the_loss_would_not_see_is_refused(kind, when, name, tmp_path):
    model = small_model(TOKENIZER)
    with pytest.raises(ValueError, match="^model: "):
        if when == "before":
            HIDDEN_CHANGES[name](model)
        trainer = kind(model, tmp_path)
        if when == "after":
            HIDDEN_CHANGES[name](model)
        trainer.train()


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite"])
def test_gradient_goes_around_what_follows_the_head(family):
    """Scales and caps after the head are the loss's business, and must not touch its gradient a second time."""
    options = {"Gemma2": dict(head_dim=8, final_logit_softcapping=5.0), "Cohere": dict(logit_scale=0.3),
               "Granite": dict(logits_scaling=4.0)}  # fmt: skip
    model, ids = tiny_model(family, **options[family]), torch.randint(2, 50, (3, 9))
    want, got = logps_of_logits(model, ids, 4), logps_here(model, ids, 4)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        *(torch.autograd.grad(x.sum(), list(model.parameters())) for x in (got, want)), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm().clamp(min=1e-3)


# Adapters


def test_prompt_learning_trains(tmp_path):
    peft = pytest.importorskip("peft")
    sizes = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapters = {
        "prompt tuning": peft.PromptTuningConfig(**sizes),
        "prompt encoder": peft.PromptEncoderConfig(**sizes, encoder_hidden_size=16),
        "prefix tuning": peft.PrefixTuningConfig(**sizes),
    }
    for name, adapter in adapters.items():
        model = peft.get_peft_model(small_model(TOKENIZER), copy.deepcopy(adapter))
        ids = torch.randint(2, 12, (2, 7))
        model.eval()
        torch.testing.assert_close(logps_here(model, ids, 3).double(), logps_of_logits(model, ids, 3), msg=name)
        trainer = grpo(small_model(TOKENIZER), tmp_path, adapter=adapter)
        before = {key: value.clone() for key, value in trainer.model.named_parameters() if value.requires_grad}
        logs, _ = numbers(trainer)
        assert all(entry["grad_norm"] > 0 for entry in logs), name
        assert any(not torch.equal(value, trainer.model.get_parameter(key)) for key, value in before.items()), name


def test_adapter_twice_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(small_model(TOKENIZER), adapter)
    with pytest.raises(ValueError, match="peft_config: expected None with a model that has an adapter"):
        grpo(model, tmp_path, adapter=adapter)
