"""The result of writing a batch, delivery by delivery."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from workers.actions import Origin, SeriesKey
from workers.store.feed import Change, ChangedSamples


@dataclass
class Written:
    """The result of a batch: rows changed by each delivery, and stale deliveries (older than a stored row)."""

    changed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    stale: set[int] = field(default_factory=set)
    rows: Counter[str] = field(default_factory=Counter)  # changed rows, by kind
    changes: dict[tuple[str, ...], Change] = field(default_factory=dict)  # of records and connections, for the feed
    samples: list[ChangedSamples] = field(default_factory=list)  # inserted or updated, for the feed

    def newer(self, compared: Iterable[Row[Any]], given: Sequence[Any]) -> Sequence[Any]:
        """The rows of `given` whose deliveries are newer than the stored rows. Records stale deliveries."""
        found = list(compared)
        self.stale.update(row.n for row in found if row.is_stale)
        newer = {row.n for row in found if row.is_newer}
        return [row for row in given if row.n in newer]

    def sample_changes(self, numbers: Mapping[SeriesKey, int], origin: Origin) -> list[Change]:
        """The changes of inserted and updated samples: one per user, resource and source."""
        keys = {number: key[:4] for key, number in numbers.items()} if self.samples else {}
        ranges: dict[tuple[str, str, str, str], tuple[datetime, datetime, int]] = {}
        for one in self.samples:
            key = keys[one.series_id]
            first, last, rows = ranges.get(key, (one.first, one.last, 0))
            ranges[key] = min(first, one.first), max(last, one.last), rows + one.rows
        return [Change("put", *key, None, *changed, origin) for key, changed in ranges.items()]
