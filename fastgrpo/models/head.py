"""The language-model head: what the loss does with hidden states at the completion's positions, inside the forward.

`run_completion_head` calls the model as anyone would. For the time of that call alone, the head's module has another
class, whose forward gives `fn(hidden, head)` in the place of logits. Nothing is left on the model afterwards, and its
own forward runs, whoever has patched, wrapped or compiled it. The work happens inside the forward, so that DDP, FSDP
and accelerate's autocast wrap it as they wrap the model's own head, and inside a call of the head's own module, so
that its hooks run, and FSDP2 and ZeRO-3 gather its parameters and reduce their gradients.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastgrpo.engine.hidden import no_autocast
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


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model, adapters included, under what PEFT, torch.compile and accelerate have wrapped it in."""
    while True:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if is_peft(inner):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def head_layer(model: PreTrainedModel) -> nn.Module:
    """The module that holds the head's weight.

    Raises:
        ValueError: no output embeddings, or an adapter on them that the weight alone does not show.
    """
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise ValueError(f"model: expected one with a language-model head, got {type(model).__name__} without one")
    if hasattr(layer, "modules_to_save"):  # PEFT trains a copy of the whole head
        layer = layer.original_module if layer.disable_adapters else layer.modules_to_save[layer.active_adapter]
    layer = getattr(layer, "_orig_mod", layer)  # compiled on its own
    if hasattr(layer, "base_layer"):
        raise ValueError(
            "model: a PEFT adapter on the language-model head is not supported, since logits are made from its "
            "weight; take it out of target_modules, or name it in modules_to_save"
        )
    return layer


@contextlib.contextmanager
def in_place_of_head(model: PreTrainedModel, fn: Callable[[Tensor, Head], Any]) -> Iterator[None]:
    """While this lasts, calls of the model's head give fn(hidden, head), within the calls of its module and its hooks.

    What shards a module's parameters hooks into its calls: it gathers them before, and in the backward pass again, and
    reduces their gradients. A weight that is gathered by hand keeps the gradient of one process.

    hidden and head come in the device and dtype that the head's own forward computes in.

    Raises:
        ValueError: a head that is still sharded in its own forward, by tensor parallelism.
    """
    layer, options = head_layer(model), logit_options(model)
    own = type(layer)
    vars(layer)["_in_place"] = lambda hidden: _call_at_head(layer, hidden, fn, options)
    layer.__class__ = _replacing(own)  # type: ignore[arg-type]  # a class has a hash, whatever its instances have
    try:
        yield
    finally:
        layer.__class__ = own
        del vars(layer)["_in_place"]


@functools.cache
def _replacing(own: type[nn.Module]) -> type[nn.Module]:
    """The class with another forward. A property goes before what others have put on the instance, and a compiled
    graph, which knows a module by its class, keeps one version with it and one without."""

    @torch.compiler.disable  # once a step another function, and kernels that a compiler need not see
    def run(self: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return vars(self)["_in_place"](hidden)

    return type(own.__name__, (own,), {"forward": property(lambda self: self._run_in_place), "_run_in_place": run})


def _call_at_head(layer: Any, hidden: Tensor, fn: Callable, options: tuple[float, float | None]) -> Any:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if isinstance(weight, DTensor):
        raise ValueError("model: a language-model head that is split by tensor parallelism is not supported")
    # the forward under ours; one on the instance is that of accelerate's hooks, or a cast to fp32
    forward = vars(layer).get("forward") or super(type(layer), layer).forward
    with torch.no_grad():
        like = forward(hidden[:, :0])  # without rows
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind)
    cast = like.dtype != (torch.get_autocast_dtype(kind) if autocast else hidden.dtype)
    hidden = hidden.to(like.device, like.dtype if cast else hidden.dtype)
    if cast or not autocast:
        weight, bias = weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
    with no_autocast(hidden) if cast else contextlib.nullcontext():
        return fn(hidden, Head(weight, bias, *options))


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


def run_completion_head(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, length: int, fn: Callable[[Tensor, Head], Tensor]
) -> Tensor:
    """fn(hidden (B, T, H), head) for the last T = `length` tokens of input_ids (B, P + T); `model` may be wrapped.

    Raises:
        ValueError: the model does not make its logits by one call of its head.
    """
    inner, results = unwrap(model), []
    gradient: list[Tensor] = []

    def at_head(hidden: Tensor, head: Head) -> Tensor:
        results.append(fn(hidden[:, -length - 1 : -1], head))
        blank = hidden.new_zeros(*hidden.shape[:-1], 1)
        return _Leave.apply(gradient, blank, results[-1]) if results[-1].requires_grad else blank

    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(inner.base_model.forward).parameters and not _has_prompt_learning(model):
        # counted over real tokens, as generate() does: learned positions must not start at the padding
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with in_place_of_head(inner, at_head):
        output = model(**inputs)
    logits = output[0] if isinstance(output, tuple) else output.logits
    if len(results) != 1 or logits.requires_grad != results[0].requires_grad:
        raise ValueError(
            f"model: expected the forward of {type(inner).__name__} to make its logits by one call of its own head, "
            f"got {len(results)} calls"
        )
    return _Return.apply(gradient, logits, results[0].detach()) if logits.requires_grad else results[0]


class _Leave(torch.autograd.Function):
    """Zeros that leave the model in the place of logits, and lead back to `value`.

    What shards or wraps a model finds its gradients at its outputs, so the way back to the loss has to go through
    them. What the model does to its logits must not touch the loss; so its gradient goes around, from `_Return`.
    """

    @staticmethod
    def forward(ctx: Any, gradient: list, blank: Tensor, value: Tensor) -> Tensor:
        ctx.gradient = gradient
        return blank

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.gradient[0]


class _Return(torch.autograd.Function):
    """`value`, with the way back over the model's outputs."""

    @staticmethod
    def forward(ctx: Any, gradient: list, logits: Tensor, value: Tensor) -> Tensor:
        ctx.gradient, ctx.like = gradient, logits.new_zeros(()).expand_as(logits)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        ctx.gradient[:] = [gradient]
        return None, ctx.like, None


def _has_prompt_learning(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before the prompt; it counts positions itself then."""
    configs = getattr(extract_model_from_parallel(model, keep_torch_compile=False), "peft_config", {})
    return any(config.is_prompt_learning for config in configs.values())


@torch.no_grad()
def check_completion_head(model: nn.Module) -> None:
    """Compare the logits made here with the model's own on a few tokens.

    Raises:
        ValueError: they differ, so this model transforms its logits in a way that is not read off its config.
    """
    inner = unwrap(model)
    device: Any = inner.get_input_embeddings().weight.device
    vocabulary = inner.config.get_text_config().vocab_size  # a sharded weight would not tell
    ids = torch.linspace(0, vocabulary - 1, 6, device=device).long()[None]
    mask, training = torch.ones_like(ids), model.training
    model.eval()
    try:
        own = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] : -1].float()
        ours = run_completion_head(
            model, ids, mask, ids.shape[1] - 1, lambda hidden, head: project(hidden, head.weight, **head.options)
        )
    finally:
        model.train(training)
    tolerance = 1e-3 if ours.dtype in (torch.float32, torch.float64) else 2e-2
    ours = ours.float()
    if own.shape != ours.shape or not (own - ours).abs().max() <= tolerance * own.abs().max():
        raise ValueError(
            f"model: the logits of {type(inner).__name__} are not softcap(logit_scale · (hidden @ weightᵀ + bias)) "
            "with the options read off its config, because of its architecture or of a hook on its head, so the fused "
            "loss would be computed from other logits than the model's; this is not supported"
        )
