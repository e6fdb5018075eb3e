"""Time and memory: sides take turns in one process, medians; peaks in a fresh process, or by the GPU's own count."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from types import SimpleNamespace

import torch

_L2_BYTES = 256 << 20  # more than any GPU's L2 cache
_MOST_CALLS = 50  # of a turn
_ROTATED_BYTES = 1 << 30  # inputs below this are kept twice on a GPU, and take turns


def interleave(
    steps: dict[str, tuple[Callable, Callable]],
    inputs: SimpleNamespace,
    *,
    seconds: float,
    turns: int = 2,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Milliseconds of each call of `{name: (prepare, step)}`; only the steps are timed.

    Sides take turns, because timings on a shared machine drift. A turn is calls in a row, as a training loop makes
    them, for a share of `seconds`; its first is not counted, because it pays for the state of the caches and of the
    system's free memory that the side before it left; unless it took more than ten times `seconds`, and then it is
    the only one. On a GPU, events measure, the L2 cache is flushed before each call, and inputs of less than a GiB
    rotate between two copies.

    Returns:
        (the times, and what went wrong with those that have none).
    """
    tensors = {name: x for name, x in vars(inputs).items() if isinstance(x, torch.Tensor)}
    on_gpu = any(x.is_cuda for x in tensors.values())
    copies = [inputs]
    if on_gpu:
        flushed = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
        if sum(x.numel() * x.element_size() for x in tensors.values()) < _ROTATED_BYTES:
            copies.append(SimpleNamespace(**vars(inputs) | {name: x.clone() for name, x in tensors.items()}))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def call(prepare: Callable, step: Callable, number: int) -> float:
        given = copies[number % len(copies)]
        prepare(given)
        if not on_gpu:
            begun = time.perf_counter()
            step(given)
            return 1e3 * (time.perf_counter() - begun)
        flushed.zero_()
        start.record()
        step(given)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    times, failures = {name: [] for name in steps}, {}
    for turn in range(turns):
        for name in list(times):
            prepare, step = steps[name]
            until = time.perf_counter() + seconds / turns
            try:
                if turn and len(times[name]) == 1 and times[name][0] > 1e4 * seconds:
                    continue
                first = call(prepare, step, 0)
                if first > 1e4 * seconds:
                    times[name].append(first)
                    continue
                for number in range(1, _MOST_CALLS):
                    times[name].append(call(prepare, step, number))
                    if time.perf_counter() > until:
                        break
            except Exception as problem:  # noqa: BLE001 (the others are still to be measured)
                failures[name] = problem
                del times[name]
    return times, failures


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """(20%, 50%, 80%) of measured times."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


# ---- memory


def gpu_peak(step: Callable[[SimpleNamespace], object], inputs: SimpleNamespace) -> float:
    """MiB above the inputs at the peak of a step."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(inputs)
    torch.cuda.synchronize()
    del results
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class FreshProcesses:
    """Processes that have loaded the libraries and computed nothing, one for each peak of CPU memory.

    They are forked from a process that only imports, so that a peer's import costs its time once.
    """

    def __init__(self, packages: list[str]):
        self._context = None
        if sys.platform == "linux":  # the only one that lets a process reset its own peak
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(packages)
            here = os.getcwd()
            os.chdir(os.sep)  # its Python looks for modules where it starts, and a checkout has no libraries in it
            try:
                forkserver.ensure_running()
            finally:
                os.chdir(here)

    def peak(self, function: Callable, *arguments, limit: float = 300.0) -> float | None:
        """What `function(*arguments)` returns in a fresh process; None where it cannot be had."""
        if self._context is None:
            return None
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_send, args=(sender, function, torch.get_num_threads(), arguments))
        process.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(limit) else None
        except EOFError:  # killed, for memory as a rule
            return None
        finally:
            process.terminate()
            process.join()


def _send(sender, function: Callable, threads: int, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    sender.send(function(*arguments))


def cpu_peak(step: Callable[[SimpleNamespace], object], inputs: SimpleNamespace) -> float:
    """MiB above the inputs at the peak of a step, as the system counts them; meant for a fresh process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    step(inputs)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))
