"""What the sampler kept, from `generate` to the loss: `GRPOConfig(keep_sampling_mask=True)`, and TRL's subclass."""

import math

import pytest
import test_trainer
import torch
from test_trainer import even_digits, make_config, make_trainer, step_logs

from fastgrpo.trainer import GRPOTrainer, completion, grpo_trainer, sampling
from fastgrpo.trainer.rollout import generate_completions, make_generation_config

one_thread, tokenizer, model, dataset = (
    getattr(test_trainer, name) for name in ("one_thread", "tokenizer", "model", "dataset")
)
TRUNCATIONS = {
    "top_p": dict(top_p=0.7),
    "top_k": dict(top_k=3, temperature=1.5),
    "min_p": dict(min_p=0.2),
    "all": dict(top_p=0.9, top_k=6, min_p=0.05, temperature=0.8, repetition_penalty=1.3),
}


def prompts_of(tokenizer):
    ids = torch.tensor([tokenizer(f"{i}+{i}=")["input_ids"] for i in range(6)])
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_the_recorder_samples_as_generate_does(name, model, tokenizer, tmp_path):
    """The same completions from the same random state, and the sets of the scores that `generate` itself gives."""
    args = make_config(tmp_path, **TRUNCATIONS[name])
    config = make_generation_config(args, tokenizer, [tokenizer.eos_token_id])
    prompts = prompts_of(tokenizer)
    torch.manual_seed(0)
    output = model.generate(
        input_ids=prompts[0], attention_mask=prompts[1], generation_config=config, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    torch.manual_seed(0)
    recorder = sampling.SetRecorder(config)
    completions = generate_completions(model, *prompts, config, recorder)
    sets = recorder.sets(completions)
    kept = torch.stack(output.scores, dim=1).isfinite()
    assert 1 < kept.sum(-1).double().mean() < 0.8 * kept.shape[-1]
    for i, tokens in enumerate(completions):
        assert output.sequences[i, prompts[0].shape[1] :][: len(tokens)].tolist() == tokens
        assert [x.tolist() for x in sets[i]] == [kept[i, t].nonzero()[:, 0].tolist() for t in range(len(tokens))]


def test_sets_are_carried_with_the_rows_of_a_batch():
    kept = [[[3, 1], None, [5]], [[2]], [torch.tensor([7, 8, 9]), []]]
    batch = sampling.pack_sets(kept, torch.zeros(3, 4))
    assert batch["kept_counts"].tolist() == [[2, 0, 1, 0], [1, 0, 0, 0], [3, 0, 0, 0]]
    part = sampling.sets_of({name: x[[2, 0]] for name, x in batch.items()})
    assert part["kept_ids"].tolist() == [7, 8, 9, 3, 1, 5]
    assert part["kept_offsets"].tolist() == [0, 3, 3, 3, 3, 5, 5, 6, 6]
    assert sampling.sets_of({}) == {}
    nothing = sampling.sets_of(sampling.pack_sets(None, torch.zeros(3, 4)))
    assert nothing["kept_ids"].tolist() == [] and nothing["kept_offsets"].tolist() == [0] * 13


def first_ratios(keep, model, tokenizer, dataset, tmp_path, monkeypatch):
    """exp(the loss's logps - the sampler's) of the loss tokens of a first update."""
    sampled, outputs = [], []
    own, make = sampling.SetRecorder.__call__, completion.linear_grpo_loss

    def record(recorder, input_ids, scores):
        scores = own(recorder, input_ids, scores)
        sampled.append(scores.log_softmax(-1))
        return scores

    def loss(*args, **options):
        outputs.append((args[2], options["completion_mask"], make(*args, **options)))
        return outputs[-1][-1]

    monkeypatch.setattr(sampling.SetRecorder, "__call__", record)
    monkeypatch.setattr(completion, "linear_grpo_loss", loss)
    monkeypatch.setattr(grpo_trainer, "shuffle_rows", lambda batch: batch)
    trainer = make_trainer(
        model, tokenizer, dataset, tmp_path, keep_sampling_mask=True, top_p=0.8, temperature=0.9, max_steps=1
    )
    if not keep:
        monkeypatch.setattr(completion, "sets_of", lambda batch: {})
    trainer.train()
    ids, mask, output = outputs[0]
    logps = torch.stack(sampled[: ids.shape[1]], dim=1).gather(-1, ids[..., None])[..., 0]
    return (output.per_token_logps - logps)[mask.bool()].exp()


def test_the_ratio_at_a_first_update_is_1_with_the_sets_and_off_without(
    model, tokenizer, dataset, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        ratios = first_ratios(True, model, tokenizer, dataset, tmp_path / "a", patched)
    assert ratios.numel() > 8 and (ratios - 1).abs().max() < 1e-5
    ratios = first_ratios(False, model, tokenizer, dataset, tmp_path / "b", monkeypatch)
    assert ratios.mean() < 0.95  # about the mass that was kept


RUNS = {
    "old and reference logps": dict(steps_per_generation=4, gradient_accumulation_steps=2, beta=0.1, max_steps=3),
    "sequences": dict(importance_sampling_level="sequence", loss_type="grpo", num_iterations=2),
    "top entropy": dict(top_entropy_quantile=0.5, entropy_coef=0.01),
    "bf16": dict(bf16=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_logp_of_a_run_is_over_the_sets(name, model, tokenizer, dataset, tmp_path, monkeypatch):
    calls = {"loss": [], "logps": []}
    loss, logps = completion.linear_grpo_loss, completion.linear_logps
    monkeypatch.setattr(completion, "linear_grpo_loss", lambda *a, **k: calls["loss"].append(k) or loss(*a, **k))
    monkeypatch.setattr(completion, "linear_logps", lambda *a, **k: calls["logps"].append(k) or logps(*a, **k))
    options = dict(keep_sampling_mask=True, top_k=4, **RUNS[name])
    trainer = make_trainer(model, tokenizer, dataset, tmp_path, **options)
    trainer.train()
    logs = step_logs(trainer)
    assert logs and all(math.isfinite(entry["loss"]) and entry["entropy"] <= math.log(4) + 1e-5 for entry in logs)
    if name == "old and reference logps":
        assert calls["logps"]
    for k in (*calls["loss"], *calls["logps"]):
        sizes, mask = k["kept_offsets"].diff(), k.get("completion_mask", k.get("mask")).reshape(-1).bool()
        assert bool((sizes[mask] == 4).all()) and int(k["kept_offsets"][-1]) == len(k["kept_ids"])


def test_nothing_is_recorded_without_truncation_or_the_option(model, tokenizer, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "SetRecorder", None)
    make_trainer(model, tokenizer, dataset, tmp_path / "a", keep_sampling_mask=True, max_steps=1).train()
    make_trainer(model, tokenizer, dataset, tmp_path / "b", top_p=0.9, max_steps=1).train()


def test_what_cannot_be_kept_is_refused(model, tokenizer, dataset, tmp_path):
    with pytest.raises(ValueError, match="generation_kwargs: expected no truncation beside .*, got typical_p"):
        make_config(tmp_path, keep_sampling_mask=True, generation_kwargs=dict(typical_p=0.9))

    class Elsewhere(GRPOTrainer):
        def _generate(self, prompt_ids, prompt_mask):
            return [[2, 3]] * len(prompt_ids)

    args = make_config(tmp_path, keep_sampling_mask=True, top_p=0.9)
    with pytest.raises(ValueError, match="keep_sampling_mask: expected a sampler that gives `Sampled`"):
        Elsewhere(model, even_digits, args, dataset, processing_class=tokenizer).train()


@pytest.mark.parametrize("top_p", [0.9, 1.0], ids=["of the config", "of the sampler alone"])
def test_a_sampler_of_the_users_gives_sets_as_lists(top_p, model, tokenizer, dataset, tmp_path):
    class Elsewhere(GRPOTrainer):
        def _generate(self, prompt_ids, prompt_mask):
            return sampling.Sampled([[2, 3]] * len(prompt_ids), [[[2, 5], [3]]] * len(prompt_ids))

    args = make_config(tmp_path, keep_sampling_mask=True, top_p=top_p, max_steps=1)
    trainer = Elsewhere(model, even_digits, args, dataset, processing_class=tokenizer)
    trainer.train()
    (entry,) = step_logs(trainer)
    assert 0 < entry["entropy"] <= math.log(2) / 2  # of two tokens the second was alone


@pytest.mark.parametrize("top_p", [0.9, 1.0], ids=["of the config", "of the sampler alone"])
def test_metrics_are_the_same_ones_where_nothing_was_kept(top_p, model, tokenizer, dataset, tmp_path, monkeypatch):
    """Processes gather them in one tensor: their names and order are those of the config, whatever was sampled."""
    seen, reduce = [], grpo_trainer.reduce_metrics
    monkeypatch.setattr(grpo_trainer, "reduce_metrics", lambda *a: seen.append(a[2]) or reduce(*a))

    class Elsewhere(GRPOTrainer):
        def _generate(self, prompt_ids, prompt_mask):
            completions, n = [[2, 3]] * len(prompt_ids), len(prompt_ids)
            if len(seen) == 0:
                return sampling.Sampled(completions, [[[2, 5], [3]]] * n)
            return completions if top_p == 1.0 and len(seen) == 1 else sampling.Sampled(completions, [[None, []]] * n)

    args = make_config(tmp_path, keep_sampling_mask=True, top_p=top_p, max_steps=3, entropy_coef=0.01)
    Elsewhere(model, even_digits, args, dataset, processing_class=tokenizer).train()
    assert len(seen) == 3 and len({tuple(metrics) for metrics in seen}) == 1
    of_sets = [(metrics["kept/mean"].item(), metrics["kept/without"].item()) for metrics in seen]
    assert of_sets == [(1.5, 0), (0, 1), (0, 1)]


def test_a_round_with_sets_goes_on_from_a_checkpoint(tokenizer, dataset, tmp_path):
    options = dict(
        keep_sampling_mask=True, top_k=4, steps_per_generation=4, gradient_accumulation_steps=2, max_steps=4,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    whole = make_trainer(test_trainer.small_model(tokenizer), tokenizer, dataset, tmp_path, **options)
    whole.train()
    again = make_trainer(test_trainer.small_model(tokenizer), tokenizer, dataset, tmp_path, **options)
    again.train(str(tmp_path / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
