"""fastgrpo inside TRL.

`patch()` puts fastgrpo's projection in the place of TRL's own chunked log-probabilities, so that every trainer that
scores tokens through it (GRPO, RLOO, DPO, KTO, SFT, AsyncGRPO) computes the same numbers in less time and memory:

    import fastgrpo.integrations.trl

    fastgrpo.integrations.trl.patch()      # until unpatch(), or as a context manager

`python -m fastgrpo.integrations.trl SCRIPT ARGS...` does so for a script, or for TRL's own command, as it is.
`GRPOTrainer` is TRL's with its loss made where the hidden states are, gradients in the forward pass: less work still.
"""

from __future__ import annotations

import sys

from fastgrpo._extras import require

if __name__ == "__main__":  # python -m fastgrpo.integrations.trl
    from fastgrpo.integrations._trl_script import main

    sys.exit(main(sys.argv[1:]))
require("fastgrpo.integrations.trl", "trl", "trl")

import contextlib
import functools
import importlib
import inspect
import threading
import warnings
from importlib.metadata import version

import torch
import trl
from torch import Tensor, nn

from fastgrpo import backends
from fastgrpo.backends import Rows
from fastgrpo.linear import head_options, linear_grpo_loss
from fastgrpo.linear_ops import no_autocast
from fastgrpo.loss import GRPOOutput
from fastgrpo.metrics import reduce_metrics
from fastgrpo.models.head import Head, head_layer, in_place_of_head, logit_options, unwrap
from fastgrpo.objective import Objective
from fastgrpo.projection import Projection, cut, wide

_MODULE, _CHUNKED = "trl.trainer.utils", "_ChunkedLogProbFunction"
_SCORE = "_get_per_token_logps_and_entropies"
_ARGUMENTS = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
              "logit_scale", "outputs"]  # fmt: skip
_VERSIONS = "1.10 to 1.16"


class ChunkedLogProb(torch.autograd.Function):
    """TRL's `_ChunkedLogProbFunction` on fastgrpo's kernels, with its arguments and results.

    The forward pass takes 2NHV FLOPs, a chunk of logits at a time. The backward pass takes 6HV for each row whose
    upstream gradient is not exactly 0, and nothing for the others.

    Args of `apply`:
        hidden (N, H), weight (V, H), bias (V,) or None: as in `linear_logps`.
        targets (N,) int64: the tokens to score.
        temperature: number > 0.
        chunk_size: not used.
        final_logit_softcapping, logit_scale: `softcap` and `logit_scale` of `linear_logps`.
        outputs: the results to compute beside logp.

    Returns:
        logp, entropy, log_sum_sq_probs, mean_logits (N,) fp32, is_top1 (N,) bool; None if not in `outputs`. The first
        two are differentiable.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        ctx.set_materialize_grads(False)
        hidden = hidden[None]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        options = head_options(hidden, len(weight), logit_scale, final_logit_softcapping, None, dtype, "auto")
        vocab, softcap, chunk, _, backend = options
        kernels, n = backends.get(backend), targets.numel()
        inv_temperature = torch.full((n,), logit_scale / temperature, dtype=wide(dtype), device=hidden.device)
        every = torch.ones(n, dtype=torch.bool, device=hidden.device)
        results = {name: torch.empty_like(inv_temperature) for name in ("log_probs", "lse", *outputs)}
        if "is_top1" in outputs:
            results["is_top1"] = every.clone()
        with no_autocast(hidden):
            projection = Projection(hidden, weight, bias, vocab, dtype, min(chunk, n))
            for rows in cut(0, n, chunk):
                logits = projection.logits(rows)
                ids, mask, inv_t = targets[rows], every[rows], inv_temperature[rows]
                entropy, cap = "entropy" in outputs, softcap or None
                stats = kernels.row_stats(logits, Rows(ids, mask, inv_t), want_entropy=entropy, softcap=cap)
                for name, values in zip(("log_probs", "lse", "entropy"), stats, strict=True):
                    if name in results:
                        results[name][rows] = values
                if "log_sum_sq_probs" in outputs:  # Σp² = Σexp(2z) / exp(2 lse)
                    doubled = Rows(ids, mask, 2 * inv_t)
                    _, twice, _ = kernels.row_stats(logits, doubled, want_entropy=False, softcap=cap)
                    results["log_sum_sq_probs"][rows] = twice - 2 * stats[1]
                if "mean_logits" in outputs:
                    z = logits[0] if not softcap else softcap * torch.tanh(logits[0].to(inv_t.dtype) / softcap)
                    results["mean_logits"][rows] = z.mean(-1, dtype=inv_t.dtype) * inv_t
                if "is_top1" in outputs:
                    results["is_top1"][rows] = logits[0].argmax(-1) == ids
        entropy = results.get("entropy")
        ctx.save_for_backward(hidden, weight, bias, targets, inv_temperature, results["lse"], entropy)
        ctx.options = options
        rest = [results.get(name) for name in ("log_sum_sq_probs", "mean_logits", "is_top1")]
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        return results["log_probs"], entropy, *rest

    @staticmethod
    def backward(ctx, d_logp: Tensor | None, d_entropy: Tensor | None, *_):
        hidden, weight, bias, targets, inv_temperature, lse, entropy = ctx.saved_tensors
        if d_logp is None and d_entropy is None:
            return (None,) * 9
        g = torch.zeros_like(lse) if d_logp is None else d_logp.to(lse.dtype).contiguous()
        h = None if d_entropy is None else d_entropy.to(lse.dtype).contiguous()
        needs = list(ctx.needs_input_grad[:3])
        # ZeRO-3 has taken them apart again; before 1.15 the head's own module has put them together
        with _seam().maybe_gather_lm_head_ctx(weight, bias) if _chunked() else contextlib.nullcontext():
            gradients = torch.ops.fastgrpo.linear_grad(
                hidden, weight, bias, targets, lse, lse if entropy is None else entropy, g, h, inv_temperature, needs,
                *ctx.options,
            )  # fmt: skip
        d_hidden, *others = (x if need else None for x, need in zip(gradients, needs, strict=True))
        return d_hidden if d_hidden is None else d_hidden[0], *others, *(None,) * 6


_lock = threading.RLock()
_originals: list[tuple[object, str, object]] = []  # (owner, attribute, TRL's own) of what is patched


class _Patched(contextlib.AbstractContextManager):
    """What `patch()` returns: leaving it as a context manager is `unpatch()`."""

    def __exit__(self, *_):
        unpatch()


def patch() -> contextlib.AbstractContextManager:
    """Let TRL's trainers score tokens with fastgrpo, from their next forward pass on, until `unpatch()`.

    From TRL 1.15 on these are the trainers that score through TRL's chunked log-probabilities: GRPO, RLOO, DPO, KTO,
    SFT, AsyncGRPO. In 1.10 to 1.14, where GRPO and RLOO make full logits, it is these two, and they make none.
    A second call changes nothing.

    Returns:
        A context manager that calls `unpatch()` on exit.

    Raises:
        RuntimeError: this TRL has its log-probabilities elsewhere, or they take other arguments; nothing is changed.
    """
    with _lock:
        if not _originals:
            _originals.extend(_put(ChunkedLogProb))
    return _Patched()


def unpatch() -> None:
    """Put TRL's own objects back; does nothing if they are in place."""
    with _lock:
        while _originals:
            setattr(*_originals.pop())


def _put(scorer) -> list[tuple[object, str, object]]:
    """Let `scorer.apply`, with `ChunkedLogProb`'s arguments and results, score tokens.

    All of TRL's places are looked at before the first is changed.

    Returns:
        (owner, attribute, what was there) of each.
    """
    if _chunked():
        places = [(_seam(), _CHUNKED, scorer)]
    else:
        owners = (GRPOTrainer.__base__, trl.RLOOTrainer)  # trl.GRPOTrainer may be the subclass by now
        places = [(owner, _SCORE, _score_at_head(owner, scorer)) for owner in owners]
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in places]
    for place in places:
        setattr(*place)
    return before


def _chunked() -> bool:
    """Whether this TRL scores through its chunked log-probabilities; else it makes logits."""
    return tuple(int(n) for n in version("trl").split(".")[:2]) >= (1, 15)


def _refuse(problem: str):
    raise RuntimeError(
        f"fastgrpo {version('fastgrpo')} fits TRL {_VERSIONS}; TRL {version('trl')} differs, and nothing is changed: "
        f"{problem}"
    )


def _seam():
    """TRL's module with the chunked log-probabilities."""
    try:
        module = importlib.import_module(_MODULE)
        found = list(inspect.signature(getattr(module, _CHUNKED).forward).parameters)[1:]  # but ctx
        module.maybe_gather_lm_head_ctx  # noqa: B018 (needed in the backward pass)
    except (ImportError, AttributeError) as error:
        _refuse(str(error))
    if found != _ARGUMENTS:
        _refuse(f"{_CHUNKED} takes {', '.join(found)}, expected {', '.join(_ARGUMENTS)}")
    return module


# ---- TRL 1.10 to 1.14: the trainers make logits, and take log-probabilities from them


def _score_at_head(trainer: type, scorer):
    """The trainer's own scoring method, with log-probability and entropy of the next token in place of its logits."""
    original, module = getattr(trainer, _SCORE), sys.modules[trainer.__module__]
    original = getattr(original, "_trl", original)
    takers = _takers(module)

    @functools.wraps(original)
    def scored(self, model, *args, **kwargs):
        inner = unwrap(self.accelerator.unwrap_model(model))
        if (why := _keeps_its_logits(self, inner)) is not None:
            _say_once(self, why)
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

        watch = inner.register_forward_pre_hook(lambda _, a, k: seen.update(k), with_kwargs=True)
        try:
            with _lock, in_place_of_head(inner, at_head), contextlib.ExitStack() as stack:
                for name in takers:
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, functools.partial(_TAKERS[name], self.temperature))
                return original(self, model, *args, **kwargs)
        finally:
            watch.remove()

    scored._trl = original
    return scored


@functools.cache
def _takers(module) -> list[str]:
    """TRL's functions that take logits in a trainer's module."""
    takers = [name for name in _TAKERS if hasattr(module, name)]
    if "selective_log_softmax" not in takers or "logits_to_keep" not in inspect.getsource(module):
        _refuse(f"{module.__name__} has no selective_log_softmax")
    return takers


def _keeps_its_logits(trainer, model) -> str | None:
    """Why a model's logits cannot be replaced at its head."""
    if getattr(trainer, "use_liger_kernel", False):
        return "use_liger_kernel=True"
    try:
        head_layer(model)
    except ValueError as error:
        return str(error)
    if logit_options(model) != (1.0, None):
        return f"{type(model).__name__} scales or caps its logits after the head"
    return None


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


def _say_once(trainer, why: str) -> None:
    said = vars(trainer).setdefault("_fastgrpo_said", set())
    if why not in said:
        said.add(why)
        warnings.warn(f"fastgrpo leaves this to TRL: {why}", RuntimeWarning, stacklevel=3)


# ---- the subclass


class _LossAtHead:
    """Stands at TRL's seam for one forward pass of a model, and takes the loss there.

    What it returns goes through the model's outputs, with a term of value 0 that leads back to the loss: so wrappers
    that look for gradients at a model's outputs (DDP, FSDP, ZeRO) find them.

    Args:
        completion_mask (B, T): the completions' tokens, those of tools included.
        call: keyword arguments of `linear_grpo_loss`; what is per token is (B, T).
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
                if isinstance(value, Tensor) and value.shape == self._mask.shape:
                    call[name] = value[self._mask]
        head = dict(bias=bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            weight, head["bias"] = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
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


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with fastgrpo's loss from hidden states; arguments, config, data, logs and results are TRL's.

    The gradients are made in the forward pass, with 6NHV FLOPs in place of 8NHV. Masked and tool tokens enter no GEMM;
    tokens of advantage 0, with beta and the entropy coefficient 0, enter only the first. The metrics take one
    collective and one wait.

    If a subclass overrides a method that makes the loss, or an option has no counterpart in `Objective`, the loss is
    TRL's own, and a RuntimeWarning says why.
    """

    def _compute_loss(self, model, inputs):
        try:
            return self._fused_loss(model, inputs, self._objective())
        except _NotFused as reason:
            _say_once(self, str(reason))
            return super()._compute_loss(model, inputs)

    def _fused_loss(self, model, inputs, objective: Objective) -> Tensor:
        mode = "train" if self.model.training else "eval"
        train = mode == "train"
        accumulation = self.current_gradient_accumulation_steps if train else 1
        completion_mask = inputs["completion_mask"]
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        parts = self.accelerator.num_processes * (self.args.steps_per_generation if train else 1)
        corrected = objective.loss_type == "vespo" or (self.use_vllm and self.vllm_importance_sampling_correction)
        at_head = _LossAtHead(
            completion_mask,
            dict(
                completion_ids=inputs["completion_ids"],
                advantages=inputs["advantages"],
                completion_mask=mask,
                old_per_token_logps=inputs.get("old_per_token_logps"),
                ref_per_token_logps=inputs["ref_per_token_logps"] if self.beta != 0 else None,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps"),
                importance_sampling_ratio=inputs.get("importance_sampling_ratio") if corrected else None,
                num_items_in_batch=inputs["num_items_in_batch"].clamp(min=1) / parts,
                loss_scale=1.0 / accumulation,
                objective=objective,
            ),
        )
        logps, entropies, aux_loss = self._score(model, inputs, at_head)
        output, metrics = at_head.output, self._metrics[mode]
        # The way back to the loss is at every scored position; one is enough.
        carrier = logps.view(-1).gather(0, completion_mask.view(-1).argmax()[None])[0]
        loss = output.loss.detach() + (carrier - carrier.detach())
        reduced = reduce_metrics(self.accelerator, objective, _with_policy_loss(output), mask, accumulation)
        if not self._entropy_bonus_enabled:
            del reduced["policy_loss"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            reduced["aux_loss"] = self.accelerator.gather_for_metrics(aux_loss.detach()).mean()
        names, values = list(reduced), torch.stack([x.to(loss.device) for x in reduced.values()]).tolist()
        for name, value in zip(names, values, strict=True):
            metrics[name].append(value)
        if self._entropy_bonus_enabled and train:
            self._control_entropy(entropies, mask)
        return loss

    def _objective(self) -> Objective:
        """TRL's options as an Objective, with the entropy coefficient of this step."""
        if (why := vars(self).get("_fastgrpo_left")) is not None:
            raise _NotFused(why)
        if not _chunked():
            model = unwrap(self.accelerator.unwrap_model(self.model))
            if (why := _keeps_its_logits(self, model)) is not None:
                raise _NotFused(why)
        for name in ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights"):
            if getattr(type(self), name, None) is not getattr(trl.GRPOTrainer, name, None):
                raise _NotFused(f"{type(self).__name__} overrides {name}")
        if self.top_entropy_quantile < 1 and self.accelerator.num_processes > 1:
            raise _NotFused("top_entropy_quantile is of the tokens of all processes")
        coefficient = self.entropy_coef if self._entropy_bonus_enabled else 0.0
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coefficient = 0.0
        options = ("use_bias_correction_kl", "delta", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
                   "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")  # fmt: skip
        try:
            return Objective(
                loss_type=self.loss_type,
                importance_sampling_level=self.importance_sampling_level,
                beta=self.beta,
                epsilon=self.epsilon_low,
                epsilon_high=self.epsilon_high,
                entropy_coef=coefficient,
                top_entropy_quantile=self.top_entropy_quantile,
                off_policy_mask_threshold=self.off_policy_mask_threshold,
                max_completion_length=self.max_completion_length,
                **{name: getattr(self.args, name) for name in options},
            )
        except (ValueError, AttributeError) as error:
            raise _NotFused(str(error)) from error

    def _score(self, model, inputs, at_head: _LossAtHead):
        """TRL's own scoring of a batch, with `at_head` in the place of its log-probabilities."""
        prompt_and_completion = [
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        ]
        scoring = [getattr(self, name) for name in (_SCORE, "_full_logits_logps") if hasattr(self, name)]  # 1.14: both
        known = {name for method in scoring for name in inspect.signature(method).parameters}
        extras = {name: inputs[name] for name in known if name in inputs}  # of images
        with _lock:
            before = _put(at_head)
            try:
                scores = self._get_per_token_logps_and_entropies(
                    model, *prompt_and_completion, inputs["completion_ids"].size(1), compute_entropy=True,
                    compute_aux_loss=self.aux_loss_enabled, **extras,
                )  # fmt: skip
            finally:
                for place in before:
                    setattr(*place)
        if at_head.output is None:
            self._fastgrpo_left = f"{type(self).__name__} did not score its tokens at the model's head"
            raise _NotFused(self._fastgrpo_left)
        return scores

    def _control_entropy(self, entropies: Tensor, mask: Tensor) -> None:
        """Log the entropy coefficient at the end of a step; where it is adaptive, move it towards the target first.

        The entropy that counts is that of all tokens of a step that the bonus acts on, on all processes.
        """
        if self.use_adaptive_entropy:
            counted = mask.to(entropies.dtype)
            if self.top_entropy_quantile < 1.0:
                counted = counted * self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
            window = torch.stack([(entropies.detach() * counted).sum(), counted.sum()])
            if self._entropy_window_stats is not None:
                window = window + self._entropy_window_stats
            self._entropy_window_stats = window
            if self.accelerator.sync_gradients:
                total, tokens = self.accelerator.reduce(window, reduction="sum").tolist()
                self._last_world_entropy, self._entropy_window_stats = total / max(tokens, 1.0), None
                step = self.args.entropy_coef_delta
                if self._last_world_entropy <= self.args.entropy_target:
                    self.entropy_coef = min(self.entropy_coef + step, self.args.entropy_coef_max)
                else:
                    self.entropy_coef = max(self.entropy_coef - step, self.args.entropy_coef_min)
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)


class _NotFused(Exception):
    """Why a loss is left to TRL."""


def _with_policy_loss(output: GRPOOutput) -> GRPOOutput:
    """An entropy coefficient of 0 leaves the policy's loss to be the whole."""
    return output._replace(metrics={"policy_loss": output.loss, **output.metrics})
