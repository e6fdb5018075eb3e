"""PPO beside GRPO: the same samples and the same fused loss, two ways to advantages.

python examples/ppo.py                     # a value head and GAE: an advantage for each token
python examples/ppo.py --algorithm grpo    # the mean of the group instead: one for each completion

The task is that of `fastgrpo train`: sums of three digits, a tiny model made here, no network.
"""

import argparse
import copy
import random

import torch
from torch import nn

from fastgrpo import Objective, gae, group_advantages, linear_grpo_loss, linear_logps
from fastgrpo.recipes import sums
from fastgrpo.rewards import exact
from fastgrpo.trainer.evaluate import sampled_accuracy

PROMPTS, GENERATIONS, PASSES = 64, 8, 2  # questions of a step, completions of each, and updates with them
VALUE_CLIP, VALUE_COEF = 0.2, 0.5


def token_rewards(scores, mask, kl=0.0):
    """(B, T): less `kl` on every token, and the completion's score (B,) on its last one."""
    last = mask.sum(1, keepdim=True) - 1
    return torch.zeros(mask.shape, dtype=scores.dtype).scatter_(1, last, scores[:, None]) - kl


def ppo_advantages(rewards, values, mask, gamma, lam):
    """(advantages, returns), both (B, T), by GAE (arXiv:1506.02438); the advantages with mean 0 and std 1."""
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    counted = advantages[mask]
    return (advantages - counted.mean()) / (counted.std() + 1e-8), returns  # masked ones are not read again


def value_loss(values, old_values, returns, mask):
    """Half the mean squared error, or that of values held near the old ones where it is larger."""
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * error[mask].mean()


def update_loss(hidden, weight, value_head, batch, objective):
    """The clipped policy loss, the same for both algorithms, and with a value head (arXiv:1707.06347) its loss."""
    loss = linear_grpo_loss(
        hidden,
        weight,
        batch["completion_ids"],
        batch["advantages"],  # (B, T) or (B,)
        completion_mask=batch["mask"],
        old_per_token_logps=batch["old_logps"],
        ref_per_token_logps=batch["ref_logps"],
        objective=objective,
    ).loss
    if value_head is not None:
        values = value_head(hidden).squeeze(-1)
        loss = loss + VALUE_COEF * value_loss(values, batch["old_values"], batch["returns"], batch["mask"])
    return loss


def hidden_states(model, ids, length):
    """(B, T, H): what predicts the last `length` tokens."""
    return model.model(ids).last_hidden_state[:, -length - 1 : -1]


@torch.no_grad()
def collect(model, reference, value_head, tokenizer, rows, options):
    """Samples a completion for each row: (what `update_loss` reads, the mean score)."""
    # questions of one length, so that no padding stands before them; else generate() and the model need a mask
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")["input_ids"]
    ids = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=sums.MAX_COMPLETION_LENGTH)
    completion_ids = ids[:, prompts.shape[1] :]
    ended = completion_ids == tokenizer.eos_token_id
    mask = ended.cumsum(1) - ended.int() == 0  # up to the first end token, which counts
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    scores = torch.tensor(exact(texts, [row["answer"] for row in rows]))

    hidden = hidden_states(model, ids, mask.shape[1])
    logps, ref_logps = linear_logps(hidden, model.lm_head.weight, completion_ids, mask=mask), None
    if reference is not None:
        ref_hidden = hidden_states(reference, ids, mask.shape[1])
        ref_logps = linear_logps(ref_hidden, reference.lm_head.weight, completion_ids, mask=mask)
    batch = dict(ids=ids, completion_ids=completion_ids, mask=mask, old_logps=logps, ref_logps=ref_logps)
    if value_head is None:
        batch["advantages"] = group_advantages(scores, GENERATIONS)
    else:
        kl = 0.0 if reference is None else options.beta * (logps - ref_logps)  # PPO's KL is part of the reward
        batch["old_values"] = value_head(hidden).squeeze(-1)
        batch["advantages"], batch["returns"] = ppo_advantages(
            token_rewards(scores, mask, kl), batch["old_values"], mask, options.gamma, options.lam
        )
    return batch, scores.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=["ppo", "grpo"], default="ppo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beta", type=float, default=0.0, help="KL penalty: in PPO's rewards, in GRPO's loss")
    parser.add_argument("--gamma", type=float, default=1.0, help="PPO: discount of later rewards")
    parser.add_argument("--lam", type=float, default=0.95, help="PPO: lambda of GAE")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a second one saves a model this small nothing

    tokenizer = sums.make_tokenizer()
    model = sums.make_model(tokenizer, options.seed)
    questions, held_out = sums.make_datasets(options.seed)
    sums.warm_start(model, tokenizer, questions, options.seed)
    questions = questions.to_list()

    def measure():
        return sampled_accuracy(model, tokenizer, held_out, exact, sums.MAX_COMPLETION_LENGTH, samples=2)

    before = measure()
    reference = copy.deepcopy(model) if options.beta else None
    parameters, value_head = [{"params": model.parameters()}], None
    if options.algorithm == "ppo":
        value_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(value_head.weight)
        nn.init.zeros_(value_head.bias)
        parameters.append({"params": value_head.parameters(), "lr": 3e-3})
        objective = Objective()
    else:
        objective = Objective(beta=options.beta, use_bias_correction_kl=False)
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0)

    random.seed(options.seed)
    torch.manual_seed(options.seed)  # so that both algorithms begin with the same samples
    for step in range(options.steps):
        rows = [row for row in random.sample(questions, PROMPTS) for _ in range(GENERATIONS)]
        batch, score = collect(model, reference, value_head, tokenizer, rows, options)
        for _ in range(PASSES):
            hidden = hidden_states(model, batch["ids"], batch["mask"].shape[1])
            optimizer.zero_grad()
            update_loss(hidden, model.lm_head.weight, value_head, batch, objective).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: reward {score:.2f}", flush=True)

    print(f"{options.algorithm} accuracy {before:.2f} -> {measure():.2f}")


if __name__ == "__main__":
    main()
