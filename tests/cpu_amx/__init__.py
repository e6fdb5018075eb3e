"""Builds the CPU library for AMX with the instructions of `tiles.h` in place of the CPU's, and lets the cpu backend
use it."""

import contextlib
import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from fastgrpo.backends import cpu, native

HERE = Path(__file__).resolve().parent
CPU = HERE.parents[1] / "csrc" / "cpu"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
NAMES = ("api", "columns", "gather", "head_stats", "products", "sweeps", "matmul")
SOURCES = [
    *(CPU / f"{name}.cpp" for name in NAMES),
    HERE / "dispatch.cpp",
]


def unavailable() -> str | None:
    """Why nothing can be built here."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "a little-endian Linux machine is needed"
    return None if shutil.which("g++") else "no g++"


def build(directory: Path) -> Path:
    """The shared library."""
    out = Path(directory) / "libfastgrpo_cpu.so"
    amx = ["-include", str(HERE / "tiles.h"), "-DFASTGRPO_AMX", "-DFASTGRPO_PRODUCTS=amx"]
    objects, running = [], []
    for source in SOURCES:
        objects.append(out.with_name(source.stem + ".o"))
        options = ['-DFASTGRPO_SIMD="simd_portable.h"', *(amx if source.stem == "matmul" else [])]
        command = ["g++", *FLAGS, *options, f"-I{CPU}", "-c", str(source), "-o", str(objects[-1])]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(filter(None, said)))
    subprocess.run(["g++", "-shared", "-pthread", *map(str, objects), "-o", str(out)], check=True)
    return out


def _forget() -> None:
    cpu._load.cache_clear()
    cpu._isa.cache_clear()


@contextlib.contextmanager
def backend(path: Path):
    """The cpu backend calls the library at `path`, which this gives; what a CPU with AMX would refuse is an error."""
    library = ctypes.CDLL(str(path))
    for name in ("loaded", "in_use"):
        getattr(library, f"fastgrpo_host_tiles_{name}").restype = ctypes.c_int64
    library.fastgrpo_host_tiles_violation.restype = ctypes.c_char_p
    with mock.patch.object(native, "library_path", lambda name: path):
        _forget()
        assert cpu._load()[1] is None
        yield library
    _forget()
    if (violation := library.fastgrpo_host_tiles_violation()) is not None:
        raise RuntimeError(f"AMX: {violation.decode()}")
