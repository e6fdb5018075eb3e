"""What more frameworks' own losses give; tests/parity/record.py calls this, and says how."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from loading import B, Case, Config, T, as_is, load, stands


def prime_rl(root):
    with stands("prime_rl", "jaxtyping", "beartype"):
        __import__("jaxtyping")
        sys.modules["jaxtyping"].jaxtyped = lambda **_: as_is
        module = load(Path(root) / "src/prime_rl/trainer/rl/loss.py", "prime_loss")
        case = Case()
        x = case.x
        config = SimpleNamespace(dppo_mask_low=0.2, dppo_mask_high=0.2, adv_tau=1.0, kl_tau=1e-3)

        def call(leaf):
            total = 0.0
            for i in range(B):
                advantages, mask = x["advantages"][i].expand(T), x["mask"][i].bool()
                given = module.LossInputs(leaf[i], x["sampling"][i], None, advantages, mask)
                total = total + module.default_loss_fn(given, config).loss
            return total / x["mask"].sum()

        case.add("default", dict(preset="prime-rl"), call)
        return case


def nemo_rl(root):
    folder = Path(root) / "nemo_rl/algorithms"
    with stands("nemo_rl", "pydantic", "ray"):
        name = "nemo_rl.algorithms.utils"
        __import__(name)
        utils = load(folder / "utils.py", name)
        name = "nemo_rl.algorithms.loss.interfaces"
        __import__(name)
        load(folder / "loss/interfaces.py", name)
        module = load(folder / "loss/loss_functions.py", "nemo_loss_functions")
        assert utils.calculate_kl is module.calculate_kl
        case = Case()
        x = case.x
        config = Config(
            disable_ppo_ratio=False, ratio_clip_min=0.2, ratio_clip_max=0.2, ratio_clip_c=None,
            reference_policy_kl_penalty=0.01, reference_policy_kl_type="k3", use_kl_in_reward=False,
            kl_input_clamp_value=20.0, kl_output_clamp_value=10.0, use_importance_sampling_correction=False,
            truncated_importance_sampling_type=None, truncated_importance_sampling_ratio=None,
            truncated_importance_sampling_ratio_min=None, use_on_policy_kl_approximation=False,
            force_on_policy_ratio=False, sequence_level_importance_ratios=False, positive_example_nll_weight=0.0,
            token_level_loss=True, use_cispo=False,
        )  # fmt: skip

        def first(values):  # the token before the first, which is not looked at
            return torch.cat([values[:, :1], values], dim=1)

        data = dict(
            token_mask=first(x["mask"]), sample_mask=torch.ones(B, dtype=torch.float64), prev_logprobs=first(x["old"]),
            advantages=x["advantages"][:, None].expand(B, T + 1), generation_logprobs=first(x["sampling"]),
            reference_policy_logprobs=first(x["ref"]),
        )  # fmt: skip

        def loss(**options):
            function = module.ClippedPGLossFn(Config(**{**vars(config), **options}))
            return lambda leaf: function(leaf, data, torch.tensor(float(B)), x["mask"].sum())[0]

        case.add("default", dict(preset="nemo-rl"), loss())
        case.add("dual clip", dict(preset="nemo-rl", clip_ratio_c=3.0), loss(ratio_clip_c=3.0))
        case.add("reinforce", dict(preset="nemo-rl", loss_type="reinforce"), loss(disable_ppo_ratio=True))
        case.add("cispo", dict(preset="nemo-rl", loss_type="cispo_clip"), loss(use_cispo=True))
        for kind, correction, (low, high) in (
            ("tis", "token_truncate:0.9_1.1", (0.9, 1.1)),
            ("icepop", "token_mask:0.9_1.1", (0.9, 1.1)),
            ("seq-mask-tis", "token_truncate,geometric_drop:0.95_1.02", (0.95, 1.02)),
        ):
            call = loss(use_importance_sampling_correction=True, truncated_importance_sampling_type=kind,
                        truncated_importance_sampling_ratio=high,
                        truncated_importance_sampling_ratio_min=low)  # fmt: skip
            case.add(f"correction {kind}", dict(preset="nemo-rl", sampling_correction=correction), call)
        options = dict(preset="nemo-rl", importance_sampling_level="sequence", average="grpo")
        sequences = dict(sequence_level_importance_ratios=True, token_level_loss=False)
        case.add("gspo", options, loss(**sequences))
        return case


# slime, and miles that comes from it

NO_RATIO = math.exp(-20)  # their MIS bounds log ratios to ±20
CORRECTIONS = {  # of their mis.py: our text, its options
    "token truncate": (f"token_truncate:{NO_RATIO}_1.1", dict(tis_upper_bound=1.1)),
    "token clip": ("token_truncate:0.9_1.1", dict(tis_mode="clip", tis_lower_bound=0.9, tis_upper_bound=1.1)),
    "token mask": ("token_mask:0.8_1.25", dict(tis_mode="mask", tis_upper_bound=1.25)),  # the lower one is 1 / 1.25
    "sequence truncate": (f"sequence_truncate:{NO_RATIO}_1.2", dict(tis_level="sequence", tis_upper_bound=1.2)),
    "sequence mask": ("sequence_mask:0.7_1.1", dict(tis_level="sequence", tis_mode="mask", tis_lower_bound=0.7,
                                                    tis_upper_bound=1.1)),
    "geometric clip": ("geometric_truncate:0.97_1.03", dict(tis_level="geometric", tis_mode="clip",
                                                            tis_lower_bound=0.97, tis_upper_bound=1.03)),
    "geometric mask": ("geometric_mask:0.95_1.02", dict(tis_level="geometric", tis_mode="mask", tis_lower_bound=0.95,
                                                        tis_upper_bound=1.02)),
    "rejection": (f"token_truncate:{NO_RATIO}_1.1,sequence_drop:0.7_1.1",
                  dict(tis_upper_bound=1.1, use_rs=True, rs_level="sequence", rs_lower_bound=0.7, rs_upper_bound=1.1)),
    "rejection and veto": (f"token_truncate:{NO_RATIO}_1.1,geometric_drop:0.95_1.02,any_drop:0.85_",
                           dict(tis_upper_bound=1.1, use_rs=True, rs_level="geometric", rs_lower_bound=0.95,
                                rs_upper_bound=1.02, rs_veto_threshold=0.85)),
}  # fmt: skip


def _given(leaf):
    return dict(log_probs=list(leaf), entropy=list(torch.zeros_like(leaf)))


def _of_megatron(case, preset, module, corrections, mean_of, **flags):
    """The cases of both: `module` has policy_loss_function; mean_of(args, masks, denominators) makes its reducer."""
    x = case.x
    args = SimpleNamespace(
        eps_clip=0.2, eps_clip_high=0.2, eps_clip_c=None, advantage_estimator="grpo", entropy_coef=0.0,
        use_rollout_logprobs=False, use_opsm=False, opsm_delta=1e-4, calculate_per_token_loss=False,
        use_kl_loss=False, kl_loss_coef=1.0, kl_loss_type="k1", use_unbiased_kl=False,
        get_mismatch_metrics=False, use_tis=False, tis_clip=2.0, tis_clip_low=0, custom_tis_function_path=None,
        custom_pg_loss_reducer_function_path=None, rollout_top_p=1.0, qkv_format="thd", skip_actor_forward_only=False,
        observe_training_entropy=False, tis_mode="truncate", tis_level="token", tis_lower_bound=None,
        tis_upper_bound=2.0, tis_batch_normalize=False, use_rs=False, rs_level=None, rs_lower_bound=None,
        rs_upper_bound=None, rs_veto_threshold=None,
    )  # fmt: skip
    masks = list(x["mask"])
    module.load_function = as_is  # the options below have the function in place of its path

    def loss(samples_of_a_rollout=1, only_kl=False, **options):
        given = SimpleNamespace(**{**vars(args), **options})
        counts = x["mask"].sum(1).view(-1, samples_of_a_rollout).sum(1).repeat_interleave(samples_of_a_rollout)
        advantages = torch.zeros(B, dtype=torch.float64) if only_kl else x["advantages"]
        batch = dict(
            advantages=list(advantages[:, None].expand(B, T)), log_probs=list(x["old"]), ref_log_probs=list(x["ref"]),
            rollout_log_probs=list(x["sampling"]), response_lengths=[T] * B, total_lengths=[T] * B,
            unconcat_tokens=None, loss_masks=masks, rollout_mask_sums=list(counts),
        )  # fmt: skip
        over = x["mask"].sum() if given.calculate_per_token_loss else B / samples_of_a_rollout
        return lambda leaf: module.policy_loss_function(given, batch, leaf, mean_of(given, masks, counts))[0] / over

    def add(name, call, **options):
        case.add(name, dict(preset=preset, **options, **flags), call)

    add("default", loss())
    add("clip high", loss(eps_clip_high=0.15), epsilon_high=0.15)
    add("dual clip", loss(eps_clip_c=3.0), clip_ratio_c=3.0)
    add("gspo", loss(advantage_estimator="gspo"), importance_sampling_level="sequence")
    add("average per token", loss(calculate_per_token_loss=True), average="token-mean")
    add("average of rollouts of two samples", loss(2), average="prompt-mean")
    add("rollout logprobs, opsm", loss(use_rollout_logprobs=True, use_opsm=True), ratio_anchor="sampling",
        off_policy_mask_threshold=1e-4)  # fmt: skip
    band = dict(tis_clip_low=0.9, custom_tis_function_path=corrections.icepop_function)
    mis = dict(custom_tis_function_path=corrections.compute_mis_weights_with_cp)
    for name, correction, options in (
        ("tis", "token_truncate:1.1", dict(tis_clip=1.1)),
        ("icepop", "token_mask:0.9_1.1", dict(tis_clip=1.1, **band)),
        *((f"mis {name}", correction, dict(options, **mis)) for name, (correction, options) in CORRECTIONS.items()),
    ):
        add(name, loss(use_tis=True, eps_clip_c=3.0, **options), sampling_correction=correction, clip_ratio_c=3.0)
    flags["fp32"] = True  # their log ratio to the reference is
    for name in ("k1", "k2", "k3", "low_var_kl"):
        options = dict(kl_estimator=name, beta=1.0, only_kl=True)
        if name == "low_var_kl" and preset == "slime":  # which does not bound the log ratio
            options |= dict(kl_estimator="k3", kl_clamp=10.0)
        add(f"kl {name}", loss(use_kl_loss=True, kl_loss_type=name, only_kl=True), **options)
    if preset == "slime":  # miles bounds the ratio in the loss, but not this one
        unbiased = loss(use_kl_loss=True, use_unbiased_kl=True, only_kl=True)
        add("kl unbiased", unbiased, beta=1.0, only_kl=True, use_bias_correction_kl=True)


def slime(root):
    folder = Path(root) / "slime/backends/megatron_utils"
    with stands("slime", "megatron"):
        __import__("megatron.core")
        sys.modules["megatron.core"].mpu = SimpleNamespace(
            get_context_parallel_world_size=lambda: 1, get_context_parallel_group=lambda: None
        )
        load(Path(root) / "slime/utils/ppo_utils.py", "slime.utils.ppo_utils")
        cp_utils = load(folder / "cp_utils.py", "slime.backends.megatron_utils.cp_utils")
        module = load(folder / "loss.py", "slime.backends.megatron_utils.loss")
        mis = load(Path(root) / "examples/train_infer_mismatch_helper/mis.py", "slime_mis")
        mis.icepop_function = module.icepop_function
        module.get_log_probs_and_entropy = lambda leaf, **_: (None, _given(leaf))

        def mean_of(args, masks, counts):
            return cp_utils.get_sum_of_sample_mean([T] * B, [T] * B, masks, counts, args.calculate_per_token_loss)

        case = Case()
        _of_megatron(case, "slime", module, mis, mean_of)
        return case


def miles(root):
    folder = Path(root) / "miles/backends/training_utils"
    with stands("miles", "megatron"):
        name = "miles.backends.training_utils.parallel"
        __import__(name)
        sys.modules[name].get_parallel_state = lambda: SimpleNamespace(cp=SimpleNamespace(size=1, group=None))
        cp_utils = load(folder / "cp_utils.py", "miles.backends.training_utils.cp_utils")
        for part in ("math_utils", "corrections", "losses"):
            module = load(folder / f"loss_hub/{part}.py", f"miles.backends.training_utils.loss_hub.{part}")
        mis = load(Path(root) / "examples/infra_features/train_infer_mismatch_helper/mis.py", "miles_mis")
        module.get_log_probs_and_entropy = lambda leaf, **_: _given(leaf)
        mis.icepop_function = sys.modules["miles.backends.training_utils.loss_hub.corrections"].icepop_function

        def mean_of(args, masks, counts):
            return cp_utils.get_sum_of_sample_mean(
                [T] * B, [T] * B, masks, args.calculate_per_token_loss, denominators=list(counts)
            )

        case = Case()
        _of_megatron(case, "miles", module, mis, mean_of, fp32=True)  # its ratio is
        return case


def areal(root):
    folder = Path(root) / "areal/utils"
    with stands("areal", "einops", "torchdata"):
        data = load(folder / "data.py", "areal.utils.data")
        module = load(folder / "functional/functional.py", "areal.utils.functional.functional")
        case = Case()
        x = case.x
        a, mask = x["advantages"][:, None].expand(B, T), x["mask"].bool()

        def loss(rejection=None, **options):
            sampler = x["sampling"]
            if rejection is not None:
                rejection = SimpleNamespace(
                    **{**dict(level="token", action="mask", metric="ratio", agg="mean", lower=None), **rejection}
                )
            return lambda leaf: module.ppo_actor_loss_fn(
                leaf, x["old"], sampler, a, 0.2, mask, rejection_sampling=rejection, **options
            )[0]

        def sapo(level):
            return lambda leaf: module.sapo_loss_fn(leaf, x["old"], a, 1.0, 1.05, mask, level)[0]

        def add(name, call, **options):
            case.add(name, dict(preset="areal", **options), call)

        add("default", loss())
        add("clip high", loss(eps_clip_higher=0.15), epsilon_high=0.15)
        add("dual clip", loss(c_clip=3.0), clip_ratio_c=3.0)
        add("gspo", loss(importance_sampling_level="sequence"), importance_sampling_level="sequence")
        add("sapo", sapo("token"), loss_type="sapo")
        add("sapo sequence", sapo("sequence"), loss_type="sapo", importance_sampling_level="sequence")
        sequence, clamp = dict(level="sequence"), dict(action="clamp")
        for name, correction, rejection in (
            ("token mask", "token_mask:1.1", dict(upper=1.1)),
            ("token mask band", "token_mask:0.9_1.1", dict(lower=0.9, upper=1.1)),
            ("token clamp", "token_truncate:0.9_1.1", dict(clamp, lower=0.9, upper=1.1)),
            ("sequence mask", "geometric_mask:0.95_1.02", dict(sequence, lower=0.95, upper=1.02)),
            ("sequence mask sum", "geometric_truncate,sequence_drop:0.7_1.1",
             dict(sequence, agg="sum", lower=0.7, upper=1.1)),
            ("sequence mask max", "geometric_truncate,any_drop:1.3", dict(sequence, agg="max", upper=1.3)),
            ("sequence clamp", "geometric_truncate:0.97_1.03", dict(clamp, **sequence, lower=0.97, upper=1.03)),
            ("token k1", f"token_mask:{math.exp(-0.1)!r}_{math.exp(0.1)!r}",
             dict(metric="kl_k1", lower=-0.1, upper=0.1)),
            ("token k2", "token_truncate,token_drop_k2:0.01", dict(metric="kl_k2", upper=0.01)),
            ("sequence k2 mean", "token_truncate,geometric_drop_k2:0.02",
             dict(sequence, metric="kl_k2", upper=0.02)),
            ("sequence k2 sum", "token_truncate,sequence_drop_k2:0.1",
             dict(sequence, metric="kl_k2", agg="sum", upper=0.1)),
            ("sequence k2 max", "token_truncate,any_drop_k2:0.06",
             dict(sequence, metric="kl_k2", agg="max", upper=0.06)),
            ("sequence k1 sum", f"token_truncate,sequence_drop:{math.exp(0.15)!r}",
             dict(sequence, metric="kl_k1", agg="sum", upper=0.15)),
        ):  # fmt: skip
            options = dict(sampling_correction=correction, clip_ratio_c=3.0, fp32=True)  # its weights are
            add(f"rejection {name}", loss(rejection, c_clip=3.0), **options)
        add("gspo, rejection sequence mask",
            loss(dict(sequence, lower=0.95, upper=1.02), importance_sampling_level="sequence", c_clip=3.0),
            sampling_correction="geometric_mask:0.95_1.02", clip_ratio_c=3.0, importance_sampling_level="sequence",
            fp32=True)  # fmt: skip
        for name in ("k1", "k2", "k3"):

            def kl(leaf, name=name):
                return (data.KLEstimator(name)(leaf, x["ref"]).double() * mask).sum() / mask.sum()

            add(f"kl {name}", kl, beta=1.0, kl_estimator=name, only_kl=True, fp32=True)
        return case


def roll(root):
    folder = Path(root) / "roll"
    with stands("roll", "tensordict", "imageio", "codetiming"):
        functionals = load(folder / "utils/functionals.py", "roll.utils.functionals")
        load(folder / "pipeline/agentic/utils.py", "roll.pipeline.agentic.utils")
        load(folder / "utils/train_infer_corrections.py", "roll.utils.train_infer_corrections")
        __import__("roll.pipeline.base_worker")
        sys.modules["roll.pipeline.base_worker"].ActorWorker = object
        ppo = load(folder / "pipeline/rlvr/actor_worker.py", "roll.pipeline.rlvr.actor_worker").ActorWorker
        variants = load(folder / "pipeline/rlvr/actor_pg_worker.py", "roll_variants").ActorPGWorker
        case = Case()
        x = case.x
        mask = x["mask"]
        plain = dict(
            enable_old_logprobs_recompute=False, importance_sampling="token", use_pg_clip_range=False, pg_clip=0.2,
            pg_clip_low=0.2, pg_clip_high=0.2, dual_clip_loss=False, loss_agg_mode="seq-mean-token-mean",
            use_kl_loss=False, kl_loss_coef=1.0, rl_loss_coef=1.0, entropy_loss_coef=0.0, difficulty_loss_weight=False,
            length_loss_weight=False,
        )  # fmt: skip
        dual = dict(dual_clip_loss=True)

        def loss(worker=ppo, variant=None, weight=None, filters=(), only_kl=False, **options):
            of_weight = SimpleNamespace(enabled=weight is not None, detach=True)
            if weight is not None:
                of_weight.weight_type, of_weight.upper_bound = weight
            off = dict(enabled=True, ratio_enabled=False, diff_enabled=False)
            it = worker()
            it.pipeline_config = SimpleNamespace(
                **{**plain, **options},
                actor_train=SimpleNamespace(**variant or {}),
                train_infer_correction=SimpleNamespace(
                    is_weight=of_weight, filters=[SimpleNamespace(**{**off, **one}) for one in filters]
                ),
            )
            it.logger = SimpleNamespace(info=lambda text: None)
            it.get_old_log_probs_with_cache = lambda data, logps: x["old"]
            first = torch.ones(B, 1, dtype=torch.float64)  # the token before the first, which is not looked at
            advantages = x["advantages"][:, None] * mask  # as its advantages are
            data = SimpleNamespace(
                batch=dict(
                    response_mask=torch.cat([first, mask], dim=1), ref_log_probs=x["ref"], input_ids=None,
                    advantages=advantages * 0 if only_kl else advantages, infer_logprobs=x["sampling"],
                ),
                meta_info=dict(
                    batch_num_tokens=dict(response_mask=mask.sum()), global_valid_samples=dict(response_mask=B)
                ),
                non_tensor_batch={},
            )  # fmt: skip

            def call(leaf):
                it.strategy = SimpleNamespace(
                    op_compute_log_probs=lambda **_: leaf, op_compute_entropy=lambda **_: torch.zeros_like(leaf)
                )
                return it.loss_func(data, None)[0]

            return call

        def add(name, call, **options):
            case.add(name, dict(preset="roll", **options), call)

        add("default", loss())
        add("clip range", loss(use_pg_clip_range=True, pg_clip_high=0.15), epsilon_high=0.15)
        add("dual clip", loss(**dual), clip_ratio_c=1.4)
        add("gspo", loss(importance_sampling="seq"), importance_sampling_level="sequence")
        add("average token-mean", loss(loss_agg_mode="token-mean", **dual), average="token-mean", clip_ratio_c=1.4)
        add("average seq-mean-token-sum", loss(loss_agg_mode="seq-mean-token-sum", **dual),
            average="seq-mean-token-sum", clip_ratio_c=1.4)  # fmt: skip
        add("average seq-mean-token-sum-norm", loss(loss_agg_mode="seq-mean-token-sum-norm", **dual),
            average="seq-mean-token-sum-norm", clip_ratio_c=1.4, num_items=1)  # fmt: skip
        for name, options in (
            ("ppo", {}),
            ("vanilla", dict(loss_type="reinforce")),
            ("tis", dict(loss_type="cispo_clip", epsilon=1.0, epsilon_high=0.0)),
            ("cispo", dict(loss_type="cispo_clip", epsilon=0.1)),
            ("kimi15", dict(loss_type="reinforce", log_ratio_penalty=0.05)),
        ):
            add(f"variant {name}", loss(variants, dict(pg_variant=name)), **options)
        ratio, geometric = dict(ratio_enabled=True, ratio_low=0.9, ratio_high=1.1), dict(agg_type="geometric")
        diff = dict(agg_type="token", diff_enabled=True, diff_low=-0.05, diff_high=0.05)
        for name, correction, options in (
            ("weight token", "token_truncate:1.1", dict(weight=("token", 1.1))),
            ("weight unbounded", "token_truncate", dict(weight=("token", None))),
            ("weight geometric", "geometric_truncate:1.03", dict(weight=("geometric", 1.03))),
            ("weight sequence", "sequence_truncate:1.2", dict(weight=("sequence", 1.2))),
            ("filter token", "token_reject:0.9_1.1", dict(filters=[dict(ratio, agg_type="token")])),
            ("filter geometric", "geometric_reject:0.95_1.02",
             dict(filters=[dict(ratio, **geometric, ratio_low=0.95, ratio_high=1.02)])),
            ("filter sequence", "sequence_reject:0.7_1.1",
             dict(filters=[dict(ratio, agg_type="sequence", ratio_low=0.7, ratio_high=1.1)])),
            ("filter token diff", "token_reject_tv:0.05", dict(filters=[diff])),
            ("weight token, filters token diff, geometric",
             "token_truncate:1.1,token_reject_tv:0.05,geometric_reject:0.95_1.02",
             dict(weight=("token", 1.1), filters=[diff, dict(ratio, **geometric, ratio_low=0.95, ratio_high=1.02)])),
        ):  # fmt: skip
            # a filter does not change the number of sequences
            items = dict(num_items=B) if "filters" in options else {}
            add(
                f"correction {name}",
                loss(**options, **dual),
                sampling_correction=correction,
                clip_ratio_c=1.4,
                **items,
            )
        add("kl", loss(use_kl_loss=True, only_kl=True), beta=1.0, only_kl=True)
        add("kl, filter token", loss(use_kl_loss=True, only_kl=True, filters=[dict(ratio, agg_type="token")]),
            beta=1.0, only_kl=True, sampling_correction="token_reject:0.9_1.1", num_items=B)  # fmt: skip
        for theirs, ours in (("kl", "k1"), ("abs", "abs"), ("mse", "k2")):

            def kl(leaf, name=theirs):
                each = functionals.compute_approx_kl(leaf, x["ref"], mask, name)
                return functionals.agg_loss(each, mask, "seq-mean-token-mean")

            add(f"kl {theirs}", kl, beta=1.0, kl_estimator=ours, kl_clamp=None, only_kl=True)
        return case
