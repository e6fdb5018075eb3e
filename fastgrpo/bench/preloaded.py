"""Imported once by the process that fresh ones are forked from: everything that an implementation may import."""

import contextlib

import fastgrpo.bench.turns  # noqa: F401

with contextlib.suppress(ImportError):
    import trl.trainer.grpo_trainer
    import trl.trainer.utils  # noqa: F401

    import fastgrpo.integrations.trl  # noqa: F401
with contextlib.suppress(ImportError):
    import liger_kernel.chunked_loss  # noqa: F401
