"""code_reward and its sandbox: tables of code, right and hostile; what it leaves behind; when time runs out."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fastgrpo import rewards
from fastgrpo.rewards import sandbox
from fastgrpo.rewards.fences import last_python_block

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


STDIN = [{"input": "3\n", "output": "6\n"}, {"input": "-1", "output": "-2"}]
BY_NAME = {"fn_name": "f", "inputs": [[2], [-1]], "outputs": [4, [-2]]}
METHOD = "class Solution:\n    def f(self, x):\n        return 2 * x"
# (right program, test cases): each program that is wrong in one of two cases gets a half
SHAPES = {
    "pairs": (ECHO, STDIN),
    "pairs as JSON": (ECHO, json.dumps(STDIN)),
    "JSON of JSON": (ECHO, json.dumps(json.dumps(STDIN))),
    "list of JSON texts": (ECHO, [json.dumps(case) for case in STDIN]),
    "APPS": (ECHO, {"inputs": ["3\n", "-1\n"], "outputs": ["6\n", "-2\n"]}),
    "APPS as JSON": (ECHO, json.dumps({"inputs": ["3\n", "-1\n"], "outputs": ["6\n", "-2\n"]})),
    "lists of lines": (ECHO, {"inputs": [["3"], ["-1"]], "outputs": [["6"], ["-2", ""]]}),
    "TACO without a name": (ECHO, {"inputs": ["3\n", "-1\n"], "outputs": ["6\n", "-2\n"], "fn_name": None}),
    "dict of lists": (ECHO, {"input": ["3\n", "-1"], "output": ["6\n", "-2"]}),
    "dict of tuples": (ECHO, {"input": ("3\n", "-1"), "output": ("6\n", "-2")}),
    "dict of arrays": (ECHO, {"input": np.array(["3\n", "-1"], object), "output": np.array(["6\n", "-2"], object)}),
    "array of dicts": (ECHO, np.array(STDIN, object)),
    "PyArrow's list": (ECHO, pa.array([STDIN])[0]),
    "PyArrow's struct": (ECHO, pa.array([{"input": ["3", "-1"], "output": ["6", "-2"]}])[0]),
    "typed pairs": (ECHO, [case | {"type": "stdin_stdout", "fn_name": None} for case in STDIN]),
    "in a list": (ECHO, [{"inputs": ["3"], "outputs": ["6"]}, {"inputs": "-1", "outputs": "-2"}]),
    "without inputs": ("print(6)", {"outputs": ["6", "6\n"]}),
    "one pair": (ECHO, STDIN[0]),
    "statements": (DOUBLE, DOUBLES),
    "statements as JSON": (DOUBLE, json.dumps(DOUBLES)),
    "array of statements": (DOUBLE, np.array(DOUBLES)),
    "one text of asserts": (DOUBLE, "\n".join(DOUBLES)),
    "asserts after setup": (DOUBLE, "import math  # [\nn = math.floor(2.5)\nassert f(n) == 4\n\nassert f(-1) == -2\n"),
    "one assert": (DOUBLE, "assert f(2) == 4"),
    "check and its call": (DOUBLE, "def check(g):\n    assert g(2) == 4\n    assert g(-1) == -2\n\ncheck(f)"),
    "calls": (DOUBLE, BY_NAME),
    "calls as JSON": (DOUBLE, json.dumps(BY_NAME)),
    "calls of a method": (METHOD, BY_NAME),
    "calls one by one": (
        DOUBLE, [{"fn_name": "f", "input": [2], "output": 4}, {"fn_name": "f", "input": [-1], "output": [-2]}]
    ),
}  # fmt: skip
NOTHING = [None, "", "  ", "[]", "null", "{}", [], {}, {"inputs": [], "outputs": []}, {"input": None, "output": None},
           np.array([], object), "# no test"]  # fmt: skip


@linux
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_test_cases(shape, leaves_nothing):
    """The right program gets 1 in every shape, one that is right in some cases less, a wrong one 0."""
    right, cases = SHAPES[shape]
    partly = right.replace("* 2", "* 2 + (3 if a < 0 else 0)").replace("int(input())", "(a := int(input()))")
    partly = partly.replace("return 2 * x", "return 2 * x if x > 0 else 7")
    wrong = "def f(x): return 5\nclass Solution:\n    f = lambda self, x: 5\nprint(5)"
    reward = rewards.code_reward_within(rewards.Limits(seconds=10.0, total_seconds=60.0))
    scores = reward([block(program) for program in (right, partly, wrong)], [cases] * 3)
    assert scores[0] == 1 and scores[2] == 0
    single = shape in ("without inputs", "one pair", "one assert")  # whose program is not partly right
    assert scores[1] == (1 if single else 0 if shape == "check and its call" else 0.5)


@linux
@pytest.mark.parametrize("cases", NOTHING, ids=repr)
def test_no_test_cases(cases):
    assert rewards.code_reward([block("pass"), ""], [cases, cases]) == [None, None]


REFUSED = [
    (7, "got int"),
    (b"assert f(2) == 4", "got bytes"),
    ({1, 2}, "got set"),
    ("42", "got str '42' .JSON text of a number"),
    ('"some text"', "neither JSON nor Python"),
    ("no Python, no JSON", "neither JSON nor Python"),
    ('[{"input": "1", "output": "2"}', "neither JSON nor Python"),  # cut off
    ("[{'input': '1', 'output': '2'}]", "check nothing"),  # a list, which passes
    ("f(2) == 4", "check nothing"),
    ("x = 4", "check nothing"),
    ("def check(g):\n    assert g(2) == 4", "check nothing"),  # nobody calls it
    (["f(2) == 4"], "check nothing"),
    (["assert f(2) == 4", "4"], "JSON text of a number"),
    (["assert f(2) == 4", 3], r"got list of 2 \(str 'assert f\(2\) == 4', int\)"),
    ({"in": ["1"], "out": ["2"]}, r"got dict \(in: list of 1 \(str '1'\), out: list of 1 \(str '2'\)\)"),
    ({"input": "1"}, r"got dict \(input: str '1'\)"),
    ({"input": "1", "inputs": ["1"], "output": "2"}, "got dict"),
    ({"input": "1", "output": ["2"]}, "one is a list, the other is not"),
    ({"inputs": ["1", "2"], "outputs": ["2"]}, "2 inputs for 1 outputs"),
    ({"inputs": [1], "outputs": [2]}, "inputs and outputs are text"),
    ({"inputs": ["1"], "outputs": [None]}, "inputs and outputs are text"),
    ([{"input": ["1", "2"], "output": ["2", "4"]}], "cases, or the lines of one"),
    ({"fn_name": "f", "inputs": [2], "outputs": [4]}, "list of arguments"),
    ({"fn_name": "f(", "inputs": [[2]], "outputs": [4]}, "fn_name"),
    ([{"input": "[2]", "output": "4", "testtype": "functional"}], "functional without fn_name"),
    ("[" * 10 + "]" * 10, "nested too deeply"),
]


@pytest.mark.parametrize("cases, message", REFUSED)
def test_other_shapes_are_refused_with_row_and_shape(cases, message):
    with pytest.raises(ValueError, match=f"(?s)^test_cases: row 1: expected .*; got .*{message.removeprefix('got ')}"):
        rewards.code_reward(["", ""], [["assert f(2) == 4"], cases])


DOCSTRING = 'def f():\n    """\n    ```\n    f()\n    ```\n    """'
FENCES = [
    ("```python\nx\n```", "x"),
    ("``` python\nx\n```", "x"),
    ("```\tpython \nx\n```  ", "x"),
    ("```Python\nx\n```", "x"),
    ("```py\nx\n```", "x"),
    ("```python3\nx\n```", "x"),
    ("```python3.11\nx\n```", "x"),
    ("```{python}\nx\n```", "x"),
    ("```{.python .numberLines}\nx\n```", "x"),
    ("```{python, echo=TRUE}\nx\n```", "x"),
    ('```python title="a.py"\nx\n```', "x"),
    ("```python:a.py\nx\n```", "x"),
    ("```python-repl\nx\n```", None),
    ("```pycon\nx\n```", None),
    ("```pytest\nx\n```", None),
    ("```text python\nx\n```", None),
    ("```\nx\n```", None),
    ("~~~python\nx\n~~~", "x"),
    ("~~~python `x`\nx\n~~~", "x"),
    ("```python `x`\nx\n```", None),
    ("````python\nx\n```\ny\n````", "x\n```\ny"),
    ("```python\nx\n`````", "x"),
    ("```python\nx\n~~~\n```", "x\n~~~"),
    ("```python\nx\n```python\ny\n```", "x\n```python\ny"),
    ("````markdown\n```python\nx\n```\n````", None),
    ("   ```python\n   x\n    y\n  ```", "x\n y"),
    ("    ```python\n    x\n    ```", None),  # indented code
    (f"```python\n{DOCSTRING}\n```", DOCSTRING),
    ("1. So:\n   ```python\n   def f():\n       x\n   ```\n2. Done", "def f():\n    x"),
    ("- a\n\n  1. b\n\n     ```py\n     x\n\n     y\n     ```\n", "x\n\ny"),
    ("10. a\n    ```python\n    x\n    ```", "x"),
    ("1.\t```python\n\tif x:\n\t\ty\n\t```", "if x:\n\ty"),
    ("- ```python\n  x\n  ```", "x"),
    ("- ```python\n  x\nend of the list", None),
    ("> ```python\n> x\n>\n> y\n> ```", "x\n\ny"),
    ("> ```python\n> x\n\n```\n", None),
    ("1. a\nlazy\n   ```python\n   x\n   ```", "x"),
    ("a\n2. ```python\n   x\n   ```", None),  # a list that starts at 2 does not interrupt
    ("<answer>\n```python\nx\n```\n</answer>", "x"),
    ("```python\r\nx\r\ny\r\n```\r\n", "x\ny"),
    ("```python\n```", ""),
    ("```python\nx", None),
    ("```python\nx\n```\n```python\ncut off", "x"),
    ("```python\nx\n```\n```python\ny\n```", "y"),
    ("```js\nx\n```\n```python\ny\n```", "y"),
    ("so ```python\nx\n```", None),
]


@pytest.mark.parametrize("written, code", FENCES)
def test_fences(written, code):
    assert last_python_block(written) == code


def test_fences_are_those_of_a_commonmark_parser():
    """Thousands of lines drawn from what the rules speak of, against markdown-it-py."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").disable(["html_block", "html_inline"])
    prefixes = [
        "",
        "",
        "  ",
        "   ",
        "    ",
        "      ",
        "- ",
        "1. ",
        "2. ",
        "10. ",
        "> ",
        ">",
        "* ",
        "\t",
        "-",
        "1.  ",
        "1.\t",
    ]
    bodies = ["```python", "```", "````python", "````", "```py", "``` {python}", "~~~python", "~~~", "x = 1", "x", "",
              "", "---", "# h", "```js", " ``` ", "```python `x`", "- - -", "``` x", "2) a"]  # fmt: skip
    rng, found = random.Random(0), 0
    for _ in range(3000):
        parts = range(rng.choice([0, 0, 1, 1, 2]))
        lines = ["".join(rng.choice(prefixes) for _ in parts) + rng.choice(bodies) for _ in range(rng.randint(3, 9))]
        code = None
        for token in parser.parse("\n".join(lines) + "\n"):
            last = lines[token.map[1] - 1].strip("-*>.0123456789 \t") if token.type == "fence" else ""
            closes = last and not last.strip(token.markup[0]) and len(last) >= len(token.markup)
            if closes and token.map[1] - token.map[0] == token.content.count("\n") + 2 and "py" in token.info[:8]:
                code = token.content.removesuffix("\n")
        assert last_python_block("\n".join(lines)) == code, lines
        found += code is not None
    assert found > 100


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


def test_a_run_has_less_time_than_all():
    """With as much, no run could be judged too slow."""
    for seconds in (9.0, 10.0):
        with pytest.raises(ValueError, match=f"seconds: expected less than total_seconds=9.0, .* got {seconds}"):
            rewards.code_reward_within(rewards.Limits(seconds=seconds))


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
        "from fastgrpo.rewards import sandbox\n"
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
