"""DeepSeek-R1's recipe on the trainers, R1-Zero's prompt, and the tasks that `fastgrpo train` brings."""

from fastgrpo._extras import require

require("fastgrpo.recipes", "train", "accelerate", "datasets", "transformers")
