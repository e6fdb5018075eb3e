"""`product`: all GEMMs of the head, which write the dtype of their operands, or fp32.

A product of two bf16 or fp16 numbers is exact in fp32, so such operands and an fp32 sum have the precision of an fp32
head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.backends import cpu
from fastgrpo.engine.plan import cut

SLICE_BYTES = 1 << 20  # of an fp32 copy, which stays in a CPU's cache between its cast and its GEMM


@torch.compiler.assume_constant_result
def writes_fp32(device_type: str) -> bool:
    """Whether a GEMM of narrow operands on such a device writes its fp32 sums at the speed of those operands."""
    if device_type == "cpu":
        return cpu.unavailable() is None
    return device_type == "cuda" and torch.version.hip is None


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, bias: Tensor | None = None) -> None:
    """out = a @ b, or a @ b + bias, or with `add` out + a @ b.

    Args:
        a (M, K), b (K, N): of one dtype.
        out (M, N): in their dtype or, from bf16 or fp16, in fp32; unit stride in N.
        bias (N,) fp32 (float64 for float64), contiguous: added before a sum is rounded; not with `add`.
    """
    assert not add or bias is None
    if a.device.type == "cpu" and a.dtype != torch.float64 and writes_fp32("cpu"):
        cpu.matmul(a, b, out, add=add, bias=bias)
    elif out.dtype == a.dtype:
        if add:
            out.addmm_(a, b)
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias.to(out.dtype), a, b, out=out)
    elif bias is not None:
        product(a, b, out.copy_(bias), add=True)
    elif writes_fp32(a.device.type):
        _to_fp32(a, b, out, add)
    else:
        _through_fp32(a, b, out, add)


def _to_fp32(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """`product` by cuBLAS, which reads bf16 or fp16 and writes fp32."""
    if not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # torch 2.9 takes a sum that is wider than the operands here, and only later versions in addmm
        batch = out[None]
        torch.baddbmm(batch, a[None], b[None], out_dtype=out.dtype, out=batch)


def _through_fp32(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """`product` by GEMMs of fp32 copies: of all of the smaller operand, of a slice of the longest dimension at a time.

    With the inner dimension the longest, both are cut, and out is their sum.
    """
    (m, k), n = a.shape, b.shape[1]
    longest = max(m, k, n)
    step = max(1, SLICE_BYTES * longest // (4 * max(a.numel(), b.numel(), 1)))
    if k > max(m, n):
        for part in cut(0, k, step):
            product(a[:, part].float(), b[part].float(), out, add=add or part.start > 0)
    elif longest == n:
        whole = a.float()
        for part in cut(0, n, step):
            product(whole, b[:, part].float(), out[:, part], add=add)
    else:
        whole = b.float()
        for part in cut(0, m, step):
            product(a[part].float(), whole, out[part], add=add)
