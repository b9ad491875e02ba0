"""Parsed deliveries and their outcomes: values and pure functions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import Action, Download, LargeRequest, LostDelivery, Parsed, Record, Samples, SeriesKey
from workers.aggregators.repair import repaired
from workers.ingest.refused import sentence
from workers.store.ledger import ArchivedDelivery, Outcome, OutcomeRow
from workers.store.users import ClientId, User
from workers.store.writer import Written

ERASED = "the user was erased"
KEPT_BY_A_MERGE = Record | Samples | LargeRequest | LostDelivery


@dataclass(frozen=True)
class ParsedDelivery:
    """A delivery with its parsed content, or the reason why it cannot be applied. Neither before it is parsed."""

    delivery: Delivery
    attempts: int
    parsed: Parsed | None = None
    reason: str | None = None
    is_erased: bool = False  # the user was erased
    is_item: bool = False  # a refused item of another delivery, which has no outcome of its own
    is_repaired: bool = False  # its records were rewritten, because PostgreSQL refused one of them

    @property
    def actions(self) -> tuple[Action, ...]:
        return self.parsed.actions if self.parsed and not self.reason else ()

    @property
    def series(self) -> list[SeriesKey]:
        """The series of its samples."""
        return [key for one in self.actions if isinstance(one, Record | Samples) for key in one.series]

    @property
    def is_claim_check(self) -> bool:
        """Whether it contains only a URL from which the event must be downloaded."""
        return self.parsed is not None and any(isinstance(one, Download) for one in self.parsed.actions)


@dataclass(frozen=True)
class Applied:
    """The result of a message: outcomes of its deliveries, and the ids of backfills to fetch.

    Deliveries in `by_reference` have no outcome yet: download their events and apply them under the same ids.
    """

    settled: list[OutcomeRow]
    backfills: list[int]
    by_reference: tuple[Delivery, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)  # written, by kind

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(one.outcome for one in self.settled)


def combine(parts: Sequence[Applied]) -> Applied:
    return Applied(
        settled=[row for part in parts for row in part.settled],
        backfills=[number for part in parts for number in part.backfills],
        by_reference=tuple(delivery for part in parts for delivery in part.by_reference),
    )


def reason_of(error: Exception) -> str:
    """The reason of a dead letter. The message of an unexpected error may quote a value: only its class is used."""
    if isinstance(error, Unprocessable):
        return str(error)
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    line = f" at {where.tb_frame.f_code.co_name}:{where.tb_lineno}" if where else ""
    return f"unexpected {type(error).__name__}{line}"


def once_each(deliveries: Iterable[Delivery]) -> list[ParsedDelivery]:
    """Removes duplicate delivery ids. The first delivery of an id is kept; `attempts` counts all of them."""
    found: dict[str, ParsedDelivery] = {}
    for delivery in deliveries:
        known = found.setdefault(delivery.key, ParsedDelivery(delivery, 0))
        found[delivery.key] = replace(known, attempts=known.attempts + 1)
    return list(found.values())


def client_ids(opened: Sequence[ParsedDelivery]) -> dict[str, ClientId]:
    """The users of the deliveries, each with the newest client_user_id."""
    users: dict[str, ClientId] = {}
    for one in opened:
        if one.parsed and one.parsed.user_id:
            known = users.setdefault(one.parsed.user_id, None)
            name, at = one.parsed.client_user_id, one.parsed.occurred_at or one.delivery.received
            if name and (known is None or at > known[1]):
                users[one.parsed.user_id] = (name, at)
    return users


def with_merged_user(opened: ParsedDelivery, merged: Mapping[str, str]) -> ParsedDelivery:
    """A delivery of a merged user, under the new user_id.

    Its data is kept. Its connection events and notices are dropped, because they concern the former connection.
    """
    parsed = opened.parsed
    user_id = merged.get(parsed.user_id or "") if parsed else None
    if parsed is None or user_id is None:
        return opened
    data = (action for action in parsed.actions if isinstance(action, KEPT_BY_A_MERGE))
    actions = tuple(replace(action, user_id=user_id) for action in data)
    ignored = parsed.ignored if actions else parsed.ignored or "for a connection that was replaced by a reconnection"
    return replace(opened, parsed=replace(parsed, user_id=user_id, actions=actions, ignored=ignored))


def without_erased(opened: Iterable[ParsedDelivery], users: Mapping[str, User]) -> list[ParsedDelivery]:
    """The deliveries. Those of erased users are replaced by empty ones, without user and actions."""
    return [
        replace(one, parsed=Parsed(one.parsed.event_type, ignored=ERASED), reason=None, is_erased=True)
        if one.parsed and one.parsed.user_id and users[one.parsed.user_id].is_erased
        else one
        for one in opened
    ]


def outcome_of(n: int, opened: ParsedDelivery, written: Written) -> OutcomeRow:
    delivery, parsed = opened.delivery, opened.parsed
    if parsed is None or opened.reason:
        outcome: Outcome = "dead"
    elif parsed.ignored:
        outcome = "ignored"
    elif written.changed[n]:
        outcome = "applied"
    else:
        outcome = "stale" if n in written.stale else "duplicate"
    return OutcomeRow(
        aggregator=delivery.aggregator,
        message_id=delivery.message_id,
        event_type=parsed.event_type or None if parsed else None,
        user_id=parsed.user_id if parsed else None,
        received_at=delivery.received,
        outcome=outcome,
        attempts=opened.attempts,
        error=opened.reason or (parsed.ignored or remarks(parsed) if parsed else None),
        reference=(delivery.reference or "").partition(":chunk:")[0] or None,
        team_id=parsed.team_id if parsed else None,
    )


def with_repaired_records(opened: ParsedDelivery) -> ParsedDelivery:
    """A delivery of which PostgreSQL refused a record. Raises Unprocessable."""
    if opened.parsed is None:
        raise Unprocessable("there is no record")
    actions = tuple(repaired(one) if isinstance(one, Record) else one for one in opened.parsed.actions)
    return replace(opened, parsed=replace(opened.parsed, actions=actions), is_repaired=True)


def remarks(parsed: Parsed) -> str | None:
    """What the ledger says about an applied delivery of which something was refused or not stored as received."""
    return "; ".join((*sentence(parsed.refused), *parsed.notes)) or None


def to_archive(opened: Sequence[ParsedDelivery]) -> list[ArchivedDelivery]:
    return [
        ArchivedDelivery(one.delivery, one.parsed.event_type, one.parsed.user_id)
        for one in opened
        if one.parsed and not one.reason and not one.is_erased
    ]
