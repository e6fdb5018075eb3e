"""A TRL GRPO script on fastgrpo: the two lines that differ are marked.

python examples/trl_grpo.py                                      # a tiny random model, made here: no network
python examples/trl_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct   # a real one
"""

import argparse

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from fastgrpo.integrations.trl import GRPOTrainer  # was: from trl import GRPOTrainer

# Or keep TRL's trainer, and patch it: fastgrpo.integrations.trl.patch()


def tiny_model():
    """(random model of two layers, character tokenizer)"""
    letters = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .?!"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    config = Qwen2Config(
        vocab_size=len(letters),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config), tokenizer


def vowels(completions, **_):
    """The share of vowels in a completion."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder (default: a tiny random model, made here)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output-dir", default="trl-grpo")
    options = parser.parse_args()
    model, tokenizer = (options.model, None) if options.model else tiny_model()
    args = GRPOConfig(
        output_dir=options.output_dir,
        max_steps=options.steps,
        learning_rate=1e-6 if options.model else 1e-2,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=256 if options.model else 16,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=vowels,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["say something. ", "well? ", "go on. ", "hello! "] * 8}),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"mean reward: {rewards[0]:.2f} -> {rewards[-1]:.2f}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
