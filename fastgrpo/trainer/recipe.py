"""The old name of `fastgrpo.recipes.r1`."""

from fastgrpo._moved import public_names

globals().update(public_names(__name__, "fastgrpo.recipes.r1"))
