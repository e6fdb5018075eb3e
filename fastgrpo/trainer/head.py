"""The language-model head: what the loss does with hidden states at the completion's positions, inside the forward.

`model(..., completion_fn=fn, completion_length=T)` runs the backbone once and returns `fn(hidden, head)`, where hidden
(B, T, H) predicts the last T tokens and `head` says how logits come from it. The work happens inside the forward, so
that DDP, FSDP and accelerate's autocast wrap it as they wrap the model's own head, and inside a call of the head's own
module, so that FSDP2 and ZeRO-3 gather its parameters and reduce their gradients.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastgrpo.reference import project


class Head(NamedTuple):
    """logits = softcap(logit_scale · (hidden @ weightᵀ + bias)), with softcap(x) = c·tanh(x/c)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `linear_grpo_loss` and `linear_logps`."""
        return {name: value for name, value in self._asdict().items() if name != "weight"}


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper, adapters included; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def head_layer(model: PreTrainedModel) -> nn.Module:
    """The module that holds the head's weight.

    Raises:
        ValueError: no output embeddings, or an adapter on them that the weight alone does not show.
    """
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise ValueError(f"model: expected one with a language-model head, got {type(model).__name__} without one")
    if hasattr(layer, "modules_to_save"):  # PEFT trains a copy of the whole head
        return layer.original_module if layer.disable_adapters else layer.modules_to_save[layer.active_adapter]
    if hasattr(layer, "base_layer"):
        raise ValueError(
            "model: a PEFT adapter on the language-model head is not supported, since logits are made from its "
            "weight; take it out of target_modules, or name it in modules_to_save"
        )
    return layer


@contextlib.contextmanager
def in_place_of_head(model: PreTrainedModel, fn: Callable[[Tensor, Head], Any]):
    """While this lasts, calls of the model's head give fn(hidden, head), within the calls of its module and its hooks.

    What shards a module's parameters hooks into its calls: it gathers them before, and in the backward pass again, and
    reduces their gradients. A weight that is gathered by hand keeps the gradient of one process.

    Raises:
        ValueError: a head that is still sharded in its own forward, by tensor parallelism.
    """
    layer, options = head_layer(model), logit_options(model)

    def forward(hidden: Tensor) -> Any:
        if isinstance(layer.weight, DTensor):
            raise ValueError("model: a language-model head that is split by tensor parallelism is not supported")
        return fn(hidden, Head(layer.weight, getattr(layer, "bias", None), *options))

    own = vars(layer).get("forward")  # what an instance's hooks may have put over the class's
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def logit_options(model: PreTrainedModel) -> tuple[float, float | None]:
    """(logit_scale, softcap). The families name the factor differently, and Granite's divides."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse; Falcon-H1
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None) is not None:  # Granite, MiniCPM3; HyperCLOVA X multiplies
            factor = float(config.logits_scaling)
            scale = factor if config.model_type == "hyperclovax" else 1.0 / factor
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    return scale, None if not softcap else float(softcap)


def add_completion_head(model: PreTrainedModel) -> None:
    """Teach `model.forward` the keywords `completion_fn` and `completion_length`; without them it is what it was.

    Call it before the model is wrapped (PEFT's wrapper may be there already: pass what is inside).
    """
    if hasattr(model.forward, "completion_head"):
        return
    if model.base_model is model:
        raise ValueError(f"model: expected a causal language model with a backbone, got {type(model).__name__}")
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self, *args, completion_fn: Callable | None = None, completion_length: int | None = None, **kwargs):
        if completion_fn is None:
            return original(*args, **kwargs)
        # PEFT's wrapper fills in labels=None and the like, which a backbone need not know
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if "position_ids" not in inspect.signature(self.base_model.forward).parameters:  # ALiBi models have none
            kwargs.pop("position_ids", None)
        # backbone and head are looked up now, since wrappers may replace them after this function was made
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        with in_place_of_head(self, completion_fn):
            return self.get_output_embeddings()(hidden[:, -completion_length - 1 : -1])

    forward.completion_head = True
    model.forward = types.MethodType(forward, model)


def run_completion_head(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, length: int, fn: Callable[[Tensor, Head], Any]
) -> Any:
    """fn(hidden, head) for the last `length` tokens of input_ids (B, P + T); `model` may be wrapped."""
    # counted over real tokens, as generate() does: learned positions must not start at the padding
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        completion_fn=fn,
        completion_length=length,
    )


@torch.no_grad()
def check_completion_head(model: nn.Module) -> None:
    """Compare the logits made here with the model's own on a few tokens.

    Raises:
        ValueError: they differ, so this model transforms its logits in a way that is not read off its config.
    """
    device = unwrap_peft(model).get_input_embeddings().weight.device
    vocabulary = unwrap_peft(model).config.get_text_config().vocab_size  # a sharded weight would not tell
    ids = torch.linspace(0, vocabulary - 1, 6, device=device).long()[None]
    mask, training = torch.ones_like(ids), model.training
    model.eval()
    try:
        own = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        ours = run_completion_head(
            model, ids, mask, ids.shape[1] - 1, lambda hidden, head: project(hidden, head.weight, **head.options)
        ).float()
    finally:
        model.train(training)
    tolerance = 1e-3 if unwrap_peft(model).dtype in (torch.float32, torch.float64) else 2e-2
    if own.shape != ours.shape or not (own - ours).abs().max() <= tolerance * own.abs().max():
        raise ValueError(
            f"model: the logits of {type(unwrap_peft(model)).__name__} are not softcap(logit_scale · (hidden @ "
            "weightᵀ + bias)) with the options read off its config, so the fused loss would be computed from other "
            "logits than the model's; this architecture is not supported"
        )
