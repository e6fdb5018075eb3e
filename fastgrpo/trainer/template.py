"""The old name of `fastgrpo.recipes.template`."""

from fastgrpo._moved import public_names

globals().update(public_names(__name__, "fastgrpo.recipes.template"))
