"""The wheel that FASTGRPO_WHEEL names, beside torch and Triton in an environment without a compiler.

`make wheel wheel-test` builds it and runs this.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import installed
import pytest
from packaging.requirements import Requirement

WHEEL = os.environ.get("FASTGRPO_WHEEL")
pytestmark = pytest.mark.skipif(not WHEEL, reason="no wheel was built: make wheel wheel-test")

LOSSES = """
import torch
from fastgrpo import Objective, backends, grpo_loss, linear_grpo_loss
from fastgrpo.reference import grpo_loss_reference, linear_grpo_loss_reference

torch.manual_seed(0)
B, T, H, V = 4, 3, 16, 300
head = torch.randn(B, T, H), torch.randn(V, H) / 4
ids, advantages = torch.randint(V, (B, T)), torch.randn(B)
objective = Objective(beta=0.04)
old = linear_grpo_loss_reference(*head, ids, advantages).per_token_logps + 0.1 * torch.randn(B, T)
options = dict(old_per_token_logps=old, ref_per_token_logps=old, objective=objective)


def gradients(loss, inputs, dtype, device, **more):
    def there(x):
        return x.to(device, dtype) if torch.is_tensor(x) and x.is_floating_point() else x

    leaves = [there(x).detach().clone().requires_grad_() for x in inputs]
    call = {name: there(x) for name, x in options.items()}
    loss(*leaves, ids.to(device), there(advantages), **call, **more).loss.backward()
    return [leaf.grad.double().cpu() for leaf in leaves]


for name in backends.NAMES:
    why = backends.get(name).unavailable()
    if why is None:
        device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
        for loss, truth, inputs in (
            (grpo_loss, grpo_loss_reference, [head[0] @ head[1].T]),
            (linear_grpo_loss, linear_grpo_loss_reference, head),
        ):
            got = gradients(loss, inputs, torch.float32, device, backend=name)
            want = gradients(truth, inputs, torch.float64, "cpu")
            for a, b in zip(got, want, strict=True):
                assert (a - b).norm() < 1e-5 * b.norm(), (name, loss)
    print(f"{name}: {why or 'right'}")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs the new environment's Python, with nothing else on PATH."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "env")
    binaries = folder / "env" / "bin"
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    # what an index would bring, from this environment; behind the new one's own packages on the path
    (packages / "torch.pth").write_text(str(installed.link(folder / "packages", "torch", "triton")))
    (folder / "empty").mkdir()
    hidden = ("PIP_", "PYTHON", "TRITON_INTERPRET", "CUDACXX")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}

    def run(*command, **environment):
        return subprocess.run(
            [*map(str, command)], cwd=folder / "empty", env=clean | {"PATH": str(binaries)} | environment,
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip

    # without an index: it asks for torch, triton and their own requirements, or this fails
    pip = [sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--no-index"]
    result = run(*pip, Path(WHEEL).resolve(), PIP_CONFIG_FILE=os.devnull)
    assert result.returncode == 0, result.stdout + result.stderr
    return functools.partial(run, binaries / "python")


def test_contents():
    """Both libraries, for any Python, under the tag of an old enough glibc."""
    name, *_, tags = Path(WHEEL).stem.split("-")
    assert "-py3-none-" in WHEEL and name == "fastgrpo"
    versions = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", tags)]
    assert versions and max(versions) <= 34, WHEEL
    with zipfile.ZipFile(WHEEL) as wheel:
        assert "fastgrpo/py.typed" in wheel.namelist()
        libraries = {Path(each).name for each in wheel.namelist() if each.endswith(".so")}
        (metadata,) = (each for each in wheel.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(metadata).decode())
    cuda = {"libfastgrpo_cuda.so"} if shutil.which(os.environ.get("CUDACXX", "nvcc")) else set()
    assert libraries == {"libfastgrpo_cpu.so"} | cuda
    needed = [Requirement(each) for each in metadata.get_all("Requires-Dist")]
    assert {each.name for each in needed if "extra" not in str(each.marker)} == {"torch", "triton"}


def test_losses_on_every_backend(python):
    result = python("-c", LOSSES)
    assert result.returncode == 0, result.stderr
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert said["cpu"] == said["torch"] == "right"
    for name in ("cuda", "triton"):  # or the machine lacks something; the wheel does not
        assert said[name] == "right" or not re.search("does not exist|cannot be loaded|imported", said[name]), said


def test_losses_in_tritons_interpreter(python, tmp_path):
    """It computes with NumPy, which neither torch nor Triton requires."""
    numpy = installed.link(tmp_path / "numpy", "numpy")
    result = python("-c", LOSSES, TRITON_INTERPRET="1", PYTHONPATH=str(numpy))
    assert result.returncode == 0, result.stderr
    assert "triton: right" in result.stdout


def test_command(python):
    result = python("-m", "fastgrpo", "env")
    assert result.returncode == 0 and "backend cpu: works" in result.stdout
    script = Path(python("-c", "import sys; print(sys.prefix)").stdout.strip()) / "bin" / "fastgrpo"
    result = python(script, "train")
    assert result.returncode == 2 and result.stderr.endswith("pip install 'fastgrpo[train]'\n")


def test_no_compiler_is_found(python):
    """Or the tests above would prove less."""
    tools = ["cc", "gcc", "c++", "g++", "clang", "nvcc", "cmake", "ninja"]
    assert python("-c", f"import shutil; print(*filter(shutil.which, {tools}))").stdout.strip() == ""
