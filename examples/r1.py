"""The stages of DeepSeek-R1, function by function, on a tiny model made here: no network, three minutes.

python examples/r1.py

`fastgrpo train --recipe r1` does the same with checkpoints, --resume, tables, and models of one's own.
"""

import argparse

import torch
from datasets import concatenate_datasets
from transformers import TrainingArguments

from fastgrpo.recipes import r1
from fastgrpo.recipes import word_problems as task
from fastgrpo.trainer import GRPOConfig
from fastgrpo.trainer.config import CHECKPOINTING
from fastgrpo.trainer.evaluate import sample

LENGTH = task.MAX_COMPLETION_LENGTH


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each stage of reinforcement learning")
    parser.add_argument("--documents", type=int, default=51_200, help="that the base model learns from")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a second one saves a model this small nothing

    common = dict(output_dir="r1", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True)
    common |= {"logging_strategy": "no", CHECKPOINTING: False}
    rl = GRPOConfig(
        max_steps=options.steps,
        learning_rate=5e-4,
        per_device_train_batch_size=256,
        num_generations=8,
        max_completion_length=LENGTH,
        bf16=False,
        **common,
    )
    tokenizer = task.make_tokenizer()
    model = task.make_model(tokenizer, seed=0)
    questions, held_out = task.make_questions(seed=0)
    requests, _ = task.make_requests(seed=0)

    def supervised(examples, learning_rate, epochs, batch_size):
        args = TrainingArguments(
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            remove_unused_columns=False,
            lr_scheduler_type="constant",
            adam_beta2=0.98,
            **common,
        )
        r1.supervised(model, tokenizer, examples, args)

    def report(stage):
        rewards = r1.reasoning_rewards(held_out)
        samples = sample(model, tokenizer, held_out, rewards, LENGTH, samples=2, batch_size=512)
        print(f"{stage}: " + ", ".join(f"{name} {samples.mean(name):.2f}" for name in rewards), flush=True)

    supervised(task.documents(questions, requests, options.documents, seed=0), 5e-3, 1, 128)
    report("base model")
    supervised(task.cold_start_examples(questions, 96, seed=0), 1e-3, 4, 32)
    report("cold start")
    r1.reasoning_rl(model, tokenizer, questions, rl, consistent_language=True)
    report("reasoning RL")
    kept = r1.rejection_sample(model, tokenizer, questions, rl, num_samples=4, batch_size=512)
    general = task.general_samples(requests, 800, seed=0).cast(kept.features)
    supervised(concatenate_datasets([kept, general]), 5e-4, 1, 64)
    report("rejection sampling")
    r1.all_scenarios_rl(model, tokenizer, questions, requests, task.courtesy_reward, rl)
    report("all scenarios")


if __name__ == "__main__":
    main()
