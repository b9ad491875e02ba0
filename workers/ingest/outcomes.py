"""What a message's deliveries mean and what became of them: values and pure functions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from app.delivery import Delivery
from app.errors import Unprocessable
from workers.actions import Action, Download, LargeRequest, Parsed, Record, Samples
from workers.store.ledger import ArchivedDelivery, Outcome, OutcomeRow
from workers.store.users import ClientId, User
from workers.store.writer import Written

ERASED = "the user was erased"


@dataclass(frozen=True)
class ParsedDelivery:
    """A delivery and what it means, or why it cannot be used; neither before it is parsed."""

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
    def is_claim_check(self) -> bool:
        """Whether it only announces where the event is."""
        return self.parsed is not None and any(isinstance(one, Download) for one in self.parsed.actions)


@dataclass(frozen=True)
class Applied:
    """What became of a message: its deliveries, and the backfills that it announced and somebody should go on with.

    What is elsewhere is not settled yet: it is to be fetched, and then applied under its announcement's id.
    """

    settled: list[OutcomeRow]
    backfills: list[int]
    by_reference: tuple[Delivery, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)  # written, by kind

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many deliveries came to which end."""
        return Counter(one.outcome for one in self.settled)


def combine(parts: Sequence[Applied]) -> Applied:
    return Applied(
        [s for part in parts for s in part.settled],
        [b for part in parts for b in part.backfills],
        tuple(e for part in parts for e in part.by_reference),
    )


def reason_of(error: Exception) -> str:
    """Why a delivery is set aside. An error that is not ours may quote a value, so only its kind is told."""
    if isinstance(error, Unprocessable):
        return str(error)
    where = error.__traceback__
    while where and where.tb_next:
        where = where.tb_next
    line = f" at {where.tb_frame.f_code.co_name}:{where.tb_lineno}" if where else ""
    return f"unforeseen {type(error).__name__}{line}"


def once_each(deliveries: Iterable[Delivery]) -> list[ParsedDelivery]:
    """A delivery id may stand in a message more than once: the first one is taken, all are counted as attempts."""
    found: dict[str, ParsedDelivery] = {}
    for delivery in deliveries:
        known = found.setdefault(delivery.key, ParsedDelivery(delivery, 0))
        found[delivery.key] = replace(known, attempts=known.attempts + 1)
    return list(found.values())


def client_ids(opened: Sequence[ParsedDelivery]) -> dict[str, ClientId]:
    """Who the deliveries are about, with the client_user_id that was told last."""
    users: dict[str, ClientId] = {}
    for one in opened:
        if one.parsed and one.parsed.user_id:
            told = users.setdefault(one.parsed.user_id, None)
            name, at = one.parsed.client_user_id, one.parsed.occurred_at or one.delivery.received
            if name and (told is None or at > told[1]):
                users[one.parsed.user_id] = (name, at)
    return users


def with_merged_user(opened: ParsedDelivery, merged: Mapping[str, str]) -> ParsedDelivery:
    """A delivery about somebody who has reconnected, under the id that they go by now.

    Its data is theirs; what it says of the connection is about the one that is no more.
    """
    parsed = opened.parsed
    user_id = merged.get(parsed.user_id or "") if parsed else None
    if parsed is None or user_id is None:
        return opened
    kept = (one for one in parsed.actions if isinstance(one, Record | Samples | LargeRequest))
    actions = tuple(replace(one, user_id=user_id) for one in kept)
    ignored = parsed.ignored if actions else parsed.ignored or "of a connection that another has taken the place of"
    return replace(opened, parsed=replace(parsed, user_id=user_id, actions=actions, ignored=ignored))


def without_erased(opened: Iterable[ParsedDelivery], users: Mapping[str, User]) -> list[ParsedDelivery]:
    """The deliveries; of those about somebody who was erased, no more than that they came."""

    def emptied(one: ParsedDelivery) -> ParsedDelivery:
        if not (one.parsed and one.parsed.user_id and users[one.parsed.user_id].is_erased):
            return one
        return ParsedDelivery(one.delivery, one.attempts, Parsed(one.parsed.event_type, ignored=ERASED), is_erased=True)

    return [emptied(one) for one in opened]


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


def to_archive(opened: Sequence[ParsedDelivery]) -> list[ArchivedDelivery]:
    alive = (one for one in opened if one.parsed and not one.reason and not one.is_erased)
    return [ArchivedDelivery(one.delivery, one.parsed.event_type, one.parsed.user_id) for one in alive if one.parsed]
