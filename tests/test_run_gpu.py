"""The run on a GPU, rehearsed: its stages, limits and files, and what becomes of a kernel that is wrong or hangs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import unavailable as no_host

from fastgrpo.bench import report

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
FIELDS = set("op impl backend dtype mode ms_p50 device versions commit date command rehearsed".split())

if (_why := no_host()) is not None:
    pytest.skip(f"the CUDA kernels cannot be built for the CPU: {_why}", allow_module_level=True)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The kernels for the CPU are built there once."""
    return tmp_path_factory.mktemp("scratch")


def run(*arguments, **environment):
    """(exit status, what was said) of the script, with this Python."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment, cwd="/", timeout=900)
    return done.returncode, done.stdout + done.stderr


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def stages(*names):
    return [word for name in names for word in ("--stage", name)]


def test_the_first_call_rehearsed(tmp_path, scratch):
    """All but the build, which has a test of its own."""
    names = ("ceilings", "smoke", "sweeps", "hidden", "counters", "tests")  # and memcheck: test_cuda_driver.py
    arguments = ("--rehearse", "--commit", "abc123", "--scratch", scratch)
    status, said = run("first", *arguments, *stages(*names), OUT=str(tmp_path))
    assert status == 0, said[-6000:]
    for name in names:
        assert f"== {name}, at most" in said and f"  {name}: done" in said
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"first.log", "rows.jsonl", "smoke.jsonl", "profile.txt", "tests.log"}
    log = (tmp_path / "first.log").read_text()
    assert all(f"== {name}, at most" in log and f"  {name}: done" in log for name in names) and "right" in log

    smoke = rows_of(tmp_path / "smoke.jsonl")
    assert len({row["case"] for row in smoke}) == len(smoke) and all(row["ok"] for row in smoke)
    told = {(row["backend"], row["kernel"], row["choice"], row["dtype"]) for row in smoke}
    for dtype in ("bf16", "fp32", "fp16"):
        assert ("cuda", "gradient", "", dtype) in told and ("cuda", "scale", "", dtype) in told
        for cluster in (-1, 1, 2, 4, 8, 16):
            assert ("cuda", "loss and gradient in place", f"cluster={cluster}", dtype) in told
            assert ("cuda", "statistics", f"cluster={cluster}", dtype) in told
    assert ("cuda", "statistics", "cluster=16,buffers=4,blocks=2,evict_first=1", "bf16") in told

    rows = rows_of(tmp_path / "rows.jsonl")
    assert all(FIELDS <= row.keys() and row["rehearsed"] and row["commit"] == "abc123" for row in rows)
    assert {row["op"] for row in rows} == {"ceiling", "sweep", "linear", "overlap"}
    overlaps = {row["choice"]: row for row in rows if row["op"] == "overlap"}
    assert len(overlaps) == 9 and all(row["ok"] and row["ms_p50"] > 0 for row in overlaps.values())
    assert {"parts=1", "parts=2,multiprocessors=0", "parts=4,multiprocessors=64"} <= overlaps.keys()
    assert "the fastest: --overlap 'parts=" in said
    sweeps = [row for row in rows if row["op"] == "sweep" and row["impl"] == "fastgrpo"]
    assert all(row["ok"] and row["ms_p50"] > 0 and row["over_copy"] > 0 for row in sweeps)
    assert any(row["entropy"] for row in sweeps) and any(not row["entropy"] for row in sweeps)
    assert "the fastest, with and without the entropy together: --cuda '" in said
    assert {row["impl"] for row in rows if row["op"] == "ceiling"} == {"copy", "read", "GEMM"}
    assert report.load(tmp_path) == ([], [])  # nothing of a rehearsal is reported
    assert "cuda:token_loss: right" in said


def test_the_second_call_rehearsed(tmp_path, scratch):
    """A stage that reaches its limit is stopped, and the next ones run."""
    choice = ("--cuda", "cluster=2,buffers=2", "--triton", "lanes=512,programs=66", "--overlap", "parts=2")
    arguments = ("--rehearse", *choice, *stages("compiled", "peers", "step"), "--limit", "compiled=1")
    status, said = run("second", *arguments, "--out", tmp_path, "--scratch", scratch)
    assert status == 1, said[-6000:]
    assert "  compiled: stopped at its limit of 1 s" in said and "  peers: done" in said and "  step: done" in said
    assert {path.name for path in tmp_path.iterdir()} == {"second.log", "rows.jsonl"}
    rows = rows_of(tmp_path / "rows.jsonl")
    assert all(FIELDS <= row.keys() for row in rows)
    assert {row["op"] for row in rows} == {"loss", "linear", "step"}
    timed = [row for row in rows if row["ms_p50"] is not None]
    assert {"fastgrpo", "eager", "copy", "GEMMs alone"} <= {row["impl"] for row in timed}
    chosen = {"cuda": choice[1], "triton": choice[3], "overlap": choice[5]}
    tuned = [row for row in rows if row.get("choice")]
    assert tuned and all(row["choice"] == chosen and row["impl"] == "fastgrpo" for row in tuned)
    cases = {(row["case"], row["backend"]) for row in tuned}
    assert cases <= {(row["case"], row["backend"]) for row in rows if not row.get("choice")}
    rows = [json.loads(line) | dict(rehearsed=False, commit="a" * 40) for line in open(tmp_path / "rows.jsonl")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reported, _ = report.load(tmp_path)
    assert reported and not [row for row in reported if row.get("choice")]


@pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None, reason="scikit-build-core is what it is built with"
)
def test_the_build_rehearsed(tmp_path):
    """Without nvcc, which takes a minute; into a folder of its own, which the stages after it use."""
    arguments = ("second", "--rehearse", *stages("build", "compiled"), "--out", tmp_path)
    status, said = run(*arguments, CMAKE_ARGS="-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert status == 0, said[-6000:]
    assert "  build: done" in said and "  compiled: done" in said and "not measured: left out of a quick run" in said
    assert "backend cpu: works" in said and "site/fastgrpo/lib/libfastgrpo_cuda.so does not exist" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "expected first or second, got ''"),
        (("third",), "expected first or second, got 'third'"),
        (("first", "--stage", "peers"), "--stage: expected one of build ceilings smoke .*, got peers"),
        (("first", "--limit", "nap=3"), "--limit: expected one of build .* with seconds, got nap=3"),
        (("first", "--wheels", "/nowhere"), "--wheels: no such folder: /nowhere"),
        (("second", "--cuda"), "--cuda: expected a value"),
        (("second", "--quick"), "unknown option --quick"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path):
    status, said = run(*arguments, OUT=str(tmp_path))
    assert status == 2 and re.search(message, said), said
    assert not list(tmp_path.iterdir())  # nothing was done


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    status, said = run("first", "--out", str(tmp_path))
    assert status == 1 and "--rehearse does what a CPU can" in said and not list(tmp_path.iterdir())


def test_a_rehearsal_is_not_beside_measured_rows(tmp_path):
    """Without --out, on a machine with a GPU too; git ignores where it is."""
    script, tools = tmp_path / "benchmarks" / "run_gpu.sh", tmp_path / "tools"
    tools.mkdir()
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    program(tools / "nvidia-smi", "echo NVIDIA H100")
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    subprocess.run([script, "first", "--rehearse", "--stage", "hidden"], env=environment, capture_output=True)
    assert [path.name for path in (script.parent / "results").iterdir()] == ["rehearsal"]
    assert "benchmarks/results/rehearsal/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("driver, sanitizer, status", [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_the_memory_check_fails_with_its_program(driver, sanitizer, status, tmp_path):
    text = SCRIPT.read_text()
    memcheck = text[text.index("memcheck() {") :].partition("\n}\n")[0] + "\n}\n"
    program(tmp_path / "build" / "fastgrpo_cuda_driver", f"exit {driver}")
    program(tmp_path / "compute-sanitizer", f"exit {sanitizer}")
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    code = f"set -o pipefail; scratch={tmp_path} rehearse=; {memcheck} memcheck"
    assert subprocess.run(["bash", "-c", code], env=environment).returncode == status


def program(path, line):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


FAILING = """
import sys
from pathlib import Path
from unittest import mock

sys.argv = ["gpu.py", "peers", "--rehearse"]
sys.path.insert(0, {here!r})
import gpu, torch
from fastgrpo.bench import turns
from fastgrpo.bench.operation import Case, Implementation
from fastgrpo.bench.registry import REGISTRY

def raises(_):
    raise RuntimeError("planted")

def nothing_but_nan(inputs):
    return {{name: x * torch.nan for name, x in right.step(inputs).items()}}

right = next(each for each in REGISTRY if (each.op, each.name) == ("linear", "eager"))
case, output = Case("linear", 8, 4, 300, 64, "bf16"), gpu.Output(Path({out!r}), True)
with mock.patch.object(turns, "peak", lambda *_: None):
    for name, step, why in (("fastgrpo", raises, None), ("fastgrpo", nothing_but_nan, None), ("trl", raises, None),
                            ("fastgrpo", raises, "not here"), ("fastgrpo", right.step, None)):
        side = Implementation("linear", name, step, why_not=lambda case: why)
        print("failed:", gpu._measured(case, [side], output, 0.01))
"""


def test_a_side_of_ours_that_raises_or_is_nan_fails_the_stage(tmp_path):
    """Not one that cannot run here, and not a peer."""
    code = FAILING.format(here=str(SCRIPT.parent), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    failed = re.findall("failed: (.*)", done.stdout)
    assert failed == ["True", "True", "False", "False", "False"], done.stdout + done.stderr


PLANTED = """
import sys, time
sys.argv = ["gpu.py", {stage!r}, "--rehearse", "--out", {out!r}, "--scratch", {scratch!r}, "--backend", "cuda",
            "--dtype", "bf16"]
sys.path.insert(0, {here!r})
import gpu, gpu_rows
gpu.HANGS = 2
right = gpu_rows._statistics

def statistics(p, backend, entropy):
    if {stage!r} == "smoke" and entropy:
        time.sleep(60)
    results = right(p, backend, entropy)
    results["logp"] *= 1.001
    return results

gpu.STATISTICS = gpu.STATISTICS._replace(run=statistics)
gpu.KERNELS = (gpu.STATISTICS, gpu.SCALE)
gpu.TOKEN_LOSS = gpu.SCALE
sys.exit(gpu.main())
"""


def test_a_kernel_that_hangs_or_is_wrong_costs_only_itself(tmp_path, scratch):
    """It is named; a process that is lost is followed by one that goes on behind it; nothing wrong has a time."""

    def planted(stage):
        code = PLANTED.format(stage=stage, out=str(tmp_path), scratch=str(scratch), here=str(SCRIPT.parent))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    status, said = planted("smoke")
    assert status == 3 and "no answer in 2 s" in said, said[-3000:]
    (row,) = rows_of(tmp_path / "smoke.jsonl")
    assert row["ok"] is False and row["entropy"] and row["kernel"] == "statistics"
    status, said = planted("smoke")
    assert status == 3  # the next case hangs too: a choice of its own
    second = rows_of(tmp_path / "smoke.jsonl")
    assert [row["case"] for row in second][0] == row["case"] and len(second) > 1
    assert any("wrong: logp" in str(r["reason"]) and r["ok"] is False for r in second), second
    assert any(r["ok"] for r in second)

    status, said = planted("sweeps")
    assert status == 1, said[-3000:]
    sweeps = [row for row in rows_of(tmp_path / "rows.jsonl") if row["op"] == "sweep" and row["impl"] == "fastgrpo"]
    wrong = [row for row in sweeps if row["kernel"] == "statistics"]
    assert wrong and all(row["ms_p50"] is None and row["ok"] is False for row in wrong)
    assert all(row["ms_p50"] for row in sweeps if row["kernel"] != "statistics")
    left_out = [row for row in wrong if row["choice"] == ""]
    assert left_out and all("failed in the smoke test" in row["reason"] for row in left_out)
