"""The round of sampling that a checkpoint was taken in: what GRPOTrainer saves of it, and whether a run can go on.

Between two rounds every option may change. Within one, those that made its micro-batches may not.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fastgrpo.trainer.checkpoints import ResumeError, is_whole
from fastgrpo.trainer.config import GRPOConfig

_FILE = "grpo_state_{}.pt"  # in a checkpoint, of each process
_OPTIONS = (
    "steps_per_generation",
    "num_iterations",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "world_size",
    "beta",
)


def files_of_process(checkpoint: str, index: int) -> tuple[str, ...]:
    """The files that the process `index` needs: its own state, unless the run that saved had fewer processes."""
    own = _FILE.format(index)
    if not os.path.isfile(os.path.join(checkpoint, own)):
        before = _any_state(checkpoint, "cpu") or {}
        if index >= before.get("options", {}).get("world_size", index + 1):
            return ()
    return (own,)


def save(folder: str, args: GRPOConfig, **state: Any) -> None:
    """Save this process's state: `step` and `buffered_inputs` of a round that is not over, and `metrics`."""
    options = {name: getattr(args, name) for name in _OPTIONS}
    torch.save({"options": options, **state}, os.path.join(folder, _FILE.format(args.process_index)))


def load(checkpoint: str, args: GRPOConfig, device: torch.device) -> dict[str, Any] | None:
    """What this process has saved in a checkpoint, None if nothing."""
    path = os.path.join(checkpoint, _FILE.format(args.process_index))
    if not os.path.isfile(path):
        return None
    return torch.load(path, map_location=device, weights_only=True)


def check(checkpoint: str, args: GRPOConfig, device: torch.device) -> None:
    """Raise ResumeError if a whole checkpoint is within a round that this run cannot go on with."""
    own = load(checkpoint, args, device)
    # a process that the saved run did not have reads from another's whether it may join
    state = _any_state(checkpoint, device) if own is None else own
    if state is None:
        warnings.warn(f"{checkpoint} has no state of this process: a round of sampling begins", stacklevel=4)
    if state is None or (buffered := state["buffered_inputs"]) is None:
        return
    before = {"steps_per_generation": len(buffered), **state.get("options", {})}
    before["beta"] = before.get("beta", 0.0) if "ref_per_token_logps" in buffered[0] else 0.0
    for name, value in before.items():
        now = getattr(args, name)
        if now != value and not (name == "beta" and (now == 0 or value != 0)):
            raise ResumeError(
                f"resume_from_checkpoint: {checkpoint} is within a round of sampling that was made with "
                f"{name}={value}, and cannot go on with {name}={now}"
            )
    if own is None:
        raise ResumeError(
            f"resume_from_checkpoint: {checkpoint} is within a round of sampling, and has no state of process "
            f"{args.process_index}"
        )


def _any_state(checkpoint: str, device: torch.device | str) -> dict[str, Any] | None:
    """What the first process that has saved its state in a checkpoint here has saved."""
    for path in sorted(Path(checkpoint).glob(_FILE.format("*"))):
        if is_whole(path):
            return torch.load(path, map_location=device, weights_only=True)
    return None
