"""What other frameworks' own estimators of advantages give; tests/parity/record.py loads them and calls this."""

from types import SimpleNamespace

import torch


def reward_inputs():
    """Float64 rewards of a batch in groups of several sizes, in no order, and what estimators read beside them."""
    gen = torch.Generator().manual_seed(1)
    rows, length = 9, 6
    ids = torch.tensor([4, 2, 2, 0, 4, 0, 2, 0, 2])
    mask = torch.arange(length) < torch.tensor([6, 4, 5, 1, 3, 6, 2, 2, 4])[:, None]
    holes = mask & (torch.rand(rows, length, generator=gen) < 0.7)
    holes[:, 0] = True
    rewards = torch.randn(rows, generator=gen, dtype=torch.float64)
    rewards[[1, 3]] = 0.0
    per_token = torch.randn(rows, length, generator=gen, dtype=torch.float64)
    logp = -torch.rand(rows, length, generator=gen, dtype=torch.float64) * 3
    squares = logp.exp() ** 2 + 0.1 * torch.rand(rows, length, generator=gen, dtype=torch.float64)
    ratio = 2 * torch.rand(rows, length, generator=gen, dtype=torch.float64)
    greedy = torch.randn(rows, generator=gen, dtype=torch.float64)
    several = (
        torch.randn(rows, 2, generator=gen, dtype=torch.float64).float().double()
    )  # for those who take fp32 alone
    return dict(rewards=rewards, ids=ids, mask=mask.double(), holes=holes.double(), per_token=per_token, logp=logp,
                squares=squares, ratio=ratio, greedy=greedy, several=several)  # fmt: skip


class _Advantages:
    """(name, the estimator of fastgrpo with its options, what the framework gives) of each case."""

    def __init__(self):
        self.x, self.rows = reward_inputs(), {}

    def add(self, name, function, result, mask="mask", rewards="rewards", **options):
        """`options` that are names of inputs stand for these."""
        given = dict(function=function, mask=mask, rewards=rewards, options=options)
        self.rows[name] = dict(given, advantages=result.double().tolist())

    def at_last(self, mask="mask"):
        """(B, T): the rewards at the last loss token."""
        counted = self.x[mask].cumsum(1)
        return torch.where((counted == counted[:, -1:]) & (self.x[mask] > 0), self.x["rewards"][:, None], 0.0)


def verl(core, groupwise):
    core.as_torch_index, core.group_mean_std = groupwise.as_torch_index, groupwise.group_mean_std
    case = _Advantages()
    x, index = case.x, case.x["ids"].numpy()

    def estimated(name, mask="mask", rewards=None, **options):
        config = dict(norm_adv_by_std_in_grpo=options.pop("by_std", True))
        settings = SimpleNamespace(gamma=options.pop("gamma", 1.0), get=config.get)
        given = dict(
            index=index, config=settings, norm_adv_by_std_in_grpo=config["norm_adv_by_std_in_grpo"], **options
        )
        function = core.get_adv_estimator_fn(name)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        if not function.__code__.co_flags & 8:  # it takes no others
            given = {key: value for key, value in given.items() if key in names}
        rewards = case.at_last(mask) if rewards is None else x[rewards]
        return function(token_level_rewards=rewards.clone(), response_mask=x[mask], **given)[0]

    case.add("grpo", "group_advantages", estimated("grpo"), epsilon=1e-6)
    case.add("grpo without std", "group_advantages", estimated("grpo", by_std=False), scale_rewards="none")
    case.add("grpo_passk", "best_of_group", estimated("grpo_passk"))
    case.add("grpo_passk without std", "best_of_group", estimated("grpo_passk", by_std=False), scale_rewards="none")
    case.add("rloo", "rloo", estimated("rloo"))
    case.add("rloo_vectorized", "rloo", estimated("rloo_vectorized"))
    case.add("opo", "opo", estimated("opo"))
    case.add("gpg", "gpg", estimated("gpg"))
    case.add("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", estimated("reinforce_plus_plus_baseline"))
    for gamma in (1.0, 0.9):
        for mask in ("mask", "holes"):
            for rewards in ("rewards", "per_token"):
                given = dict(mask=mask, gamma=gamma)
                of_tokens = None if rewards == "rewards" else rewards
                result = estimated("reinforce_plus_plus", rewards=of_tokens, **given)
                name = f"reinforce_plus_plus {gamma} {mask} {rewards}"
                case.add(name, "reinforce_plus_plus", result, rewards=rewards, **given)
    for rewards in ("rewards", "per_token"):
        of_tokens = None if rewards == "rewards" else rewards
        result = estimated("remax", rewards=of_tokens, reward_baselines=x["greedy"])
        case.add(f"remax {rewards}", "remax", result, rewards=rewards, baseline_rewards="greedy")
        for name, mask in (("optimal_token_baseline", "mask"), ("tir_optimal_token_baseline", "holes")):
            for ratio in (None, "ratio"):
                given = dict(old_log_probs=x["logp"], sum_pi_squared=x["squares"])
                weights = None if ratio is None else x[ratio]
                result = estimated(name, mask=mask, rewards=of_tokens, rollout_is_weights=weights, **given)
                of_case = dict(per_token_logps="logp", sum_pi_squared="squares", importance_sampling_ratio=ratio)
                case.add(f"{name} {rewards} {ratio}", "optimal_token_baseline", result, mask, rewards, **of_case)
    settings = dict(gdpo_reward_keys=["0", "1"], gdpo_reward_weights=[1.0, 0.5])
    result = core.get_adv_estimator_fn("gdpo")(
        case.at_last(), x["mask"], index, config=settings,
        non_tensor_batch={str(i): x["several"][:, i].numpy() for i in range(2)},
        batch=dict(prompts=torch.zeros(len(index), 0), attention_mask=x["mask"].long()),
    )[0]  # fmt: skip
    case.add("gdpo", "gdpo", result, rewards="several", weights=[1.0, 0.5], epsilon=1e-6, fp32=True)
    return case


def openrlhf(maker):
    """In contiguous groups of one size, which its function takes alone."""
    case = _Advantages()
    x = case.x

    def estimated(name):
        made = maker.__new__(maker)
        made.advantage_estimator, made.kl_ctl = name, SimpleNamespace(value=0.0)
        advantage = SimpleNamespace(estimator=name, gamma=1.0, lambd=1.0, no_std_norm=True)
        made.args = SimpleNamespace(rollout=SimpleNamespace(n_samples_per_prompt=3), reward=SimpleNamespace(
            clip_range=None), algo=SimpleNamespace(advantage=advantage))  # fmt: skip
        made.strategy = SimpleNamespace(args=made.args)
        batch = SimpleNamespace(
            index=list(range(len(x["ids"]))), rewards=x["rewards"].clone(), action_mask=x["mask"],
            kl=torch.zeros_like(x["mask"]), values=None, info={},
        )  # fmt: skip
        return made.compute_advantages_and_returns([batch])[0].advantages * x["mask"]

    case.add("rloo", "rloo", estimated("rloo"), num_generations=3)
    case.add("dr_grpo", "group_advantages", estimated("dr_grpo"), num_generations=3, scale_rewards="none")
    case.add("group_norm", "group_advantages", estimated("group_norm"), num_generations=3, epsilon=1e-9)
    case.add("flash_reinforce", "group_advantages", estimated("flash_reinforce"), num_generations=9,
             scale_rewards="none")  # fmt: skip
    return case


def skyrl(module):
    case = _Advantages()
    x = case.x

    def estimated(function, rewards=None, **options):
        rewards = case.at_last() if rewards is None else x[rewards]
        return function(rewards.clone(), x["mask"], index=x["ids"].numpy(), **options)[0]

    by_group = module.compute_grpo_outcome_advantage
    # whose statistics are in fp32
    case.add("grpo", "group_advantages", estimated(by_group), epsilon=1e-6, fp32=True)
    without = estimated(by_group, grpo_norm_by_std=False)
    case.add("grpo without std", "group_advantages", without, scale_rewards="none", fp32=True)
    case.add("rloo", "rloo", estimated(module.compute_rloo_outcome_advantage))
    case.add("maxrl", "maxrl", estimated(module.compute_maxrl_advantage), fp32=True)
    for rewards in ("rewards", "per_token"):
        of_tokens = None if rewards == "rewards" else rewards
        result = estimated(module.compute_reinforce_plus_plus_outcome_advantage, of_tokens, gamma=0.9)
        case.add(f"reinforce++ {rewards}", "reinforce_plus_plus", result, rewards=rewards, gamma=0.9)
    return case
