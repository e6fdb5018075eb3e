"""Train a Hugging Face model with GRPO on GSM8K, with the fused loss.

python examples/train_hf.py --model Qwen/Qwen2.5-0.5B-Instruct
accelerate launch examples/train_hf.py        # one process per GPU
"""

import argparse

import torch
from datasets import load_dataset

from fastgrpo.rewards import completion_text, numeric
from fastgrpo.trainer import GRPOConfig, GRPOTrainer

INSTRUCTION = "Reason step by step and end with a line `#### <number>`."


def marks_its_answer(completions, **_):
    """A small reward for an answer that can be found."""
    return [0.1 if "####" in completion_text(completion) else 0.0 for completion in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--output-dir", default="gsm8k-grpo")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    data = load_dataset("openai/gsm8k", "main")
    data = data.map(lambda row: {"prompt": [{"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}]})

    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=[numeric, marks_its_answer],  # both get the column `answer`
        args=GRPOConfig(
            output_dir=options.output_dir,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            num_generations=8,
            max_completion_length=384,
            learning_rate=1e-6,
            eval_strategy="steps",
            eval_steps=50,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"].select(range(64)),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
