"""The one function of all GEMMs: against float64 in every dtype and layout, and what torch is asked for on CUDA."""

import pytest
import torch
from cases import rel_norm

from fastgrpo.engine import gemm

NARROW = (torch.bfloat16, torch.float16)
SHAPES = {"n longest": (5, 37, 301), "k longest": (7, 301, 19), "m longest": (301, 11, 23), "one row": (1, 33, 70)}


def strided(x):
    """The same values, in the second half of rows of twice their length, as a gradient lies in its logits."""
    rows, width = x.shape
    memory = torch.full((rows, 2 * width + 6), torch.nan, dtype=x.dtype, device=x.device)
    view = memory[:, width + 3 : 2 * width + 3]
    view.copy_(x)
    return view


LAYOUTS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.t().contiguous().t(),
    "strided rows": strided,
    "strided columns": lambda x: strided(x.t()).t(),
    "no unit stride": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


def operands(shape, dtype, of_a="rows", of_b="rows"):
    m, k, n = shape
    gen = torch.Generator().manual_seed(sum(shape))
    a, b = torch.randn(m, k, generator=gen).to(dtype), torch.randn(k, n, generator=gen).to(dtype)
    return LAYOUTS[of_a](a), LAYOUTS[of_b](b), torch.randn(n, generator=gen), torch.randn(m, n, generator=gen)


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(gemm, "writes_fp32", lambda device: False)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("kind", ["plain", "bias", "add"])
@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_product(shape, of_a, of_b, kind, library, request, monkeypatch):
    """In fp32 to fp32's digits, also where it is cut into slices; in the operands' dtype to one rounding."""
    if not library:
        request.getfixturevalue("without_library")
    monkeypatch.setattr(gemm, "SLICE_BYTES", 4000)
    for dtype in (*NARROW, torch.float32, torch.float64):
        a, b, bias, before = operands(shape, dtype, of_a, of_b)
        for out_dtype in dict.fromkeys((dtype, torch.float32 if dtype != torch.float64 else dtype)):
            sums = torch.float64 if dtype == torch.float64 else torch.float32
            out = strided(before.to(out_dtype) if kind == "add" else torch.full_like(before, torch.nan).to(out_dtype))
            want = a.double() @ b.double()
            want = want + bias.double() if kind == "bias" else want + out.double() if kind == "add" else want
            gemm.product(a, b, out, add=kind == "add", bias=bias.to(sums) if kind == "bias" else None)
            error, most = rel_norm(out, want), {torch.bfloat16: 3e-3, torch.float16: 4e-4}.get(out_dtype, 4e-7)
            assert error <= (1e-14 if dtype == torch.float64 else most), (dtype, out_dtype)


def test_fp32_copies_are_slices(without_library, monkeypatch):
    """No whole copy of the larger operand: of 2 MB in bf16, in any role, a slice at a time is cast."""
    monkeypatch.setattr(gemm, "SLICE_BYTES", 1 << 16)
    casts = []
    monkeypatch.setattr(torch.Tensor, "float", lambda x: casts.append(x.numel()) or x.to(torch.float32))
    for m, k, n in ((16, 16, 1 << 16), (16, 1 << 16, 16), (1 << 16, 16, 16)):
        a, b, _, before = operands((m, k, n), torch.bfloat16)
        gemm.product(a, b, before)
    assert max(casts) <= 1 << 14 and len(casts) > 3 * 60


class Cublas:
    """Stands in for torch's GEMMs on CUDA: what torch 2.9 checks, by its sources, then the product.

    `mm` takes an out_dtype that is that of `out`. `addmm` refuses a sum in another dtype than the operands', which
    later versions take; `baddbmm` takes one, and adds to what `out` holds rather than to `self`, so that both must be
    the same.
    """

    def __init__(self, monkeypatch):
        self.calls = []
        for name in ("mm", "addmm", "baddbmm"):
            monkeypatch.setattr(torch, name, getattr(self, name))

    def mm(self, a, b, *, out_dtype, out):
        self._check("mm", a, b, out_dtype, out)
        out.copy_(a.double() @ b.double())

    def addmm(self, sums, a, b, *, out_dtype, out):
        self._check("addmm", a, b, out_dtype, out)
        assert sums.dtype == a.dtype, "self and mat2 must have the same dtype"

    def baddbmm(self, sums, a, b, *, out_dtype, out):
        self._check("baddbmm", a, b, out_dtype, out)
        assert sums.dim() == a.dim() == b.dim() == 3 and sums is out
        out.add_(a.double() @ b.double())

    def _check(self, name, a, b, out_dtype, out):
        self.calls.append(name)
        assert out_dtype == out.dtype == torch.float32 and a.dtype == b.dtype and a.dtype in NARROW
        assert out.shape == (*a.shape[:-1], b.shape[-1]) and out.stride(-1) == 1


@pytest.mark.parametrize("dtype", NARROW)
def test_what_cuda_is_asked_for(dtype, without_library, monkeypatch):
    a, b, bias, before = operands((5, 37, 30), dtype)
    fake = Cublas(monkeypatch)
    monkeypatch.setattr(gemm, "_through_fp32", gemm._to_fp32)  # as if these tensors were on such a device
    out, exact = strided(torch.full_like(before, torch.nan)), a.double() @ b.double()
    gemm.product(a, b, out)
    assert rel_norm(out, exact) < 1e-6 and fake.calls == ["mm"]
    gemm.product(a, b, out, add=True)
    assert rel_norm(out, 2 * exact) < 1e-6 and fake.calls == ["mm", "baddbmm"]
    gemm.product(a, b, out, bias=bias)
    assert rel_norm(out, exact + bias) < 1e-6


@pytest.mark.parametrize("name", ["mm", "baddbmm"])
def test_torch_has_what_cuda_is_asked_for(name):
    schema = getattr(torch.ops.aten, name).dtype_out._schema
    assert [x.name for x in schema.arguments if x.name in ("out_dtype", "out")] == ["out_dtype", "out"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", NARROW)
def test_product_on_a_gpu(dtype):
    for shape in ((64, 128, 1000), (64, 1000, 128), (1000, 64, 128)):
        a, b, bias, before = (x.cuda() for x in operands(shape, dtype, "strided rows", "columns"))
        for out, call in ((before, dict(add=True)), (torch.full_like(before, torch.nan), dict(bias=bias))):
            want = a.double() @ b.double() + (out.double() if "add" in call else bias.double())
            out = strided(out)
            gemm.product(a, b, out, **call)
            assert rel_norm(out, want) <= 1e-6
