"""Where rows come from: machine, versions, commit, command."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch


def facts(on: str, program: str = "fastgrpo") -> dict:
    """What every row says about where it comes from."""
    packages = ("fastgrpo", "torch", "triton", "transformers", "trl", "liger_kernel")
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = torch.cuda.get_device_name() if on == "cuda" else cpu_name()
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]  # nobody's folders
    return dict(
        device=device, threads=torch.get_num_threads(), python=platform.python_version(), versions=versions,
        commit=_commit(), date=datetime.date.today().isoformat(), command=plain(" ".join([program, *words])),
    )  # fmt: skip


def plain(command: str) -> str:
    """A command without the files and folders that it writes to, which are of one machine."""
    return re.sub(r" --(json|out|scratch)[ =]\S+", "", command)


def cpu_name() -> str:
    """The processor's name and this process's threads."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """Of the checkout that this package is run from, or the command is run in; or what FASTGRPO_COMMIT says, where
    the sources came without their history."""
    if given := os.environ.get("FASTGRPO_COMMIT"):
        return given
    for folder in (Path(__file__).parents[2], Path.cwd(), *Path.cwd().parents):
        if (folder / "csrc" / "objective.h").is_file() and (folder / ".git").exists():
            asked = [
                ["git", "-C", str(folder), *words]
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
            ]
            try:
                commit, changed = (subprocess.run(a, capture_output=True, text=True, check=True).stdout for a in asked)
            except (OSError, subprocess.CalledProcessError):
                return None
            return commit.strip() + ("+changes" if changed.strip() else "")
    return None
