"""The old name of `fastgrpo.recipes.word_problems`."""

from fastgrpo._moved import stand_in

stand_in(__name__, "fastgrpo.recipes.word_problems")
