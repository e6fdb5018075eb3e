"""What an operation is to the bench: its cases, inputs, truth and costs, who computes it, and what it is held to.

Each file of ops/ makes one, and `registry` reads them; nothing else knows an operation by name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from fastgrpo import Objective

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPSILON, GROUP = 0.2, 8

Inputs = SimpleNamespace
Results = dict[str, Tensor]
Rows = list[dict]

OPERATIONS: dict[str, Operation] = {}  # by name, in the order in which they are measured; `registry` fills it


@dataclass(frozen=True)
class Case:
    """One size of one operation: B completions of T tokens, hidden width H, vocabulary V."""

    op: str
    B: int
    T: int
    V: int
    H: int = 896
    dtype: str = "bf16"
    device: str = "cpu"
    inactive: float = 0.0  # share of completions with advantage 0
    softcap: float | None = None
    model: str | None = None

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.op]

    @property
    def objective(self) -> Objective:
        return Objective(epsilon=EPSILON, beta=self.operation.beta)

    @property
    def shape(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.operation.sizes}

    @property
    def bytes(self) -> int:
        """What has to move, once each: inputs of a row and, with a gradient, its output."""
        return self.operation.bytes(self)

    @property
    def flops(self) -> int:
        """Of the GEMMs that cannot be done without."""
        return self.operation.flops(self)

    def __str__(self) -> str:
        words = [self.op, " ".join(f"{name}={size}" for name, size in self.shape.items()), self.dtype]
        words += [f"{self.inactive:.0%} inactive"] * (self.inactive > 0)
        words += [f"softcap {self.softcap}"] * bool(self.softcap)
        return ", ".join(words)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Args:
        op: the operation's name.
        step: inputs to results, the gradient included where the operation has one.
        why_not: why a case cannot run here, or None.
        mode: what its user chooses, such as "in place".
        prepare: what is put in place before each step, and not timed.
        truth: where the results are those of another function than the operation.
        compiles: what it runs is compiled at its first call for a size.
        is_floor: computes less than the operation, and is not checked: copies and GEMMs, the roofs.
        work: the bytes or FLOPs of a floor, which make it the roof.
        keeps: what its first step makes stays, and counts as its inputs.
    """

    op: str
    name: str
    step: Callable[[Inputs], Results]
    backend: str = "torch"
    mode: str = ""
    prepare: Callable[[Inputs], None] = lambda inputs: None
    why_not: Callable[[Case], str | None] = lambda case: None
    truth: Callable[[Inputs], Results] | None = None
    is_floor: bool = False
    compiles: bool = False
    work: Callable[[Case], int] | None = None
    keeps: bool = False

    def __str__(self) -> str:
        return label({"impl": self.name, "backend": self.backend, "mode": self.mode})


def label(row: dict) -> str:
    """What an implementation is called in tables, by its row."""
    details = [x for x in (row["backend"] if row["impl"] == "fastgrpo" else "", row["mode"]) if x]
    return row["impl"] + (f" ({', '.join(details)})" if details else "")


@dataclass(frozen=True)
class Target:
    """A number that rows of one case give, and its bound.

    Args:
        value: the rows of one case to the number, or None where they do not hold it.
        bound: the least that the number may be, or with `at_most` the most.
        accuracy: it is about an error, not a time.
        of_device: (part of a device's name, the bound in place of `bound` there).
    """

    what: str
    dtype: str
    value: Callable[[Rows], float | None]
    bound: float
    at_most: bool = False
    inactive: bool = False
    accuracy: bool = False
    on: str = "cpu"
    of_device: tuple[tuple[str, float], ...] = ()

    def bound_on(self, device: str) -> float:
        return next((bound for name, bound in self.of_device if name in device), self.bound)

    def is_met(self, value: float, device: str) -> bool:
        bound = self.bound_on(device)
        return value <= bound if self.at_most else value >= bound


@dataclass(eq=False)
class Operation:
    """What is measured of one operation; the one object of its kind in a file of ops/.

    Args:
        name: of its cases and rows.
        title: of its tables.
        place: among the operations, in what is measured and printed.
        inputs: makes the random inputs of a case.
        truth: the results in float64, by the names that implementations give them.
        bytes, flops: see `Case`.
        sizes: the letters of a case's shape.
        beta: of the objective.
        quick, full, growth: the cases of `fastgrpo bench --quick`, `--full`, `--growth`.
        quick_peaks: (dtype, share of inactive completions) whose memory a quick run measures, too.
        targets: what its rows are held to.
        dtypes: those that it has; None: any.
        has_inactive: inactive completions may be left out of it.
        softcap: how a model's softcap is met: "taken", "ignored" (there are no hidden states), or "refused".
        page: its place on the page of results and in the README's table; None: its rows are reported nowhere.
        short: its name in the README's table; None: not there.
        size: the words for a row's B and T.
        gradient_bytes: (shape, bytes of a number) to those of its gradients, for the memory that it takes beside them
            as tokens grow; None: its growth is not reported.
    """

    name: str
    title: str
    place: int
    inputs: Callable[[Case], Inputs]
    truth: Callable[[Inputs], Results]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int] = lambda case: 0
    sizes: str = "BTV"
    beta: float = 0.0
    quick: tuple[Case, ...] = ()
    full: tuple[Case, ...] = ()
    growth: tuple[Case, ...] = ()
    quick_peaks: tuple[tuple[str, float], ...] = ()
    targets: tuple[Target, ...] = ()
    dtypes: tuple[str, ...] | None = None
    has_inactive: bool = False
    softcap: str = "ignored"
    page: int | None = None
    short: str | None = None
    size: Callable[[dict[str, int]], str] = lambda shape: f"{shape['B'] * shape['T']:,} tokens"
    gradient_bytes: Callable[[dict[str, int], int], int] | None = None
    implementations: list[Implementation] = field(default_factory=list)

    def add(self, name: str, **options) -> Callable:
        """Adds the decorated step to the implementations."""

        def added(step):
            self.implementations.append(Implementation(self.name, name, step, **options))
            return step

        return added


def head_bytes(case: Case) -> int:
    """Of hidden states and weight, read, and of their gradients, written."""
    return 2 * (case.B * case.T * case.H + case.V * case.H) * DTYPES[case.dtype].itemsize


def head_flops(case: Case) -> int:
    """2NHV, and 4NHV for the tokens that learn."""
    rows = case.B * case.T
    learn = rows - round(case.inactive * case.B) * case.T
    return 2 * rows * case.H * case.V + 4 * learn * case.H * case.V


def leaf_of(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def needs(package: str, extra: str = "bench") -> Callable[[Case], str | None]:
    """Why a case cannot run without a package."""
    missing = importlib.util.find_spec(package) is None
    return lambda case: f"{package} is not installed (pip install 'fastgrpo[{extra}]')" if missing else None
