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
}
