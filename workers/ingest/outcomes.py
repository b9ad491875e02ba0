"""Parsed deliveries and their outcomes: values and pure functions."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

from app.delivery import Delivery
from app.errors import RetryAlone, RetryCause, TryLater, Unprocessable, describe
from app.sealing import LARGEST, MIB
from workers.actions import Action, Download, LargeRequest, LostDelivery, Origin, Parsed, Record, Samples
from workers.aggregators.repair import repaired
from workers.ingest.refused import sentence
from workers.store.ledger import DeliveryKey, Outcome, OutcomeRow
from workers.store.samples import Written
from workers.store.users import Claim, User

ERASED = "the user was erased"
# Lost connections after which a message's deliveries go one by one, and their crashes are counted. Most are an outage.
MAX_LOST = 2
MAX_TRIES = 5  # of a delivery alone, for every cause but those of TRANSIENT
# A table may be locked for minutes, and memory used by others: a dead letter is made after about ten minutes.
TRANSIENT, MAX_TRIES_TRANSIENT = frozenset[RetryCause]({"lock_timeout", "conflict", "storage", "out_of_memory"}), 25
# Why a delivery that PostgreSQL did not execute is a dead letter, and what an operator can do about it.
GIVEN_UP: dict[RetryCause, str] = {
    "statement_timeout": "a database statement took too long ({}); apply it with headrace dead replay ID --timeout 10m",
    "lock_timeout": "another transaction held a lock ({}); when it has ended, run headrace dead replay ID",
    "conflict": "it conflicted with other transactions in every try ({}); run headrace dead replay ID",
    "damaged_page": "the database has a damaged page ({}); after the repair, run headrace dead replay ID",
    "storage": "the database cannot read or write a file ({}); after the repair, run headrace dead replay ID",
    "out_of_memory": "the database has too little memory ({}); with more memory, run headrace dead replay ID",
    "other": "the database did not execute a statement ({}); when the cause is removed, run headrace dead replay ID",
}
# Of an inflated body: 60 MB of one repeated sample are 0.4 MB sealed, and took the live lane 9 s. It passes larger ones
# on. And of all bodies that are parsed for one transaction: the 1 MiB sealed of an ordinary message are seldom more.
MAX_LIVE_BYTES, MAX_MESSAGE_BYTES = 2 * MIB, 16 * MIB
KEPT_BY_A_MERGE = Record | Samples | LargeRequest | LostDelivery


@dataclass(frozen=True)
class ParsedDelivery:
    """A delivery with its parsed content, or the reason why it cannot be applied. Neither before it is parsed."""

    delivery: Delivery
    limit: int = LARGEST  # of its body in bytes; a larger one is left to the lane `download`
    is_replay: bool = False  # it comes from the archive or a dead letter; of all deliveries of a batch, or of none
    is_retry: bool = False  # its transaction waits little for locks
    attempts: int = 1
    size: int = 0  # of its body, once it is opened
    is_large: bool = False  # its body exceeds the limit
    parsed: Parsed | None = None
    reason: str | None = None
    is_erased: bool = False  # the user was erased
    is_item: bool = False  # a refused item of another delivery, which has no outcome of its own
    month: date | None = None  # of its entry in the ledger, if it has one
    is_repaired: bool = False  # its records were rewritten, because PostgreSQL refused one of them

    @property
    def origin(self) -> Origin:
        """The cause of the rows that it writes."""
        return "replay" if self.is_replay else "webhook"

    @property
    def actions(self) -> tuple[Action, ...]:
        return self.parsed.actions if self.parsed and not self.reason else ()

    @property
    def claim(self) -> Claim | None:
        """The user of the delivery as its aggregator names them, if it names one."""
        user_id = self.parsed.user_id if self.parsed else None
        return Claim(self.delivery.aggregator, user_id) if user_id else None

    @property
    def key(self) -> DeliveryKey:
        return self.delivery.aggregator, self.delivery.message_id

    @property
    def download(self) -> Download | None:
        """The URL from which the event must be downloaded, if the delivery contains only that (a claim check)."""
        return next((one for one in self.actions if isinstance(one, Download)), None)

    @property
    def is_for_download(self) -> bool:
        """Whether the lane `download` applies it."""
        return self.reason is None and (self.is_large or self.download is not None)


@dataclass(frozen=True)
class Unsettled:
    """A delivery without an outcome. Enqueue it as a message of its own, so that no other delivery waits for it."""

    delivery: Delivery
    failures: int = 0  # its tries alone
    error: Exception | None = None  # of the last try; None: not tried yet


@dataclass(frozen=True)
class Applied:
    """The result of a message: outcomes of its deliveries, and the ids of backfills to fetch.

    Deliveries in `for_download` have no outcome yet. The lane `download` applies them under the same ids, because they
    are large or their event has to be downloaded.
    """

    settled: list[OutcomeRow]
    backfills: list[int]
    for_download: tuple[Delivery, ...] = ()
    unsettled: tuple[Unsettled, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)  # written, by kind

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(one.outcome for one in self.settled)


def combine(parts: Sequence[Applied]) -> Applied:
    return Applied(
        settled=[row for part in parts for row in part.settled],
        backfills=[number for part in parts for number in part.backfills],
        for_download=tuple(delivery for part in parts for delivery in part.for_download),
    )


def failures_after(failures: int, error: Exception) -> int:
    """The failures of a message with this one. Outages do not use up the tries of a delivery alone."""
    return failures + isinstance(error, RetryAlone)


def is_last_try(tries: int, error: RetryAlone) -> bool:
    """Whether a delivery that failed alone becomes a dead letter."""
    return tries >= (MAX_TRIES_TRANSIENT if error.cause in TRANSIENT else MAX_TRIES)


def retry_reason(error: Exception) -> str:
    """The reason of a retry. `status` groups by it, so that the place of an unexpected error is left out."""
    return str(error) if isinstance(error, TryLater) else f"unexpected {type(error).__name__}"


def cause_of(error: Exception) -> str:
    """The metric label of a failed try."""
    if isinstance(error, RetryAlone):
        return error.cause
    return "unavailable" if isinstance(error, TryLater) else "unexpected"


def reason_of(error: Exception) -> str:
    """The reason of a dead letter."""
    return GIVEN_UP[error.cause].format(error) if isinstance(error, RetryAlone) else describe(error)


def once_each(batch: Iterable[ParsedDelivery]) -> list[ParsedDelivery]:
    """Removes deliveries with the id or the digest of an earlier one, whose `attempts` counts them."""
    found: dict[DeliveryKey, ParsedDelivery] = {}
    keys: dict[tuple[str, bytes], DeliveryKey] = {}  # of the first delivery with this digest
    for one in batch:
        key, digest = one.key, one.delivery.digest
        if digest is not None and key not in found:
            key = keys.setdefault((one.delivery.aggregator, digest), key)
        known = found.get(key)
        found[key] = replace(known, attempts=known.attempts + 1) if known else one
    return list(found.values())


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


def without_erased(opened: Iterable[ParsedDelivery], users: Mapping[Claim, User]) -> list[ParsedDelivery]:
    """The deliveries. Those of erased users are replaced by empty ones, without user and actions."""
    return [
        replace(one, parsed=Parsed(one.parsed.event_type, ignored=ERASED), reason=None, is_erased=True)
        if one.parsed and one.claim and users[one.claim].is_erased
        else one
        for one in opened
    ]


def outcome_of(n: int, opened: ParsedDelivery, written: Written) -> OutcomeRow:
    """The ledger's entry of a delivery, `n` being its place in the batch."""
    delivery, parsed = opened.delivery, opened.parsed or Parsed("")
    if opened.parsed is None or opened.reason:
        outcome: Outcome = "dead"
    elif parsed.ignored:
        outcome = "ignored"
    elif written.changed[n]:
        outcome = "applied"
    else:
        outcome = "stale" if n in written.stale else "duplicate"
    remarks = "; ".join((*sentence(parsed.refused), *parsed.notes))  # what was refused, or not stored as received
    return OutcomeRow(
        aggregator=delivery.aggregator,
        message_id=delivery.message_id,
        event_type=parsed.event_type or None,
        user_id=parsed.user_id,
        received_at=delivery.received,
        outcome=outcome,
        attempts=opened.attempts,
        error=opened.reason or parsed.ignored or remarks or None,
        reference=(delivery.reference or "").partition(":chunk:")[0] or None,
        digest=delivery.digest.hex() if delivery.digest and opened.parsed else None,  # if not parsed, it may be forged
        team_id=parsed.team_id,
        month=opened.month,
    )


def fallback(opened: ParsedDelivery, error: Exception) -> ParsedDelivery | None:
    """The same delivery after its commit failed: repaired, else dead, else dead without its user; None after that."""
    if opened.reason is not None:  # PostgreSQL may have rejected the user_id or the event type
        return replace(opened, parsed=None) if opened.parsed else None
    if isinstance(error, Unprocessable) and opened.parsed and not opened.is_repaired:
        with contextlib.suppress(Unprocessable):
            actions = tuple(repaired(one) if isinstance(one, Record) else one for one in opened.parsed.actions)
            return replace(opened, parsed=replace(opened.parsed, actions=actions), is_repaired=True)
    return replace(opened, reason=reason_of(error))
