"""The backends: modules with the same functions (`contract.Backend`), and the place that chooses one (`select`)."""

from .contract import Backend, Call, ColumnBackend, Columns, Rows, Scores, TokenLoss, TokenRows, TokenSpec
from .select import NAMES, columns, get, select

__all__ = [
    "NAMES",
    "Backend",
    "Call",
    "ColumnBackend",
    "Columns",
    "Rows",
    "Scores",
    "TokenLoss",
    "TokenRows",
    "TokenSpec",
    "columns",
    "get",
    "select",
]
