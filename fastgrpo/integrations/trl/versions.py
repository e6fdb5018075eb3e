"""TRL's versions: where each scores its tokens, and what those before 1.15, whose trainers make logits, need."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from types import ModuleType

import torch
import trl
from torch import Tensor, nn

from fastgrpo.integrations.seam import NotHonoured, Package, Place, in_place
from fastgrpo.models.head import Head, head_layer, in_place_of_head, logit_options, unwrap

TRL = Package("trl", title="TRL", versions="1.10 to 1.16")
IS_CHUNKED = TRL.is_at_least(1, 15)  # scores through chunked log-probabilities; else the trainers make logits
SCORE = "_get_per_token_logps_and_entropies"
OwnGRPOTrainer = trl.GRPOTrainer  # under trl's name may be the subclass later

_CHUNKED = "_ChunkedLogProbFunction"
_ARGUMENTS = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
              "logit_scale", "outputs"]  # fmt: skip


def places_of(scorer) -> list[Place]:
    """Where TRL scores tokens, for `scorer.apply` with the arguments and results of `ChunkedLogProb`.

    Raises:
        RuntimeError: this TRL scores elsewhere, or with other arguments.
    """
    if IS_CHUNKED:
        return [Place(_utils(), _CHUNKED, scorer)]
    return [Place(owner, SCORE, _score_at_head(owner, scorer)) for owner in (OwnGRPOTrainer, trl.RLOOTrainer)]


def gathered(weight: Tensor, bias: Tensor | None) -> contextlib.AbstractContextManager:
    """A context in which the head is whole: for a backward pass, before which ZeRO-3 has taken it apart again."""
    # before 1.15 the head's own module has put it together
    return _utils().maybe_gather_lm_head_ctx(weight, bias) if IS_CHUNKED else contextlib.nullcontext()


def _utils() -> ModuleType:
    return TRL.module("trl.trainer.utils", takes={_CHUNKED: _ARGUMENTS}, has=["maybe_gather_lm_head_ctx"])


# ---- TRL 1.10 to 1.14: the trainers make logits, and take log-probabilities from them


def _score_at_head(trainer: type, scorer):
    """The trainer's own scoring method, with log-probability and entropy of the next token in place of its logits."""
    original, module = getattr(trainer, SCORE), sys.modules[trainer.__module__]
    original = getattr(original, "_trl", original)
    takers = _takers(module)

    @functools.wraps(original)
    def scored(self, model, *args, **kwargs):
        inner = unwrap(self.accelerator.unwrap_model(model))
        try:
            _check_head(self, inner)
        except NotHonoured as why:
            TRL.leave(self, why)
            return original(self, model, *args, **kwargs)
        seen = {}

        def at_head(hidden: Tensor, head: Head) -> Tensor:
            hidden = hidden[:, :-1]  # what follows the last token is not known, nor asked for
            following = seen["input_ids"][:, -hidden.shape[1] :]
            scores = scorer.apply(
                hidden.flatten(0, 1), head.weight, head.bias, following.flatten(), self.temperature, 0, head.softcap,
                head.logit_scale, ("entropy",),
            )  # fmt: skip
            return nn.functional.pad(torch.stack(scores[:2], dim=-1).unflatten(0, following.shape), (0, 0, 0, 1))

        ours = [Place(module, name, functools.partial(_TAKERS[name], self.temperature)) for name in takers]
        watch = inner.register_forward_pre_hook(lambda _, a, k: seen.update(k), with_kwargs=True)
        try:
            with in_place(ours), in_place_of_head(inner, at_head):
                return original(self, model, *args, **kwargs)
        finally:
            watch.remove()

    scored._trl = original
    return scored


@functools.cache
def _takers(module: ModuleType) -> list[str]:
    """TRL's functions that take logits in a trainer's module."""
    takers = [name for name in _TAKERS if hasattr(module, name)]
    if "selective_log_softmax" not in takers or "logits_to_keep" not in inspect.getsource(module):
        TRL.refuse(f"{module.__name__} has no selective_log_softmax")
    return takers


def check_model(trainer) -> None:
    """Check that a trainer's model can be scored at its head, before the first step of the subclass.

    Raises:
        NotHonoured: TRL would make logits that cannot be replaced.
    """
    if not IS_CHUNKED:
        _check_head(trainer, unwrap(trainer.accelerator.unwrap_model(trainer.model)))


def _check_head(trainer, model) -> None:
    if getattr(trainer, "use_liger_kernel", False):
        raise NotHonoured("use_liger_kernel=True")
    try:
        head_layer(model)
    except ValueError as error:
        raise NotHonoured(str(error)) from error
    if logit_options(model) != (1.0, None):
        raise NotHonoured(f"{type(model).__name__} scales or caps its logits after the head")


def _logps_of(divided_by: float, scores: Tensor, ids: Tensor, /, **options) -> Tensor:
    # what TRL gives no `temperature` for, it has divided by it
    return scores[..., 0] if "temperature" in options else scores[..., 0] * divided_by


def _entropies_of(divided_by: float, scores: Tensor, /) -> Tensor:
    return scores[..., 1] * divided_by


def _both_of(_divided_by: float, scores: Tensor, ids: Tensor, /, entropy_requires_grad: bool = True, **_):
    entropies = scores[..., 1]
    return scores[..., 0], entropies if entropy_requires_grad else entropies.detach()


_TAKERS = {
    "selective_log_softmax": _logps_of,
    "entropy_from_logits": _entropies_of,
    "selective_log_softmax_and_entropy": _both_of,
}
