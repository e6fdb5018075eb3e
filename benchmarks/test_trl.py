"""Loss and backward of one micro-batch in TRL's GRPOTrainer: alone, patched, and as fastgrpo's subclass.

`pytest benchmarks/test_trl.py -s`. Two layers of Qwen2.5-0.5B's width with its vocabulary of 151,936, 8 completions of
64 to 128 tokens after prompts of 64, no autocast. One process, the sides take turns; their losses and gradient norms
are compared first. Fails below the project's floors for two cores.
"""

import statistics
import time

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

trl = pytest.importorskip("trl", reason="TRL is the other side (pip install '.[bench]')")
fast = pytest.importorskip("fastgrpo.integrations.trl")

V, PROMPT, LENGTHS = 151_936, 64, [64, 72, 80, 88, 100, 112, 120, 128]
FLOORS = {torch.bfloat16: 4.0, torch.float32: 1.6}  # x TRL alone


def make_trainer(cls, dtype, folder):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")),
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    config = Qwen2Config(
        vocab_size=V, hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    args = trl.GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", num_generations=8,
                          per_device_train_batch_size=8, gradient_checkpointing=False)  # fmt: skip
    from datasets import Dataset

    trainer = cls(model=Qwen2ForCausalLM(config).to(dtype), reward_funcs=lambda completions, **_: [0.0] * 8, args=args,
                  processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}))  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return dict(
        prompt_ids=torch.randint(3, V, (8, PROMPT), generator=generator),
        prompt_mask=torch.ones(8, PROMPT, dtype=torch.int64),
        completion_ids=torch.randint(3, V, mask.shape, generator=generator) * mask,
        completion_mask=mask,
        advantages=torch.randn(8, generator=generator),
        num_items_in_batch=mask.sum(),
    )


@pytest.mark.parametrize("dtype", list(FLOORS), ids=["bf16", "fp32"])
def test_trl_step(benchmark, dtype, tmp_path):
    plain, ours = (make_trainer(cls, dtype, tmp_path) for cls in (trl.GRPOTrainer, fast.GRPOTrainer))
    inputs = make_inputs()

    def step(trainer):
        start = time.perf_counter()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        seconds = time.perf_counter() - start
        gradients = [p.grad.float().norm() for p in trainer.model.parameters()]
        trainer.model.zero_grad()
        return seconds, float(loss), float(torch.stack(gradients).norm())

    def patched(trainer):
        with fast.patch():
            return step(trainer)

    sides = {"trl": lambda: step(plain), "patched": lambda: patched(plain), "subclass": lambda: step(ours)}
    first = {name: side() for name, side in sides.items()}
    near = 1e-4 if dtype == torch.float32 else 3e-2
    for name, (_, loss, norm) in first.items():
        assert loss == pytest.approx(first["trl"][1], rel=near, abs=1e-5), (name, first)
        assert norm == pytest.approx(first["trl"][2], rel=near), (name, first)

    def turns():
        times = {name: [] for name in sides}
        for _ in range(3):
            for name, side in sides.items():
                times[name].append(side()[0])
        return {name: statistics.median(seconds) for name, seconds in times.items()}

    median = benchmark.pedantic(turns, rounds=1)
    ratios = {name: median["trl"] / median[name] for name in ("patched", "subclass")}
    benchmark.extra_info.update(ratios=ratios, median_seconds=median)
    print(f"\n{dtype}: " + ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in median.items()) + f"; {ratios}")
    assert ratios["patched"] >= FLOORS[dtype] and ratios["subclass"] >= 0.97 * ratios["patched"]
