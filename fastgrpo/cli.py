"""The command `fastgrpo`: env | bench | train."""

from __future__ import annotations

import sys

from fastgrpo.commands import bench, env, errors, train
from fastgrpo.commands.options import Parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = Parser(prog="fastgrpo", description="GRPO training with fused loss kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="env|bench|train")
    for command in (env, bench, train):
        command.add(commands)
    options = parser.parse_args(argv)
    return errors.run(options.command, lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
