"""The loss where TRL scores its tokens: gradients in the forward pass."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fastgrpo import GRPOOutput, linear_grpo_loss


class LossAtHead:
    """Stands at TRL's seam for one forward pass of a model, and takes the loss there.

    What it returns goes through the model's outputs, with a term of value 0 that leads back to the loss: so wrappers
    that look for gradients at a model's outputs (DDP, FSDP, ZeRO) find them.

    Args:
        completion_mask (B, T): the completions' tokens, those of tools included.
        call: keyword arguments of `linear_grpo_loss`; what is per token is (B, T), or (B, T, k).
    """

    def __init__(self, completion_mask: Tensor, call: dict):
        self._mask, self._call = completion_mask.bool(), call
        self.output: GRPOOutput | None = None

    def apply(
        self, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()
    ) -> tuple[Tensor, Tensor, None, None, None]:
        call, (batch, length) = dict(self._call), self._mask.shape
        every = len(hidden) >= batch * length  # position, or only those of completions
        if every:
            rows = hidden.view(batch, -1, hidden.shape[-1])[:, -length:]
        else:
            rows = hidden
            lengths = self._mask.sum(-1)
            call["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            for name, value in call.items():
                if isinstance(value, Tensor) and value.shape[:2] == self._mask.shape:
                    call[name] = value[self._mask]
        head = dict(bias=bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
        device, under = hidden.device.type, contextlib.nullcontext()
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(device):
            if hidden.dtype in (torch.bfloat16, torch.float16):  # a cast of the weight would round its gradient, too
                under = torch.autocast(device, dtype=hidden.dtype)
            else:
                weight = weight.to(hidden.dtype)
        with under:
            self.output = output = linear_grpo_loss(rows, weight, **call, **head)
        results = []
        for values in (output.per_token_logps, output.entropies):
            if every:
                full = values.new_zeros(batch, len(hidden) // batch)
                full[:, -length:] = values
                values = full.view(-1)
            results.append(values)
        logps, entropies = results
        return logps + (output.loss - output.loss.detach()), entropies, None, None, None
