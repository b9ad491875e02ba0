"""Poison messages: crash counts of deliveries identify the one that crashes workers, or processes of PostgreSQL."""

import contextlib
from collections.abc import Sequence

from sqlalchemy import Connection, Engine

from app.errors import TryLater
from workers.ingest.outcomes import ParsedDelivery
from workers.store.crashes import clear_crashes, crash_counts, record_crash
from workers.store.engine import transaction

MAX_CRASHES = 2  # crashes that are counted; at the next try the delivery becomes a dead letter


class CrashCounter:
    """The crash counts of one worker process. Counts are cleared by the next transaction that is committed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._to_clear: list[str] = []

    def safest_first(self, batch: Sequence[ParsedDelivery]) -> list[ParsedDelivery]:
        """The deliveries of a redelivered message in ascending order of crashes."""
        known = crash_counts(self._engine, [one.delivery.key for one in batch])
        return sorted(batch, key=lambda one: known.get(one.delivery.key, 0))

    def is_poison(self, one: ParsedDelivery) -> bool:
        """Counts a crash in advance, before the delivery is processed. True if the count exceeds the limit."""
        self.release()  # counts that could not be cleared while PostgreSQL was away
        self._to_clear.append(one.delivery.key)  # first: the count may be committed although its answer is lost
        return record_crash(self._engine, one.delivery.key) > MAX_CRASHES

    def clear(self, connection: Connection) -> None:
        """Clears the counts of processed deliveries, in the transaction that applies them."""
        if self._to_clear:
            clear_crashes(connection, self._to_clear)

    def forget(self) -> None:
        """Call this after the commit of `clear`; or to leave the counts, if a delivery may have crashed PostgreSQL."""
        self._to_clear.clear()

    def release(self) -> None:
        """Clears the counts in a transaction of its own: an error is not a crash."""
        if self._to_clear:
            with contextlib.suppress(TryLater):
                with transaction(self._engine) as connection:
                    self.clear(connection)
                self._to_clear.clear()
