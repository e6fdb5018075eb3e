"""The old name of `fastgrpo.rewards`."""

from fastgrpo._moved import public_names

globals().update(public_names(__name__, "fastgrpo.rewards"))
