"""From the options of `fastgrpo train` to a GRPOConfig that can run here."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgrpo import _defaults, backends
from fastgrpo.commands.errors import UsageError
from fastgrpo.engine.head import choose_logits_dtype
from fastgrpo.trainer.config import CHECKPOINTING, GRPOConfig, as_logits_dtype, name_of_logits_dtype


def make_config(options: argparse.Namespace, output_dir: Path, defaults: _defaults.Sizes, is_tiny: bool) -> GRPOConfig:
    """The options, and where they are None the defaults; a tiny model gains nothing from saving memory.

    Raises:
        ValueError: names the option, what was expected and what came.
    """
    on_gpu = torch.cuda.is_available()
    names = ("max_completion_length", "steps", "learning_rate", "batch_size")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    sizes = defaults._replace(**given)
    args = GRPOConfig(
        output_dir=str(output_dir),
        use_cpu=not on_gpu,
        bf16=on_gpu and not is_tiny,
        report_to="none",
        loss_type=options.loss_type,
        beta=options.beta,
        advantage_estimator=options.advantage_estimator,
        advantage_kwargs=options.advantage_kwargs,
        num_generations=options.num_generations,
        num_iterations=options.num_iterations,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        keep_sampling_mask=options.keep_sampling_mask,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        logging_steps=1,
        save_strategy="steps" if options.save_steps > 0 else "no",
        save_steps=options.save_steps,
        save_total_limit=1,
        seed=options.seed,
        backend=options.backend,
        logits_dtype=options.logits_dtype,
        column_tolerance=options.column_tolerance,
        dataloader_pin_memory=on_gpu,
        **{CHECKPOINTING: on_gpu and not is_tiny},
        max_completion_length=sizes.max_completion_length,
        max_steps=sizes.steps,
        learning_rate=sizes.learning_rate,
        warmup_steps=sizes.warmup_steps,
        per_device_train_batch_size=sizes.batch_size,
    )
    name_of_logits_dtype(args.logits_dtype, args, torch.float32)  # as the models here are loaded and made
    return args


def check_backend(args: GRPOConfig) -> None:
    """Raise a UsageError unless the backend asked for can run here."""
    if args.backend == "auto":
        return
    backend = backends.get(args.backend)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    dtype = choose_logits_dtype(as_logits_dtype(args.logits_dtype), dtype, args.device)
    why = backend.unavailable() or backend.refuses(backends.Call(args.device.type, args.device.index, dtype, 1))
    if why is not None:
        raise UsageError(f"--backend: {args.backend} cannot be used here: {why}")


def check_round(args: GRPOConfig, count: int) -> None:
    """Raise a UsageError unless `count` training prompts are enough for a round of sampling."""
    prompts = args.generation_batch_size // args.num_generations
    if count < prompts:
        raise UsageError(
            f"--batch-size: expected no more completions in a round than {count} training prompts have with "
            f"--num-generations {args.num_generations}, got {args.generation_batch_size} (--batch-size times "
            "--gradient-accumulation-steps times processes)"
        )
