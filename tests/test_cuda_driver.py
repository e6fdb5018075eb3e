"""The program that runs every CUDA kernel under compute-sanitizer, here on the machine of cuda_host: its cases, its
truth, and that it sees what is wrong."""

import re
import shutil
import subprocess

import cuda_host
import pytest

DRIVER = cuda_host.HERE.parent / "cuda_driver" / "driver.cpp"
KERNELS = sorted((cuda_host.CSRC / "cuda").glob("*.cu"))

# What is broken in two_pass.cu: text -> text.
PLANTED = {
    "x[k] *= factor;": "x[k] *= 1.1f * factor;",
    "E::number(global_load(span.at(target)))": "E::number(global_load(span.at(target + (1 << 20))))",
    "sync_threads(kWorkersBarrier, kWorkers);  // the target's own gradient comes last":
        "sync_threads(kWorkersBarrier, kWorkers);"
        "if (row + 1 < block_count() && thread == 0) global_store((Bits*)out.at(out.lead + out.count), (Bits)0);",
}  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(name, sources): the program with these kernels; gives run(*arguments) -> (exit status, output)."""
    if (why := cuda_host.unavailable()) is not None:
        pytest.skip(why)

    def build(name, sources):
        program = cuda_host.build(tmp_path_factory.mktemp(name), [*sources, DRIVER], program=name)

        def run(*arguments):
            done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
            return done.returncode, done.stdout + done.stderr

        return run

    return build


def test_every_kernel_is_right(build):
    status, said = build("driver", KERNELS)("--quick")
    *lines, last = said.splitlines()
    assert status == 0 and last == f"{len(lines)} cases are right, 0 wrong, 0 skipped", said[-4000:]
    assert all(line.startswith("ok ") for line in lines)
    for dtype in ("fp32", "bf16", "fp16"):
        for kernel in ("row_stats", "token_loss"):
            for how in ("two passes", *(f"cluster {n}" for n in (1, 2, 4, 8, 16))):
                for V in (61, 1003):
                    assert f"{kernel} {dtype} V={V}, {how}" in said
        for what in ("in place", "apart"):
            assert re.search(rf"token_loss {dtype} V=\d+, cluster 16.*{what}:", said)
        for what in ("in place", "apart", "apart and otherwise modulo 16"):
            for entropy in ("", ", entropy"):
                assert f"row_grad {dtype} V=1003{entropy}, {what}:" in said
        for how in ("", ", two passes"):
            assert f"token_loss {dtype} V=1003{how}, groups" in said
        for n in (1, 2, 3, 4):
            assert all(f"{n} buffers, {blocks} to a multiprocessor" in said for blocks in (1, 2))
        assert all(f"scale {dtype} V=61, factor {factor}" in said for factor in (1, 0.3))
    for dtype in ("fp32 to bf16", "fp32 to fp16"):
        for what in ("in the second half of the rows", "apart", "apart and otherwise modulo 16"):
            assert f"row_grad {dtype} V=1003, entropy, {what}:" in said
        for how in ("two passes", *(f"cluster {n}" for n in (1, 2, 4, 8, 16))):
            assert re.search(rf"token_loss {dtype} V=1003, {how}, entropy, in the second half of the rows:", said)


def test_what_is_wrong_is_seen(build, tmp_path):
    two_pass = (cuda_host.CSRC / "cuda" / "two_pass.cu").read_text()
    for text, broken in PLANTED.items():
        assert two_pass.count(text) == 1
        two_pass = two_pass.replace(text, broken)
    planted = tmp_path / "two_pass.cu"
    planted.write_text(two_pass)
    run = build("planted", [planted, *(path for path in KERNELS if path.name != planted.name)])
    for case, why in {
        "scale bf16 V=61, factor 0.3": r"WRONG .*: product of row 0, element \d+: .*\n0 cases are right, 1 wrong",
        "row_stats fp32 V=61, two passes": r"ERROR  kernel: out of bounds: |ERROR  call: out of bounds: ",
        "row_grad fp16 V=1003, apart": r"WRONG .*: what is around rows .*: 0, not -77",
        "no such case": "^0 cases are right, 0 wrong, 0 skipped",
    }.items():
        status, said = run("--quick", "--filter", case)
        assert status == 1 and re.search(why, said), said
    status, said = run("--filter", "token_loss bf16 V=5, cluster 2")
    assert status == 0, said  # what is not broken is right
    assert run("--quickly")[0] == 2


def test_it_is_c_plus_plus_for_nvcc(tmp_path):
    """With the true runtime's headers; the kernels are compiled with them by test_cuda_gates.py."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    include = (f"-I{cuda_host.CSRC}", f"-I{cuda_host.CSRC / 'cuda'}")
    command = ["nvcc", "-std=c++17", *include, "-x", "cu", "-c", DRIVER, "-o", tmp_path / "driver.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
