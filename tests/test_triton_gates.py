"""What the Triton kernels compile to, held by numbers: registers, spills, access width, instructions per logit.

No GPU is needed: the kernels are compiled ahead of time, in a process of its own because Triton's interpreter, which
other tests turn on, is chosen when Triton is imported. `pytest -s` prints the table.

The gates were run with Triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0. To run them with another than the one installed:
`pip install --no-deps --target DIR triton==X`, and PYTHONPATH=DIR in front.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
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

FORWARD, WITH_ENTROPY, GRADIENT = 6.0, 7.0, 7.0  # machine instructions per logit on sm_90, at most
SOFTCAP = 10.0  # more with one
FENCE = 0.5  # more where a narrower gradient is written over its own row
STATS = ("stats", "stats_entropy")
CASES = [
    (target, dtype, kernel)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for dtype in (("bf16", "fp32", "fp16") if target == "sm_90" else ("bf16", "fp32"))
    for kernel in (*STATS, "grad", "token", "token_softcap", "token_wide", "token_wide_softcap")
] + [("sm_90", dtype, kernel) for dtype in ("bf16", "fp32", "fp16") for kernel in ("token_groups", "grad_softcap")]
# A gradient narrower than its logits, elsewhere and ("own") in its row's second half.
CASES += [
    (target, dtype, kernel)
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for dtype in (("fp32_bf16", "fp32_fp16") if target == "sm_90" else ("fp32_bf16",))
    for kernel in ("grad", "grad_own", "token", "token_own", "token_own_softcap", "token_wide_own")
]


# ---- in the child process: compile, disassemble, count


def launched(dtype: str, kernel: str, V: int = 151937, T: int = 3, spec=None, start: int = 0):
    """(kernel, threads of a program, arguments, constants), as the backend would launch it; nothing is launched.

    The rows are those of a chunk that begins at row `start`.
    """
    import torch

    from fastgrpo.backends import Rows, Scores, TokenRows, TokenSpec
    from fastgrpo.backends import triton as backend

    calls = []

    def take(kernel, programs, lanes, device, *arguments, **constants):
        calls.append((kernel, lanes, arguments, constants))

    backend.launch.run, run = take, backend.launch.run
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    logits_dtype, _, narrower = dtype.partition("_")
    stride = -(-V // 64) * 64 if narrower else V
    buffer = torch.empty(1, T, stride, dtype=dtypes[logits_dtype])
    x = out = buffer[..., :V]
    if "own" in kernel:
        out = buffer.view(dtypes[narrower])[..., stride : stride + V]
    elif narrower:
        out = torch.empty_like(buffer, dtype=dtypes[narrower])[..., :V]
    ids, mask, seq, row = (
        torch.empty(start + T, dtype=dtype)[start:] for dtype in (torch.int64, torch.bool, torch.int32, torch.float32)
    )
    rows = Rows(ids, mask, row)
    softcap = 30.0 if "softcap" in kernel else None
    try:
        if kernel.startswith("grad"):
            backend.row_grad(x, rows, Scores(row, row, None), row, None, out, softcap=softcap)
        elif kernel.startswith("token"):
            token = TokenRows(row, row, None, None, row, row, None, None)
            if kernel == "token_groups":
                token = token._replace(advantages=None, rewards=row, seq=seq)
            with backend.using(lanes=1024 if "wide" in kernel else 512):
                spec = TokenSpec(beta=0.1) if spec is None else spec
                backend.token_loss(x, rows, token, spec, out, want_entropy=True, softcap=softcap)
        else:
            backend.row_stats(x, rows, want_entropy=kernel == "stats_entropy", softcap=softcap)
    finally:
        backend.launch.run = run
    return calls[-1]  # before the token kernel the advantages of groups may come


def signature_of(name: str, argument):
    """What Triton is told of an argument: its type, that an integer is a stride, and that None is a constant."""
    types = {"torch.float32": "*fp32", "torch.bfloat16": "*bf16", "torch.float16": "*fp16", "torch.int64": "*i64",
             "torch.int32": "*i32", "torch.bool": "*i1"}  # fmt: skip
    if argument is None:
        return "constexpr"
    if isinstance(argument, tuple):
        members = [signature_of(name, x) for x in argument]
        return type(argument)(*members) if hasattr(argument, "_fields") else tuple(members)
    if isinstance(argument, (int, float)):
        return "fp32" if isinstance(argument, float) else "i64" if "stride" in name else "i32"
    return types[str(argument.dtype)]


def absent(path: tuple, argument) -> dict:
    """{where: None} of the arguments, and members of tuples, that are None."""
    if argument is None:
        return {path: None}
    members = argument if isinstance(argument, tuple) else ()
    return {k: v for i, x in enumerate(members) for k, v in absent((*path, i), x).items()}


def compile_case(target: str, dtype: str, kernel: str) -> dict:
    """Compile one kernel as its launcher would, and return what was found in the machine code."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastgrpo.backends.triton import launch

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    # V is odd, and nothing is said of any run-time value: no width below can come from a lucky divisibility.
    function, lanes, arguments, constants = launched(dtype, kernel)
    assert constants.get("PARTS", 1) == (2 if "wide" in kernel else 1)
    names = function.arg_names
    signature = {name: signature_of(name, x) for name, x in zip(names, arguments, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(function, signature=signature, constexprs=absent((), arguments) | constants)
    options = {"num_warps": lanes // gpu.warp_size}
    if nvidia:
        options["maxnreg"] = launch.REGISTERS
    compiled = triton_compile(source, target=gpu, options=options)
    bits = 64 if "_" in dtype else 128
    found = read_sass(compiled.asm["cubin"], bits) if nvidia else read_amdgcn(compiled.asm["amdgcn"], bits)
    for loop in found["loops"]:
        loop["per_logit"] = loop["instructions"] / (loop["loads"] * constants["K"])
    return found


def variants(kernel: str) -> int:
    """How often Triton would compile a kernel for several lengths, strides and places of rows, and objectives."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fastgrpo.backends import TokenSpec

    specs = TokenSpec(beta=0.1), TokenSpec(1, (1.0,), 1.0, True), TokenSpec(2, (16.0, 1.0), 16.0, skip_zero=True)
    keys = set()
    # 1 and multiples of 16 are what Triton specialises upon
    for V, T, start in ((151937, 3, 1), (151936, 1, 2), (151952, 16, 16)):
        for spec in specs:
            function, _, arguments, constants = launched(
                "fp32_bf16" if "own" in kernel else "bf16", kernel, V, T, spec, start
            )
            backend = make_backend(GPUTarget("cuda", 90, 32))
            bind = create_function_from_signature(function.signature, function.params, backend)
            keys.add(str(bind(*arguments, **constants)[1]))
    return len(keys)


def read_sass(cubin: bytes, bits: int) -> dict:
    """What is asked of NVIDIA's machine code, whose sweeps write `bits` at a time."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (kernel,) = sass.kernels(Path(file.name))
    return {
        "registers": kernel.usage["REG"],
        "spilled": kernel.spilled,
        "unfenced": unfenced(kernel.code, kernel.labels, bits),
        "loops": loops(
            kernel.code, kernel.labels, sass.BRANCH, exp=r"MUFU\.EX2", load=r"\bLDGS?T?S?\b", store=r"\bSTG\b",
            wide=(sass.WIDE, rf"\.{bits}\b"), pause=r"\bBAR\b", ignore=r"\bNOP\b",
        ),
    }  # fmt: skip


def unfenced(code, labels, bits: int) -> dict[str, int]:
    """The narrow loads and stores from which a path without a barrier leads to a sweep that writes gradients.

    That is one of each, of the row's ends, if the barrier stands between the target's logit, whose address takes
    several loads, and the first gradient. A narrower gradient of the ends, over their own row, comes after the sweep.
    """
    before = {i: [] for i in range(len(code) + 1)}  # the instructions that may come just before
    for i, instruction in enumerate(code):
        if target := re.search(sass.BRANCH, instruction):
            before[labels[target[1]]].append(i)
        if instruction.startswith("@") or not re.search(r"\b(?:BRA|EXIT|RET)\b", instruction):
            before[i + 1].append(i)
    sweeps = [
        range(start, end + 1)
        for start, end in sass.innermost(code, labels)
        if re.search(r"MUFU\.EX2", "".join(code[start : end + 1])) and re.search("STG", "".join(code[start : end + 1]))
    ]
    seen, left = set(), [i for sweep in sweeps for i in sweep]
    while left:
        i = left.pop()
        if i not in seen and not code[i].startswith("BAR.SYNC"):
            seen.add(i)
            left += before[i]
    narrow = [code[i] for i in seen if not re.search(rf"{sass.WIDE}|STG.*\.{bits}\b", code[i])]
    return {"sweeps": len(sweeps), "loads": sum("LDG" in x for x in narrow), "stores": sum("STG" in x for x in narrow)}


def read_amdgcn(text: str, bits: int) -> dict:
    labels, code = {}, []
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif re.match(r"[svbgd]\w*_\w+", line):
            code.append(line)
    number = {name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in
              ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}  # fmt: skip
    return {
        "registers": number["vgpr_count"],
        "spilled": number["vgpr_spill_count"] + number["private_segment_fixed_size"] + text.count("scratch_"),
        "loops": loops(
            code, labels, r"s_c?branch\w*\s+(\.LBB\w+)", exp=r"v_exp_f32", load=r"(?:global|buffer)_load",
            store=r"(?:global|buffer)_store", wide=(r"dwordx4", rf"dwordx{bits // 32}"), pause=r"s_barrier",
            ignore=r"s_nop",
        ),
    }  # fmt: skip


def loops(code, labels, branch, *, exp, load, store, wide, pause, ignore) -> list[dict]:
    """The innermost loops with 128-bit loads and exponentials. wide: of a load, and of a store."""
    found, (wide_load, wide_store) = [], wide
    for start, end in sass.innermost(code, labels, branch):
        body = [x for x in code[start : end + 1] if not re.search(ignore, x)]
        loads = [x for x in body if re.search(load, x)]
        stores = [x for x in body if re.search(store, x)]
        kinds = {"L": load, "S": store, "B": pause}
        if any(re.search(wide_load, x) for x in loads) and any(re.search(exp, x) for x in body):
            found.append({
                "instructions": len(body),
                "loads": sum(bool(re.search(wide_load, x)) for x in loads),
                "stores": sum(bool(re.search(wide_store, x)) for x in stores),
                "narrow": sum(not re.search(wide_load, x) for x in loads)
                + sum(not re.search(wide_store, x) for x in stores),
                "exponentials": sum(bool(re.search(exp, x)) for x in body),
                "order": "".join(kind for x in body for kind, pattern in kinds.items() if re.search(pattern, x)),
                "spills": sum(bool(re.search(r"\bLDL\b|\bSTL\b|scratch_", x)) for x in body),
            })  # fmt: skip
    return found


# ---- in pytest


def may_spill(target: str, kernel: str) -> int:
    """Bytes of stack and accesses to it, together, for values of a row or a program; in a loop over logits: none.

    A thread executes about 5,000 instructions for a row, with a softcap 10,000, so that on NVIDIA these are less than
    1% of them. A program of 1024 threads leaves each of them 64 registers on NVIDIA, and 128 on AMD.
    """
    version = tuple(int(n) for n in importlib.metadata.version("triton").split(".")[:2])
    if target == "gfx942" and "wide" in kernel:
        return 170
    if target == "sm_100" and "wide" in kernel:
        return 64
    if target == "sm_100" and "token" in kernel:
        if version >= (3, 8) and kernel != "token":
            return 48
        if version < (3, 7):
            return 16
    return 16 if "softcap" in kernel else 0


def is_fenced(order: str, count: int) -> bool:
    """Whether in each turn of a loop a barrier stands behind the loads and before the stores, wherever it begins."""
    return sorted(order) == sorted("LS" * count + "B") and "L" * count + "B" + "S" * count in 2 * order


def compiled(cases: list) -> list:
    """This file run in a process without the interpreter: `compile_case` of each case, or `variants` of a kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, json.dumps(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def machine_code():
    """{case: what `compile_case` found}, from two child processes without the interpreter; prints the table."""
    halves = CASES[::2], CASES[1::2]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [pair for half, results in zip(halves, pool.map(compiled, halves), strict=True)
                 for pair in zip(half, results, strict=True)]  # fmt: skip
    found = dict(found)
    print("\n| target | dtype | kernel | registers | instructions per logit | loads, stores of a vector a loop |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        kinds = hot(case, found[case])
        counts = ", ".join(f"{kind} {x['per_logit']:.2f}" for kind, x in kinds.items())
        widths = ", ".join(f"{x['loads']} {x['stores']}" for x in kinds.values())
        print("| " + " | ".join([*case, str(found[case]["registers"]), counts, widths]) + " |")
    return found


def hot(case, found) -> dict[str, dict]:
    """The hot loops of a kernel by what they do; where unrolling left a remainder loop, the one that does most."""
    kinds = {"stats": "forward", "stats_entropy": "entropy"}
    chosen = {}
    for loop in found["loops"]:
        kind = "gradient" if loop["stores"] else kinds.get(case[2], "entropy")
        if kind not in chosen or loop["exponentials"] > chosen[kind]["exponentials"]:
            chosen[kind] = loop
    return chosen


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_machine_code(case, machine_code):
    target, _, kernel = case
    found = machine_code[case]
    assert found["spilled"] <= may_spill(target, kernel), found
    kinds = hot(case, found)
    expected = {"stats": "forward", "stats_entropy": "entropy", "grad": "gradient", "token": "entropy gradient"}
    assert set(kinds) == set(expected[kernel if kernel in STATS else kernel.split("_")[0]].split()), (
        f"the hot loops were not found among {found['loops']}"
    )
    for kind, loop in kinds.items():
        assert loop["narrow"] == 0, f"{kind}: accesses narrower than a vector: {loop}"
        assert loop["spills"] == 0, f"{kind}: spills in the loop: {loop}"
        fences = "own" in kernel and kind == "gradient"
        assert loop["order"].count("B") == fences, f"{kind}: barriers in the loop: {loop}"
        assert loop["loads"] >= 4 and loop["stores"] == (loop["loads"] if kind == "gradient" else 0), f"{kind}: {loop}"
        if target == "sm_90":
            limit = {"forward": FORWARD, "entropy": WITH_ENTROPY, "gradient": GRADIENT}[kind]
            limit += (SOFTCAP if "softcap" in kernel else 0) + FENCE * fences
            assert loop["per_logit"] <= limit, f"{kind}: {loop}"


INPLACE = [c for c in CASES if c[2] not in STATS and ("_" not in c[1] or "own" in c[2])]
WITH_TARGET = [c for c in INPLACE if "token" in c[2] or "softcap" in c[2]]  # where it is read


@pytest.mark.parametrize("case", [c for c in WITH_TARGET if c[0] == "sm_90"], ids="-".join)
def test_no_gradient_before_every_warp_has_the_target(case, machine_code):
    found = machine_code[case]["unfenced"]
    assert found["sweeps"] >= 2, found  # the hot one, the careful one, and what unrolling may leave
    assert (found["loads"], found["stores"]) == (1, 0 if "own" in case[2] else 1), found


@pytest.mark.parametrize("case", [c for c in INPLACE if "own" in c[2]], ids="-".join)
def test_no_narrower_gradient_before_every_warp_has_its_tile(case, machine_code):
    sweeps = [loop for loop in machine_code[case]["loops"] if loop["stores"]]
    assert len(sweeps) == 2, sweeps  # the hot one, and the careful one
    for loop in sweeps:
        assert is_fenced(loop["order"], loop["loads"]), loop


def test_lengths_strides_and_numbers_are_not_specialised_upon():
    kernels = ["stats", "stats_entropy", "grad", "grad_own", "token", "token_own", "token_softcap", "token_wide",
               "token_groups"]  # fmt: skip
    assert dict(zip(kernels, compiled(kernels), strict=True)) == dict.fromkeys(kernels, 1)


if __name__ == "__main__":
    print(json.dumps([variants(x) if isinstance(x, str) else compile_case(*x) for x in json.loads(sys.argv[1])]))
