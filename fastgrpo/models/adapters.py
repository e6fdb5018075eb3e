"""The reference policy of a PEFT model that came with an adapter: a frozen copy of that adapter, beside it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch

from fastgrpo.models.calls import AnyModel


@torch.no_grad()
def add_reference(model: AnyModel) -> list[str]:
    """Add frozen copies of the active adapters to a PEFT model; returns their names, "ref" where that is free."""
    active, names = list(model.active_adapters), []
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for adapter in active:
        config = copy.deepcopy(model.peft_config[adapter])
        # AdaLoRA has one trainable adapter at most; prompts for inference would lose what encodes them
        config.inference_mode = not config.is_prompt_learning
        before = _tensors(model)
        taken = {*model.peft_config, *(part for key in before for part in key.split("."))}
        name, count = "ref", 1
        while name in taken:  # also by a module, so that this part of a key can only be the adapter
            count += 1
            name = f"ref{count}"
        model.add_adapter(name, config)
        for key, value in _tensors(model).items():
            if key not in before:
                source = ".".join(adapter if part == name else part for part in key.split("."))
                if source not in before:
                    raise ValueError(
                        f"model: expected an adapter of which a reference can be made, got {adapter!r} without "
                        f"{source}, which its copy has"
                    )
                value.copy_(before[source])
        names.append(name)
    _activate(model, active)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter, learns in learning:
        parameter.requires_grad_(learns)
    return names


@contextlib.contextmanager
def reference(model: AnyModel, names: list[str]) -> Iterator[None]:
    """While this lasts, a PEFT model is its reference: with the adapters `names`, or without any."""
    if not names:
        with model.disable_adapter():
            yield
        return
    active, learning = list(model.active_adapters), [parameter.requires_grad for parameter in model.parameters()]
    _activate(model, names)
    try:
        yield
    finally:
        _activate(model, active)
        for parameter, learns in zip(model.parameters(), learning, strict=True):
            parameter.requires_grad_(learns)


def _tensors(model: AnyModel) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _activate(model: AnyModel, names: list[str]) -> None:
    if len(names) == 1:
        model.set_adapter(names[0])
    else:
        model.base_model.set_adapter(names)
