"""How Triton kernels are launched: geometry, grids, devices, and the choices that only a speed depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choices import Choices

REGISTERS = 64  # a thread, on NVIDIA: 1024 threads per multiprocessor; left alone, ptxas takes up to 110


# ---- choices


@dataclasses.dataclass(frozen=True)
class InPlace:
    """How the token kernel is launched where it writes the gradient; no choice changes a bit.

    lanes: threads of a program, 512, or 1024, which hold two parts of a row side by side (a row of one part, of at
    most 128 KB, keeps the threads that it has). programs: how many there are at most; 0 leaves it to the device.
    On AMD 1024 lanes leave a thread 128 registers, and some of its values wait in memory.
    """

    lanes: int = 512
    programs: int = 0

    def __post_init__(self) -> None:
        if self.lanes not in (512, 1024):
            raise ValueError(f"lanes: expected 512 or 1024, got {self.lanes!r}")
        if type(self.programs) is not int or self.programs < 0:
            raise ValueError(f"programs: expected a whole number, 0 for the device's own, got {self.programs!r}")


choices = Choices(InPlace())
using = choices.using


# ---- geometry: what a row's bits may depend on comes from V and the dtype alone


class Geometry(NamedTuple):
    K: int  # elements in 16 bytes
    LANES: int  # threads of a program
    UNROLL: int  # half the vectors of K elements that a thread has on their way at once
    PART: int  # vectors in a part, a multiple of LANES * UNROLL
    PARTS: int = 1  # that a program holds side by side

    def parts(self, V: int) -> int:
        return -(-V // (self.K * self.PART))


@functools.cache
def geometry(V: int, dtype: torch.dtype) -> Geometry:
    """512 threads for a long row, so that the few rows which fit into the L2 cache keep the memory busy."""
    size = dtype.itemsize
    lanes = 512 if V * size >= 65536 else 256 if V * size >= 16384 else 128
    return Geometry(16 // size, lanes, 2, lanes * 16)


def wide(cut: Geometry, V: int, lanes: int) -> Geometry:
    """The geometry of `InPlace.lanes`: as many parts of a row side by side as the lanes are of 512."""
    beside = lanes // 512 if cut.parts(V) > 1 else 1
    return cut._replace(LANES=cut.LANES * beside, PARTS=beside) if beside > 1 else cut


def layout(x: Tensor) -> tuple[int, int, int, int]:
    """(V, T, stride_b, stride_t)."""
    _, T, V = x.shape
    stride_b, stride_t, _ = x.stride()
    return V, T, stride_b, stride_t


def same_phase(a: Tensor, b: Tensor) -> bool:
    """Whether in every row the vectors of b begin with the elements that a's begin with: as many as a has in 16 bytes,
    at multiples of their size."""
    if a is b:
        return True
    apart = [b.data_ptr() // b.element_size() - a.data_ptr() // a.element_size()]
    apart += [b.stride(d) - a.stride(d) for d in (0, 1) if a.shape[d] > 1]
    return all(n % (16 // a.element_size()) == 0 for n in apart)


def inplace(logits: Tensor, out: Tensor) -> bool:
    """Whether `out` is the logits or, narrower, may lie in their rows' memory: between the first and the last byte."""
    if out.dtype == logits.dtype:
        return out.data_ptr() == logits.data_ptr()
    return out.data_ptr() < _end(logits) and logits.data_ptr() < _end(out)


def _end(x: Tensor) -> int:
    """The address behind the last element."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size()


# ---- devices


@functools.cache
def _device(device: torch.device) -> tuple[int, int, int]:
    """(multiprocessors, bytes of L2 cache, threads of a warp) of a device."""
    if device.type == "cpu":
        return 1, 1 << 22, 32
    import triton

    module = getattr(torch, device.type)
    with module.device(device):
        warp = triton.runtime.driver.active.get_current_target().warp_size
    properties = module.get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 64)
    return processors, getattr(properties, "L2_cache_size", 0) or 1 << 25, warp


def split(n_rows: int, V: int, cut: Geometry, device: torch.device) -> bool:
    """Whether to cut rows into parts: when there are too few of them to keep every multiprocessor busy."""
    return cut.parts(V) > 1 and n_rows < _device(device)[0]


def rows_in_flight(n_rows: int, row_bytes: int, device: torch.device) -> int:
    """Programs for a pass that reads its row twice, so that the second reading finds the L2 cache.

    On average half of a row waits there for its second reading: 1.5 times the cache leaves a quarter to spare.
    """
    processors, cache, _ = _device(device)
    return min(n_rows, processors * max(1, round(1.5 * cache / row_bytes / processors)))


# ---- launches


def aligned(vectors: Any) -> Any:
    """A named tuple of inputs, each beginning at 16 bytes.

    Triton specialises upon that for every tensor in a tuple, and a chunk of rows may begin anywhere: a kernel would be
    compiled anew for each combination.
    """
    return vectors._make(x.clone() if isinstance(x, Tensor) and x.data_ptr() % 16 else x for x in vectors)


@functools.cache
def _options(device: torch.device, lanes: int) -> dict[str, int]:
    """Triton's own options for `lanes` threads."""
    options = {"num_warps": max(1, lanes // _device(device)[2])}
    if device.type == "cuda" and torch.version.hip is None:
        options["maxnreg"] = REGISTERS
    return options


def run(kernel: Any, programs: int, lanes: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """`programs` programs of `lanes` threads; the arguments, a tuple's members too, are tensors, numbers or None."""
    on = contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
    with on:
        kernel[(programs,)](*args, **constants, **_options(device, lanes))


def sweep(kernel: Any, programs: int, cut: Geometry, device: torch.device, *args: Any, **constants: Any) -> None:
    """`run` for a kernel that walks rows of logits."""
    run(kernel, programs, cut.LANES, device, *args, K=cut.K, LANES=cut.LANES, UNROLL=cut.UNROLL, **constants)
