"""Time and memory: sides take turns in one process, medians; peaks in a fresh process, or by the GPU's own count."""

from __future__ import annotations

import ctypes
import functools
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

TURNS = 2  # of each side
_L2_BYTES = 256 << 20  # more than any GPU's L2 cache
_MOST_CALLS = 50  # of a turn
_ROTATED_BYTES = 1 << 30  # inputs below this are kept twice on a GPU, and take turns
_AHEAD_MS = 1.0  # that a GPU waits before a step, so that what the host does until the first kernel is in no time


class Stopwatch:
    """Times steps on the inputs of a case, a turn at a time, in milliseconds; only the steps are timed.

    Sides take turns, because timings on a shared machine drift. On a GPU, events measure, the L2 cache is flushed
    before each call, the device is kept busy while the host enqueues the step, and inputs of less than a GiB rotate
    between two copies.

    Args:
        seconds: for each side, over all its turns.
    """

    def __init__(self, inputs: SimpleNamespace, seconds: float, turns: int = TURNS):
        self.seconds, self.turns, self._copies = seconds, turns, [inputs]
        tensors = {name: x for name, x in vars(inputs).items() if isinstance(x, torch.Tensor)}
        self._on_gpu = any(x.is_cuda for x in tensors.values())
        if self._on_gpu:
            self._flushed = torch.empty(_L2_BYTES, dtype=torch.int8, device="cuda")
            self._cycles = round(_AHEAD_MS * gpu_cycles())
            if sum(x.numel() * x.element_size() for x in tensors.values()) < _ROTATED_BYTES:
                self._copies.append(SimpleNamespace(**vars(inputs) | {name: x.clone() for name, x in tensors.items()}))

    def turn(self, prepare: Callable, step: Callable, times: list[float]) -> None:
        """Adds the times of a side's turn: calls in a row, as a training loop makes them, for its share of `seconds`.

        The first call is not counted, because it pays for the state of the caches and of the system's free memory
        that the side before it left; unless it took more than ten times `seconds`, and then it is the only one.
        """
        slow = 1e4 * self.seconds
        if len(times) == 1 and times[0] > slow:
            return
        until = time.perf_counter() + self.seconds / self.turns
        first = self._call(prepare, step, 0)
        if first > slow:
            times.append(first)
            return
        for number in range(1, _MOST_CALLS):
            times.append(self._call(prepare, step, number))
            if time.perf_counter() > until:
                break

    def _call(self, prepare: Callable, step: Callable, number: int) -> float:
        given = self._copies[number % len(self._copies)]
        prepare(given)
        if not self._on_gpu:
            begun = time.perf_counter()
            step(given)
            return 1e3 * (time.perf_counter() - begun)
        self._flushed.zero_()
        return gpu_milliseconds(lambda: step(given), self._cycles)


def gpu_milliseconds(step: Callable[[], object], cycles: int = 0) -> float:
    """The device's time of a step, which starts when the host has had `cycles` of the device's clock to enqueue it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cycles:
        torch.cuda._sleep(cycles)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def gpu_cycles() -> float:
    """Of the device's clock in a millisecond, by its own events; the first of two runs wakes it."""
    cycles = 1 << 23
    return [cycles / gpu_milliseconds(lambda: torch.cuda._sleep(cycles)) for _ in range(2)][1]


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
