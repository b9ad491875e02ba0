"""Estimates of how many requests a backfill will make, from the costs of completed backfills."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, text

from app.catalogue import Resource
from workers.store.backfills import MARGIN, first_slice_days, max_slice_days

MEASURED_COSTS = text("""
SELECT provider, resource, sum(pages)::float8 AS pages,
       sum(extract(epoch FROM window_end - window_start + interval '2 days') / 86400)::float8 AS days
FROM headrace.backfills WHERE status = 'complete' AND item = '' AND pages > 0 GROUP BY 1, 2""")


@dataclass(frozen=True)
class RequestEstimate:
    """The pages that were fetched, and the days of history in them, by provider and resource."""

    of: Mapping[tuple[str, str], tuple[float, float]]  # pages, days

    def requests(
        self, provider: str, resource: Resource, start: datetime, end: datetime, aggregator: str = "junction"
    ) -> tuple[int, bool]:
        """The number of requests for a window. True if it was measured, False if it is only the lower bound."""
        days = (end - start + 2 * MARGIN) / timedelta(days=1)
        if resource.dates == "none":
            return _min_requests(aggregator, resource, days), True
        known = [self.of[key] for key in self.of if key == (provider, resource.name)]
        known = known or [cost for (_, name), cost in self.of.items() if name == resource.name]
        if known:
            pages, walked = sum(pages for pages, _ in known), sum(walked for _, walked in known)
            return max(1, math.ceil(days * pages / walked)), True
        return _min_requests(aggregator, resource, days), False


def measured_costs(connection: Connection) -> RequestEstimate:
    """The costs of completed backfills."""
    return RequestEstimate(
        {(row.provider, row.resource): (row.pages, row.days) for row in connection.execute(MEASURED_COSTS)}
    )


def _min_requests(aggregator: str, resource: Resource, days: float) -> int:
    """The number of slices in a window without data."""
    if resource.dates == "none" and resource.kind != "stream":
        return 1
    count, length, max_days = 0, first_slice_days(aggregator, resource), max_slice_days(aggregator)
    while days > 0:
        days, length, count = days - length, min(length * 2, max_days), count + 1
    return count
