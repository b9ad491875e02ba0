"""Workout streams: the aggregator has no list of streams, so the records that own them are listed first."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from app.catalogue import Resource
from workers.actions import Record
from workers.aggregators import junction
from workers.aggregators.requests import Page
from workers.fetch.http import HttpResponse
from workers.store.backfills import ChunkPosition

MAX_CACHED_LISTS = 64


class OwnerLists:
    """The owners of each slice, listed once: a backfill that has to wait for its rate comes back to many of them."""

    def __init__(self) -> None:
        self._lists: dict[tuple[int, datetime, int], list[Record]] = {}

    def get(self, work: ChunkPosition, list_owners: Callable[[ChunkPosition], list[Record]]) -> list[Record]:
        """The owners of a slice. A single record is looked up each time: it may have been erased since."""
        if work.item:
            return list_owners(work)
        key = _slice_of(work)
        if key not in self._lists:
            if len(self._lists) >= MAX_CACHED_LISTS:
                self._lists.clear()
            self._lists[key] = list_owners(work)
        return self._lists[key]

    def forget(self, work: ChunkPosition) -> None:
        """Drops the list of a slice that is done."""
        self._lists.pop(_slice_of(work), None)


def owners_in(page: Page) -> list[Record]:
    """The records of a page, without their payloads, in the order in which their streams are fetched."""
    records = (replace(action, payload=b"") for action in page.actions if isinstance(action, Record))
    return sorted(records, key=lambda record: record.id)


def next_owner(owners: list[Record], cursor: str | None) -> Record | None:
    """The owner after the cursor, which is the id of the last one whose stream was fetched; None at the end."""
    return next((one for one in owners if cursor is None or one.id > cursor), None)


def read_stream(resource: Resource, owner: Record, answer: HttpResponse) -> Page:
    """The stream of one record as a page. Raises Unprocessable, NotYet."""
    return junction.read_stream(resource, owner, answer.body, answer.asked_at)


def _slice_of(work: ChunkPosition) -> tuple[int, datetime, int]:
    return work.chunk_id, work.slice_end, work.slice_days
