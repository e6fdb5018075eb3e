"""Compares pairs of formulas with math-verify. A program of its own, which accuracy.py runs in the sandbox.

Reads {"path", "seconds", "pairs"} as JSON; prints True or False for each pair. Each comparison gets a
child process and an alarm whose default action ends it: that stops also what Python's signal handlers cannot, a power
of powers that computes within one instruction.
"""

import json
import os
import signal
import sys


def main() -> None:
    task = json.load(sys.stdin)
    sys.path[:] = task["path"]
    from math_verify import parse, verify  # found on the caller's path only

    for given, truth in task["pairs"]:
        child = os.fork()
        if child == 0:
            equal = False
            try:
                signal.setitimer(signal.ITIMER_REAL, task["seconds"])
                sides = [parse(f"${text}$", parsing_timeout=None) for text in (truth, given)]
                equal = verify(*sides, timeout_seconds=None)
            finally:
                os._exit(0 if equal else 1)  # whatever else happened
        print(os.waitpid(child, 0)[1] == 0, flush=True)


if __name__ == "__main__":
    main()
