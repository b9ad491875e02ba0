"""Applies messages: opens every delivery, merges what they say and settles them, all in one transaction."""

import contextlib
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine

from app import metrics, tracing
from app.actions import Action, Download, LargeRequest, Notice, Origin, Parsed, Record, Samples, Succession
from app.config import Settings
from app.delivery import Delivery, Receipt, seal, unpack
from app.errors import DeadLetter, TryLater
from app.providers import PROVIDERS
from app.sealing import Sealer
from workers.store.backfills import Asked, open_backfill
from workers.store.engine import transaction
from workers.store.large_requests import expect
from workers.store.ledger import Kept, Outcome, Settled, acquit, bury, settle, settled_already, suspect, suspects
from workers.store.series import Key, SeriesNumbers
from workers.store.successions import succeed
from workers.store.users import Told, User, touch_users
from workers.store.writer import Numbered, Written, write

UNKNOWN = "unknown"  # stands for the aggregator of what is no message of ours
ERASED = "the user was erased"
MOST_CRASHES = 2  # of workers with one delivery, after the first; then it is set aside
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A delivery and what it means, or why it cannot be used; it may be known even then whose it is."""

    delivery: Delivery
    attempts: int
    parsed: Parsed | None = None
    reason: str | None = None
    is_erased: bool = False  # whom it is about

    @property
    def actions(self) -> tuple[Action, ...]:
        """What is to be done."""
        return self.parsed.actions if self.parsed and not self.reason else ()

    @property
    def is_elsewhere(self) -> bool:
        """Whether it only announces where the event is."""
        return self.parsed is not None and any(isinstance(one, Download) for one in self.parsed.actions)


@dataclass(frozen=True)
class Applied:
    """What became of a message: its deliveries, and the backfills that it announced and somebody should go on with.

    What is elsewhere is not settled yet: it is to be fetched, and then applied under its announcement's id.
    """

    settled: list[Settled]
    backfills: list[int]
    elsewhere: tuple[Delivery, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)  # written, by kind

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
        self._owed: list[str] = []  # written down as suspects, and put back unharmed: the database was away

    def apply(self, packed: str, *, again: bool = False) -> Applied:
        """Applies a message. Raises TryLater, having changed nothing that applying it again would not.

        All deliveries go in one transaction. If PostgreSQL refuses the data of one of them, each goes in its own, so
        that the others land and only that one is set aside. So it is where a worker may have died with the message
        (`again`: the broker gives it out once more), because it may be one of them that kills.
        """
        try:
            deliveries = unpack(packed)
        except DeadLetter as reason:  # not ours, or of a newer version: kept as it is, until somebody can read it
            return self.set_aside(packed.encode(), str(reason))
        return self.receive(deliveries, again=again)

    def receive(self, deliveries: Sequence[Delivery], *, again: bool = False) -> Applied:
        """As `apply`, for deliveries that are at hand."""
        once = _once_each(deliveries)
        tracing.holds(len(deliveries))
        return self._counted(self._suspiciously(once) if again else self._together(once, "webhook"))

    def refuse(self, delivery: Delivery, reason: str) -> Applied:
        """Sets a delivery aside. Raises TryLater."""
        return self._counted(self._commit([Opened(delivery, 1, reason=reason)]))

    def set_aside(self, raw: bytes, reason: str) -> Applied:
        """Keeps what came from the broker and is no message of deliveries, under its digest. Raises TryLater."""
        foreign = seal(UNKNOWN, Receipt(hashlib.sha256(raw).hexdigest()), raw, self._sealer)
        return self._counted(self._commit([Opened(foreign, 1, reason=reason)]))

    def raise_foreign(self, foreign: Delivery) -> Applied:
        """Applies what was set aside. Raises DeadLetter if it is no message of deliveries."""
        raw = self._sealer.open(foreign.sealed, foreign.about)
        return self._counted(self._together(_once_each(within(raw)), "webhook"))

    def replay(self, deliveries: Sequence[Delivery]) -> Applied:
        """Applies deliveries that were kept, or were dead. Raises TryLater."""
        return self._together(_once_each(deliveries), "replay")

    def _together(self, deliveries: Sequence[tuple[Delivery, int]], origin: Origin) -> Applied:
        opened = [self._open(delivery, attempts, origin) for delivery, attempts in deliveries]
        try:
            return self._commit(opened, origin)
        except TryLater:
            raise
        except Exception as error:  # noqa: BLE001 - one of them is at fault; which one, each alone will tell
            log.info("a message of %d deliveries is taken apart: %s", len(opened), _reason(error))
            return _joined([self._commit_alone(one, origin) for one in opened])

    def _suspiciously(self, deliveries: Sequence[tuple[Delivery, int]]) -> Applied:
        """One by one, each written down before it is touched. What workers have died with goes last."""
        known = suspects(self._engine, [delivery.about for delivery, _ in deliveries])
        parts = []
        for delivery, attempts in sorted(deliveries, key=lambda one: known.get(one[0].about, 0)):
            crashes = suspect(self._engine, delivery.about)
            self._owed.append(delivery.about)  # struck out with whatever is committed next, this or another
            opened = Opened(delivery, attempts, reason=f"its worker died with it, {MOST_CRASHES + 1} times")
            if crashes <= MOST_CRASHES:
                opened = self._open(delivery, attempts)
            try:
                parts.append(self._commit_alone(opened, "webhook"))
            except TryLater:  # which is no death
                with contextlib.suppress(TryLater), transaction(self._engine) as connection:
                    acquit(connection, self._owed)
                raise
        return _joined(parts)

    def _counted(self, applied: Applied) -> Applied:
        now = time.time()
        for settled in applied.settled:
            metrics.DELIVERY_SECONDS.labels(settled.aggregator).observe(max(now - settled.received_at.timestamp(), 0))
            _tell(settled)
        for (aggregator, outcome), count in Counter((s.aggregator, s.outcome) for s in applied.settled).items():
            metrics.OUTCOMES.labels(aggregator, outcome).inc(count)
        tracing.tell(**{str(outcome): count for outcome, count in applied.outcomes.items()})
        return applied

    def _open(self, delivery: Delivery, attempts: int, origin: Origin = "webhook") -> Opened:
        provider = PROVIDERS.get(delivery.aggregator)
        if provider is None:
            return Opened(delivery, attempts, reason="from an aggregator that this worker does not know")
        try:
            with tracing.span("open", aggregator=delivery.aggregator, delivery=delivery.message_id):
                body = self._sealer.open(delivery.sealed, delivery.about)
                parsed = provider.parse(delivery, body, self._settings)
        except Exception as error:  # noqa: BLE001 - the edge of a delivery: it is kept, whatever is wrong with it
            return Opened(delivery, attempts, reason=_reason(error))
        if parsed.collapsed:
            metrics.COLLAPSED.inc(parsed.collapsed)
        if parsed.timeless:
            metrics.TIMELESS.inc(parsed.timeless)
        opened = Opened(delivery, attempts, parsed)
        if origin == "replay" and opened.is_elsewhere:
            return Opened(delivery, attempts, reason="it only announced a URL, and that has expired")
        return opened

    def _commit_alone(self, opened: Opened, origin: Origin) -> Applied:
        try:
            return self._commit([opened], origin)
        except TryLater:
            raise
        except Exception as error:
            if opened.reason is None:
                refused = replace(opened, reason=_reason(error))
            elif opened.parsed is not None:  # the name of the user, or of the event, may be what is refused
                refused = replace(opened, parsed=None)
            else:
                raise
            return self._commit_alone(refused, origin)

    def _commit(self, given: Sequence[Opened], origin: Origin = "webhook") -> Applied:
        elsewhere = tuple(one.delivery for one in given if one.is_elsewhere)
        here = [one for one in given if not one.is_elsewhere]
        numbers = self._series.of(a.series for one in here for a in one.actions if isinstance(a, Samples))
        applied = Applied([], [])
        with tracing.span("commit", deliveries=len(here)), transaction(self._engine) as connection:
            users = touch_users(connection, _users(here))
            successors = {name: user.successor for name, user in users.items() if user.successor}
            if not successors:
                applied = self._write(connection, _without_erased(here, users), numbers, origin)
        if successors:  # begun again, because other rows are meant, and series that may have no number yet
            return self._commit([_renamed(one, successors) for one in given], origin)
        self._owed.clear()
        metrics.count_rows(applied.rows, origin)
        return replace(applied, elsewhere=elsewhere)

    def _write(
        self, connection: Connection, opened: Sequence[Opened], numbers: Mapping[Key, int], origin: Origin
    ) -> Applied:
        batch = [Numbered(n, action) for n, one in enumerate(opened) for action in one.actions]
        seen = _seen(connection, opened) if origin == "replay" else ()
        with tracing.span("merge", actions=len(batch)):
            written = write(connection, batch, origin, numbers, seen)
        announced = _announce(connection, opened, batch, written)
        settled = [_settled(n, one, written) for n, one in enumerate(opened)]
        news = [n for n in range(len(opened)) if n not in seen]
        kept = _to_keep([opened[n] for n in news]) if self._settings.keep_days else ()
        with tracing.span("settle"):
            dead = settle(connection, [settled[n] for n in news], kept, replayed=origin == "replay")
        _bury_dead(connection, opened, dead)
        if self._owed:
            acquit(connection, self._owed)
        return Applied(settled, announced, rows=written.rows)


def within(raw: bytes) -> list[Delivery]:
    """The deliveries in what was set aside: a message, or the first argument of a task. Raises DeadLetter."""
    with contextlib.suppress(msgspec.DecodeError, LookupError):
        raw = str(msgspec.json.decode(raw, type=list[list[str] | Any])[0][0]).encode()
    return unpack(raw.decode(errors="replace"))


def _tell(settled: Settled) -> None:
    """What became of a delivery: for somebody on call if it was set aside, otherwise for who looks closely."""
    is_dead = settled.outcome == "dead"
    if is_dead or log.isEnabledFor(logging.DEBUG):
        ids = {"aggregator": settled.aggregator, "delivery": settled.message_id}
        reason = f": {settled.error}" if is_dead else ""
        log.log(logging.WARNING if is_dead else logging.DEBUG, "%s%s", settled.outcome, reason, extra=ids)


def _joined(parts: Sequence[Applied]) -> Applied:
    return Applied(
        [s for part in parts for s in part.settled],
        [b for part in parts for b in part.backfills],
        tuple(e for part in parts for e in part.elsewhere),
    )


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
    """Takes in what is no data: notices of history, large requests, reconnections. Returns the backfills to go on with.

    A reconnection comes last: it moves what this very message has brought under the old id, too.
    """
    announced = []
    for one in sorted(batch, key=lambda one: isinstance(one.action, Succession)):
        came = opened[one.n].delivery
        match one.action:
            case Notice() as notice:
                asked = Asked(came.aggregator, came.message_id, "notice", came.received)
                backfill_id = open_backfill(connection, asked, notice)
                announced += [backfill_id] if backfill_id is not None else []
                written.changed[one.n] += backfill_id is not None
            case LargeRequest() as large:
                written.changed[one.n] += expect(connection, came.aggregator, large)
            case Succession() as reconnected:
                written.changed[one.n] += succeed(connection, reconnected.old_user_id, reconnected.user_id)
    return announced


def _users(opened: Sequence[Opened]) -> dict[str, Told]:
    """Who the deliveries are about, with the client_user_id that was told last."""
    users: dict[str, Told] = {}
    for one in opened:
        if one.parsed and one.parsed.user_id:
            told = users.setdefault(one.parsed.user_id, None)
            name, at = one.parsed.client_user_id, one.parsed.told_at or one.delivery.received
            if name and (told is None or at > told[1]):
                users[one.parsed.user_id] = (name, at)
    return users


def _renamed(opened: Opened, successors: Mapping[str, str]) -> Opened:
    """A delivery about somebody who has reconnected, under the id that they go by now.

    Its data is theirs; what it says of the connection is about the one that is no more.
    """
    parsed = opened.parsed
    user_id = successors.get(parsed.user_id or "") if parsed else None
    if parsed is None or user_id is None:
        return opened
    kept = (one for one in parsed.actions if isinstance(one, Record | Samples | LargeRequest))
    actions = tuple(replace(one, user_id=user_id) for one in kept)
    ignored = parsed.ignored if actions else parsed.ignored or "of a connection that another has taken the place of"
    return replace(opened, parsed=replace(parsed, user_id=user_id, actions=actions, ignored=ignored))


def _without_erased(opened: Iterable[Opened], users: Mapping[str, User]) -> list[Opened]:
    """The deliveries; of those about somebody who was erased, no more than that they came."""

    def emptied(one: Opened) -> Opened:
        if not (one.parsed and one.parsed.user_id and users[one.parsed.user_id].is_erased):
            return one
        return Opened(one.delivery, one.attempts, Parsed(one.parsed.event_type, ignored=ERASED), is_erased=True)

    return [emptied(one) for one in opened]


def _settled(n: int, opened: Opened, written: Written) -> Settled:
    delivery, parsed = opened.delivery, opened.parsed
    if parsed is None or opened.reason:
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
        (delivery.reference or "").partition(":chunk:")[0] or None,
    )


def _seen(connection: Connection, opened: Sequence[Opened]) -> set[int]:
    """Which of these were settled for good: nothing that a replay may find changes what the ledger says of them."""
    names = [(one.delivery.aggregator, one.delivery.message_id) for one in opened]
    known = settled_already(connection, names)
    return {n for n, name in enumerate(names) if name in known}


def _to_keep(opened: Sequence[Opened]) -> list[Kept]:
    alive = (one for one in opened if one.parsed and not one.reason and not one.is_erased)
    return [Kept(one.delivery, one.parsed.event_type, one.parsed.user_id) for one in alive if one.parsed]


def _bury_dead(connection: Connection, opened: Sequence[Opened], dead: set[tuple[str, str]]) -> None:
    for one in opened:
        if one.reason and (one.delivery.aggregator, one.delivery.message_id) in dead:
            bury(connection, one.delivery, None, one.reason)
