"""fastgrpo inside TRL.

`patch()` puts fastgrpo's projection in the place of TRL's own chunked log-probabilities, so that every trainer that
scores tokens through it (GRPO, RLOO, DPO, KTO, SFT, AsyncGRPO) computes the same numbers in less time and memory:

    import fastgrpo.integrations.trl

    fastgrpo.integrations.trl.patch()      # until unpatch(), or as a context manager

`python -m fastgrpo.integrations.trl SCRIPT ARGS...` does so for a script, or for TRL's own command, as it is.
`GRPOTrainer` is TRL's with its loss made where the hidden states are, gradients in the forward pass: less work still.
"""

import sys

from fastgrpo._extras import MissingPackage, require

try:
    require("fastgrpo.integrations.trl", "trl", "trl")
except MissingPackage:
    if sys.argv[:1] != ["-m"]:  # there Python looks for __main__ in here, which says the same in one line
        raise
else:
    from fastgrpo.integrations.trl.places import patch, unpatch
    from fastgrpo.integrations.trl.trainer import GRPOTrainer

    __all__ = ["GRPOTrainer", "patch", "unpatch"]
