"""`fastgrpo env`: what there is on this machine, and what to do about what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

# the packages that `env` looks for, and what to install where one is missing
_PACKAGES = {
    "torch": "torch", "triton": "triton", "transformers": "fastgrpo[train]", "accelerate": "fastgrpo[train]",
    "datasets": "fastgrpo[train]", "matplotlib": "fastgrpo[train]", "peft": "peft", "trl": "fastgrpo[trl]",
    "math-verify": "fastgrpo[rewards]", "py3langid": "fastgrpo[rewards]", "liger-kernel": "fastgrpo[bench]",
}  # fmt: skip
_COMPILERS = {"cpu": "apt install g++", "cuda": "nvcc 12.1 or later from developer.nvidia.com/cuda-downloads"}
_REBUILD = "pip install --force-reinstall --no-deps ."
_DRIVERS = ("/proc/driver/nvidia/version", "/dev/kfd")  # NVIDIA's, AMD's


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command, which has no options."""
    commands.add_parser(
        "env", help="print versions, which backends work here, and what to do about what is missing"
    ).set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from fastgrpo import __version__, backends

    print(f"fastgrpo {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name, brought_by in _PACKAGES.items():
        try:
            print(f"{name}: {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed; to do: pip install '{brought_by}'")
    print(f"threads: {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(devices) or 'none' + _todo_for_a_gpu()}")
    for name in backends.NAMES:
        why = _why_not(name)
        print(f"backend {name}: {'works' if why is None else f'unavailable: {why}'}")
    if backends.get("cuda").unavailable() is None:
        for index in range(torch.cuda.device_count()):
            for line in backends.get("cuda").describe(index):
                print(line)


def _why_not(name: str) -> str | None:
    """Why a backend cannot run here, and what to do about it; None where it can."""
    from fastgrpo import backends
    from fastgrpo.backends.native import library_path

    why = backends.get(name).unavailable()
    if why is None:
        return None
    compiled = name in _COMPILERS
    if compiled and not library_path(f"fastgrpo_{name}").exists():
        build = f"{_COMPILERS[name]}; then, where fastgrpo's sources are: {_REBUILD}"
        todo = f"\n    to do: {build}" if name == "cpu" else _todo_for_a_gpu(build)
    elif compiled and backends.get(name)._load()[0] is None:  # it is there, of another version or broken
        todo = f"\n    to do, where fastgrpo's sources are: {_REBUILD}"
    else:
        todo = _todo_for_a_gpu()
        if name == "triton" and backends.get(name).kernels is None:
            todo = "\n    to do: pip install triton"
    return why + todo


def _todo_for_a_gpu(build: str = "") -> str:
    """What to do about a GPU that cannot be used; `build` is what has to be built for it."""
    import torch

    if not any(map(os.path.exists, _DRIVERS)):
        return "\n    to do: nothing on a machine without a GPU; with one, install its driver (nvidia-smi shows it)"
    if torch.version.cuda is None and torch.version.hip is None:
        return "\n    to do: this torch was built for CPUs alone; pip install --force-reinstall torch"
    return f"\n    to do: {build or 'nvidia-smi, which shows what the driver says'}"
