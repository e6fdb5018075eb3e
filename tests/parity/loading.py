"""Loads a function of a framework from its file, whatever else that imports, and keeps what it gives of one batch."""

import contextlib
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch

B, T = 6, 8


def inputs():
    """Float64 vectors (B, T) of a batch whose ratios leave every clip range, its mask and its advantages (B,)."""
    gen = torch.Generator().manual_seed(0)

    def noise(*shape, scale=1.0):
        return torch.randn(*shape, generator=gen, dtype=torch.float64) * scale

    logp = -(noise(B, T).abs() * 1.5 + 0.02)
    old = torch.minimum(logp + noise(B, T, scale=0.4), torch.tensor(-0.01))
    sampling = torch.minimum(old + noise(B, T, scale=0.2), torch.tensor(-0.01))
    ref = logp + noise(B, T, scale=0.5)
    old[0, 0], old[1, 1], ref[0, 1], ref[2, 0] = logp[0, 0] - 25, logp[1, 1] - 3, logp[0, 1] + 22, logp[2, 0] + 3
    mask = torch.arange(T) < torch.tensor([8, 7, 5, 1, 6, 3])[:, None]
    advantages = noise(B)
    return dict(logp=logp, old=old, sampling=sampling, ref=ref, mask=mask.double(), advantages=advantages)


class _Stand(ModuleType):
    """A module that has every name; as a package, every module below it."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class _Stands(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Stand(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def stands(*packages):
    """What of `packages` is not installed is a stand-in; torch.compile is left out."""
    before, finder = dict(sys.modules), _Stands(packages)
    sys.meta_path.append(finder)
    try:
        with mock.patch.object(torch, "compile", lambda f=None, **_: f or (lambda g: g)):
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - set(before):
            del sys.modules[name]


def load(path, name):
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(Path(path).read_text(), str(path), "exec"), module.__dict__)
    return module


def as_is(function=None, **_):
    return function or (lambda f: f)


class Case:
    """(name, options of fastgrpo's Objective, the framework's call of a leaf) of each case."""

    def __init__(self):
        self.x, self.rows = inputs(), {}

    def add(self, name, options, call):
        leaf = self.x["logp"].clone().requires_grad_()
        loss = call(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        self.rows[name] = dict(objective=options, loss=loss.item(), gradient=gradient.tolist())


class Config(SimpleNamespace):
    """The options of a framework, in place of its own class."""
