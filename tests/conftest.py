import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on CPU tensors

import cuda_host
import pytest

from fastgrpo import backends


def pytest_report_header():
    if not torch.cuda.is_available() and (why := backends.get("triton").unavailable()) is not None:
        return f"Triton's kernels are not run: {why}"
    return None


@pytest.fixture(scope="session")
def cuda_host_library(tmp_path_factory):
    """The CUDA kernels, built for the machine in cuda_host."""
    if (why := cuda_host.unavailable()) is not None:
        pytest.skip(f"the CUDA kernels cannot be built for the CPU: {why}")
    return cuda_host.build(tmp_path_factory.mktemp("cuda_host"), sorted((cuda_host.CSRC / "cuda").glob("*.cu")))


@pytest.fixture
def cuda_anywhere(request):
    """The cuda backend, on a GPU where there is one; elsewhere on the CPU, on CPU tensors. Gives the device."""
    if backends.get("cuda").unavailable() is None:
        yield "cuda"
    else:
        with cuda_host.backend(request.getfixturevalue("cuda_host_library")):
            yield "cpu"


@pytest.fixture(params=["torch", "cpu", "triton", "cuda"])
def backend(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda_anywhere")
    elif (why := backends.get(request.param).unavailable()) is not None:
        pytest.skip(f"backend {request.param}: {why}")
    return request.param


@pytest.fixture
def device(request):
    """The device to test the backend of this test on: a GPU where the backend is for one and one is there."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else "cpu"
    if name == "cuda":
        return request.getfixturevalue("cuda_anywhere")
    return "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
