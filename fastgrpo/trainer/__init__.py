"""GRPO training, and supervised fine-tuning, of Hugging Face models with the fused loss."""

from fastgrpo._extras import require

require("fastgrpo.trainer", "train", "accelerate", "datasets", "transformers")

from fastgrpo import rewards
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.grpo_trainer import GRPOTrainer
from fastgrpo.trainer.sft import SFTTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTTrainer", "rewards"]
