"""Loss and backward pass of one micro-batch in TRL's GRPOTrainer, on a model of two layers.

The model has Qwen2's layers at a case's H and V, with tied embeddings; completions of T/2 to T tokens follow prompts
of T/2. Nothing is sampled and no optimiser steps: it is the part of a training step that a loss changes.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings

import torch
from torch import Tensor, nn

from fastgrpo import linear_grpo_loss_reference
from fastgrpo.bench.inputs import Random, add_completions
from fastgrpo.bench.operation import (
    DTYPES,
    EPSILON,
    GROUP,
    Case,
    Inputs,
    Operation,
    Results,
    head_bytes,
    head_flops,
    needs,
)
from fastgrpo.bench.targets import both, ratio


def _inputs(case: Case) -> Inputs:
    inputs = Inputs(case=case)
    add_completions(inputs, Random(case))
    return inputs


def _make_model(case: Case) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=case.V, hidden_size=case.H, intermediate_size=max(case.H * 38 // 7 // 64 * 64, 64),
        num_hidden_layers=2, num_attention_heads=max(case.H // 64, 1), num_key_value_heads=1,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    return model.to(torch.bfloat16).to(DTYPES[case.dtype]).to(case.device)


def _make_trainer(cls: type, case: Case, folder: str):
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = trl.GRPOConfig(
            output_dir=folder, use_cpu=case.device == "cpu", bf16=False, report_to="none", num_generations=case.B,
            per_device_train_batch_size=case.B, gradient_checkpointing=False, epsilon=EPSILON, beta=0.0,
        )  # fmt: skip
        trainer = cls(
            model=_make_model(case), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": ["a"] * GROUP}),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def _trainer(inputs: Inputs, name: str):
    """TRL's trainer, or fastgrpo's subclass of it; made once."""
    made = vars(inputs).setdefault("trainers", {})
    if name not in made:
        import trl

        from fastgrpo.integrations.trl import GRPOTrainer

        inputs.folder = tempfile.TemporaryDirectory()
        made[name] = _make_trainer(
            GRPOTrainer if name == "subclass" else trl.GRPOTrainer, inputs.case, inputs.folder.name
        )
    return made[name]


def _batch(inputs: Inputs) -> dict[str, Tensor]:
    case, ids = inputs.case, inputs.ids
    prompt = max(case.T // 2, 1)
    lengths = torch.linspace(prompt, case.T, case.B, device=ids.device).long()
    mask = (torch.arange(case.T, device=ids.device) < lengths[:, None]).long()
    return dict(
        prompt_ids=ids[:, :prompt].flip(0), prompt_mask=torch.ones_like(ids[:, :prompt]), completion_ids=ids * mask,
        completion_mask=mask, advantages=inputs.advantages, num_items_in_batch=mask.sum(),
    )  # fmt: skip


def _results(loss: Tensor, model: nn.Module) -> Results:
    layer = model.model.layers[0]
    results = {
        "loss": loss.detach(),
        "d_embeddings": model.model.embed_tokens.weight.grad,
        "d_mlp": layer.mlp.down_proj.weight.grad,
    }
    model.zero_grad()
    return results


def _step(inputs: Inputs, name: str) -> Results:
    trainer = _trainer(inputs, name)
    loss = trainer._compute_loss(trainer.model, _batch(inputs))
    loss.backward()
    return _results(loss, trainer.model)


def _patched(inputs: Inputs) -> Results:
    from fastgrpo.integrations.trl import patch

    with patch():
        return _step(inputs, "trl")


def _truth(inputs: Inputs) -> Results:
    """The whole model in float64."""
    batch, model = _batch(inputs), copy.deepcopy(_make_model(inputs.case)).double()
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -inputs.case.T - 1 : -1]
    output = linear_grpo_loss_reference(
        hidden, model.lm_head.weight, batch["completion_ids"], batch["advantages"].double(),
        completion_mask=batch["completion_mask"], objective=inputs.case.objective, return_stats=False,
    )  # fmt: skip
    output.loss.backward()
    return _results(output.loss, model)


step = Operation(
    "step",
    title="loss and backward pass of TRL's trainer, on a model of two layers",
    place=9,
    inputs=_inputs,
    truth=_truth,
    bytes=head_bytes,
    flops=head_flops,
    sizes="BTVH",
    quick=(Case("step", 8, 16, 32_768),),
    full=tuple(Case("step", 8, 128, 151_936, dtype=dtype) for dtype in ("bf16", "fp32")),
    targets=both("TRL's step: TRL's time over the subclass's", ratio("trl", under_mode="GRPOTrainer"), 4, 1.6),
    softcap="refused",
    page=6,
    short="a step of TRL's trainer, two layers",
    size=lambda shape: f"{shape['B']} completions of {shape['T'] // 2} to {shape['T']} tokens",
)

for _name, _backend, _mode, _call in (
    ("trl", "torch", "", functools.partial(_step, name="trl")),
    ("fastgrpo", "auto", "patch()", _patched),
    ("fastgrpo", "auto", "GRPOTrainer", functools.partial(_step, name="subclass")),
):
    step.add(_name, backend=_backend, mode=_mode, why_not=needs("trl"), keeps=True)(_call)
