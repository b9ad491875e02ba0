"""Fragments of SQL: identifiers, and rows that are passed as one array per column."""

from collections.abc import Iterable, Sequence
from typing import Any


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


class RowParameters:
    """Rows as parameters of a statement: one array per column. As text it is a FROM item."""

    def __init__(self, definition: str, alias: str = "given") -> None:
        """`definition` has the columns with their types, such as "id text, version timestamptz"."""
        types = dict(column.split() for column in definition.split(","))
        self._names = {name: f"{alias}_{name}" for name in types}
        self.columns = ", ".join(types)
        self.arrays = f"unnest({', '.join(f'CAST(:{alias}_{name} AS {kind}[])' for name, kind in types.items())})"
        self._item = f"{self.arrays} AS {alias}({self.columns})"

    def __str__(self) -> str:
        return self._item

    def values(self, rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
        """The parameters, for rows with their values in the order of the columns."""
        columns = list(zip(*rows, strict=True)) or [()] * len(self._names)
        return {name: list(column) for name, column in zip(self._names.values(), columns, strict=True)}
