"""Runs Python code that a model wrote.

A protection against accidents: endless loops and output, memory and disk, forks and daemons. It is none against an
attacker: the code runs as the same user, sees the same files and the same network, and could kill any process of that
user, the trainer included. Train on code from untrusted sources in a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastgrpo.rewards.supervisor import FAILED, PASSED, STOPPED, kill_descendants

_SUPERVISOR = str(Path(__file__).with_name("supervisor.py"))
_GRACE = 4.0  # seconds that a supervisor gets beyond its program's to end everything; it needs milliseconds


@dataclass(frozen=True)
class Limits:
    """What code may use.

    seconds: wall clock for one run, and CPU time for each of its processes.
    memory: bytes of address space for each of its processes.
    file_size: bytes in one file; its output is a file.
    processes: how many it may have at once.
    total_seconds: wall clock for all runs of one call of a reward.
    """

    seconds: float = 3.0
    memory: int = 1 << 30
    file_size: int = 16 << 20
    processes: int = 32
    total_seconds: float = 9.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = "number" if name.endswith("seconds") else "integer"
            right_type = isinstance(value, int) or (kind == "number" and isinstance(value, float))
            if isinstance(value, bool) or not right_type or not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a finite {kind} > 0, got {value!r}")


def run_python(source: str, stdin: str, limits: Limits) -> tuple[int, str]:
    """Run a program in a process and an empty folder of its own, both gone afterwards.

    Input and output are files: no pipe can fill up, and RLIMIT_FSIZE bounds the output. The environment is empty but
    for the folder (as HOME and TMPDIR), one thread for numeric libraries and what finds shared libraries.

    Returns:
        (PASSED for exit status 0, FAILED for another or a signal, STOPPED at the limit of time or of processes;
        what it wrote to stdout).

    Raises:
        RuntimeError: not on Linux, or the program could not be started.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"sandbox: expected Linux, got {sys.platform}")
    with _temporary_folder() as folder, tempfile.TemporaryFile() as output:
        program = Path(folder, "program.py")
        program.write_bytes(source.encode("utf-8", "surrogatepass"))
        with tempfile.TemporaryFile() as file:
            file.write(stdin.encode("utf-8", "surrogatepass"))
            file.seek(0)
            status = _supervise(str(program), folder, file, output, limits)
        output.seek(0)
        return status, output.read(limits.file_size).decode("utf-8", "replace")


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(prefix="fastgrpo-", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # folders too deep for shutil
            subprocess.run(["rm", "-rf", folder.name], check=False)


def _supervise(program: str, folder: str, stdin: IO[bytes], stdout: IO[bytes], limits: Limits) -> int:
    bounds = map(str, (os.getpid(), limits.seconds, limits.memory, limits.file_size, limits.processes))
    environment = {"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-S", _SUPERVISOR, *bounds, sys.executable, "-I", "-B", "-X", "utf8", program],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,  # its end is seen at once, where a wait with a time limit would poll
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    try:
        _, errors = supervisor.communicate(timeout=limits.seconds + _GRACE)
    except BaseException as error:
        # the program has stopped its supervisor, or the trainer is interrupted
        kill_descendants(supervisor.pid)
        supervisor.kill()
        supervisor.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return STOPPED
        raise
    if supervisor.returncode in (PASSED, FAILED, STOPPED):
        return supervisor.returncode
    if supervisor.returncode < 0:  # by a signal of the program's
        return FAILED
    raise RuntimeError(f"sandbox: no program can be started: {errors.decode(errors='replace').strip()}")
