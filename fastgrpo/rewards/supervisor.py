"""Runs one program under limits and leaves none of its processes behind.

sandbox.py starts it as a script, in a session of its own; the standard library is all that it needs.

    python -I -S supervisor.py PARENT SECONDS MEMORY FILE_SIZE PROCESSES COMMAND...

It is the subreaper of everything below it: a process that loses its parent, or daemonises with setsid, becomes a child
of the supervisor. So the tree below finds all of them, and there are none once waitpid knows no child. The limits are
set here, between fork and exec of a process with one thread, where a preexec_fn in the trainer could deadlock.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
import time

PASSED, FAILED, STOPPED = 100, 101, 102  # exit statuses; another one is a fault of the supervisor
POLL = 0.02  # seconds between looks at the clock and at the number of processes
LET_GO = 2.0  # seconds after which a process that even SIGKILL does not end (a dead disk) is given up
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(parent: int, seconds: float, memory: int, file_size: int, processes: int, command: list[str]) -> int:
    deadline = time.monotonic() + seconds
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    children(os.getpid())  # fails where the kernel does not list them
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # waits for sigtimedwait
    failure, report = os.pipe()  # closed by exec: an empty report says that the program runs
    program = os.fork()
    if program == 0:
        try:
            become(command, math.ceil(seconds), memory, file_size)
        except BaseException as error:
            os.write(report, repr(error).encode())
            os._exit(1)
    os.close(report)
    if text := os.read(failure, 1000):
        raise OSError(text.decode())

    status, crowded, too_late = None, False, False
    while not (status is not None or crowded or too_late):
        signal.sigtimedwait([signal.SIGCHLD], POLL)
        crowded = len(descendants(os.getpid())) > processes  # the last look, too: a program may fork, and end at once
        status = reap(program)
        too_late = time.monotonic() > deadline or os.getppid() != parent
    end_all()
    return STOPPED if crowded or status is None else PASSED if status == 0 else FAILED


def become(command: list[str], cpu_seconds: int, memory: int, file_size: int) -> None:
    """Turn this process into the program."""
    os.setsid()  # its process group is not the supervisor's
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should it kill its supervisor, it goes too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    # No RLIMIT_NPROC: it counts all threads of the user, the trainer's too, and does not bind root. The supervisor
    # counts instead.
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    # where memory runs out, the kernel should take this process and not the trainer
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the pipe is for the supervisor's own complaints
    os.execv(command[0], command)


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def reap(program: int) -> int | None:
    """Collect every child that has ended; the wait status of the program if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):  # there are no children
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = ended[1] if ended[0] == program else status
    return status


def end_all() -> None:
    """Kill everything below this process. What is forked meanwhile is found in the next round."""
    deadline = time.monotonic() + LET_GO
    while time.monotonic() < deadline:
        kill_descendants(os.getpid())
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def kill_descendants(pid: int) -> None:
    for descendant in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(descendant, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    found = [pid]
    for process in found:  # grows
        with contextlib.suppress(OSError):  # it has just ended, and its children are the supervisor's
            found += children(process)
    return found[1:]


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            found += map(int, file.read().split())
    return found


if __name__ == "__main__":
    _, parent, seconds, memory, file_size, processes, *command = sys.argv
    status = main(int(parent), float(seconds), int(memory), int(file_size), int(processes), command)
    os._exit(status)
