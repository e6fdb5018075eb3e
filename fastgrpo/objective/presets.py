"""The settings of papers, and the defaults of other frameworks, as options of an Objective."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "grpo-paper": dict(loss_type="grpo", beta=0.04, use_bias_correction_kl=False),  # arXiv:2402.03300
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),  # arXiv:2503.14476
    "dr_grpo": dict(loss_type="dr_grpo"),  # arXiv:2503.20783; needs max_completion_length
    "bnpo": dict(loss_type="bnpo"),  # TRL's: an average over the tokens of a batch
    # GSPO, arXiv:2507.18071
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "gspo-token": dict(loss_type="grpo", importance_sampling_level="sequence_token", epsilon=3e-4, epsilon_high=4e-4),
    # arXiv:2602.05261
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3),
    "cispo": dict(loss_type="cispo", epsilon_high=5.0),  # arXiv:2506.13585
    "sapo": dict(loss_type="sapo"),  # arXiv:2511.20347
    "vespo": dict(loss_type="vespo"),  # arXiv:2602.10693
    "scale-rl": dict(loss_type="cispo", epsilon_high=5.0, average="prompt-mean"),  # arXiv:2510.13786
    "dual-clip": dict(loss_type="dapo", clip_ratio_c=3.0),  # arXiv:1912.09729
    "gmpo": dict(loss_type="gmpo", epsilon=0.4, epsilon_high=0.4),  # arXiv:2507.20673
    "dppo-tv": dict(loss_type="dppo_tv"),  # arXiv:2602.04879
    "dppo-kl": dict(loss_type="dppo_kl"),
    "clip-cov": dict(loss_type="clip_cov"),  # arXiv:2505.22617
    "kl-cov": dict(loss_type="kl_cov"),
    "gpg": dict(loss_type="reinforce"),  # arXiv:2504.02546
    "reinforce": dict(loss_type="reinforce"),
    "rloo": dict(loss_type="reinforce", average="luspo"),  # arXiv:2402.14740
    "dro": dict(loss_type="reinforce", log_ratio_penalty=0.05),  # arXiv:2405.19107, its beta 0.1
    "icepop": dict(loss_type="icepop", epsilon=0.5, epsilon_high=4.0, ratio_anchor="sampling"),  # arXiv:2510.18855
    # the defaults of frameworks
    "verl": dict(  # 0.9.1; its KL, if beta is given
        loss_type="dapo", average="token-mean", clip_ratio_c=3.0, log_ratio_clamp=20.0,
        kl_estimator="low_var_kl", use_bias_correction_kl=False,
    ),
    "prime-rl": dict(  # 0.8.0
        loss_type="dppo", average="token-mean", ratio_anchor="sampling", log_ratio_penalty=1e-3,
    ),
    "skyrl": dict(  # 0.4.0
        loss_type="dapo", average="token-mean", log_ratio_clamp=20.0, beta=1e-3,
        kl_estimator="low_var_kl", use_bias_correction_kl=False, kl_average="grpo",
    ),
    "nemo-rl": dict(  # 0.6.0
        loss_type="dapo", average="token-mean", beta=0.01,
        kl_log_ratio_clamp=20.0, kl_clamp=10.0, kl_anchor="current",
    ),
    "openrlhf": dict(  # 0.11.2; its KL is in the reward, or in the loss if beta is given
        loss_type="dapo", average="token-mean", log_ratio_clamp=20.0,
        kl_estimator="k1", kl_clamp=10.0, use_bias_correction_kl=False,
    ),
    "slime": dict(  # 0.3.1; its KL, if beta is given
        loss_type="dapo", average="seq-mean-token-mean", kl_estimator="k1", use_bias_correction_kl=False,
    ),
    "miles": dict(  # August 2026; its KL, if beta is given
        loss_type="dapo", average="seq-mean-token-mean", log_ratio_clamp=20.0,
        kl_estimator="k1", use_bias_correction_kl=False,
    ),
    "areal": dict(  # 1.0.4; its KL is in the reward, or in the loss if beta is given
        loss_type="dapo", average="token-mean", kl_estimator="k1", kl_clamp=10.0, use_bias_correction_kl=False,
    ),
    "roll": dict(  # 0.3.0; its KL, if beta is given
        loss_type="dapo", average="seq-mean-token-mean", kl_estimator="k3", kl_clamp=10.0,
        use_bias_correction_kl=False,
    ),
}  # fmt: skip
