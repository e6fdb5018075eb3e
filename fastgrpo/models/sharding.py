"""What FSDP2 and DeepSpeed's ZeRO-3 ask of a trainer beyond the hooks that they put on modules."""

from __future__ import annotations

import copy
import dataclasses

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled


def copy_model(model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """A copy of the model; under ZeRO-3, where a partitioned parameter cannot be copied, a new one with its values."""
    if not is_deepspeed_zero3_enabled():
        return copy.deepcopy(model)
    import deepspeed

    # born partitioned; `model` is too if it was loaded after the training arguments were made
    new = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config), dtype=model.dtype, trust_remote_code=trust_remote_code
    )
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in new.named_parameters():  # one at a time, so that the whole model is never in one place
            with deepspeed.zero.GatheredParameters([parameter, values[name]], modifier_rank=0):
                parameter.copy_(values[name])
        for mine, theirs in zip(new.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
    return new


def prepare_reference(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """The frozen reference on its device, sharded like the policy, so that it takes no more memory than that."""
    if accelerator.is_fsdp2:
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if not is_deepspeed_zero3_enabled():
        return accelerator.prepare_model(model, evaluation_mode=True)
    import deepspeed

    options = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = {"stage": 3}
    if "offload_param" in options["zero_optimization"]:
        zero["offload_param"] = options["zero_optimization"]["offload_param"]
    kept = ("train_micro_batch_size_per_gpu", "bf16", "fp16")
    config = {**{name: options[name] for name in kept if name in options}, "zero_optimization": zero}
    deepspeed.initialize(model=model, config=config)  # puts its hooks on the model's own modules
    return model


def keep_output_dtype(accelerator: Accelerator) -> None:
    """Under FSDP2, accelerate's mixed precision would round losses and log probabilities to bf16 or fp16."""
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
