"""GRPO without a trainer: sample, judge, score, step.

python examples/raw_loop.py     # sums of three digits, a tiny model made here: no network
"""

import argparse
import random

import torch

from fastgrpo import grpo_loss, selective_logps
from fastgrpo.recipes import sums
from fastgrpo.rewards import exact
from fastgrpo.trainer.evaluate import sampled_accuracy

PROMPTS, GENERATIONS, PASSES = 64, 8, 2  # questions of a step, completions of each, and updates with them


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a second one saves a model this small nothing
    random.seed(options.seed)

    length = sums.MAX_COMPLETION_LENGTH
    tokenizer = sums.make_tokenizer()
    model = sums.make_model(tokenizer, options.seed)
    questions, held_out = sums.make_datasets(options.seed)
    sums.warm_start(model, tokenizer, questions, options.seed)
    before = sampled_accuracy(model, tokenizer, held_out, exact, length, samples=2)
    rows = questions.to_list()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)

    for step in range(options.steps):
        batch = [row for row in random.sample(rows, PROMPTS) for _ in range(GENERATIONS)]  # groups stand together
        # questions of one length, so that no padding stands before them; else generate() and model() need a mask
        prompts = tokenizer([row["prompt"] for row in batch], return_tensors="pt")["input_ids"]
        ids = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=length)
        completion_ids = ids[:, prompts.shape[1] :]
        ended = completion_ids == tokenizer.eos_token_id
        mask = ended.cumsum(1) - ended.int() == 0  # up to the first end token, which counts

        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = torch.tensor(exact(texts, [row["answer"] for row in batch]))
        old_logps = None
        for _ in range(PASSES):
            logits = model(ids, logits_to_keep=completion_ids.shape[1] + 1).logits[:, :-1]
            if old_logps is None:  # the policy that sampled is the one before the first update
                old_logps = selective_logps(logits.detach(), completion_ids, mask=mask)
            out = grpo_loss(
                logits,
                completion_ids,
                rewards=rewards,
                num_generations=GENERATIONS,
                completion_mask=mask,
                old_per_token_logps=old_logps,
                inplace=True,
            )
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: reward {rewards.mean():.2f}, entropy {out.metrics['entropy']:.2f}", flush=True)

    after = sampled_accuracy(model, tokenizer, held_out, exact, length, samples=2)
    print(f"accuracy {before:.2f} -> {after:.2f}")


if __name__ == "__main__":
    main()
