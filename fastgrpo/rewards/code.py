"""Does the code pass its tests?"""

from __future__ import annotations

import os
import secrets
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastgrpo.rewards.cases import Case, Run, read_cases
from fastgrpo.rewards.fences import last_python_block
from fastgrpo.rewards.sandbox import Limits, run_python
from fastgrpo.rewards.scoring import RewardFunc
from fastgrpo.rewards.supervisor import PASSED, STOPPED
from fastgrpo.rewards.text import completion_text


def code_reward(completions: list, test_cases: list, **_: Any) -> list[float | None]:
    """The share of its test cases that the completion's code passes: the last ```python block that is closed.

    An entry of the column `test_cases` is one of these, a list of these in any mixture, or JSON text of either:

    - {"input": …, "output": …}, texts, the input or None;
    - {"inputs": […], "outputs": […]}, as in APPS and TACO, texts or lists of lines; with "fn_name": "f" lists of
      arguments and the values of the calls of f, or of a method of the class Solution; without the s, what PyArrow
      makes of a list of cases;
    - statements such as "assert f(2) == 4": of several in one text, each assertion is a case, run after the statements
      in front of it that are none.

    The code is run once for each case. It passes an input when it ends with exit status 0 and its output is the
    expected one, but for white space at the ends of lines and of the text; it passes a statement when that, appended
    to the code, raises nothing and is reached. After a run that is stopped at the time limit, the remaining cases
    count as not passed.

    No block: 0. None where there are no test cases, and, with a warning, for what the time limit of the call does not
    reach. Several run at once, one for each CPU. Linux only; see `Limits` for the limits, and sandbox.py for what they
    do not protect from.

    Raises:
        ValueError: test cases of another form, with the row and the form.
    """
    return _score(completions, test_cases, Limits())


def code_reward_within(limits: Limits) -> RewardFunc:
    """`code_reward` with other limits.

    Raises:
        ValueError: one run may take as long as all: no run would then be stopped by its own limit.
    """
    if limits.seconds >= limits.total_seconds:
        expected = f"less than total_seconds={limits.total_seconds}"
        raise ValueError(f"seconds: expected {expected}, so that a run can be judged too slow, got {limits.seconds}")

    def code_reward(completions: list, test_cases: list, **_: Any) -> list[float | None]:
        return _score(completions, test_cases, limits)

    return code_reward


def _score(completions: list, test_cases: list, limits: Limits) -> list[float | None]:
    cases_of_rows = [read_cases(cases, row) for row, cases in enumerate(test_cases)]
    deadline = time.monotonic() + limits.total_seconds
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    with ThreadPoolExecutor(workers) as pool:
        codes = [last_python_block(completion_text(completion)) for completion in completions]
        runs = [
            pool.submit(_share_passed, code, cases, limits, deadline) if cases and code is not None else None
            for code, cases in zip(codes, cases_of_rows, strict=True)
        ]
        shares = [
            run.result() if run else 0.0 if cases else None for run, cases in zip(runs, cases_of_rows, strict=True)
        ]
    missed = sum(run is not None and share is None for run, share in zip(runs, shares, strict=True))
    if missed:
        warnings.warn(
            f"code_reward: {missed} of {len(completions)} completions were not judged within total_seconds="
            f"{limits.total_seconds}; code_reward_within(Limits(…)) gives more",
            RuntimeWarning,
            stacklevel=3,
        )
    return shares


def _share_passed(code: str, cases: list[Case], limits: Limits, deadline: float) -> float | None:
    passed = 0
    for case in cases:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        status, ok = _run(code, case, replace(limits, seconds=min(limits.seconds, left)))
        if status == STOPPED:
            if left < limits.seconds:
                return None  # it might have ended in time
            break
        passed += ok
    return passed / len(cases)


def _run(code: str, case: Case, limits: Limits) -> tuple[int, bool]:
    if isinstance(case, Run):
        status, output = run_python(code, case.stdin, limits)
        return status, status == PASSED and _lines(output) == _lines(case.output)
    # Exit status 0 does not say that the statement was reached; a word that the code cannot know does.
    word = secrets.token_hex(16)
    status, output = run_python(f"{code}\n\n{case}\n\n__import__('os').write(1, b'{word}')\n", "", limits)
    return status, status == PASSED and word in output


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
