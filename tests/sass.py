"""Machine code of NVIDIA chips, read with the tools that Triton brings: kernels, what they use, their loops."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

BRANCH = r"\bBRA\b.*`\((\.L\w+)\)"
LOCAL = r"\b(?:LDL|STL)\b"
WIDE = r"\.128\b"


@dataclass
class Kernel:
    name: str  # mangled
    usage: dict[str, int]  # REG, STACK, SHARED, LOCAL
    code: list[str]  # its instructions
    labels: dict[str, int]  # where in `code` they are

    @property
    def spilled(self) -> int:
        return self.usage["STACK"] + self.usage["LOCAL"] + sum(bool(re.search(LOCAL, x)) for x in self.code)


def tools() -> Path | None:
    """Where cuobjdump and nvdisasm are."""
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    return path if path and (path / "cuobjdump").exists() and (path / "nvdisasm").exists() else None


def kernels(cubin: Path) -> list[Kernel]:
    usage = subprocess.check_output([tools() / "cuobjdump", "--dump-resource-usage", cubin], text=True)
    text = subprocess.check_output([tools() / "nvdisasm", "-c", cubin], text=True)
    used = dict(re.findall(r"Function (\S+):\s*\n\s*(.*)", usage))
    found = []
    for section in re.split(r"\.section\s+\.text\.", text)[1:]:
        labels, code = {}, []
        for line in section.splitlines():
            if label := re.match(r"\s*(\.L\w+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(instruction[1])
        name = section.split(",")[0].strip('"')
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", used[name])}
        found.append(Kernel(name, numbers, code, labels))
    return found


def innermost(code: list[str], labels: dict[str, int], branch: str = BRANCH) -> list[tuple[int, int]]:
    """(first, last instruction) of the innermost loops; a loop ends at the last branch back to its label."""
    spans = {}
    for end, instruction in enumerate(code):
        if (target := re.search(branch, instruction)) and labels.get(target[1], end + 1) <= end:
            spans[labels[target[1]]] = end
    return [
        (start, end)
        for start, end in sorted(spans.items())
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans.items())
    ]
