"""`patch()` and `unpatch()`."""

from __future__ import annotations

from fastgrpo.integrations.seam import Patch
from fastgrpo.integrations.trl.chunked import ChunkedLogProb
from fastgrpo.integrations.trl.versions import places_of

_patch = Patch(lambda: places_of(ChunkedLogProb))


def patch() -> Patch:
    """Let TRL's trainers score tokens with fastgrpo, from their next forward pass on, until `unpatch()`.

    From TRL 1.15 on these are the trainers that score through TRL's chunked log-probabilities: GRPO, RLOO, DPO, KTO,
    SFT, AsyncGRPO. In 1.10 to 1.14, where GRPO and RLOO make full logits, it is these two, and they make none.
    A second call changes nothing.

    Returns:
        A context manager that calls `unpatch()` on exit; as text, the names that are replaced.

    Raises:
        RuntimeError: this TRL has its log-probabilities elsewhere, or they take other arguments; nothing is changed.
    """
    return _patch.put()


def unpatch() -> None:
    """Put TRL's own objects back; does nothing if they are in place."""
    _patch.take_back()
