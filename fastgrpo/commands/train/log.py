"""What a run of `fastgrpo train` logs: its progress bar, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from fastgrpo.trainer import terminal
from fastgrpo.trainer.checkpoints import append_whole, write_whole


class RunLog(TrainerCallback):
    """The run's progress bar with the reward or the loss, and every logged step as a line of metrics.jsonl.

    Without a `stage`, the file is written afresh. With one, lines are appended, each with a field for the stage, and
    the bar has its name.
    """

    def __init__(self, path: Path, stage: str | None = None):
        self.path, self.stage, self.bar = path, stage, None

    def _line(self, entry: dict) -> str:
        return json.dumps(entry if self.stage is None else {"stage": self.stage, **entry}) + "\n"

    def on_train_begin(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a resumed run continues the file up to its checkpoint; a new one starts it afresh
            write = write_whole if self.stage is None else append_whole
            write(self.path, "".join(map(self._line, state.log_history)))
            name = self.stage or "GRPO"
            self.bar = terminal.start(name, state.max_steps, state.global_step)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if self.bar is None:
            return
        append_whole(self.path, self._line({**logs, "step": state.global_step}))
        name = "reward" if "reward" in logs else "loss"
        if logs.get(name) is not None:
            self.bar.set_postfix({name: f"{logs[name]:.2f}"}, refresh=False)

    def on_step_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_train_end(self, args, state, control, **_) -> None:
        if self.bar is not None:
            self.bar.finish()
