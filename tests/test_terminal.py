"""The progress bar: a run has one, what others print is above it, and without a terminal there are plain lines."""

import io
import logging
import os
import re
import sys
import threading

import pytest
from test_command import SMALL, elsewhere, forbidden, run

from fastgrpo.recipes import sums
from fastgrpo.trainer import terminal

__all__ = ["elsewhere"]


def shown_on_terminal(data):
    """The lines of a terminal of 100 columns, and what each was overwritten with."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.|\n", data.replace("\r\n", "\n\r"), re.DOTALL):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            raise AssertionError(f"a bar that moves the cursor by {part!r} is nested in another")
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal_of(monkeypatch):
    """Runs a function with stdout and stderr on a pseudo-terminal; returns what it showed."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals")

    def call(function, columns=100):
        import fcntl
        import struct
        import termios

        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        data = []

        def read():
            while True:
                try:
                    part = os.read(leader, 4096)
                except OSError:  # the other end is closed
                    return
                if not part:
                    return
                data.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        with open(follower, "w", buffering=1) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            function()
        reader.join(10)
        os.close(leader)
        return shown_on_terminal(b"".join(data).decode())

    return call


def noisy(completions, **_):
    """A reward function that prints, logs, and leaves lines unfinished for a while."""
    print("printed by a reward")
    print("begun", end=" ")
    print("and ended")
    print("complained by a reward", file=sys.stderr)
    logging.getLogger("noisy").warning("logged by a reward")
    return [float(len(completion) % 2) for completion in completions]


BAR = re.compile(r"(warm start|sampling|GRPO|base|cold-start|[a-z-]+rl|[a-z-]+sft): +\d+%\|.*")


@pytest.mark.parametrize("columns", [100, 0])  # 0: a terminal that does not know its size
def test_a_run_has_one_bar(columns, tmp_path, terminal_of, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    monkeypatch.setattr(sums, "WARM_START_MAX_STEPS", 3)
    arguments = ["train", "--reward", "test_terminal:noisy", *SMALL, "--output-dir", tmp_path / "out"]

    def train():
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("noisy").addHandler(handler)
        try:
            assert run(*arguments) == 0
        finally:
            logging.getLogger("noisy").removeHandler(handler)

    lines = terminal_of(train, columns)
    bars = [line for line in lines if "%|" in line]
    assert len(bars) == 1 and BAR.fullmatch(bars[0]), lines
    others = [line for line in lines if "%|" not in line]
    assert not [line for line in others if re.search(r"\d+/\d+ \[|it/s|Writing|Loading", line)]
    noise = ("printed by a reward", "begun and ended", "complained by a reward", "logged by a reward")
    assert [others.count(line) for line in noise] == [6] * 4, lines  # a round before, four steps, and one after
    assert re.fullmatch(r"reward \d\.\d\d -> \d\.\d\d", [line for line in lines if line][-1])
    place = lines.index(bars[0])
    assert place > max(i for i, line in enumerate(lines) if line.endswith("by a reward"))  # they are above it


def test_unfinished_lines_are_above_the_bar(terminal_of):
    """Also those that nothing ends before the run's last line."""

    def dotted():
        with terminal.one_bar():
            bar = terminal.start("GRPO", 1)
            print("..", end="")
            print("!", end="", file=sys.stderr)
            bar.update()
            bar.finish()
            terminal.close()
            print("accuracy 0.10 -> 0.20")

    *above, bar, last = [line for line in terminal_of(dotted) if line]
    assert above == ["..", "!"] and BAR.fullmatch(bar) and last == "accuracy 0.10 -> 0.20"


def test_a_mistake_after_the_bar_has_a_line_of_its_own(tmp_path, terminal_of, monkeypatch):
    monkeypatch.setattr(sums, "WARM_START_MAX_STEPS", 3)
    monkeypatch.setattr("fastgrpo.commands.train.grpo.sampled_accuracy", lambda *_, **__: forbidden())
    lines = terminal_of(lambda: run("train", *SMALL, "--output-dir", tmp_path / "out"))
    assert [line for line in lines if line][1:] == [
        "fastgrpo train: error: --output-dir: out/metrics.jsonl: Permission denied"
    ]
    assert lines[0].startswith("warm start: 100%|")


def test_plain_lines_without_a_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sums, "WARM_START_MAX_STEPS", 3)
    assert run("train", *SMALL, "--output-dir", tmp_path / "out") == 0
    captured = capfd.readouterr()
    assert "\r" not in captured.err + captured.out and "\x1b" not in captured.err + captured.out
    lines = [line for line in captured.err.splitlines() if re.match(r"(warm start|sampling|GRPO): ", line)]
    steps = [re.match(r"[a-zA-Z ]+: \d+/\d+", line)[0] for line in lines]
    assert steps == ["warm start: 0/3", "warm start: 3/3", "sampling: 0/1", "sampling: 1/1", "GRPO: 0/4", "GRPO: 4/4",
                     "sampling: 0/1", "sampling: 1/1"]  # fmt: skip
    assert re.search(r"GRPO: 4/4, reward \d\.\d\d", captured.err)
    assert "Writing" not in captured.err and "Loading" not in captured.err


def test_plain_lines_come_at_a_sane_rate(monkeypatch):
    """At most one in ten seconds, and fewer in a long run."""
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    bar = terminal.start("GRPO", 100_000)
    for _ in range(100_000):
        now[0] += 1.0
        bar.update()
    bar.finish()
    steps = [int(re.match(r"GRPO: (\d+)/", line)[1]) for line in stream.getvalue().splitlines()]
    assert steps[0] == 0 and steps[-1] == 100_000
    assert all(b - a > 10 for a, b in zip(steps[:-1], steps[1:-1], strict=False)) and len(steps) < 400
