import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on CPU tensors

import pytest

from fastgrpo import backends


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


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
