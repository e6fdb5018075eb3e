"""The old name of `fastgrpo.recipes.r1`."""

from fastgrpo._moved import stand_in

stand_in(__name__, "fastgrpo.recipes.r1")
