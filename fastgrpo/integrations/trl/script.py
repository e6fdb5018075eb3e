"""`python -m fastgrpo.integrations.trl`: a TRL script, or one of TRL's own commands, as it is, on fastgrpo's kernels.

    python -m fastgrpo.integrations.trl [--subclass] SCRIPT ARGS...
    python -m fastgrpo.integrations.trl [--subclass] grpo --config config.yaml ...
    accelerate launch -m fastgrpo.integrations.trl SCRIPT ARGS...
    torchrun --nproc-per-node 2 -m fastgrpo.integrations.trl SCRIPT ARGS...

The script runs under `patch()`; with `--subclass`, `trl.GRPOTrainer` is fastgrpo's besides. sys.argv, sys.path[0] and
`__main__` are what they are under `python SCRIPT ARGS...`, and so are the exit code and a traceback's last frames.
TRL's command launches its processes through accelerate, as it does by itself; where a launcher has started this
process already, it runs in it. A process that the script starts by itself, other than by fork, is not patched.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.resources
import io
import os
import sys
from importlib.metadata import version

from fastgrpo import __version__
from fastgrpo._extras import MissingPackage, require
from fastgrpo.integrations.seam import Patch, Place, held_in, in_place

_NAME = "python -m fastgrpo.integrations.trl"
_USAGE = f"usage: {_NAME} [--subclass] SCRIPT|COMMAND [ARGS...]; COMMAND: one of TRL's that train, such as grpo"
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as launchers name it
_LAUNCHED = (*_RANKS, "ACCELERATE_MIXED_PRECISION")  # the last: `accelerate launch` of one process


class _Refused(Exception):
    """Why nothing is run: shown without a traceback."""


def main(argv: list[str]) -> int:
    """Run what `argv` names; returns the exit status, unless the script ends the process itself."""
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return 0
    flags = ["--subclass"] if argv[:1] == ["--subclass"] else []
    try:
        if not argv[len(flags) :] or argv[len(flags)].startswith("-"):
            raise _Refused(f"expected a script or a command, got {' '.join(argv) or 'nothing'}; {_USAGE}")
        target, *arguments = argv[len(flags) :]
        require("fastgrpo.integrations.trl", "trl", "trl")
        if target in _commands():
            if not any(name in os.environ for name in _LAUNCHED):
                return _launch(target, arguments, flags)
            target = str(importlib.resources.files("trl.scripts") / f"{target}.py")
        if not os.path.isfile(target):
            raise _Refused(f"expected a script or one of TRL's {', '.join(_commands())}; no such file: {target}")
        replaced = _replace(bool(flags))
    except (MissingPackage, _Refused) as error:
        print(f"{_NAME}: error: {error}", file=sys.stderr)
        return 2
    if not any(int(os.environ.get(name, 0)) for name in _RANKS):
        print(f"fastgrpo {__version__} in TRL {version('trl')}: replaced {replaced}", file=sys.stderr)
    _run(target, arguments)
    return 0


def _commands() -> list[str]:
    """TRL's commands that train."""
    from trl.cli.commands import TrainingCommand, get_commands

    return [command.name for command in get_commands() if isinstance(command, TrainingCommand)]


def _launch(command: str, arguments: list[str], flags: list[str]) -> int:
    """TRL's command, which starts processes through accelerate; each comes back here, with TRL's script."""
    from trl.cli import accelerate_launcher
    from trl.cli.main import main as trl_main

    launch = accelerate_launcher.launch_training_script

    def launch_here(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
        launch(script_name, [*launch_args, "--module", "fastgrpo.integrations.trl", *flags], training_script_args)

    with in_place([Place(accelerate_launcher, "launch_training_script", launch_here)]):
        return trl_main([command, *arguments])


def _replace(subclass: bool) -> str:
    """Put fastgrpo in TRL's places, for the rest of the process; returns their names."""
    from fastgrpo.integrations.trl import places, trainer, versions

    try:
        replaced = str(places.patch())
    except RuntimeError as error:  # not a TRL that it knows
        raise _Refused(error) from error
    if not subclass:
        return replaced
    # scripts import it from more than one of TRL's modules
    Patch(lambda: held_in("trl", "GRPOTrainer", versions.OwnGRPOTrainer, trainer.GRPOTrainer)).put()
    return f"{replaced}, trl.GRPOTrainer"


def _run(script: str, arguments: list[str]) -> None:
    """Run a file in the place of this process's main module, which others may hold already."""
    path = os.path.abspath(script)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec")
    sys.argv = [script, *arguments]
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # else it has no entry for the script
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    namespace = vars(sys.modules["__main__"])
    annotations = {"__annotations__": {}} if "__annotations__" in namespace else {}  # up to Python 3.13
    namespace.clear()
    namespace.update(
        **annotations,
        __name__="__main__",
        __doc__=None,
        __package__=None,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
        __spec__=None,
        __builtins__=builtins,
        __file__=path,
        __cached__=None,
    )
    exec(code, namespace)
