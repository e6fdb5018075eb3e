"""The old name of `fastgrpo.recipes.template`."""

from fastgrpo._moved import stand_in

stand_in(__name__, "fastgrpo.recipes.template")
