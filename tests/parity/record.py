"""Records what other frameworks' own losses and advantages give: inputs, outputs, package and version, as JSON.

Their packages bring much that a loss does not need, so a function is loaded from its file, and what the file imports
and does not have is a stand-in that is never called. Unpack a wheel, then for example

    pip download --no-deps verl==0.9.1 && unzip -d verl verl-0.9.1-py3-none-any.whl
    python tests/parity/record.py verl 0.9.1 verl

and likewise openrlhf 0.11.2, skyrl 0.4.0, areal 1.0.4; for prime-rl, nemo-rl, slime, miles and roll a checkout, and
its commit as the version.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import record_advantages
import record_more
from loading import B, Case, Config, T, as_is, load, stands

HERE = Path(__file__).parent


def verl(root):
    root = Path(root)
    config = Config(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info={}, clip_ratio_c=3.0,
        tau_pos=1.0, tau_neg=1.05, loss_agg_mode="token-mean",
        policy_loss=SimpleNamespace(clip_cov_ratio=1.0, clip_cov_lb=0.1, clip_cov_ub=5.0, kl_cov_ratio=0.3,
                                    ppo_kl_coef=0.1, dro_beta=0.1),
    )  # fmt: skip
    config.get = lambda name, default=None: getattr(config, name, default)
    with stands("verl", "omegaconf", "tensordict", "ray", "codetiming"):
        sys.modules["verl.utils.torch_functional"] = load(root / "verl/utils/torch_functional.py", "verl_functional")
        sys.modules["verl.utils"].torch_functional = sys.modules["verl.utils.torch_functional"]
        for name in ("verl.trainer.config", "verl.workers.config"):
            __import__(name)
            sys.modules[name].AlgoConfig, sys.modules[name].ActorConfig = type("AlgoConfig", (), {}), Config
        __import__("verl.utils.import_utils")
        sys.modules["verl.utils.import_utils"].deprecated = lambda *_: as_is
        core = load(root / "verl/trainer/ppo/core_algos.py", "verl_core")
        case = Case()
        x = case.x
        a, mask = x["advantages"][:, None].expand(B, T), x["mask"]

        def loss(mode, average="token-mean"):
            function = core.get_policy_loss_fn(mode)
            return lambda leaf: function(x["old"], leaf, a, mask, average, config, None)[0]

        cov = dict(cov_low=0.1, cov_share=1.0)
        ours = {
            "vanilla": dict(preset="verl"),
            "gspo": dict(preset="verl", importance_sampling_level="sequence_token", log_ratio_clamp=10.0,
                         clip_ratio_c=None),
            "sapo": dict(loss_type="sapo", log_ratio_clamp=20.0, average="seq-mean-token-mean"),
            "gpg": dict(preset="gpg"),
            "clip_cov": dict(loss_type="clip_cov", **cov),
            "kl_cov": dict(loss_type="kl_cov", cov_share=0.3, cov_coef=0.1),
            "geo_mean": dict(loss_type="gmpo"),
            "dro": dict(preset="dro"),
            "cispo": dict(loss_type="cispo_clip", log_ratio_clamp=20.0),
            "dppo_tv": dict(loss_type="dppo_tv", log_ratio_clamp=20.0, clip_ratio_c=3.0),
            "dppo_kl": dict(loss_type="dppo_kl", log_ratio_clamp=20.0, clip_ratio_c=3.0),
        }  # fmt: skip
        for mode, options in ours.items():
            averages = dict(gspo="seq-mean-token-mean")
            if mode in averages:
                options["average"] = averages[mode]
            case.add(mode, options, loss(mode, averages.get(mode, "token-mean")))
        for average in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm",
                        "token-sum"):  # fmt: skip
            case.add(f"average {average}", dict(preset="verl", average=average), loss("vanilla", average))
        for name in ("k1", "abs", "k2", "low_var_kl", "k1+", "abs+", "low_var_kl+"):

            def kl(leaf, name=name):
                return (core.kl_penalty(leaf, x["ref"], name) * mask).sum() / mask.sum()

            options = dict(preset="verl", beta=1.0, kl_estimator=name)
            case.add(f"kl {name}", dict(options, only_kl=True), kl)
        _verl_corrections(root, core, config, case)
        advantages = record_advantages.verl(core, load(root / "verl/utils/groupwise.py", "verl_groupwise"))
        return case, advantages


def _verl_corrections(root, core, config, case):
    helper = load(root / "verl/trainer/ppo/rollout_corr_helper.py", "verl_rollout_corr")
    __import__("verl.trainer.ppo.rollout_corr_helper")
    sys.modules["verl.trainer.ppo.rollout_corr_helper"] = helper
    helper.DataProto = SimpleNamespace(from_dict=lambda tensors: SimpleNamespace(batch=tensors))
    x = case.x
    a, mask, q = x["advantages"][:, None].expand(B, T), x["mask"], x["old"] - x["sampling"]

    def loss(weights=None, rejects=None, mode="vanilla", average="token-mean"):
        function = core.get_policy_loss_fn(mode)
        kept = mask if rejects is None else helper.compute_rollout_rejection_mask(q, mask, *rejects)[0]
        w = None if weights is None else helper.compute_rollout_correction_weights(q, mask, *weights)[0]
        return lambda leaf: function(x["old"], leaf, a, kept, average, config, w)[0]

    def add(name, correction, call, **options):
        case.add(name, {"preset": "verl", "sampling_correction": correction, **options}, call)

    add("rollout_is token", "token_truncate:1.1", loss(("token", 1.1)))
    add("rollout_is token icepop", "token_mask:0.9_1.1", loss(("token", "0.9_1.1")))
    add("rollout_is sequence", f"sequence_truncate:{math.exp(-20)}_1.2", loss(("sequence", 1.2)))
    add("rollout_is sequence icepop", "sequence_mask:0.7_1.1", loss(("sequence", "0.7_1.1")))
    icepop = loss(("token", "0.9_1.1"), mode="geo_mean")
    case.add("rollout_is geo_mean", dict(loss_type="gmpo", sampling_correction="token_mask:0.9_1.1"), icepop)
    for level, ours, bounds in (
        ("token", "token", ("0.9_1.25", 0.045, 0.04)),
        ("seq_sum", "sequence", ("0.85_1.22", 0.1, 0.05)),
        ("seq_mean", "geometric", ("0.98_1.3", 0.02, 0.01)),
        ("seq_max", "any", (None, 0.04, 0.02)),
    ):
        for measure, bound in zip(("k1", "k2", "k3"), bounds, strict=True):
            if bound is None:
                continue
            correction = f"{ours}_reject_{measure}:{bound}"
            if measure == "k1":  # whose ratio is that of the sampler to the policy
                low, high = (1 / float(text) for text in reversed(bound.split("_")))
                correction = f"{ours}_reject:{low!r}_{high!r}"
            add(f"rollout_rs {level}_{measure}", correction, loss(rejects=(f"{level}_{measure}", bound)))
    add("rollout_is and rollout_rs", "token_truncate:1.1,geometric_reject_k3:0.02,token_reject:0.8_1.25",
        loss(("token", 1.1), ("seq_mean_k3,token_k1", "0.02,0.8_1.25")))  # fmt: skip
    add("rollout_rs, seq-mean-token-mean", "token_reject:0.8_1.25",
        loss(rejects=("token_k1", "0.8_1.25"), average="seq-mean-token-mean"),
        average="seq-mean-token-mean")  # fmt: skip

    def bypass(leaf, **options):
        config.policy_loss.get = lambda name, default=None: options
        config.global_batch_info = dict(dp_size=1, batch_num_tokens=mask.sum())  # as it is before the rejection
        try:
            return core.get_policy_loss_fn("bypass_mode")(x["sampling"], leaf, a, mask, "token-mean", config, None)[0]
        finally:
            config.global_batch_info = {}

    add("bypass_mode ppo_clip", "geometric_drop_k3:0.1",
        lambda leaf: bypass(leaf, rollout_rs="seq_mean_k3", rollout_rs_threshold=0.1),
        ratio_anchor="sampling", without_old=True)  # fmt: skip
    add("bypass_mode reinforce", "token_truncate:1.5",
        lambda leaf: bypass(leaf, loss_type="reinforce", rollout_is="token", rollout_is_threshold=1.5),
        loss_type="reinforce", without_old=True)  # fmt: skip


def openrlhf(root):
    folder = next(Path(root).rglob("openrlhf/models"))
    with stands("flash_attn", "deepspeed", "peft", "ray", "openrlhf"):
        load(folder / "utils.py", "openrlhf_models.utils")
        module = load(folder / "loss.py", "openrlhf_models.loss")
        utils = sys.modules["openrlhf_models.utils"]
        case = Case()
        x = case.x
        a, mask = x["advantages"][:, None].expand(B, T), x["mask"]

        def loss(**options):
            function = module.PolicyLoss(**options)
            return lambda leaf: function(leaf, x["old"], a, mask, x["sampling"])[0]

        case.add("default", dict(preset="openrlhf"), loss())
        corrections = {
            "token clip": ("token_truncate:0.9_1.1", "token", "clip", "ratio", (0.9, 1.1)),
            "token mask": ("token_mask:0.9_1.1", "token", "mask", "ratio", (0.9, 1.1)),
            "seq mask": ("token_truncate,geometric_drop:0.95_1.02", "seq", "mask", "ratio", (0.95, 1.02)),
        }
        for gating in ("binary_kl", "tv"):
            for level, ours, bound in (("token", "token", 0.02), ("seq", "geometric", 0.04)):
                correction = f"token_truncate,{ours}_drop_{gating}:{bound}"
                corrections[f"{level} {gating}"] = (correction, level, "mask", gating, (0, bound))
        for name, (correction, level, mode, gating, band) in corrections.items():
            call = loss(is_correction_level=level, is_correction_mode=mode, is_correction_gating=gating,
                        is_correction_threshold=band)  # fmt: skip
            case.add(f"correction {name}", dict(preset="openrlhf", sampling_correction=correction), call)
        case.add("dual clip", dict(preset="openrlhf", clip_ratio_c=3.0), loss(dual_clip=3.0))
        case.add("gspo", dict(importance_sampling_level="sequence", average="grpo"), loss(policy_loss_type="gspo"))
        for name in ("k1", "k2", "k3"):

            def kl(leaf, name=name):
                # whose k3 is in fp32 and ends at a log ratio of 10
                return (utils.compute_approx_kl(leaf, x["ref"], kl_estimator=name).double() * mask).sum() / mask.sum()

            case.add(f"kl {name}", dict(preset="openrlhf", beta=1.0, kl_estimator=name, only_kl=True, fp32=True), kl)
        maker = load(folder.parent / "trainer/ppo_utils/experience_maker.py", "openrlhf_maker")
        maker.compute_reward = utils.compute_reward
        return case, record_advantages.openrlhf(maker.RemoteExperienceMaker)


def skyrl(root):
    folder = Path(root) / "skyrl/backends/skyrl_train/utils"
    with stands("skyrl", "ray", "jaxtyping", "loguru", "omegaconf", "flash_attn"):
        torch_utils = load(folder / "torch_utils.py", "skyrl_torch_utils")
        sys.modules["skyrl.backends.skyrl_train.utils.torch_utils"] = torch_utils
        name = "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"
        sys.modules[name] = load(folder / "off_policy_correction_utils.py", name)
        __import__("ray")
        sys.modules["ray"].is_initialized = lambda: False
        __import__("jaxtyping")
        sys.modules["jaxtyping"].Float = sys.modules["jaxtyping"].Integer = mock.MagicMock()
        module = load(folder / "ppo_utils.py", "skyrl_ppo_utils")
        case = Case()
        x = case.x
        a, mask = x["advantages"][:, None].expand(B, T), x["mask"]
        tokens = mask.sum().item()
        config = SimpleNamespace(
            policy_loss_type="regular", eps_clip_low=0.2, eps_clip_high=0.2, clip_ratio_c=3.0,
            off_policy_correction=SimpleNamespace(**dict.fromkeys((
                "tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
                "outlier_token_is_threshold_high", "token_mask_is_threshold_low", "token_mask_is_threshold_high"))),
            cispo=SimpleNamespace(cispo_anchor="old", cispo_eps_clip_low=1.0, cispo_eps_clip_high=4.0),
            dppo=SimpleNamespace(dppo_type="binary_tv", delta_low=0.2, delta_high=0.2),
            sapo=SimpleNamespace(tau_pos=1.0, tau_neg=1.05), loss_reduction="sequence_mean",
            # the advantages that these see are already over the number of tokens, the coefficient is not
            clip_cov=SimpleNamespace(clip_ratio=1.0, clip_cov_lb=0.1 / tokens, clip_cov_ub=5.0 / tokens),
            kl_cov=SimpleNamespace(kl_cov_frac=0.3, ppo_kl_coef=0.1 / tokens),
        )  # fmt: skip

        def loss(function, reduction="token_mean", **options):
            def call(leaf):
                for name, value in options.items():
                    setattr(config, name, value)
                scaled = module.apply_loss_reduction_to_advantages_minibatch(
                    a, mask, reduction, B, T, prompt_boundaries=[(0, 2), (2, 4), (4, 6)]
                )
                return function(leaf, x["old"], scaled, config, mask, x["sampling"])[0]

            return call

        regular = module.ppo_policy_loss
        sampled = dict(log_ratio_clamp=20.0, ratio_anchor="sampling")
        without_kl = dict(preset="skyrl", beta=0.0)
        case.add("regular", without_kl, loss(regular))
        case.add("dual_clip", dict(without_kl, clip_ratio_c=3.0), loss(regular, policy_loss_type="dual_clip"))
        for name, average in (("sequence_mean", "grpo"), ("seq_mean_token_sum_norm", "seq-mean-token-sum-norm"),
                              ("prompt_mean", "prompt-mean")):  # fmt: skip
            options = dict(without_kl, average=average)
            case.add(f"average {name}", options, loss(regular, name, policy_loss_type="regular"))
        case.add("cispo", dict(loss_type="cispo_clip", epsilon=1.0, epsilon_high=4.0, log_ratio_clamp=20.0),
                 loss(module.compute_policy_loss_cispo))  # fmt: skip
        case.add("rollout_is", dict(sampled, loss_type="icepop"), loss(module.rollout_is_policy_loss))
        case.add("dppo", dict(sampled, loss_type="dppo"), loss(module.dppo_policy_loss))
        case.add("clip_cov", dict(loss_type="clip_cov", cov_low=0.1, cov_share=1.0),
                 loss(module.compute_policy_loss_clip_cov))  # fmt: skip
        case.add("kl_cov", dict(loss_type="kl_cov", cov_share=0.3, cov_coef=0.1),
                 loss(module.compute_policy_loss_kl_cov))  # fmt: skip
        sequences = dict(importance_sampling_level="sequence_token", average="grpo")
        case.add("gspo", dict(without_kl, **sequences, log_ratio_clamp=10.0),
                 loss(module.gspo_policy_loss, "sequence_mean"))  # fmt: skip
        case.add("sapo", dict(loss_type="sapo", log_ratio_clamp=20.0), loss(module.sapo_policy_loss, "sequence_mean"))
        case.add("importance_sampling", dict(loss_type="dapo", epsilon=1e6),  # no bound
                 loss(module.importance_sampling_loss))  # fmt: skip

        off, least = vars(config.off_policy_correction), math.exp(-20)  # its log ratios are within ±20
        product = dict(product_mask_low=0.7, product_mask_high=1.1)
        geometric = dict(geo_mask_low=0.95, geo_mask_high=1.02)
        token = dict(tis_ratio_type="token", token_tis_ratio_clip_high=1.1)
        for name, correction, given in (
            ("tis token", f"token_truncate:{least}_1.1", token),
            ("tis sequence", f"sequence_truncate:{least}_1.2", dict(tis_ratio_type="sequence",
                                                           sequence_tis_ratio_clip_high=1.2)),
            ("geometric", "geometric_drop:0.95_1.02", dict(sequence_mask_metric="geometric", **geometric)),
            ("product", "sequence_drop:0.7_1.1", dict(sequence_mask_metric="product", **product)),
            ("token mask", "token_drop:0.9_1.1", dict(token_mask_is_threshold_low=0.9,
                                                      token_mask_is_threshold_high=1.1)),
            ("outlier", "any_drop:0.7_1.3", dict(outlier_token_is_threshold_low=0.7,
                                                 outlier_token_is_threshold_high=1.3)),
            ("tis token, geometric", f"token_truncate:{least}_1.1,geometric_drop:0.95_1.02",
             dict(token, sequence_mask_metric="geometric", **geometric)),
        ):  # fmt: skip
            given = SimpleNamespace(**{**off, **given})
            call = loss(regular, policy_loss_type="regular", off_policy_correction=given)
            case.add(f"correction {name}", dict(without_kl, sampling_correction=correction), call)

        def kl(leaf):
            each = module.compute_approx_kl(leaf, x["ref"], mask, "k3")
            return (each.sum(1) / mask.sum(1)).mean()

        case.add("kl", dict(preset="skyrl", beta=1.0, only_kl=True), kl)
        return case, record_advantages.skyrl(module)


FRAMEWORKS = {
    "verl": verl,
    "openrlhf": openrlhf,
    "skyrl": skyrl,
    "prime-rl": record_more.prime_rl,
    "nemo-rl": record_more.nemo_rl,
    "slime": record_more.slime,
    "miles": record_more.miles,
    "areal": record_more.areal,
    "roll": record_more.roll,
}


def main(name, version, root):
    cases = FRAMEWORKS[name](root)  # of losses; or (of losses, of advantages)
    written = dict(package=name, version=version)
    for prefix, case in zip(("", "advantage_"), cases if isinstance(cases, tuple) else (cases,), strict=False):
        written[f"{prefix}inputs"] = {key: value.tolist() for key, value in case.x.items()}
        written[f"{prefix}cases"] = case.rows
        print(f"{name} {version}: {', '.join(case.rows)}")
    (HERE / f"{name}.json").write_text(json.dumps(written).replace('}, "', '},\n"') + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
