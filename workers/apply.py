"""Applies messages: opens every delivery, merges what they say and settles them, all in one transaction."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine

from app import metrics
from app.actions import Notice, Parsed, Samples
from app.config import Settings
from app.delivery import Delivery, unpack
from app.errors import DeadLetter, TryLater
from app.providers import PROVIDERS
from app.sealing import Sealer
from workers.store.backfills import Asked, open_backfill
from workers.store.engine import transaction
from workers.store.ledger import Outcome, Settled, bury, settle
from workers.store.series import SeriesNumbers
from workers.store.writer import Numbered, Written, touch_users, write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A delivery and what it means, or why it cannot be used."""

    delivery: Delivery
    attempts: int
    parsed: Parsed | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Applied:
    """What became of a message: its deliveries, and the backfills that it announced and somebody should go on with."""

    settled: list[Settled]
    backfills: list[int]

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many deliveries came to which end."""
        return Counter(one.outcome for one in self.settled)


class Applier:
    """Turns messages into rows. One for the life of a worker process."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._sealer = Sealer(settings.encryption_keys)
        self._series = SeriesNumbers(engine)

    def apply(self, packed: str) -> Applied:
        """Applies a message. Raises TryLater, having changed nothing.

        All deliveries go in one transaction. If PostgreSQL refuses the data of one of them, each goes in its own, so
        that the others land and only that one is set aside.
        """
        opened = self._open_all(packed)
        try:
            applied = self._commit(opened)
        except TryLater:
            raise
        except Exception as error:  # noqa: BLE001 - one of them is at fault; which one, each alone will tell
            log.info("a message of %d deliveries is taken apart: %s", len(opened), _reason(error))
            parts = [self._commit_alone(one) for one in opened]
            applied = Applied(
                [s for part in parts for s in part.settled], [b for part in parts for b in part.backfills]
            )
        for settled in applied.settled:
            metrics.OUTCOMES.labels(settled.aggregator, settled.outcome).inc()
        return applied

    def _open_all(self, packed: str) -> list[Opened]:
        try:
            return [self._open(delivery, attempts) for delivery, attempts in _once_each(unpack(packed))]
        except DeadLetter as reason:  # not ours, or of a newer version: kept as it is, until somebody can read it
            name = hashlib.sha256(packed.encode()).hexdigest()
            return [Opened(Delivery("unknown", name, time.time(), packed.encode()), 1, reason=str(reason))]

    def _open(self, delivery: Delivery, attempts: int) -> Opened:
        provider = PROVIDERS.get(delivery.aggregator)
        if provider is None:
            return Opened(delivery, attempts, reason="from an aggregator that this worker does not know")
        try:
            body = self._sealer.open(delivery.sealed, delivery.about)
            parsed = provider.parse(delivery, body, self._settings)
        except Exception as error:  # noqa: BLE001 - the edge of a delivery: it is kept, whatever is wrong with it
            return Opened(delivery, attempts, reason=_reason(error))
        if parsed.collapsed:
            metrics.COLLAPSED.inc(parsed.collapsed)
        return Opened(delivery, attempts, parsed)

    def _commit_alone(self, opened: Opened) -> Applied:
        try:
            return self._commit([opened])
        except TryLater:
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a delivery: it is kept, whatever is wrong with it
            return self._commit([Opened(opened.delivery, opened.attempts, reason=_reason(error))])

    def _commit(self, opened: Sequence[Opened]) -> Applied:
        batch = [
            Numbered(n, action)
            for n, one in enumerate(opened)
            if one.parsed is not None
            for action in one.parsed.actions
        ]
        numbers = self._series.of(one.action.series for one in batch if isinstance(one.action, Samples))
        with transaction(self._engine) as connection:
            touch_users(connection, _users(opened))
            written = write(connection, batch, "webhook", numbers)
            announced = _announce(connection, opened, batch, written)
            settled = [_settled(n, one, written) for n, one in enumerate(opened)]
            dead = settle(connection, settled)
            _bury_dead(connection, opened, dead)
        return Applied(settled, announced)


def _reason(error: Exception) -> str:
    """Why a delivery is set aside. An error that is not ours may quote a value, so only its kind is told."""
    if isinstance(error, DeadLetter):
        return str(error)
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    line = f" at {where.tb_frame.f_code.co_name}:{where.tb_lineno}" if where else ""
    return f"unforeseen {type(error).__name__}{line}"


def _once_each(deliveries: Iterable[Delivery]) -> list[tuple[Delivery, int]]:
    """A delivery id may stand in a message more than once: the first one is taken, all are counted."""
    first: dict[str, Delivery] = {}
    for delivery in deliveries:
        first.setdefault(delivery.about, delivery)
    count = Counter(delivery.about for delivery in deliveries)
    return [(delivery, count[about]) for about, delivery in first.items()]


def _announce(
    connection: Connection, opened: Sequence[Opened], batch: Sequence[Numbered], written: Written
) -> list[int]:
    """Opens or extends a backfill for each notice that was not taken before."""
    announced = []
    for one in batch:
        if isinstance(one.action, Notice):
            came = opened[one.n].delivery
            asked = Asked(came.aggregator, came.message_id, "notice", came.received)
            backfill_id = open_backfill(connection, asked, one.action)
            if backfill_id is not None:
                announced.append(backfill_id)
                written.changed[one.n] += 1
    return announced


def _users(opened: Sequence[Opened]) -> dict[str, str | None]:
    """Who the deliveries that do something are about, with their client_user_id where one of them names it."""
    users: dict[str, str | None] = {}
    for one in opened:
        if one.parsed and one.parsed.user_id and one.parsed.actions:
            users[one.parsed.user_id] = one.parsed.client_user_id or users.get(one.parsed.user_id)
    return users


def _settled(n: int, opened: Opened, written: Written) -> Settled:
    delivery, parsed = opened.delivery, opened.parsed
    if parsed is None:
        outcome: Outcome = "dead"
    elif parsed.ignored:
        outcome = "ignored"
    elif written.changed[n]:
        outcome = "applied"
    else:
        outcome = "stale" if n in written.stale else "duplicate"
    return Settled(
        delivery.aggregator,
        delivery.message_id,
        parsed.event_type if parsed else None,
        parsed.user_id if parsed else None,
        delivery.received,
        outcome,
        opened.attempts,
        opened.reason or (parsed.ignored if parsed else None),
    )


def _bury_dead(connection: Connection, opened: Sequence[Opened], dead: set[tuple[str, str]]) -> None:
    for one in opened:
        if one.reason and (one.delivery.aggregator, one.delivery.message_id) in dead:
            bury(connection, one.delivery, None, one.reason)
