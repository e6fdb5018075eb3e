"""How the modules lie: who imports whom, what an import loads, and how long a file and a signature may be."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import warnings
from pathlib import Path

import installed
import pytest

import fastgrpo

TRITON = ("triton",) if sys.platform == "linux" else ()
HOUSE = Path(fastgrpo.__file__).parent
# each imports from its own floor and from those below it; what is not named is on the floor of `_defaults`
FLOORS = (
    ("__main__", "cli"),
    ("commands", "bench"),
    ("recipes",),
    ("trainer",),
    ("integrations",),
    ("rewards",),
    ("models",),
    ("", "loss", "linear", "logps", "policy", "reference"),  # the doors
    ("output",),
    ("engine",),
    ("objective",),
    ("batch", "advantages", "backends"),
)
BELOW_THE_DOORS = ("output", "engine", "objective", "batch", "backends")


def name_of(path):
    parts = path.relative_to(HOUSE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(HOUSE.rglob("*.py"))}


def room(module):
    """The folder below fastgrpo/ that a module lies in, or the module itself."""
    return module.split(".")[1] if "." in module else ""


def floor(module):
    return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), len(FLOORS))  # the lowest


def imports(source, module, is_package, modules):
    """The modules of the house that a module imports: at its top, within functions and for type checking alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name` is the package's unless the name is a module there
            targets = [name if (name := f"{base}.{alias.name}") in modules else base for alias in node.names]
        else:
            continue
        yield from (target for target in targets if target in modules)


@pytest.fixture(scope="module")
def graph():
    return {
        module: set(imports(path.read_text(), module, path.name == "__init__.py", MODULES))
        for module, path in MODULES.items()
    }


def circle_through(module, graph):
    """A shortest way along imports from a module to itself; None where there is none."""
    ways = [[module, target] for target in sorted(graph[module])]
    seen = set(graph[module])
    for way in ways:  # which grows
        if way[-1] == module:
            return way
        for target in sorted(graph[way[-1]] - seen):
            seen.add(target)
            ways.append([*way, target])
    return None


@pytest.mark.parametrize(
    "source, found",
    [
        ("import fastgrpo.a", {"fastgrpo.a"}),
        ("from fastgrpo import a, name", {"fastgrpo.a", "fastgrpo"}),
        ("from fastgrpo.a import name", {"fastgrpo.a"}),
        ("from fastgrpo.b import c as other", {"fastgrpo.b.c"}),
        ("from . import c", {"fastgrpo.b.c"}),
        ("from .c import name", {"fastgrpo.b.c"}),
        ("from ..a import name", {"fastgrpo.a"}),
        ("def f():\n    from fastgrpo.a import name", {"fastgrpo.a"}),
        ("if TYPE_CHECKING:\n    from fastgrpo.a import name", {"fastgrpo.a"}),
        ("import os, torch.nn\nfrom torch import a", set()),
    ],
)
def test_imports_are_seen(source, found):
    modules = ["fastgrpo", "fastgrpo.a", "fastgrpo.b", "fastgrpo.b.c", "fastgrpo.b.d"]
    assert set(imports(source, "fastgrpo.b.d", False, modules)) == found
    if "from .c" in source or "from . " in source:
        assert set(imports(source, "fastgrpo.b", True, modules)) == found


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set(), "e": {"e"}}
    circles = {module: circle_through(module, graph) for module in graph}
    assert circles == {"a": None, "b": ["b", "c", "b"], "c": ["c", "b", "c"], "d": None, "e": ["e", "e"]}


def test_no_circle_of_imports(graph):
    circles = [circle_through(module, graph) for module in graph]
    assert [" -> ".join(circle) for circle in circles if circle] == []


def test_imports_go_down(graph):
    upward = [(module, to) for module in graph for to in graph[module] if floor(to) < floor(module)]
    assert [" -> ".join(pair) for pair in upward] == []


@pytest.mark.parametrize("name", ["integrations", "rewards", "models", ""])
def test_what_does_without_the_trainer(name, graph):
    """Nor does it reach the trainer through what it imports."""
    reached, new = set(), {module for module in graph if room(module) == name}
    assert new
    while new:
        reached |= new
        new = {to for module in new for to in graph[module]} - reached
    assert [module for module in reached if room(module) in ("trainer", "recipes", "commands")] == []


def foreign(*names):
    """The names of modules that no package brings of those called `names`, torch and what these require."""
    allowed = {*map(str.lower, names), *installed.closure("torch", "numpy", *TRITON)}
    brought_by = importlib.metadata.packages_distributions()
    return {
        module
        for module, distributions in brought_by.items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions} & allowed
    }


def loaded_by(code):
    """The names of the modules that a fresh process has loaded after the code."""
    code += "\nimport sys; print('\\n', *{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


def test_loss_rewards_and_help_load_torch_alone():
    """With what torch itself loads where that is installed. So they are quick, and miss no package."""
    code = """
import contextlib, fastgrpo, fastgrpo.rewards
from fastgrpo.cli import main
for command in ("bench", "train"):
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
"""
    optional = foreign("fastgrpo")
    assert {"accelerate", "datasets", "matplotlib", "tokenizers", "transformers"} <= optional
    assert loaded_by(code) & optional - loaded_by(f"import {', '.join(('torch', *TRITON))}") == set()


def test_no_long_files():
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: n for module, n in lengths.items() if n > 400} == {}


def functions():
    """(module, function) of all of them; the parameters of Triton's kernels are those of a launch, constants too."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield module, node


def test_no_long_lists_of_parameters():
    long = {}
    for module, node in functions():
        constants = [a for a in node.args.args if ast.unparse(a.annotation or ast.Constant(0)) == "tl.constexpr"]
        count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) - len(constants)
        if count > 12:
            long[f"{module}, line {node.lineno}"] = count
    assert long == {}


def test_no_long_functions():
    """Below the doors a function fits on a screen, its docstring aside."""
    long = {}
    for module, node in functions():
        if room(module) in (*BELOW_THE_DOORS, "loss", "linear") and not isinstance(node, ast.Lambda):
            docs = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            if (length := node.end_lineno - node.lineno + 1 - docs) > 60:
                long[f"{module}.{node.name}"] = length
    assert long == {}


MOVED = {
    "fastgrpo.trainer.rewards": "fastgrpo.rewards",
    "fastgrpo.trainer.recipe": "fastgrpo.recipes.r1",
    "fastgrpo.trainer.template": "fastgrpo.recipes.template",
    "fastgrpo.trainer.embedded": "fastgrpo.recipes.sums",
    "fastgrpo.trainer.word_problems": "fastgrpo.recipes.word_problems",
}


@pytest.mark.parametrize("old, new", MOVED.items())
def test_old_names_warn_and_work(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    there = importlib.import_module(new)
    public = getattr(there, "__all__", [name for name in vars(there) if name[0].islower()])
    code = compile(f"from {old} import {', '.join(public)}", "users.py", "exec")
    with pytest.warns(DeprecationWarning, match=f"{old} has moved: import from {new};") as caught:
        exec(code, found := {})
    assert [warning.filename for warning in caught] == ["users.py"]
    assert all(found[name] is getattr(there, name) for name in public)
    assert importlib.import_module(old) is there


def test_rewards_of_the_trainer_need_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from fastgrpo.trainer import rewards
    assert rewards.numeric is fastgrpo.rewards.numeric and "rewards" in fastgrpo.trainer.__all__
