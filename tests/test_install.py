"""What installing brings: the package without its extras, the extras, and what is said where one is missing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import installed
import pytest
from packaging.requirements import Requirement

import fastgrpo

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "triton") if sys.platform == "linux" else ("torch",)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs a Python that finds fastgrpo, torch, triton and what these require, and no other package."""
    quiet = "ignore:Failed to initialize NumPy:UserWarning"  # torch's, at import
    folder = installed.link(tmp_path_factory.mktemp("bare") / "packages", *NEEDED)
    (folder / "fastgrpo").symlink_to(Path(fastgrpo.__file__).parent)
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # from a checkout, `-m fastgrpo` would be the sources

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-S", *arguments], cwd=elsewhere, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": quiet, "TRITON_INTERPRET": "0"},
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def project():
    return pytest.importorskip("tomllib", reason="Python 3.11").loads((ROOT / "pyproject.toml").read_text())


def names_of(requirements):
    return {Requirement(requirement).name for requirement in requirements}


def test_import_finds_torch_and_triton_enough(bare):
    code = """
import torch
from fastgrpo import linear_grpo_loss
hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
linear_grpo_loss(hidden, weight, torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([1.0, -1.0])).loss.backward()
print(weight.grad.abs().sum() > 0)
"""
    result = bare("-c", code)
    assert (result.returncode, result.stdout) == (0, "tensor(True)\n"), result.stderr


def test_rewards_find_torch_enough(bare):
    """Where only the loss and the rewards are wanted, and in a process that serves rewards."""
    result = bare("-c", "from fastgrpo.rewards import numeric; print(numeric(completions=['is 42'], answer=['42']))")
    assert (result.returncode, result.stdout) == (0, "[1.0]\n"), result.stderr


TRAIN = "not installed here: pip install 'fastgrpo[train]'"
MISSING = {
    "fastgrpo.trainer": f"fastgrpo.trainer needs accelerate, datasets, transformers, {TRAIN}",
    "fastgrpo.trainer.rewards": f"fastgrpo.trainer needs accelerate, datasets, transformers, {TRAIN}",
    "fastgrpo.recipes.r1": f"fastgrpo.recipes needs accelerate, datasets, transformers, {TRAIN}",
    "fastgrpo.integrations.trl": "fastgrpo.integrations.trl needs trl, not installed here: pip install 'fastgrpo[trl]'",  # noqa: E501
}


@pytest.mark.parametrize("module", MISSING)
def test_missing_packages_are_named_at_import(bare, module):
    result = bare("-c", f"import {module}")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"fastgrpo._extras.MissingPackage: {MISSING[module]}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fastgrpo", "train"], f"fastgrpo train needs accelerate, datasets, matplotlib, transformers, {TRAIN}"),
        (["fastgrpo", "train", "--recipe", "r1"], f"fastgrpo train needs .* {TRAIN}"),
        (["fastgrpo", "bench", "--plot", "x.png"], "fastgrpo bench --plot needs matplotlib, .*'fastgrpo.bench.'"),
        (["fastgrpo", "bench", "--report"], "fastgrpo bench --report needs matplotlib, .*'fastgrpo.bench.'"),
        (
            ["fastgrpo.integrations.trl", "x.py"],
            "fastgrpo.integrations.trl needs trl, .*'fastgrpo.trl.'",
        ),
        (
            ["fastgrpo.integrations.trl", "grpo"],
            "fastgrpo.integrations.trl needs trl, .*'fastgrpo.trl.'",
        ),
    ],
)
def test_missing_packages_are_named_by_commands(bare, arguments, message):
    result = bare("-m", *arguments)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert re.search(message.replace("[train]", ".train."), line)


def test_commands_without_extras(bare):
    result = bare("-m", "fastgrpo", "env")
    assert result.returncode == 0 and "backend torch: works" in result.stdout
    sizes = ["--shape", "B=8,T=2,V=64,H=8", "--dtype", "fp32", "--seconds", "0.01"]
    chosen = ["--op", "step", "--op", "linear", "--impl", "fastgrpo", "--impl", "trl", "--backend", "torch"]
    result = bare("-m", "fastgrpo", "bench", *chosen, *sizes)
    assert result.returncode == 0, result.stderr
    assert re.search(r"fastgrpo \(torch\) +\d", result.stdout)  # a time
    assert result.stdout.count("not measured: trl is not installed (pip install 'fastgrpo[bench]')") == 4


def test_folder_is_no_package(tmp_path, monkeypatch):
    """A folder `datasets` beside the user's script can be imported, and has nothing in it."""
    from fastgrpo._extras import MissingPackage, require

    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    require("x", "train", "torch", "packaging")
    with pytest.raises(MissingPackage, match=r"x needs no_such_package, .*\[train\]") as raised:
        require("x", "train", "torch", "no_such_package")
    assert isinstance(raised.value, ImportError) and raised.value.name == "no_such_package"


def test_what_the_project_requires(project):
    assert names_of(project["project"]["dependencies"]) == {"torch", "triton"}
    assert not names_of(project["build-system"]["requires"]) & {"torch", "triton"}
    assert set(project["project"]["optional-dependencies"]) == {"train", "trl", "rewards", "smollm2", "bench", "test"}


def test_extras_bring_what_the_code_says(project):
    extras = {name: names_of(each) for name, each in project["project"]["optional-dependencies"].items()}
    calls = 0
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                extra, *packages = (argument.value for argument in node.args[1:])
                assert set(packages) <= {name.replace("-", "_") for name in extras[extra]}, path  # as imported
                calls += 1
    assert calls >= 4


def test_extras_that_are_named_exist(project):
    known = set(project["project"]["optional-dependencies"])
    texts = [ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci" / "run", *(ROOT / "docs").rglob("*.md")]
    texts += [path for folder in ("fastgrpo", "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = {
        (extra, path)
        for path in texts
        if path.exists()
        for extras in re.findall(r"(?:fastgrpo|\.|\.whl)\\?\[([a-z,]+)\\?\]['\"]", path.read_text())
        for extra in extras.split(",")
    }
    assert len(named) > 5
    assert {extra for extra, _ in named} <= known, named


def test_first_command_of_the_readme_trains():
    commands = re.findall(r"^(?:\$ )?(.*pip install.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands[0] == 'pip install -c constraints.txt ".[train]" && fastgrpo train'


def test_release_runs_what_make_and_ci_run():
    """GitHub's machines are not here; the steps are those that .ci/run takes."""
    yaml = pytest.importorskip("yaml")
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    wheel = release["jobs"]["wheel"]
    assert wheel["container"].endswith("/manylinux_2_28_x86_64")
    lines = [line.strip() for step in wheel["steps"] for line in step.get("run", "").splitlines()]
    made = [target for line in lines if line.startswith("make ") for target in line.split()[1:]]
    assert made == ["wheel-tools", "wheel", "wheel-test"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(made) <= targets
    in_ci = [target for target in re.findall(r"^make (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)]
    of_ci_alone = ("check", "types")
    assert made == [target for target in " ".join(in_ci).split() if target not in of_ci_alone]
