"""The result of writing a batch, delivery by delivery."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row


@dataclass
class Written:
    """The result of a batch: rows changed by each delivery, and stale deliveries (older than a stored row)."""

    changed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    stale: set[int] = field(default_factory=set)
    rows: Counter[str] = field(default_factory=Counter)  # changed rows, by kind

    def newer(self, compared: Iterable[Row[Any]], given: Sequence[Any]) -> Sequence[Any]:
        """The rows of `given` whose deliveries are newer than the stored rows. Records stale deliveries."""
        found = list(compared)
        self.stale.update(row.n for row in found if row.is_stale)
        newer = {row.n for row in found if row.is_newer}
        return [row for row in given if row.n in newer]
