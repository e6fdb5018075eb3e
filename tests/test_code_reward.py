"""code_reward and its sandbox: tables of code, right and hostile; what it leaves behind; when time runs out."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from fastgrpo.trainer import rewards
from fastgrpo.trainer.rewards import sandbox

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


def message(content):
    return [{"role": "assistant", "content": content}]


@pytest.fixture
def leaves_nothing(monkeypatch, tmp_path):
    """The test's programs leave no process and no file behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.iterdir()) == []
    # at once, but for one that has killed its supervisor: the kernel's signal is on its way then
    wait_until(lambda: not sandboxed_processes(tmp_path), seconds=2)


def sandboxed_processes(folder):
    """Processes whose environment names the folder, as that of all sandboxed ones does, and their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(folder) in (entry / "environ").read_bytes():
                found.append((entry.name, (entry / "cmdline").read_bytes()))
        except OSError:  # it has just ended, or is another user's
            pass
    return found


def block(code):
    return f"Here it is:\n```python\n{code}\n```\nDone."


DOUBLE = "def f(x):\n    return 2 * x"
ECHO = "print(int(input()) * 2)"
DOUBLES = ["assert f(2) == 4", "assert f(-1) == -2"]
CODES = [
    (block(DOUBLE), DOUBLES, 1.0),
    (block(DOUBLE), ["assert f(2) == 4", "assert f(2) == 5"], 0.5),
    (message(block(DOUBLE)), DOUBLES, 1.0),
    (block("broken(") + block(DOUBLE), DOUBLES, 1.0),
    (block(DOUBLE) + block("broken("), DOUBLES, 0.0),
    (block(DOUBLE) + "\n```python\ncut off", DOUBLES, 1.0),
    (f"```py\r\n{DOUBLE}\r\n```", DOUBLES, 1.0),
    (block(ECHO), [{"input": "3\n", "output": "6\n"}, {"input": "-1", "output": "-2"}], 1.0),
    (block(ECHO), [{"input": "3\n", "output": "7\n"}, "assert True"], 0.0),
    (block("print('a  \\nb\\n\\n')"), [{"input": None, "output": "a\nb"}], 1.0),
    (block("print('½ 中')"), [{"output": "½ 中\n"}], 1.0),
    (block("import numpy; print(numpy.arange(3).sum())"), [{"output": "3"}], 1.0),
    (block("import sys; print(6); sys.exit(0)"), [{"output": "6"}], 1.0),
    (block("import sys; print(6); sys.exit(1)"), [{"output": "6"}], 0.0),
    (block("print(6); raise SystemExit('no')"), [{"output": "6"}], 0.0),
    (block("import os; print(sorted(os.environ), os.listdir(), __name__)"), [{"output": "x"}], 0.0),
    (DOUBLE, DOUBLES, 0.0),
    (f"```\n{DOUBLE}\n```", DOUBLES, 0.0),
    (f"```python\n{DOUBLE}", DOUBLES, 0.0),
    ("", DOUBLES, 0.0),
    (message(None), DOUBLES, 0.0),
    (block(DOUBLE), None, None),
    (block(DOUBLE), [], None),
    # ends before the statement is reached
    (block("raise SystemExit"), DOUBLES, 0.0),
    (block("import os; os._exit(0)"), DOUBLES, 0.0),
    (block("import sys\nclass f: __new__ = lambda *_: sys.exit(0)"), DOUBLES, 0.0),
    (block("if True:"), DOUBLES, 0.0),
    (block("'''"), DOUBLES, 0.0),
    (block("\0"), DOUBLES, 0.0),
    (block("'\ud800'"), DOUBLES, 0.0),
]


@linux
def test_code(leaves_nothing):
    completions, cases, scores = zip(*CODES, strict=True)
    roomy = rewards.code_reward_within(rewards.Limits(seconds=10.0, total_seconds=60.0))
    got = roomy(list(completions), list(cases))
    for i, (score, want) in enumerate(zip(got, scores, strict=True)):
        assert score == want, CODES[i]


FORK = "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        time.sleep(30)\n        os._exit(0)\n"
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir("/")
        for descriptor in range(3):
            os.close(descriptor)
        time.sleep(30)
    os._exit(0)
os.wait()
"""
HOSTILE = {
    "endless": ("while True: pass", 0),
    "sleeps": ("import time; time.sleep(60)", 0),
    "forks": (FORK, 0),
    "forks-and-waits": (FORK + "os.wait()", 0),
    "daemon": (DAEMON, 1),
    "daemon-and-sleeps": (DAEMON + "time.sleep(60)", 0),
    "subprocess": ("import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)", 1),
    "threads": ("import threading as t, time\nfor _ in range(20): t.Thread(target=time.sleep, args=[60]).start()", 0),
    "allocates": ("x = bytearray(10 << 30)", 0),
    "writes": ("with open('f', 'wb') as f:\n    while True: f.write(bytes(1 << 20))", 0),
    "prints": ("while True: print('a' * 1000)", 0),
    "prints-and-carries-on": ("while True:\n    try: print('a' * 1000)\n    except OSError: pass", 0),
    "complains": ("import sys\nwhile True: print('a' * 1000, file=sys.stderr)", 0),
    "reads": ("import sys\nwhile True: sys.stdin.read()", 0),
    "reads-once": ("import sys; sys.stdin.read()", 1),
    "recursion": ("f = lambda: f()\nf()", 0),
    "closes-stdout": ("import os; os.close(1)", 0),
    "closes-others": ("import os; os.close(0); os.close(2)", 1),
    "signals": ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *_: None)\n"
                "    except (OSError, ValueError): pass\nwhile True: pass", 0),
    "stops-itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", 0),
    "kills-its-group": ("import os, signal; os.killpg(0, signal.SIGKILL)", 0),
    "kills-its-parent": ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)\nwhile True: pass", 0),
    "stops-its-parent": ("import os, signal; os.kill(os.getppid(), signal.SIGSTOP)\nwhile True: pass", 0),
    "segfault": ("import ctypes; ctypes.string_at(0)", 0),
    "no-permissions": ("import os\nos.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)", 1),
    "leaves-files": ("import tempfile; tempfile.mkstemp(); open('x', 'w').close()", 1),
    "removes-its-folder": ("import os, shutil; shutil.rmtree(os.getcwd())", 1),
}  # fmt: skip


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code(name, leaves_nothing):
    code, score = HOSTILE[name]
    start = time.monotonic()
    limits = rewards.Limits(seconds=6.0 if score else 1.0)  # those that end by themselves may be slow about it
    got = rewards.code_reward_within(limits)([block(code)], [["assert True"]])
    assert time.monotonic() - start < 10
    assert got == [score]


@linux
def test_folders_deeper_than_the_stack_are_removed(leaves_nothing):
    with sandbox._temporary_folder() as folder:
        deepest = os.open(folder, os.O_RDONLY)
        for _ in range(1100):
            os.mkdir("d", dir_fd=deepest)
            parent, deepest = deepest, os.open("d", os.O_RDONLY, dir_fd=deepest)
            os.close(parent)
        os.close(deepest)


@linux
def test_time_of_a_call(leaves_nothing):
    """What the call's time does not reach is not judged; what ran out of its own time is."""
    reward = rewards.code_reward_within(rewards.Limits(seconds=0.5, total_seconds=1.2))
    slow = block("import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match="of 40 completions were not judged within total_seconds=1.2"):
        scores = reward([slow] * 40, [["assert True"] * 3] * 40)
    assert time.monotonic() - start < 5
    assert scores[0] == 0.0 and scores[-1] is None


@linux
def test_runs_of_several_threads(leaves_nothing):
    """Calls at once do not see each other's processes."""
    reward = rewards.code_reward_within(rewards.Limits(seconds=5.0, total_seconds=60.0))
    got = {}

    def call(i):
        case = {"input": f"{i}\n", "output": f"{2 * i}\n"}
        got[i] = reward([block(ECHO), block(ECHO + "\nwhile i: pass")], [[case], ["assert False"]])

    threads = [threading.Thread(target=call, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: [1.0, 0.0] for i in range(4)}


@linux
def test_killed_trainer_takes_its_programs_along(tmp_path):
    """The supervisor sees that its parent is gone, long before its program's time is up."""
    script = (
        "from fastgrpo.trainer.rewards import sandbox\n"
        f"sandbox.tempfile.tempdir = {str(tmp_path)!r}\n"
        "sandbox.run_python('import time; time.sleep(60)', '', sandbox.Limits(seconds=60.0))\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script])
    wait_until(lambda: len(sandboxed_processes(tmp_path)) == 2)  # the supervisor and the program
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not sandboxed_processes(tmp_path))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@linux
def test_environment_of_the_code(leaves_nothing, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    show = "import os; print(sorted(os.environ.keys() - {'LD_LIBRARY_PATH', 'LC_CTYPE'}), os.listdir())"
    status, output = sandbox.run_python(show, "", rewards.Limits(seconds=10.0))
    assert (status, output) == (sandbox.PASSED, "['HOME', 'OMP_NUM_THREADS', 'TMPDIR'] ['program.py']\n")


@linux
def test_supervisor_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "_SUPERVISOR", str(tmp_path / "missing.py"))
    with pytest.raises(RuntimeError, match="no program can be started: .*missing.py"):
        rewards.code_reward([block("pass")], [["assert True"]])


@linux
def test_program_that_cannot_start_is_no_failed_program():
    arguments = [str(os.getpid()), "1", str(1 << 30), str(1 << 20), "8", "/no/such/python"]
    supervisor = [sys.executable, "-I", "-S", sandbox._SUPERVISOR, *arguments]
    ended = subprocess.run(supervisor, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and "FileNotFoundError" in ended.stderr
