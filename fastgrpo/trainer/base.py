"""What the trainers share: a model whose head is checked, and checkpoints that are whole."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastgrpo.models.calls import AnyModel
from fastgrpo.models.head import check_completion_head
from fastgrpo.trainer.checkpoints import (
    ResumeError,
    last_whole_checkpoint,
    remove_old,
    whole_folder,
    why_incomplete,
)


class HeadTrainer(Trainer):
    """transformers' Trainer for losses that are made at the model's head.

    The head is checked when the trainer is made and again before the first step, since others may have patched the
    model in between. Checkpoints are written whole or not at all; resuming passes over those that are cut short.
    """

    model: AnyModel
    _head_is_checked = False
    _unfinished: str | None = None  # where a checkpoint is being written, in the place of the run's folder

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            name = type(self).__name__
            raise ValueError(f"{name} runs one process per GPU: start it with `accelerate launch` or `torchrun`")

    def _check_head_early(self, model: nn.Module) -> None:
        # under ZeRO-3 no layer can run before the engine is there to gather its parameters
        if not is_deepspeed_zero3_enabled():
            check_completion_head(model)
            self._head_is_checked = True

    def _check_head(self) -> None:
        if not self._head_is_checked:
            check_completion_head(self.model)
            self._head_is_checked = True

    def _prepare_inputs(self, inputs: Any) -> Any:
        self._check_head()
        return super()._prepare_inputs(inputs)

    @staticmethod
    def files_of_process(checkpoint: str, index: int) -> tuple[str, ...]:
        """The files in a checkpoint that the process `index` needs beside the Trainer's own."""
        return ()

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint in the output folder that is whole; warns of newer ones that are not."""
        args, index = self.args, self.args.process_index
        assert args.output_dir is not None  # as __post_init__ sees to
        return last_whole_checkpoint(args.output_dir, lambda path: self.files_of_process(path, index))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; True is the newest checkpoint that is whole.

        Raises:
            ValueError: no parameter requires a gradient.
            ResumeError: no checkpoint, or not the one named, is whole, or it is of a run with other options.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "model: expected parameters to train, got none that requires a gradient (an adapter is loaded frozen "
                "without is_trainable=True)"
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.last_checkpoint()
            if resume_from_checkpoint is None:
                raise ResumeError(f"resume_from_checkpoint: no whole checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint:
            why = why_incomplete(resume_from_checkpoint)  # another trainer's has no files of ours
            if why is not None:
                raise ResumeError(f"resume_from_checkpoint: {resume_from_checkpoint} is incomplete: {why}")
        if resume_from_checkpoint:
            self._check_resume(resume_from_checkpoint)
        self._head_is_checked = False
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # Checkpoints

    def _check_resume(self, checkpoint: str) -> None:
        """Raise ResumeError if a whole checkpoint is one that this run cannot go on from."""

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = self._get_output_dir(trial)
        checkpoint = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        args, state = self.args, self.state
        with whole_folder(
            checkpoint, self.accelerator.wait_for_everyone, args.should_save, self.is_local_process_zero()
        ) as part:
            self._unfinished = os.path.dirname(part)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            if state.best_model_checkpoint == part:
                state.best_model_checkpoint = checkpoint
                if args.should_save:
                    state.save_to_json(os.path.join(part, "trainer_state.json"))
            self._save_own(part)
        if args.should_save:
            remove_old(run, args.save_total_limit, [checkpoint, state.best_model_checkpoint])
        if args.push_to_hub:
            super()._push_from_checkpoint(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing while the checkpoint is being written: uploads take their time, and the folder is still renamed."""

    def _save_own(self, folder: str) -> None:
        """Write this process's files beside the Trainer's own."""
