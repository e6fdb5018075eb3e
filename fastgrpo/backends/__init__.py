"""The backends: modules with the same functions (`contract.Backend`), and the place that chooses one (`select`)."""

from .contract import Backend, Call, Rows, Scores, TokenLoss, TokenRows, TokenSpec
from .select import NAMES, get, select

__all__ = [
    "NAMES",
    "Backend",
    "Call",
    "Rows",
    "Scores",
    "TokenLoss",
    "TokenRows",
    "TokenSpec",
    "get",
    "select",
]
