"""The old name of `fastgrpo.rewards`."""

from fastgrpo._moved import stand_in

stand_in(__name__, "fastgrpo.rewards")
