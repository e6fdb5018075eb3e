"""The stages of `benchmarks/run_gpu.sh` that need Python.

Rows are JSON lines as `fastgrpo bench` writes them, appended and flushed as they are measured. A result is compared
with float64 before it is timed, and a wrong one has no time. With --rehearse, small shapes run on a CPU: CUDA's
kernels on the machine in tests/cuda_host, Triton's in its interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # cuda_host
if "--rehearse" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when it is imported

import torch  # noqa: E402
from gpu_rows import (  # noqa: E402
    GRADIENT,
    GRADIENT_IN_PLACE,
    KERNELS,
    OVERLAPS,
    SCALE,
    STATISTICS,
    TOKEN_LOSS,
    Kernel,
    Side,
    choices,
    make_rows,
    overlapping,
    parse_choice,
    problem_of,
    told,
    using,
)

from fastgrpo import backends  # noqa: E402
from fastgrpo.bench import command, measure, origin, turns, verdicts  # noqa: E402
from fastgrpo.bench.operation import DTYPES, Case, Implementation, label  # noqa: E402
from fastgrpo.bench.registry import REGISTRY  # noqa: E402
from fastgrpo.bench.truth import TOLERANCE, error  # noqa: E402

HANGS = 200 if "--rehearse" in sys.argv else 20  # seconds without an answer, compiling included
AGAIN = 3  # exit status of a smoke test whose process is lost, and which another one can go on with


class Sizes(NamedTuple):
    smoke: tuple[int, ...]  # V
    smoke_rows: int  # more than all clusters hold at once
    sweeps: tuple[tuple[int, int], ...]  # (N, V); the first one has all variants
    hidden: tuple[tuple[str, int, int, float | None], ...]  # (model, H, V, softcap)
    peers: tuple[tuple[str, int, int, int, int], ...]  # (op, B, T, V, H)
    step: tuple[int, int, int, int]  # B, T, V, H
    copy: int  # bytes
    gemm: int
    seconds: float  # of timing, for each side
    every_nth: int  # of the choices that are swept


GPU = Sizes(
    smoke=(1003, 32_000, 128_256, 151_936),
    smoke_rows=1100,
    sweeps=((8192, 151_936), (8192, 128_256), (32_768, 32_000)),
    hidden=(("", 4096, 151_936, None), ("gemma2-9b", 3584, 256_000, 30.0)),
    peers=(("loss", 8, 1024, 151_936, 0), ("logps", 8, 1024, 151_936, 0), ("linear", 8, 1024, 151_936, 4096),
           ("loss", 8, 1024, 128_256, 0), ("linear", 8, 1024, 128_256, 4096)),
    step=(8, 128, 151_936, 896),
    copy=5 << 29,
    gemm=8192,
    seconds=0.15,
    every_nth=1,
)  # fmt: skip
REHEARSED = Sizes(
    smoke=(67,), smoke_rows=5, sweeps=((3, 131),), hidden=(("", 64, 300, None),),
    peers=(("loss", 8, 4, 300, 0), ("linear", 8, 4, 300, 64)), step=(8, 8, 4096, 128), copy=1 << 20, gemm=64,
    seconds=0.002, every_nth=17,
)  # fmt: skip


# ---- the stages


class Output:
    """The folder of a run, its rows, and where they come from."""

    def __init__(self, folder: Path, rehearsed: bool):
        self.folder, self.device = folder, "cpu" if rehearsed else "cuda"
        self.origin = origin.facts(self.device, "benchmarks/gpu.py") | ({"rehearsed": True} if rehearsed else {})

    def write(self, row: dict, name: str = "rows.jsonl") -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(row | self.origin) + "\n")

    def read(self, name: str) -> list[dict]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def usable(output: Output, names=("cuda", "triton")) -> list[str]:
    """Those of these backends that run here; on a GPU all have to."""
    found = []
    for name in names:
        call = backends.Call(output.device, None, torch.bfloat16, 1)
        why = backends.get(name).unavailable() or backends.get(name).refuses(call)
        print(f"{name}: {why or 'runs here'}", flush=True)
        if why is None:
            found.append(name)
        elif output.device == "cuda":
            raise RuntimeError(f"backend {name}: {why}")
    return found


def timed(side: Side | Kernel, p: SimpleNamespace, clock: measure.Stopwatch, row: dict) -> dict:
    times: list[float] = []
    clock.turn(side.kernel.prepare if isinstance(side, Side) else side.prepare, side.run, times)
    row["ms_p20"], row["ms_p50"], row["ms_p80"] = measure.quantiles(times)
    row["calls"] = len(times)
    return row


def ceilings(output: Output, sizes: Sizes, _) -> int:
    """A copy, a read, and a large GEMM: what nothing on this device goes beyond."""
    device = output.device
    p = SimpleNamespace(x=torch.randn(sizes.copy // 2, device=device).bfloat16())
    p.y, p.words = torch.empty_like(p.x), p.x.view(torch.int64)
    p.a, p.b = (torch.randn(sizes.gemm, sizes.gemm, device=device).bfloat16() for _ in range(2))
    p.c = torch.empty_like(p.a)
    clock = measure.Stopwatch(p, 4 * sizes.seconds, turns=1)
    for name, step, moved, flops in (
        ("copy", lambda p: p.y.copy_(p.x), 2 * sizes.copy, 0),
        ("read", lambda p: p.words.sum(), sizes.copy, 0),
        ("GEMM", lambda p: torch.mm(p.a, p.b, out=p.c), 0, 2 * sizes.gemm**3),
    ):
        row = dict(
            op="ceiling", impl=name, backend="torch", mode="", dtype="bf16", on=device, bytes=moved, flops=flops
        )
        row = timed(Kernel(name, step), p, clock, row)
        rate = f"{moved / row['ms_p50'] / 1e9:.3f} TB/s" if moved else f"{flops / row['ms_p50'] / 1e9:.0f} TFLOP/s"
        print(f"{name}: {row['ms_p50']:.3f} ms ({row['ms_p20']:.3f} to {row['ms_p80']:.3f}), {rate}", flush=True)
        output.write(row)
    return 0


def smoke(output: Output, sizes: Sizes, options: argparse.Namespace) -> int:
    """Every kernel with every choice against float64, three times: the bits must not change.

    A case without an answer ends the process; the next one goes on behind it.
    """
    done = {row["case"]: row for row in output.read("smoke.jsonl")}
    for backend in usable(output, options.backend or ("cuda", "triton")):
        for dtype, V in itertools.product(options.dtype or ("bf16", "fp32", "fp16"), sizes.smoke):
            p = None
            for side in _smoke_sides(backend, sizes.every_nth if dtype == "bf16" else 0):
                name = f"V={V} {dtype}, {side}"
                if name in done:
                    continue
                p = p or make_rows(sizes.smoke_rows, V, dtype, output.device, holes=True)
                row = done[name] = side.row("smoke", p) | dict(case=name)
                lost = _Watchdog(output, row)
                with _reasons(row), using(backend, side.choice):
                    row["rel_err"], row["reason"] = _three_times(side, p)
                lost.cancel()
                row["ok"] = row["reason"] is None if row["fits"] else None
                print(f"{name}: {row['reason'] or 'right'}", flush=True)
                output.write(row, "smoke.jsonl")
                if row["ok"] is False and not _alive(output.device):
                    return AGAIN
    wrong = [row for row in done.values() if row["ok"] is False]
    print(f"{sum(row['ok'] is True for row in done.values())} right, {len(wrong)} wrong, "
          f"{sum(row['ok'] is None for row in done.values())} do not fit")  # fmt: skip
    for row in wrong[:20]:
        print(f"  {row['case']}: {row['reason']}")
    return int(bool(wrong))


def _smoke_sides(backend: str, every_nth: int) -> Iterator[Side]:
    for choice, entropy in itertools.product(choices(backend, every_nth), (True, False)):
        for kernel in KERNELS if not choice else (TOKEN_LOSS, STATISTICS):
            if not (entropy and kernel is SCALE):
                yield Side(backend, kernel, choice, entropy)


@contextlib.contextmanager
def _reasons(row: dict) -> Iterator[None]:
    """What goes wrong becomes the row's reason, and the others are still looked at."""
    row["fits"] = True
    try:
        yield
    except ValueError as why:  # such a choice cannot hold such a row
        row["reason"], row["fits"] = str(why), False
    except Exception as problem:  # noqa: BLE001
        row["reason"] = turns.reason(problem)


def _three_times(side: Side, p: SimpleNamespace) -> tuple[float, str | None]:
    first = None
    for _ in range(3):
        side.kernel.prepare(p)
        results = side.run(p)
        if first is None:
            worst, why = problem_of(p, results, side.entropy)
            if why is not None:
                return worst, why
            first = {name: x.clone() for name, x in results.items()}
        for name, x in results.items():
            if not torch.equal(x.nan_to_num(), first[name].nan_to_num()):
                return worst, f"wrong: {name} has other bits in another run"
    return worst, None


class _Watchdog(threading.Timer):
    """Ends the process, and says where, when a case gives no answer."""

    def __init__(self, output: Output, row: dict):
        super().__init__(HANGS, self._end)
        self.daemon, self.output, self.row = True, output, row
        self.start()

    def _end(self) -> None:
        self.row |= dict(ok=False, reason=f"no answer in {HANGS} s")
        print(self.row["reason"], flush=True)
        self.output.write(self.row, "smoke.jsonl")
        os._exit(AGAIN)


def _alive(device: str) -> bool:
    """Whether this process can still use its device, which an illegal access takes from it."""
    try:
        torch.zeros(1, device=device).item()
    except Exception:  # noqa: BLE001
        return False
    return True


def sweeps(output: Output, sizes: Sizes, options: argparse.Namespace) -> int:
    """Times of every choice beside a copy of the logits, which is measured again every few sides."""
    wrong = {
        (row["backend"], row["kernel"], row["choice"]) for row in output.read("smoke.jsonl") if row["ok"] is False
    }
    found, failed, of_these = [], 0, usable(output, options.backend or ("cuda", "triton"))
    for number, (n, V) in enumerate(sizes.sweeps):
        p = make_rows(n, V, "bf16", output.device, holes=False)
        clock = measure.Stopwatch(p, sizes.seconds, turns=1)
        every_nth = 0 if number else sizes.every_nth
        sides = [side for backend in of_these for side in _sweep_sides(backend, every_nth)]
        print(f"{n} rows of {V} bf16 logits; times over a copy's")
        for count, side in enumerate(sides):
            if count % 10 == 0:
                copy = _time_of_copy(p, clock, output)
            row = side.row("sweep", p)
            with _reasons(row), using(side.backend, side.choice):
                if (side.backend, side.kernel.name, row["choice"]) in wrong:
                    raise RuntimeError("failed in the smoke test")
                side.kernel.prepare(p)
                row["rel_err"], row["reason"] = problem_of(p, side.run(p), side.entropy)
                if row["reason"] is None:
                    timed(side, p, clock, row)
                    row["over_copy"] = row["ms_p50"] / copy
            row["ok"] = row["reason"] is None if row["fits"] else None
            failed += row["ok"] is False
            said = row["reason"] or f"{row['ms_p50']:8.3f} ms  {row['over_copy']:6.3f}"
            print(f"  {str(side):75} {said}", flush=True)
            output.write(row)
            found.append(row)
        del p, clock
    for backend in ("cuda", "triton"):
        if (best := _best(found, backend)) is not None:
            print(f"the fastest, with and without the entropy together: --{backend} '{best}'")
    return int(failed > 0)


def _sweep_sides(backend: str, every_nth: int) -> Iterator[Side]:
    kernels = (STATISTICS, GRADIENT, GRADIENT_IN_PLACE, SCALE)
    yield from (Side(backend, kernel, {}, entropy) for entropy in (True, False) for kernel in (TOKEN_LOSS, *kernels)
                if not (entropy and kernel is SCALE))  # fmt: skip
    for choice, entropy in itertools.product(choices(backend, every_nth)[1:], (True, False)):
        yield Side(backend, TOKEN_LOSS, choice, entropy)
    if backend == "cuda":
        yield from (Side(backend, STATISTICS, {"cluster": c}, True) for c in (-1, 4, 8, 16))


def _time_of_copy(p: SimpleNamespace, clock: measure.Stopwatch, output: Output) -> float:
    row = Side("torch", Kernel("copy", None), {}, False).row("sweep", p) | dict(impl="copy", mode="")
    copy = timed(Kernel("copy", lambda p: p.work.copy_(p.logits)), p, clock, row)
    rate = 2 * p.logits.numel() * p.logits.element_size() / row["ms_p50"] / 1e9
    print(f"  {'copy':75} {row['ms_p50']:8.3f} ms  {rate:.3f} TB/s", flush=True)
    output.write(row)
    return copy["ms_p50"]


def _best(rows: list[dict], backend: str) -> str | None:
    """The choice that is fastest with and without the entropy together, at the first size."""
    ours = [row for row in rows if row["backend"] == backend and row["kernel"] == TOKEN_LOSS.name and row["ok"]]
    times: dict[str, dict[bool, float]] = {}
    for row in ours:
        if row["shape"] == ours[0]["shape"]:
            times.setdefault(row["choice"], {})[row["entropy"]] = row["ms_p50"]
    sums = {choice: sum(both.values()) for choice, both in times.items() if len(both) == 2}
    return min(sums, key=sums.get, default=None)


def hidden(output: Output, sizes: Sizes, options: argparse.Namespace) -> int:
    """From hidden states: each GEMM alone, the whole step beside all three, a profile, and sweeps beside GEMMs."""
    failed, cases = False, [
        Case("linear", 8, sizes.sweeps[0][0] // 8 or 1, V, H, "bf16", output.device, softcap=softcap,
             model=model or None) for model, H, V, softcap in sizes.hidden]  # fmt: skip
    for case in cases:
        print(case, flush=True)
        _gemms(case, output, sizes)
        ours = [each for each in REGISTRY if each.name == "fastgrpo" and each.backend in
                ("cuda", "triton")] + _floors()  # fmt: skip
        failed |= _measured(case, ours, output, 4 * sizes.seconds)
        if not case.softcap:
            _profile(case, output)
    return int(failed | _overlaps(cases[0], output, sizes))


def _floors() -> list:
    return [each for each in REGISTRY if each.is_floor]


def _gemms(case: Case, output: Output, sizes: Sizes) -> None:
    n, device = case.B * case.T, case.device
    p = SimpleNamespace()
    p.h, p.w, p.z = (torch.randn(*shape, device=device).bfloat16()
                     for shape in ((n, case.H), (case.V, case.H), (n, case.V)))  # fmt: skip
    p.dh, p.dw, p.sum = torch.empty_like(p.h), torch.empty_like(p.w), p.w.float()
    steps = [("h @ Wᵀ", lambda p: torch.mm(p.h, p.w.T, out=p.z)), ("dL @ W", lambda p: torch.mm(p.z, p.w, out=p.dh)),
             ("dLᵀ @ h", lambda p: torch.mm(p.z.T, p.h, out=p.dw))]  # fmt: skip
    if device == "cuda":
        steps.append(("dLᵀ @ h to fp32", lambda p: torch.mm(p.z.T, p.h, out_dtype=torch.float32, out=p.sum)))
    clock = measure.Stopwatch(p, 2 * sizes.seconds, turns=1)
    for name, step in steps:
        row = turns.new_row(case, Implementation("linear", "GEMM", step, mode=name, is_floor=True))
        row = timed(Kernel(name, step), p, clock, row | dict(op="ceiling", flops=2 * n * case.H * case.V))
        print(f"  {name:38} {row['ms_p50']:9.3f} ms {row['flops'] / row['ms_p50'] / 1e9:6.0f} TFLOP/s", flush=True)
        output.write(row)


def _overlaps(case: Case, output: Output, sizes: Sizes) -> bool:
    """Times of a step whose chunks are cut into parts on two streams, over those of whole ones; whether one is wrong.

    A variant is compared with whole chunks, whose error is measured beside the other sides.
    """
    each = next(each for each in REGISTRY if (each.op, each.name, each.backend, each.mode) ==
                ("linear", "fastgrpo", "cuda", ""))  # fmt: skip
    inputs = case.operation.inputs(case)
    clock, want, found, failed = measure.Stopwatch(inputs, 2 * sizes.seconds, turns=1), None, {}, False
    print(f"{case}: parts of a chunk on two streams; times over those of whole chunks")
    for choice in OVERLAPS:
        row = turns.new_row(case, each) | dict(op="overlap", choice=told(choice))
        with _reasons(row), overlapping(choice):
            each.prepare(inputs)
            results = each.step(inputs)
            want = want or results
            row["rel_err"] = error(results, want, inputs.advantages)
            if not row["rel_err"] <= TOLERANCE[case.dtype]:
                raise RuntimeError(f"wrong: relative error {row['rel_err']:.2g} of what whole chunks give")
            timed(Kernel(told(choice), each.step), inputs, clock, row)
            found[told(choice)] = row["ms_p50"]
        row["ok"] = row["reason"] is None
        failed |= not row["ok"]
        whole = found.get(told(OVERLAPS[0]))
        said = row["reason"] or f"{row['ms_p50']:9.3f} ms  {row['ms_p50'] / whole if whole else float('nan'):6.3f}"
        print(f"  {told(choice):38} {said}", flush=True)
        output.write(row)
    if found:
        print(f"the fastest: --overlap '{min(found, key=found.__getitem__)}'")
    return failed


def _measured(case: Case, among: list, output: Output, seconds: float, choice: dict | None = None) -> bool:
    """Writes the rows of a case as they come; whether one of our own failed."""
    found = {}
    for row in turns.measure_case(case, among, quick=output.device == "cpu", seconds=seconds):
        row |= {"choice": choice} if choice else {}
        output.write(row)
        found[label(row)] = row | output.origin
    command.print_table(list(found.values()))
    for what, numbers, verdict in verdicts.verdicts(list(found.values())):
        if verdict != "not measured" and output.device == "cuda":
            print(f"  {verdict}: {what}: {numbers}", flush=True)
    ours = [row for row in found.values() if row["impl"] == "fastgrpo" and not row["ruled_out"]]
    return any(row["ok"] is False for row in ours)


def _profile(case: Case, output: Output) -> None:
    from torch.profiler import ProfilerActivity, profile

    on_gpu = case.device == "cuda"
    step = next(each.step for each in REGISTRY if (each.op, each.name, each.backend) ==
                ("linear", "fastgrpo", "triton" if on_gpu else "cpu"))  # fmt: skip
    inputs = case.operation.inputs(case)
    step(inputs)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiled:
        step(inputs)
        if on_gpu:
            torch.cuda.synchronize()
    order = "cuda_time_total" if on_gpu else "cpu_time_total"
    table = profiled.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
    (output.folder / "profile.txt").write_text(f"{case}\n{table}\n")
    print("\n".join(table.splitlines()[-4:]))


def one(output: Output, sizes: Sizes, options: argparse.Namespace) -> int:
    """One call of a kernel, for a profiler of hardware counters."""
    failed = False
    for name in options.kernel:
        backend, function = name.split(":")
        kernel = {"token_loss": TOKEN_LOSS, "row_stats": STATISTICS}[function]
        if not usable(output, [backend]):
            continue
        n, V = sizes.sweeps[0]
        p = make_rows(min(n, 2048), V, "bf16", output.device, holes=False)
        kernel.prepare(p)
        _, why = problem_of(p, kernel.run(p, backends.get(backend), True), True)
        print(f"{name}: {why or 'right'}")
        failed |= why is not None
    return int(failed)


def _peers(output: Output, sizes: Sizes, options: argparse.Namespace, compiled: bool) -> int:
    """TRL, Liger and eager torch beside our own; those that compile are a stage of their own."""
    failed = False
    names = ("cuda", "triton", "overlap")
    choice = {name: told(getattr(options, name)) for name in names if getattr(options, name)}
    for op, B, T, V, H in sizes.peers[:3] if compiled else sizes.peers:
        case = Case(op, B, T, V, H or 896, "bf16", output.device)
        print(case, flush=True)
        among = [each for each in REGISTRY if each.op == op and (each.compiles == compiled or
                 each.is_floor) and (output.device == "cuda" or each.backend != "triton")]  # fmt: skip
        failed |= _measured(case, among, output, 2 * sizes.seconds)
        if choice:  # those rows are beside the report, whose fastgrpo is what a user gets
            ours = [each for each in among if each.name == "fastgrpo" and each.backend in ("cuda", "triton")]
            with using("cuda", options.cuda), using("triton", options.triton), overlapping(options.overlap):
                failed |= _measured(case, ours, output, 2 * sizes.seconds, choice)
    return int(failed)


def peers(output: Output, sizes: Sizes, options: argparse.Namespace) -> int:
    return _peers(output, sizes, options, compiled=False)


def compiled(output: Output, sizes: Sizes, options: argparse.Namespace) -> int:
    return _peers(output, sizes, options, compiled=True)


def step(output: Output, sizes: Sizes, options: argparse.Namespace) -> int:
    """Loss and backward pass of TRL's trainer, with its own loss and with ours."""
    B, T, V, H = sizes.step
    case = Case("step", B, T, V, H, "bf16", output.device)
    print(case, flush=True)
    return int(_measured(case, REGISTRY, output, 4 * sizes.seconds))


STAGES = {f.__name__: f for f in (ceilings, smoke, sweeps, hidden, one, peers, step, compiled)}


@contextlib.contextmanager
def rehearsal(scratch: Path) -> Iterator[None]:
    """CUDA's kernels run on the machine in tests/cuda_host."""
    cuda_host = importlib.import_module("cuda_host")
    library = scratch / "libfastgrpo_cuda_host.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:  # another process may be building it, too
            built = cuda_host.build(Path(folder), sorted((cuda_host.CSRC / "cuda").glob("*.cu")))
            built.rename(library)
    with cuda_host.backend(library):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--out", type=Path, required=True, help="where rows and tables go")
    add("--scratch", type=Path, required=True, help="where a rehearsal builds")
    add("--rehearse", action="store_true", help="small shapes on a CPU")
    add("--backend", action="append", choices=("cuda", "triton"), help="of the smoke test and the sweeps")
    add("--dtype", action="append", choices=DTYPES, help="of the smoke test")
    add("--kernel", action="append", help="BACKEND:token_loss or BACKEND:row_stats, of the stage one")
    add("--cuda", type=parse_choice, default={}, help="cluster=8,buffers=2,blocks=1,evict_first=1, or some")
    add("--triton", type=parse_choice, default={}, help="lanes=1024,programs=132, or one of them")
    add("--overlap", type=parse_choice, default={}, help="parts=2,multiprocessors=32, or one of them")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("torch sees no GPU here; --rehearse runs small shapes on a CPU", file=sys.stderr)
        return 2
    sizes = REHEARSED if options.rehearse else GPU
    with contextlib.ExitStack() as stack:
        if options.rehearse:
            stack.enter_context(mock.patch.object(turns, "peak", lambda *_: None))  # needs processes of its own
            if "cuda" in (options.backend or ("cuda",)):
                stack.enter_context(rehearsal(options.scratch))
        return STAGES[options.stage](Output(options.out, options.rehearse), sizes, options)


if __name__ == "__main__":
    sys.exit(main())
