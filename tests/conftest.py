import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on CPU tensors

import pytest

from fastgrpo import backends


@pytest.fixture(params=["torch", "cpu", "triton"])
def backend(request):
    why = backends.get(request.param).unavailable()
    if why is not None:
        pytest.skip(f"backend {request.param}: {why}")
    return request.param


@pytest.fixture
def device(request):
    """The device to test the backend of this test on: a GPU where the backend is for one and one is there."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else "cpu"
    return "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
