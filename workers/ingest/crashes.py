"""Poison messages: counts the worker crashes of redelivered deliveries, to find the one that crashes a worker."""

import contextlib
from collections.abc import Sequence

from sqlalchemy import Connection, Engine

from app.errors import TryLater
from workers.ingest.outcomes import ParsedDelivery
from workers.store.crashes import clear_crashes, crash_counts, record_crash
from workers.store.engine import transaction

MAX_CRASHES = 2  # redeliveries of one delivery that end with a crash; at the next one it becomes a dead letter


class CrashCounter:
    """The crash counts of one worker process. A count is cleared in the transaction of whatever is committed next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._to_clear: list[str] = []

    def safest_first(self, batch: Sequence[ParsedDelivery]) -> list[ParsedDelivery]:
        """The deliveries of a redelivered message, those that workers crashed with last."""
        known = crash_counts(self._engine, [one.delivery.key for one in batch])
        return sorted(batch, key=lambda one: known.get(one.delivery.key, 0))

    def is_poison(self, one: ParsedDelivery) -> bool:
        """Counts a crash before the delivery is touched, and says whether there were too many already."""
        crashes = record_crash(self._engine, one.delivery.key)
        self._to_clear.append(one.delivery.key)
        return crashes > MAX_CRASHES

    def clear(self, connection: Connection) -> None:
        """Clears the counts of what this worker has survived, in the transaction that applies it."""
        if self._to_clear:
            clear_crashes(connection, self._to_clear)

    def committed(self) -> None:
        """Forgets what `clear` has cleared, once its transaction is committed."""
        self._to_clear.clear()

    def release(self) -> None:
        """Clears the counts outside of any delivery's transaction: the database was away, which is no crash."""
        with contextlib.suppress(TryLater), transaction(self._engine) as connection:
            self.clear(connection)
