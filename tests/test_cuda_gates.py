"""What the CUDA kernels compile to, held by numbers: registers, spills, shared memory, access width, instructions per
logit, and how a row is laid over a cluster.

No GPU is needed: nvcc compiles the kernels ahead of time, for chips as the library ships them, and the shapes come
from the launcher's own code, compiled for the CPU. `pytest -s` prints the tables.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import cuda_host
import pytest
import sass

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
TARGETS = {"one_pass": ("sm_90a", "sm_100"), "two_pass": ("sm_80", "sm_90a", "sm_100")}
DTYPES = {"bf16": 8, "fp16": 8, "fp32": 4}  # logits in 16 bytes
NARROW = ("fp32 to bf16", "fp32 to fp16")  # of the logits, and of the gradient
IN_A_VECTOR = {**DTYPES, **dict.fromkeys(NARROW, 4)}
CASES = [
    (target, kernel, dtype, entropy)
    for source, targets in TARGETS.items()
    for target in targets
    for kernel in (("one_pass",) if source == "one_pass" else ("stats", "grad", "scale"))
    for dtype in (IN_A_VECTOR if kernel in ("one_pass", "grad") else DTYPES)
    for entropy in ((False, True) if kernel in ("one_pass", "stats") else (None,))
]
# Machine instructions per logit of a kernel's hot loops together, at most; without and with entropy.
LIMITS = {
    ("one_pass", False): 10.0, ("one_pass", True): 12.0, ("stats", False): 7.5, ("stats", True): 10.0,
    ("grad", None): 5.5, ("scale", None): 3.5,
}  # fmt: skip
HOT = {"one_pass": ("maximum", "sums", "gradient"), "stats": ("tile",), "grad": ("gradient",), "scale": ("scale",)}

# Of a multiprocessor.
REGISTERS = 65536
QUARTERS = 4  # each has its own registers and warps
SHARED = 228 << 10  # sm_90, sm_100
RESERVED = 1 << 10  # shared memory of a block that belongs to the system; counted as static from sm_90 on

# What the gates must see: kernels squeezed into too few registers, and loads narrow, generic, and behind a barrier.
PLANTED = {
    "spills": """
#include "ptx.h"
#undef FASTGRPO_KERNEL
#define FASTGRPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, 6)
#include "one_pass.cu"
""",
    "loads": """
#include "ptx.h"
namespace fastgrpo {
FASTGRPO_DEVICE Vec planted_load(const Vec* p) {
  Vec v;
  sync_threads(2, 32);
  for (int i = 0; i < 4; ++i) asm volatile("ld.u32 %0, [%1];" : "=r"(v.w[i]) : "l"(p->w + i));
  return v;
}
}
#define global_load_streaming planted_load
#include "two_pass.cu"
""",
}


# ---- the sources' own numbers


def constants() -> dict[str, int]:
    """constexpr int of the sources that are sums of others."""
    known = {}
    for name in ("rows.h", "one_pass.cu", "two_pass.cu"):
        for constant, terms in re.findall(r"^constexpr int (k\w+) = ([\w +]+);", (CUDA / name).read_text(), re.M):
            values = [known.get(x.strip(), x) for x in terms.split("+")]
            if all(str(x).strip().isdigit() for x in values):
                known[constant] = sum(map(int, values))
    return known


def plans() -> dict[str, tuple[int, int]]:
    """{kernel: (threads of a block, blocks of a multiprocessor)}."""
    known, found = constants(), {}
    for name in ("one_pass.cu", "two_pass.cu"):
        pattern = r"FASTGRPO_KERNEL\((\w+), (\w+)\)\s+(\w+)_kernel\("
        for threads, blocks, kernel in re.findall(pattern, (CUDA / name).read_text()):
            found[kernel] = known[threads], int(known.get(blocks, blocks))
    return found


# ---- reading machine code


def case_of(target: str, kernel: sass.Kernel) -> tuple:
    mangled = r"\d+([a-z_]+)_kernelI((?:NS_\w+?E|S\d*_)+)(?:Lb([01])E)?E"
    name, dtypes, entropy = re.search(mangled, kernel.name).groups()
    dtypes = re.findall(r"B?Float(?:16|32)", dtypes)  # one that comes again is not written out again
    dtype = " to ".join({"BFloat16": "bf16", "Float16": "fp16", "Float32": "fp32"}[x] for x in dtypes)
    return target, name, dtype, None if entropy is None else entropy == "1"


def read_loops(case: tuple, kernel: sass.Kernel) -> list[dict]:
    """The innermost loops that access whole vectors, and of what kind they are."""
    found = []
    # Of stores; their addresses end in .64, too.
    wide = r"(?:\.\w+)*\.(?:64|128)\b" if case[2] in NARROW else ".*" + sass.WIDE
    for start, end in sass.innermost(kernel.code, kernel.labels):
        body = [x for x in kernel.code[start : end + 1] if not re.search(r"\bNOP\b", x)]

        def count(pattern, body=body):
            return sum(bool(re.search(pattern, x)) for x in body)

        loop = {
            "instructions": len(body),
            "loads": count(r"\bLD[SG]\b.*" + sass.WIDE),
            "stores": count(r"\bST[SG]\b" + wide),
            "narrow loads": count(rf"\bLD(?:S|G)?\b(?!.*{sass.WIDE})"),
            "narrow stores": count(rf"\bST(?:S|G)?\b(?!{wide})"),
            "exponentials": count(r"\bMUFU\.EX2\b"),
            "barriers": count(r"\bBAR\b|\bSYNCS\b|\bUCGABAR"),
            "slow": count(r"\bCALL\b.*`\(\$|\bMUFU\.(?!EX2)|\bD(?:ADD|MUL|FMA)\b"),  # divisions, doubles
        }
        if loop["loads"] or loop["stores"]:
            vectors = max(loop["loads"], loop["stores"])
            if case[1] == "stats":
                vectors = constants()["kHeld"]
                usual = fewest_instructions(kernel, start, end, vectors, vectors * IN_A_VECTOR[case[2]])
                loop["kind"] = "tile" if usual else "unknown"
                loop["instructions"] = usual or len(body)
            else:
                loop["kind"] = kind_of(case, loop)
            loop["per logit"] = loop["instructions"] / (vectors * IN_A_VECTOR[case[2]])
            found.append(loop)
    return found


def kind_of(case: tuple, loop: dict) -> str:
    """Loops over logits take one exponential for each, or none."""
    _, kernel, dtype, _ = case
    loads, stores = loop["loads"], loop["stores"]
    every = loop["exponentials"] == loads * IN_A_VECTOR[dtype]
    if loads == 0:
        return "zeroes"
    if kernel == "scale":
        return "scale" if loads == stores and loop["exponentials"] == 0 else "unknown"
    if every and stores == loads:
        return "gradient"
    if kernel == "grad" and every and stores == 0 and loop["narrow stores"] == loads * IN_A_VECTOR[dtype]:
        return "other phase"  # whose vectors to write start at other addresses than those read
    if kernel == "one_pass" and stores == 0:
        kinds = {0: "maximum", loads * IN_A_VECTOR[dtype]: "sums"}
        return kinds.get(loop["exponentials"], "unknown")
    return "unknown"


def fewest_instructions(kernel: sass.Kernel, start: int, end: int, loads: int, exponentials: int) -> int | None:
    """On the way once through a loop that passes so many 128-bit global loads and at least so many exponentials.

    A tile's loop is unrolled as a whole. Beside the usual way it holds others, which no tile takes as well: exponents
    of large logits, edges, the target's tile. So its instructions are those of the shortest way, all predicated ones
    included.
    """
    best = {start: {(0, 0): 0}}  # {instruction: {(loads, exponentials) before it: instructions before it}}
    finished = {}
    for i in range(start, end + 1):
        instruction = kernel.code[i]
        branch = re.search(sass.BRANCH, instruction)
        onward = [kernel.labels[branch[1]]] if branch else []
        if not re.match(r"(?:BRA\S* `|EXIT|RET)", instruction):
            onward.append(i + 1)
        for (passed, e), n in best.pop(i, {}).items():
            wide = bool(re.search(r"\bLDG\b.*" + sass.WIDE, instruction))
            state = passed + wide, min(e + ("MUFU.EX2" in instruction), exponentials)
            n += not re.search(r"\bNOP\b", instruction)
            for to in onward:
                ways = finished if to == start else best.setdefault(to, {})
                if i < to <= end or to == start:
                    ways[state] = min(n, ways.get(state, n))
    return finished.get((loads, exponentials))


def read_kernel(case: tuple, kernel: sass.Kernel) -> dict:
    used = {key: sum(bool(re.search(pattern, x)) for x in kernel.code) for key, pattern in (
        ("generic", r"\b(?:LD|ST|ATOM)\b"),
        ("bulk loads", r"\bUBLKCP\.S\.G\b"),
        ("bulk stores", r"\bUBLKCP\.G\.S\b"),
        ("barrier waits", r"\bSYNCS\.PHASECHK\b"),
        ("remote stores", r"\bSTAS\b.*" + sass.WIDE),
        ("bulk copies without a cache policy", r"\bUBLKCP\b(?!.*\bdesc\[)"),
        ("shuffles", r"\bSHFL\.BFLY\b"),
    )}  # fmt: skip
    reserved = RESERVED if case[0] != "sm_80" else 0
    return {
        "registers": kernel.usage["REG"],
        "spilled": kernel.spilled,
        "shared": kernel.usage["SHARED"] - reserved,
        "loops": read_loops(case, kernel),
        **used,
    }


def occupancy(registers: int, threads: int) -> int:
    """Blocks that a multiprocessor's registers hold: a quarter gives them to whole warps, 256 at a time."""
    warp = -(-registers * 32 // 256) * 256
    return REGISTERS // QUARTERS // warp * QUARTERS // (threads // 32)


def hot(case: tuple, found: dict) -> dict[str, dict]:
    """The hot loops in their usual variant: that of the fewest instructions."""
    chosen = {}
    for loop in found["loops"]:
        kind = loop["kind"]
        if kind in HOT[case[1]] and (kind not in chosen or loop["per logit"] < chosen[kind]["per logit"]):
            chosen[kind] = loop
    return chosen


def faults(case: tuple, found: dict) -> list[str]:
    said = []

    def hold(what, good, *details):
        if not good:
            said.append(" ".join(map(str, (what, *details))))

    kernel, narrow = case[1], case[2] in NARROW
    threads, blocks = plans()[kernel]
    hold("spills:", found["spilled"] == 0, found["spilled"])
    hold("registers:", occupancy(found["registers"], threads) >= blocks, found["registers"])
    hold("static shared memory:", found["shared"] == 0, found["shared"])
    hold("generic accesses:", found["generic"] == 0, found["generic"])
    for loop in found["loops"]:
        # A tile ends with its sums over the block: two barriers, and a warp's maximum in 32 bits. A narrow gradient
        # may lie over logits: a barrier is between a tile's loads and its stores.
        tile, other_phase = loop["kind"] == "tile", loop["kind"] == "other phase"
        hold("loop:", loop["kind"] != "unknown", loop)
        hold("slow instructions:", loop["slow"] == 0, loop)
        one = narrow and kernel == "grad" and loop["kind"] == "gradient"
        hold("barriers:", loop["barriers"] == 2 * tile + one, loop)
        hold("narrow loads:", loop["narrow loads"] == 0, loop)
        hold("narrow stores:", other_phase or loop["narrow stores"] == tile, loop)
    kinds = hot(case, found)
    hold("hot loops:", set(kinds) == set(HOT[kernel]), found["loops"])
    for loop in kinds.values():
        hold("not unrolled:", loop["loads"] >= 4, loop)
    if kernel == "grad" and not narrow:
        hold("no loop for another phase", any(x["kind"] == "other phase" for x in found["loops"]))
    if kernel == "one_pass":
        for what in ("bulk loads", "bulk stores", "barrier waits", "remote stores"):
            hold(what, (found[what] > 0) == (what != "bulk stores" or not narrow), found[what])
        policies = "bulk copies without a cache policy"
        hold(f"{policies}:", found[policies] == 0, found[policies])
        # Four steps merge 16 blocks' sums: once, wherever the code stands. A loop over the parts would be "unknown".
        hold("shuffles:", found["shuffles"] >= 4 * (1 + case[3]), found["shuffles"])
    total = sum(x["per logit"] for x in kinds.values())
    hold("instructions per logit:", total <= LIMITS[kernel, case[3]], total, kinds)
    return said


# ---- in pytest


def compile_for(target: str, source: Path, cubin: Path) -> list[sass.Kernel]:
    code = f"arch={target.replace('sm', 'compute')},code={target}"
    command = ["nvcc", "-std=c++17", "-O3", "-gencode", code, f"-I{CUDA.parent}", f"-I{CUDA}"]
    run = subprocess.run([*command, "-cubin", "-o", cubin, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return sass.kernels(cubin)


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """{source or planted fault: {case: what `read_kernel` found}}; prints the table."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    if sass.tools() is None:
        pytest.skip("no cuobjdump and nvdisasm: they come with Triton")
    known = subprocess.check_output(["nvcc", "--list-gpu-code"], text=True).split()
    directory = tmp_path_factory.mktemp("cubins")
    jobs = [("spills", "sm_90a"), *((s, t) for s, targets in TARGETS.items() for t in targets), ("loads", "sm_90a")]

    def compiled(job):
        name, target = job
        if target.rstrip("a") not in known:
            return {}
        source, cubin = CUDA / f"{name}.cu", directory / f"{name}_{target}.cubin"
        if name in PLANTED:
            source = directory / f"{name}.cu"
            source.write_text(PLANTED[name])
        return {case: read_kernel(case, kernel) for kernel in compile_for(target, source, cubin)
                for case in [case_of(target, kernel)]}  # fmt: skip

    found = {name: {} for name, _ in jobs}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for (name, _), kernels in zip(jobs, pool.map(compiled, jobs), strict=True):
            found[name].update(kernels)
    print("\n| target | kernel | dtype | entropy | registers (blocks) | instructions per logit | together |")
    print("|---|---|---|---|---|---|---|")
    for case, kernel in [(c, k) for source in TARGETS for c, k in sorted(found[source].items(), key=str)]:
        target, name, dtype, entropy = case
        kinds = hot(case, kernel)
        registers = f"{kernel['registers']} ({occupancy(kernel['registers'], plans()[name][0])})"
        counts = ", ".join(f"{kind} {kinds[kind]['per logit']:.2f}" for kind in HOT[name] if kind in kinds)
        total = f"{sum(x['per logit'] for x in kinds.values()):.2f}"
        row = (target, name, dtype, {None: "", False: "no", True: "yes"}[entropy], registers, counts, total)
        print("| " + " | ".join(row) + " |")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x) for x in case if x is not None))
def test_machine_code(case, machine_code):
    found = machine_code["one_pass" if case[1] == "one_pass" else "two_pass"]
    if not any(target == case[0] for target, *_ in found):
        pytest.skip(f"this nvcc does not know {case[0]}")
    assert faults(case, found[case]) == []


def test_nothing_else_is_compiled(machine_code):
    assert {case for source in TARGETS for case in machine_code[source]} <= set(CASES)


def test_planted_spills_are_seen(machine_code):
    assert machine_code["spills"]
    for case, found in machine_code["spills"].items():
        assert found["registers"] <= 40 and any(x.startswith("spills") for x in faults(case, found)), found


def test_planted_loads_are_seen(machine_code):
    assert machine_code["loads"]
    for case, found in machine_code["loads"].items():
        said = " ".join(faults(case, found))
        for fault in ("generic accesses", "narrow loads", "barriers", "hot loops"):
            assert fault in said, (case, found)


def test_the_kernel_of_advantages(tmp_path):
    """A thread a sequence: it spills nothing, and knows of every address that it is a global one."""
    if shutil.which("nvcc") is None or sass.tools() is None:
        pytest.skip("no nvcc, cuobjdump or nvdisasm")
    (kernel,) = compile_for("sm_80", CUDA / "advantages.cu", tmp_path / "advantages.cubin")
    assert kernel.spilled == 0 and occupancy(kernel.usage["REG"], 256) >= 2
    assert not [x for x in kernel.code if re.search(r"\b(?:LD|ST|ATOM)\b", x)]


def test_registers_are_given_to_warps():
    assert [occupancy(x, 288) for x in (80, 96, 97, 112)] == [2, 2, 1, 1]
    assert [occupancy(x, 256) for x in (64, 65, 80, 81)] == [4, 3, 3, 2]


# ---- how a row is laid over a cluster


@pytest.fixture(scope="module")
def one_pass_shape(tmp_path_factory):
    """one_pass_shape of the launcher, compiled for the CPU."""
    if (why := cuda_host.unavailable()) is not None:
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("shape")
    wrapper = directory / "shape.cpp"
    wrapper.write_text("""
#include "kernels.h"
extern "C" void shape(int32_t dtype, int64_t vocab, int32_t cluster, int32_t buffers, int32_t blocks, int32_t* to) {
  const auto s = fastgrpo::one_pass_shape(dtype, vocab, {cluster, buffers, blocks, 1}, 227 << 10);
  to[0] = s.cluster, to[1] = s.slice, to[2] = s.buffers, to[3] = s.buffer_bytes, to[4] = s.shared_bytes;
  to[5] = s.blocks;
}
""")
    library = cuda_host.build(directory, [wrapper, CUDA / "one_pass.cu"], options=["-O0"])
    function = ctypes.CDLL(str(library)).shape
    function.argtypes = [ctypes.c_int32, ctypes.c_int64, *[ctypes.c_int32] * 3, ctypes.POINTER(ctypes.c_int32)]
    function.restype = None

    def shape(dtype, vocab, cluster=0, buffers=0, blocks=0):
        numbers = (ctypes.c_int32 * 6)()
        function(["fp32", "bf16", "fp16"].index(dtype), vocab, cluster, buffers, blocks, numbers)
        return tuple(numbers)

    return shape


def check_shape(shape, dtype, vocab):
    cluster, slice_, buffers, buffer_bytes, shared, blocks = shape
    size = 16 // DTYPES[dtype]
    assert (cluster - 1) * slice_ < vocab <= cluster * slice_, "every block has a part, and no logit is left"
    assert slice_ * size % 128 == 0 and buffer_bytes % 128 == 0
    assert buffer_bytes >= slice_ * size + 128, "a slice may start anywhere in its first 128 bytes"
    assert shared >= buffers * buffer_bytes
    assert blocks <= plans()["one_pass"][1]
    assert blocks * (shared + RESERVED) <= SHARED and buffers >= (3 if blocks == 2 else 2)
    return blocks


def test_shapes(one_pass_shape):
    planned = {
        "bf16": {32000: (2,), 50257: (4,), 128256: (4, 8), 151936: (4, 8), 262144: (8, 16)},
        "fp16": {32000: (2,), 50257: (4,), 128256: (4, 8), 151936: (4, 8), 262144: (8, 16)},
        "fp32": {32000: (4,), 50257: (8,), 128256: (8, 16), 151936: (8, 16), 262144: (16,)},
    }
    print(
        "\n| dtype | vocabulary | cluster | slice | buffers | shared bytes | blocks |\n|---|---|---|---|---|---|---|"
    )
    for dtype, vocabularies in planned.items():
        for vocab, clusters in vocabularies.items():
            shape = one_pass_shape(dtype, vocab)
            blocks = check_shape(shape, dtype, vocab)
            cells = dtype, vocab, *shape[:3], shape[4], blocks
            print("| " + " | ".join(map(str, cells)) + " |")
            assert shape[0] in clusters, (dtype, vocab, shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cluster_holds_a_row_or_does_not(dtype, one_pass_shape):
    edges = {}
    for vocab in (1, 2, 63, 64, 65, *range(1000, 2_000_000, 997)):
        shape = one_pass_shape(dtype, vocab)
        if shape[0] == 0:
            assert shape == (0,) * 6
            edges.setdefault("first", vocab)
        else:
            assert "first" not in edges, "a longer row than one that no cluster holds"
            check_shape(shape, dtype, vocab)
        for cluster in (1, 2, 4, 8, 16):  # when asked for, it is that one or none
            asked = one_pass_shape(dtype, vocab, cluster)
            assert asked[0] in (0, cluster) and (asked[0] or cluster < shape[0] or shape[0] == 0)
    assert 262144 < edges["first"] < 2_000_000


@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_are_kept(dtype, one_pass_shape):
    """What is chosen is what comes, or nothing comes."""
    asked = [(c, n, b) for c in (0, 1, 2, 4, 8, 16) for n in (0, 1, 2, 3, 4) for b in (0, 1, 2)]
    held = set()
    for vocab in (1003, 32_000, 128_256, 151_936, 262_144, 600_000):
        for cluster, buffers, blocks in asked:
            shape = one_pass_shape(dtype, vocab, cluster, buffers, blocks)
            if shape[0] == 0:
                assert cluster or buffers or blocks or vocab > 262_144
                continue
            held.add((cluster, buffers, blocks))
            assert (cluster or shape[0], buffers or shape[2], blocks or shape[5]) == (shape[0], shape[2], shape[5])
            assert shape[0] * shape[1] >= vocab and shape[3] >= shape[1] * (16 // DTYPES[dtype]) + 128
            assert shape[5] * (shape[4] + RESERVED) <= SHARED
            assert shape[5] == 2 or 2 * (shape[4] + RESERVED) > SHARED, "one block shares with no other"
    assert held == set(asked)
