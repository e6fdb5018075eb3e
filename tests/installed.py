"""What is installed, by distribution: folders to put on a path in place of the whole environment."""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def closure(*names):
    """The distributions `names` and all that they require, by normalised name."""
    found, waiting = {}, [(name, "") for name in names]
    while waiting:
        name, extra = waiting.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, extra) in found:
            continue
        found[name, extra] = distribution = metadata.distribution(name)
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, each) for each in ("", *requirement.extras)]
    return {name: distribution for (name, _), distribution in found.items()}


def top_level(distributions):
    """{name: path} of the files and folders that distributions have in site-packages."""
    tops = {}
    for distribution in distributions:
        for file in distribution.files:
            if file.parts[0] not in ("..", "__pycache__"):
                tops[file.parts[0]] = Path(distribution.locate_file(file.parts[0]))
    return tops


def link(folder, *names):
    """Make a folder that holds the distributions `names`, all that they require, and nothing else."""
    folder.mkdir()
    for name, path in top_level(closure(*names).values()).items():
        (folder / name).symlink_to(path)
    return folder
