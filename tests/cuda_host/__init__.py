"""Builds CUDA sources for the machine in this folder, so that a CPU runs them and checks every access; and lets the
cuda backend run on it, with CPU tensors."""

import contextlib
import ctypes
import shutil
import subprocess
from pathlib import Path
from unittest import mock

from fastgrpo.backends import cuda, native

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", '-DFASTGRPO_MACHINE="device.h"']
INCLUDES = [f"-I{HERE}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]


def unavailable() -> str | None:
    """Why nothing can be built here."""
    return None if shutil.which("g++") else "no g++"


def build(directory: Path, sources, *, options=(), program: str | None = None) -> Path:
    """A shared library of these sources and the machine, or a program of that name."""
    out = Path(directory) / (program or "libfastgrpo_cuda_host.so")
    objects = []
    running = []
    for source in [*map(Path, sources), *HERE.glob("*.cpp")]:
        objects.append(out.with_name(source.name + ".o"))
        command = ["g++", *FLAGS, *options, *INCLUDES, "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(filter(None, said)))
    kind = [] if program else ["-shared"]
    subprocess.run(["g++", *kind, *map(str, objects), "-o", str(out)], check=True)
    return out


def library(path: Path) -> ctypes.CDLL:
    """The built library, with the types of what the machine exports."""
    lib = ctypes.CDLL(str(path))
    lib.fastgrpo_host_violation.restype = ctypes.c_char_p
    lib.fastgrpo_host_seed.argtypes = [ctypes.c_uint64]
    lib.fastgrpo_host_allow.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for name in ("devices", "active_clusters", "largest_cluster", "fail_occupancy"):
        getattr(lib, f"fastgrpo_host_{name}").argtypes = [ctypes.c_int]
    for name in ("capability", "largest_cluster_of"):
        getattr(lib, f"fastgrpo_host_{name}").argtypes = [ctypes.c_int, ctypes.c_int]
    for name in ("seed", "allow", "forget", "devices", "capability", "active_clusters", "largest_cluster",
                 "largest_cluster_of", "fail_occupancy", "copies"):  # fmt: skip
        getattr(lib, f"fastgrpo_host_{name}").restype = None
    lib.fastgrpo_host_calls.restype = ctypes.c_int64
    lib.fastgrpo_host_copies.argtypes = [ctypes.c_int64 * 3]
    return lib


def allow(lib: ctypes.CDLL, *tensors) -> None:
    """Kernels may touch these tensors' memory from now on, and no other."""
    lib.fastgrpo_host_forget()
    for tensor in tensors:
        lib.fastgrpo_host_allow(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def violation(lib: ctypes.CDLL) -> str:
    """What the last launch did that a GPU would punish."""
    return lib.fastgrpo_host_violation().decode()


def forget_answers() -> None:
    """What the backend in Python remembers of a library and its device."""
    cuda._load.cache_clear()
    cuda.shape.cache_clear()


@contextlib.contextmanager
def backend(path: Path):
    """The cuda backend takes CPU tensors: its kernels, built at `path`, run on the machine. Yields the library.

    A kernel may touch the tensors of its own call only; a violation is the backend's RuntimeError.
    """
    lib = library(path)
    pointer, call = native._pointer, cuda._call

    def allowed(tensor):
        if tensor is not None:
            memory = tensor.untyped_storage()
            lib.fastgrpo_host_allow(memory.data_ptr(), memory.nbytes())
        return pointer(tensor)

    def only_its_own(*arguments):
        try:
            call(*arguments)
        finally:
            lib.fastgrpo_host_forget()

    with mock.patch.object(native, "library_path", lambda name: path):
        forget_answers()
        assert cuda._load()[1] is None
    try:
        with (
            mock.patch.object(native, "_pointer", allowed),
            mock.patch.object(cuda._calls, "_call", only_its_own),
            mock.patch.multiple(
                cuda, _call=only_its_own, _place=lambda device: (0, 0), _DEVICE_TYPE="cpu", _works=False
            ),
            mock.patch.object(cuda, "unavailable", lambda: None),
        ):
            yield lib
    finally:
        forget_answers()
