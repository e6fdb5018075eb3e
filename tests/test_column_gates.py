"""What the Triton kernels on a few columns compile to: registers, spills, width of access; see `test_triton_gates`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sass

pytest.importorskip("triton")

import test_triton_gates as gates  # noqa: E402

PRODUCTS = ("logits", "d_hidden", "d_weight")
CASES = [
    (target, dtype, kernel)
    for target in ("sm_80", "sm_90", "gfx942")
    for dtype in ("bf16", "fp32")
    for kernel in (*PRODUCTS, "choose", "choose_entropy", "choose_softcap")
]


# ---- in the child process: compile and disassemble


def launched(dtype: str, kernel: str, V: int = 151937, T: int = 3, w: int = 17):
    """(kernel, threads of a program, arguments, constants), as the backend would launch it; nothing is launched."""
    import torch

    from fastgrpo.backends import Rows, Scores
    from fastgrpo.backends import triton as backend

    calls = []

    def take(kernel, programs, lanes, device, *arguments, **constants):
        calls.append((kernel, lanes, arguments, constants))

    backend.launch.run, run = take, backend.launch.run
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    hidden, weight = torch.empty(T, 896, dtype=dtype), torch.empty(64, 896, dtype=dtype)
    ids, row = torch.zeros(T, w, dtype=torch.int32), torch.empty(T)
    try:
        if kernel == "logits":
            backend.column_logits(hidden, weight, row, ids)
        elif kernel == "d_hidden":
            backend.column_d_hidden(ids.float(), ids, weight, hidden)
        elif kernel == "d_weight":
            backend.column_d_weight(row, ids[:, 0].clone(), ids[:, 0].clone(), hidden, weight, row)
        else:
            logits, rows = torch.empty(1, T, V, dtype=dtype), Rows(row.long(), None, row)
            h, softcap = row if kernel == "choose_entropy" else None, 30.0 if kernel == "choose_softcap" else None
            backend.select_columns(logits, rows, Scores(row, row, row), row, h, 2**-12, 512, softcap=softcap)
    finally:
        backend.launch.run = run
    return calls[-1]


def compile_case(target: str, dtype: str, kernel: str) -> dict:
    """Compile one kernel as its launcher would, and return what was found in the machine code.

    H, strides and addresses of the products are multiples of 16, as a model's are. Of a row of logits nothing is said.
    """
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastgrpo.backends.triton import launch

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    function, lanes, arguments, constants = launched(dtype, kernel)
    signature, even = {}, {}
    for i, (name, x) in enumerate(zip(function.arg_names, arguments, strict=False)):
        signature[name] = gates.signature_of(name, x)
        if kernel in PRODUCTS and (name == "H" or "stride" in name or signature[name].startswith("*")):
            even[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, signature=signature, constexprs=gates.absent((), arguments) | constants, attrs=even)
    options = {"num_warps": lanes // gpu.warp_size}
    if nvidia:
        options["maxnreg"] = launch.REGISTERS
    compiled = triton_compile(source, target=gpu, options=options)
    return read_sass(compiled.asm["cubin"]) if nvidia else read_amdgcn(compiled.asm["amdgcn"])


def read_sass(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (kernel,) = sass.kernels(Path(file.name))
    return {
        "registers": kernel.usage["REG"],
        "spilled": kernel.spilled,
        "spilled_in_loops": in_loops(sass.LOCAL, kernel.code, kernel.labels),
        "wide": in_loops(r"\bLDG.*\.128\b", kernel.code, kernel.labels),
        "atomics": sum(bool(re.search(r"\b(?:ATOM[GS]?|RED)\b", x)) for x in kernel.code),
    }


def in_loops(what: str, code: list[str], labels: dict[str, int]) -> int:
    """The most that an innermost loop has of an instruction."""
    loops = sass.innermost(code, labels)
    return max(sum(bool(re.search(what, x)) for x in code[start : end + 1]) for start, end in loops)


def read_amdgcn(text: str) -> dict:
    fields = "vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"
    count, spilled, scratch = (int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in fields)
    return {
        "registers": count,
        "spilled": spilled + scratch,
        "spilled_in_loops": text.count("scratch_"),
        "wide": text.count("load_dwordx4"),
        "atomics": text.count("atomic"),
    }


# ---- in pytest


@pytest.fixture(scope="module")
def machine_code():
    """{case: what `compile_case` found}, from a process without the interpreter; prints the table."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, json.dumps(CASES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    found = dict(zip(CASES, json.loads(run.stdout.splitlines()[-1]), strict=True))
    for case, numbers in found.items():
        print(*case, numbers)
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_machine_code(case, machine_code):
    """What a row is made of waits in memory while a loop runs over it; products hold all in registers."""
    _, dtype, kernel = case
    found = machine_code[case]
    assert found["atomics"] == 0, found
    if kernel in PRODUCTS:
        assert found["spilled"] == 0 and found["wide"] >= 2, found
    else:
        assert found["spilled"] <= 80 and found["spilled_in_loops"] == 0, found
        assert found["wide"] >= 4 or dtype == "bf16", found  # whose vectors are of 64 bits, to need no more registers


if __name__ == "__main__":
    print(json.dumps([compile_case(*case) for case in json.loads(sys.argv[1])]))
