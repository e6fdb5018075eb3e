"""TRL's options that test_trl.py leaves out: other heads, experts, adapters, checkpointing, tools, samplers, images.

Real runs again, and the same numbers: TRL alone, patched, and the subclass."""

import contextlib
import copy
import functools
import itertools
import math
import queue
import random
import types
import warnings

import numpy as np
import pytest
import test_trl
import torch
import transformers
from datasets import Dataset
from test_trl import assert_same, common, dpo_run, fast, logged, reward, sft_run, trl, trl_utils
from test_trl_seams import Kind, logits_of

from fastgrpo import Objective
from fastgrpo.integrations.trl import at_head
from fastgrpo.integrations.trl.chunked import ChunkedLogProb

peft = pytest.importorskip("peft", reason="adapters are among the options (pip install '.[test]')")

folder = test_trl.folder
pytestmark = pytest.mark.skipif(not test_trl.CHUNKED, reason="TRL had other options before 1.15")

STEPS, ACCUMULATION, LENGTH = 3, 2, 12
SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    initializer_range=0.2, tie_word_embeddings=False,  # logits of about 1, so that caps and scales show
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.5, output_router_logits=True)
MODELS = {
    "qwen2": ("Qwen2Config", {}),
    "tied": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "peaked": ("Qwen2Config", {}),
    "bias": ("PhiConfig", {}),
    "softcap": ("Gemma2Config", dict(final_logit_softcapping=0.7, head_dim=8, sliding_window=64)),
    "scale": ("CohereConfig", dict(logit_scale=0.6)),
    "divided": ("GraniteConfig", dict(logits_scaling=1.7)),
    "qwen2-moe": ("Qwen2MoeConfig", dict(EXPERTS, num_experts=4, moe_intermediate_size=32)),
    "qwen3-moe": ("Qwen3MoeConfig", dict(EXPERTS, num_experts=4, moe_intermediate_size=32, head_dim=8)),
    "mixtral": ("MixtralConfig", dict(EXPERTS, num_local_experts=4)),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(folder, tmp_path_factory):
    """name of a model -> folder with it and the tokenizer."""

    @functools.cache
    def saved(name):
        config, options = MODELS[name]
        path = tmp_path_factory.mktemp(name)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**SIZES, **options}))
        for key, values in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(values, std=0.5)
        if name == "peaked":
            model.lm_head.weight.data *= 15  # logits to 50
        model.save_pretrained(path)
        return str(path)

    return saved


# ---- runs; completions do not depend on the model, so that a difference of rounding samples no other token


def completion(step, place):
    """(tokens, 1 where they are the model's, the sampler's log-probabilities, None where it has none)."""
    draw = random.Random(f"{step} {place}")
    end = 5 if place % 4 == 3 else 1  # one in four is truncated
    ids = [draw.randrange(3, 43) for _ in range(draw.randrange(3, LENGTH))] + [end]
    own = [0 if len(ids) // 3 <= t < 2 * len(ids) // 3 else 1 for t in range(len(ids))]
    logps = [-math.log(128) + draw.gauss(0, 0.3) for _ in ids]
    if place % 4 == 1:
        logps[0] = None
    if place % 8 == 6:  # a tool wrote all of it
        own = [0] * len(ids)
    return ids, own, logps


def rollout(tools, sampler, prompts, trainer):
    step = trainer.state.global_step
    ids, own, logps = map(list, zip(*(completion(step, i) for i in range(len(prompts))), strict=True))
    output = dict(prompt_ids=trainer.processing_class(prompts)["input_ids"], completion_ids=ids, logprobs=None)
    return output | (dict(logprobs=logps) if sampler else {}) | (dict(env_mask=own) if tools else {})


def vowels(completions, **_):
    return reward([text if isinstance(text, str) else text[0]["content"] for text in completions])


def grpo_run(base, model, tmp_path, tools=False, sampler=False, adapters=False, arguments=None, **options):
    """`tools`: some tokens are not the model's. `sampler`: the completions come from a vLLM, which is not there.
    `adapters`: on attention; all else is frozen. `arguments`: others of the trainer."""
    data = Dataset.from_dict({"prompt": ["a+b=?", "hello ", "1+2=", "what is x. ", "zz ", "9"] * 2})
    if arguments is None:
        arguments = dict(train_dataset=data, eval_dataset=data.select(range(4)))
        arguments["rollout_func"] = functools.partial(rollout, tools, sampler)
    if adapters:
        arguments["peft_config"] = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    defaults = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=LENGTH,
                    gradient_accumulation_steps=ACCUMULATION, max_steps=STEPS)  # fmt: skip
    args = trl.GRPOConfig(**{**common(tmp_path), **defaults, **options})
    trainer = base(model=model, reward_funcs=vowels, args=args, **arguments)
    if sampler:
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        trainer.vllm_generation = types.SimpleNamespace(sync_weights=lambda: None)
    return trainer


def three_ways(run, monkeypatch, *args, same=assert_same, near=2e-6, **options):
    """What TRL alone logs and ends with, after the two others were held against it."""
    want = logged(run, trl.GRPOTrainer, *args, **options)
    with fast.patch():
        same(logged(run, trl.GRPOTrainer, *args, **options), want, near)
    losses, make = [], at_head.linear_grpo_loss
    monkeypatch.setattr(at_head, "linear_grpo_loss", lambda *a, **k: losses.append(make(*a, **k)) or losses[-1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fastgrpo leaves this to TRL")
        same(logged(run, fast.GRPOTrainer, *args, **options), want, near)
    evaluations = 4 * STEPS if "eval_strategy" in options else 0  # 4 completions to each of 4 prompts, 4 at a time
    assert len(losses) == STEPS * ACCUMULATION + evaluations, "the loss is made once a micro-batch"
    return want


CHECKPOINTED = dict(gradient_checkpointing=True)
EVALUATED = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
SEQUENCES = dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2)
CLIPPED = dict(sampler=True, vllm_importance_sampling_clip_min=0.6, vllm_importance_sampling_clip_max=1.5)
NOT_CORRECTED = dict(sampler=True, vllm_importance_sampling_correction=False)
CASES = {  # name: (model, options of a run)
    "tied embeddings": ("tied", dict(num_iterations=2)),
    "head with bias": ("bias", dict(entropy_coef=0.05)),
    "capped logits": ("softcap", dict(entropy_coef=0.05)),
    "scaled logits": ("scale", dict(temperature=0.8)),
    "divided logits": ("divided", dict(beta=0.1)),
    "experts": ("qwen2-moe", {}),
    "experts, evaluated": ("qwen3-moe", EVALUATED),
    "experts, entropy": ("mixtral", dict(entropy_coef=0.05, loss_type="dr_grpo")),
    "checkpointed": ("qwen2", dict(CHECKPOINTED, gradient_checkpointing_kwargs={"use_reentrant": False})),
    "checkpointed, reentrant": ("qwen2", dict(CHECKPOINTED, gradient_checkpointing_kwargs={"use_reentrant": True})),
    "adapters": ("qwen2", dict(adapters=True, beta=0.1)),
    "adapters, checkpointed": ("bias", dict(CHECKPOINTED, adapters=True, num_iterations=2)),
    "tools": ("qwen2", dict(tools=True)),
    "tools, sequences": ("qwen2", dict(SEQUENCES, tools=True)),
    "tools, off-policy": ("qwen2", dict(tools=True, num_iterations=2, off_policy_mask_threshold=0.01, beta=0.1)),
    "tools, quantile": ("qwen2", dict(tools=True, top_entropy_quantile=0.5, entropy_coef=0.05)),
    "tools, none truncated": ("qwen2", dict(EVALUATED, tools=True, mask_truncated_completions=True)),
    "none truncated": ("qwen2", dict(mask_truncated_completions=True, loss_type="grpo")),
    "sampler, token_truncate": ("qwen2", dict(CLIPPED, loss_type="dapo")),
    "sampler, token_mask": ("qwen2", dict(CLIPPED | EVALUATED, loss_type="grpo", beta=0.1)),
    "sampler, sequence_truncate": ("qwen2", dict(CLIPPED, tools=True, loss_type="cispo")),
    "sampler, sequence_mask": ("qwen2", dict(CLIPPED, loss_type="bnpo")),
    "sampler, vespo, token_truncate": ("qwen2", dict(CLIPPED, loss_type="vespo", num_iterations=2)),
    "sampler, vespo, token_mask": ("qwen2", dict(  # at 1.5, no sequence would be left
        CLIPPED, vllm_importance_sampling_clip_max=6.0, vllm_importance_sampling_clip_min=None, loss_type="vespo")),
    "sampler, vespo, not corrected": ("qwen2", dict(NOT_CORRECTED, loss_type="vespo")),
    "sampler, sequences": ("qwen2", dict(SEQUENCES, sampler=True)),
    "sampler, sapo, quantile": ("qwen2", dict(sampler=True, loss_type="sapo", top_entropy_quantile=0.5)),
    "sampler, off-policy": ("qwen2", dict(sampler=True, tools=True, off_policy_mask_threshold=0.1, beta=0.1)),
    "sampler, off-policy, not corrected": ("qwen2", dict(NOT_CORRECTED, off_policy_mask_threshold=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_options_log_the_same_three_ways(name, model_folder, tmp_path, monkeypatch):
    model, options = CASES[name]
    kind, mode = name.split(", ")[0], name.split(", ")[-1]
    if mode.startswith(("token_", "sequence_")):
        options = dict(options, vllm_importance_sampling_mode=mode)
    near = 1e-5 if options.get("loss_type") in ("vespo", "cispo") else 2e-6  # terms are advantage times logp, about 5
    history, weights = three_ways(grpo_run, monkeypatch, model_folder(model), tmp_path, near=near, **options)
    assert ("aux_loss" in history[0]) == (kind == "experts")
    corrected = kind == "sampler" and mode != "not corrected"
    assert ("sampling/importance_sampling_ratio/mean" in history[0]) == corrected
    start = transformers.AutoModelForCausalLM.from_pretrained(model_folder(model)).state_dict()
    frozen = [k for k, v in weights.items() if torch.equal(v, start.get(k.removeprefix("base_model.model."), v[:0]))]
    assert any("lm_head" in k for k in frozen) == ("adapters" in options)


CORRECTIONS = {
    "token_truncate": ("token_truncate:0.6_1.5", "dapo"),
    "token_mask": ("token_mask:0.6_1.5", "grpo"),
    "sequence_truncate": ("sequence_truncate:0.6_1.5", "cispo"),
    "sequence_mask": ("sequence_mask:0.6_1.5", "bnpo"),
}


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_a_correction_of_ones_own_is_trls(mode, corrected, model_folder, tmp_path):
    """Also where TRL corrects nothing and makes no old logps: then the current ones are the old ones."""
    text, loss_type = CORRECTIONS[mode]
    options = dict(CLIPPED, tools=True, loss_type=loss_type, vllm_importance_sampling_mode=mode)
    want = logged(grpo_run, trl.GRPOTrainer, model_folder("qwen2"), tmp_path, **options)
    objective = Objective(loss_type=loss_type, sampling_correction=text)
    given = functools.partial(fast.GRPOTrainer, objective=objective)
    options |= dict(vllm_importance_sampling_correction=corrected)
    got = logged(grpo_run, given, model_folder("qwen2"), tmp_path, **options)
    outside = [entry["sampling/outside_mean"] for entry in got[0] if "sampling/outside_mean" in entry]
    assert outside and 0 < max(outside) <= 1
    for history in (got[0], want[0]):
        for entry in history:
            for key in [key for key in entry if key.startswith("sampling/")]:
                del entry[key]  # ours are other ones
    assert_same(got, want, 1e-5)


BF16 = {
    "autocast": ("bias", dict(bf16=True, beta=0.1)),
    "autocast, capped": ("softcap", dict(bf16=True, entropy_coef=0.05, num_iterations=2)),
    "weights": ("qwen2", dict(model_init_kwargs={"dtype": "bfloat16"}, num_iterations=2)),
    "weights, scaled": ("scale", dict(model_init_kwargs={"dtype": "bfloat16"}, entropy_coef=0.05)),
    "autocast, peaked": ("peaked", dict(bf16=True, learning_rate=1e-3)),
    "weights, fp32 head": ("bias", dict(model_init_kwargs={"dtype": "bfloat16"}, cast_lm_head_to_fp32=True)),
}


class Exact:
    """TRL's chunked log-probabilities in float64, from the operands that the GEMM would get."""

    @staticmethod
    def apply(hidden, weight, bias, ids, temperature, _, softcap, scale, outputs):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        with torch.autocast("cpu", enabled=False):
            cast = [x.double() + (x.to(dtype).double() - x.double()).detach() for x in (hidden, weight)]
            kind = Kind(0.0, softcap=softcap, scale=scale, temperature=temperature)
            every = logits_of(*cast, None if bias is None else bias.double(), kind).log_softmax(-1)
            entropy = -(every.exp() * every).sum(-1)
            return every.gather(-1, ids[:, None])[:, 0].float(), entropy.float(), None, None, None


@pytest.mark.parametrize("name", BF16)
def test_bf16_is_no_further_from_an_exact_head_than_trl(name, model_folder, tmp_path, monkeypatch):
    """The bf16 of the rest of the model makes another 15 % of difference; what is forgotten (a bias, a cap) is of the
    order of the update."""
    model, options = BF16[name]
    start = transformers.AutoModelForCausalLM.from_pretrained(model_folder(model)).state_dict()

    def update(result):
        return torch.cat([(values.float() - start[key]).view(-1) for key, values in result[1].items()])

    def off(result):
        """How far a run ends from one with an exact head, as a share of its update."""
        return float((update(result) - update(exact)).norm() / update(exact).norm())

    def near(got, want, _):
        assert off(got) < 1.25 * off(want)
        for ours, theirs, truth in zip(got[0], want[0], exact[0], strict=True):
            for key, value in truth.items():
                far = max(0.05 * abs(value), 2e-3, 1.25 * abs(theirs[key] - value))
                assert ours[key] == pytest.approx(value, abs=far, nan_ok=True), key

    with monkeypatch.context() as patched:
        patched.setattr(trl_utils, "_ChunkedLogProbFunction", Exact)
        exact = logged(grpo_run, trl.GRPOTrainer, model_folder(model), tmp_path, **options)
    three_ways(grpo_run, monkeypatch, model_folder(model), tmp_path, same=near, **options)


class TakenApart:
    """The head's parameters have no elements in a training step, as ZeRO-3 has it, but where they are gathered."""

    def training_step(self, *args):
        head = self.model.get_output_embeddings()
        full = {id(p): (p, p.data) for p in (head.weight, head.bias)}
        self.gathered = []

        @contextlib.contextmanager
        def gather(*params):
            params = [p for p in params if id(p) in full]  # those of the reference are whole
            for p in params:
                p.data = full[id(p)][1]
            self.gathered.append(len(params))
            yield
            for p in params:
                p.data = p.data.new_empty(0)

        for p, data in full.values():
            p.data = p.data.new_empty(0)
            p.register_hook(lambda _, p=p, data=data: setattr(p, "data", data))  # whole when its gradient is there
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(trl_utils, "maybe_gather_lm_head_ctx", gather)
            return super().training_step(*args)


def test_a_head_that_is_taken_apart_is_gathered(model_folder, tmp_path):
    """In the forward pass, and in the backward pass if that projects again."""

    def run(base, *mixins):
        cls = type("Trainer", (*mixins, base), {})
        seen.append(grpo_run(cls, model_folder("bias"), tmp_path, beta=0.1, entropy_coef=0.05))
        return seen[-1]

    seen = []
    want = logged(run, trl.GRPOTrainer)
    assert_same(logged(run, trl.GRPOTrainer, TakenApart), want)
    with fast.patch():
        assert_same(logged(run, trl.GRPOTrainer, TakenApart), want)
    assert_same(logged(run, fast.GRPOTrainer, TakenApart), want)
    assert [trainer.gathered for trainer in seen[1:]] == [[2, 2], [2, 2], [2]]


# ---- images


class Answers:
    """Scripted completions to prompts with images."""

    def _generate_single_turn(self, prompt_ids, *_):
        return [completion(self.state.global_step, place)[0] for place in range(len(prompt_ids))], None


class OnlyImages(transformers.Qwen2_5_VLProcessor):
    """Without a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return type(argument)


TEMPLATE = """{% for part in messages[0].content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}"""


def vision_model(folder):
    """(model, processor) of vision and language."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    image, video, start = tokenizer.convert_tokens_to_ids(names)
    vision = dict(hidden_size=16, intermediate_size=32, depth=2, num_heads=2, patch_size=4, spatial_merge_size=2,
                  window_size=16, out_hidden_size=32, fullatt_block_indexes=[1], initializer_range=0.5)  # fmt: skip
    text = dict(SIZES, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=image,
                                           video_token_id=video, vision_start_token_id=start)  # fmt: skip
    images = module.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return model, OnlyImages(images, tokenizer, chat_template=TEMPLATE)


def test_images_reach_the_model(folder, tmp_path, monkeypatch):
    pil = pytest.importorskip("PIL.Image")
    model, processor = vision_model(folder)
    pixels = torch.randint(0, 256, (6, 16, 8, 3), dtype=torch.uint8).numpy()
    texts = ["a+b=?", "hello ", "1+2=", "what is x. ", "zz ", "9"]
    data = Dataset.from_dict({
        "prompt": [[{"role": "user", "content": text}] for text in texts],
        "image": [pil.fromarray(x[: 8 + 8 * (i % 2)]) for i, x in enumerate(pixels)],  # of two sizes
    })  # fmt: skip
    seen = []

    def run(base, *args, **options):
        seen.append([])
        own = copy.deepcopy(model)
        own.model.register_forward_pre_hook(lambda _, a, k: seen[-1].append(k), with_kwargs=True)
        arguments = dict(train_dataset=data, processing_class=processor)
        return grpo_run(type("Trainer", (Answers, base), {}), own, *args, arguments=arguments, **options)

    three_ways(run, monkeypatch, tmp_path, num_iterations=2)
    for calls in zip(*seen, strict=True):
        for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids"):
            assert all(torch.equal(call[key], calls[0][key]) for call in calls)


# ---- other trainers, which patch() reaches


def kto_run(model, tmp_path, **options):
    args = trl.KTOConfig(**common(tmp_path, per_device_train_batch_size=4, max_length=48, **options))
    rows = dict(prompt=["a+b=", "1+2=", "zz ", "hello "] * 4, completion=["c", "4 or 5", "z", "w"] * 4,
                label=[True, False, True, False] * 4)  # fmt: skip
    return trl.KTOTrainer(model=model, args=args, train_dataset=Dataset.from_dict(rows))


class Worker:
    """Rollouts that are all there from the start, and weights that are sent nowhere."""

    def __init__(self, sample):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        for place in range(4 * ACCUMULATION * (STEPS + 2)):  # more than are asked for ahead
            ids, own, logps = completion(0, place)
            old = [-5.0 if x is None else x for x in logps]
            self.rollout_buffer.put(sample(
                prompt=[], completion=[], group_id=place // 4, model_version=STEPS, metrics={"reward": 0.5},
                input_ids=np.array([3, 4, 5 + place // 4, *ids]), advantage=[1.0, -1.0, 0.5, -0.5][place % 4],
                completion_mask=np.array([0, 0, 0, *own]), old_log_probs=np.array([0, 0, 0, *old]),
            ))  # fmt: skip

    def check_health(self, stale_after_s):
        raise RuntimeError("no more rollouts")

    def __getattr__(self, name):
        return lambda *args: None


def flash_attn_varlen_func(q, k, v, starts_q, starts_k, *_, softmax_scale, **__):
    outputs, spans = [], [itertools.pairwise(starts.tolist()) for starts in (starts_q, starts_k)]
    for (a, b), (c, d) in zip(*spans, strict=True):
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))  # the last query sees every key
        parts = [x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])]
        attend = torch.nn.functional.scaled_dot_product_attention
        outputs.append(attend(*parts, attn_mask=seen, scale=softmax_scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs)


def async_grpo_run(model, tmp_path, **options):
    from trl.experimental import async_grpo
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    sizes = dict(per_device_train_batch_size=4, gradient_accumulation_steps=ACCUMULATION, token_budget=0)
    worker = Worker(RolloutSample)
    return async_grpo.AsyncGRPOTrainer(
        model=model, reward_funcs=vowels, train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        args=async_grpo.AsyncGRPOConfig(**common(tmp_path, dtype="float32", **sizes, **options)),
        rollout_worker=worker, weight_transfer=worker,
    )  # fmt: skip


OTHERS = {
    "kto": (kto_run, "qwen2", {}),
    "kto, apo": (kto_run, "bias", dict(loss_type="apo_zero_unpaired")),
    "dpo, experts": (dpo_run, "qwen2-moe", {}),
    "dpo, ipo": (dpo_run, "softcap", dict(loss_type="ipo")),
    "dpo, sft too": (dpo_run, "bias", dict(loss_type=["sigmoid_norm", "sft"], loss_weights=[1.0, 0.5])),
    "sft, dft": (sft_run, "divided", dict(loss_type="dft")),
    "async": (async_grpo_run, "bias", {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_trainers_log_the_same_under_patch(name, model_folder, tmp_path, monkeypatch):
    run, model, options = OTHERS[name]
    if run is async_grpo_run:  # it asks for a GPU's kernels and name
        kernels = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
        monkeypatch.setattr("trl.experimental.async_grpo.packing._flash_attn", lambda: kernels)
        place = "trl.experimental.async_grpo.async_grpo_trainer.get_peak_flops_per_device"
        monkeypatch.setattr(place, lambda *_: None)

    def result():
        history, weights = logged(run, model_folder(model), tmp_path, **options)
        return [{k: v for k, v in entry.items() if not k.startswith("perf/")} for entry in history], weights

    want = result()
    calls, ours = [], ChunkedLogProb.apply
    monkeypatch.setattr(ChunkedLogProb, "apply", lambda *a: calls.append(a) or ours(*a))
    with fast.patch():
        assert_same(result(), want)
    assert calls


def test_sets_in_the_inputs(model_folder, tmp_path):
    """All tokens: the same numbers as without. The sampled one alone: its probability is 1, there and in entropies."""
    ways = {"none": lambda ids: None, "all": lambda ids: torch.arange(128).expand(*ids.shape, 128),
            "one": lambda ids: ids[..., None]}  # fmt: skip

    def run(way):
        class Keeps(fast.GRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                made = super()._generate_and_score_completions(inputs)
                if (kept := ways[way](made["completion_ids"])) is not None:
                    made["kept_ids"] = torch.where(made["completion_mask"][..., None] != 0, kept, -1)
                return made

        return logged(grpo_run, Keeps, model_folder("qwen2"), tmp_path / way, tools=True)

    none, every, one = map(run, ways)
    sizes = [entry.pop("kept/mean") for entry in every[0] if "kept/mean" in entry]
    assert sizes and set(sizes) == {128.0}
    assert not any(entry.pop("kept/without", 0) for entry in every[0])
    assert_same(every, none, 2e-6)
    entropies = [entry["entropy"] for entry in one[0] if "entropy" in entry]
    assert entropies and not any(entropies)
