"""Where a stored value came from: what brought it, what else held it, and which of them won."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Engine

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.errors import Unprocessable
from app.sealing import Sealer
from workers.actions import Action, Record, Samples
from workers.aggregators import AGGREGATORS
from workers.store import audit, provenance
from workers.store.engine import transaction
from workers.store.provenance import Fetch, LedgerEntry, Named, Person, StoredRow

Verdict = Literal["won", "same", "older", "outranked", "newer", "ignored", "dead", "gone"]
SeriesName = tuple[str, str, str]  # provider, source type, subtype
MISSING = object()
SAYS: dict[Verdict, str] = {
    "won": "its version is the one that is stored",
    "same": "said the same, with an older version",
    "older": "said something else, with an older version",
    "outranked": "equally new, and of two contents the greater one stands",
    "newer": "newer than what is stored, and not stored: headrace replay applies it again",
    "ignored": "was not to be stored",
    "dead": "could not be applied",
    "gone": "nothing is stored any more",
}


@dataclass(frozen=True)
class Question:
    """Which value is meant: a record by its id, or the samples of a moment."""

    user_id: str
    resource: Resource
    id: str | None = None
    at: datetime | None = None


@dataclass(frozen=True)
class Holding:
    """A delivery that really holds the record or moment, and what came of that."""

    aggregator: str
    message_id: str
    event_type: str | None
    received_at: datetime
    version: datetime
    outcome: str | None  # of the delivery as a whole; None: the ledger does not know it
    attempts: int | None
    error: str | None
    verdict: Verdict
    differs: tuple[str, ...]  # in which fields, from what is stored
    wrote: bool  # what is stored was written with it
    series: SeriesName
    content: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Explanation:
    """All that is known of where a value came from."""

    question: Question
    person: Person
    rows: list[StoredRow]
    holdings: list[Holding]
    fetches: list[Fetch]
    unkept: list[Named]  # applied with the row, and no longer kept
    unread: int  # deliveries that might hold it and cannot be opened or read
    looked_at: int
    kept_since: datetime | None

    @property
    def why(self) -> list[str]:
        """A sentence for each row, or one that says why there is none."""
        return [_of_row(self, row) for row in self.rows] or [_of_nothing(self)]


def explain(
    engine: Engine, settings: Settings, asked: Question, on_progress: Callable[[int, int], None], *, values: bool
) -> Explanation:
    """Looks everything up. `on_progress` gets the number of deliveries read so far, and of all. Raises TryLater."""
    resource, user_id = asked.resource, asked.user_id
    with transaction(engine) as connection:
        about = {"resource": resource.name, "id": asked.id, "at": asked.at, "values": values}
        audit.note(connection, "explain", user_id, about)
        person = provenance.person(connection, user_id)
        users = (user_id, *person.former)
        rows = _stored(connection, asked)
        day = next((row.day for row in rows if row.day), asked.at)
        fetches = provenance.fetches(connection, resource.name, user_id, asked.id or "", day)
        known = provenance.archived(connection, users) + provenance.dead(connection, users)
        named = [one for row in rows for one in provenance.same_moment(connection, row.stored_at, users)]
        since = provenance.oldest_archived(connection)
    entries = [one for one in known if _may_hold(one.aggregator, one.event_type, resource)]
    here = {one.message_id for one in entries}
    unkept = [
        one
        for one in dict.fromkeys(named)
        if one.message_id not in here and _may_hold(one.aggregator, one.event_type, resource)
    ]
    found, unread = _read(engine, settings, asked, (users, entries), on_progress)
    holdings = sorted((_judged(*one, asked, rows) for one in found), key=lambda one: (one.version, one.received_at))
    return Explanation(asked, person, rows, holdings, fetches, unkept, unread, len(entries), since)


def _stored(connection: Connection, asked: Question) -> list[StoredRow]:
    if asked.resource.is_series and asked.at:
        return provenance.of_sample(connection, asked.resource, asked.user_id, asked.at)
    return provenance.of_record(connection, asked.resource, asked.user_id, asked.id or "")


def _may_hold(aggregator: str, event_type: str | None, resource: Resource) -> bool:
    """By its name alone. Junction's events are about one resource; an object of Terra's becomes several."""
    if aggregator != "junction" or event_type is None:
        return True
    event = catalogue().event(event_type)
    return event.does in ("data", "device") and event.resource is resource


def _read(
    engine: Engine,
    settings: Settings,
    asked: Question,
    whose: tuple[Sequence[str], Sequence[LedgerEntry]],
    on_progress: Callable[[int, int], None],
) -> tuple[list[tuple[LedgerEntry, "_Held"]], int]:
    """What of somebody's deliveries holds it, and how many cannot be read."""
    users, entries = whose
    sealer = Sealer(settings.encryption_keys)
    everything = replace(settings, resources=(), providers=())  # also what is left out today
    found, unread = [], 0
    for n, (entry, delivery) in enumerate(provenance.opened(engine, users, entries), 1):
        try:
            body = sealer.open(delivery.sealed, delivery.key)
            actions = AGGREGATORS[delivery.aggregator].parse(delivery, body, everything).actions
        except (Unprocessable, KeyError):
            unread += 1
        else:
            found += [(entry, held) for action in actions for held in _pending(action, asked)]
        on_progress(n, len(entries))
    return found, unread


@dataclass(frozen=True)
class _Held:
    series: SeriesName
    version: datetime
    content: dict[str, Any]


def _pending(action: Action, asked: Question) -> Iterator[_Held]:
    """What of an action is about the record or moment. Whose it is is known: a delivery is about one person."""
    if isinstance(action, Record) and action.resource == asked.resource.name and action.id == asked.id:
        payload = msgspec.json.decode(action.payload)
        content = provenance.content_of_record(payload, is_deleted=action.is_deleted)
        yield _Held((action.provider, action.source_type, ""), action.version, content)
    elif isinstance(action, Samples) and action.resource == asked.resource.name and asked.at:
        for one in action.rows:
            if one.ts == asked.at:
                extra = msgspec.json.decode(one.extra) if one.extra else None
                content = {name: getattr(one, name) for name in ("ts_end", "value", "unit", "timezone_offset")}
                series = (action.provider, action.source_type, action.subtype)
                yield _Held(series, action.version, content | {"extra": extra})


def _judged(entry: LedgerEntry, held: _Held, asked: Question, rows: Sequence[StoredRow]) -> Holding:
    """What came of it, held against the row: of a record there is one, of a moment one a series."""
    of_series = (row for row in rows if (row.provider, row.source_type, row.subtype) == held.series)
    row = next(of_series if asked.resource.is_series else iter(rows), None)
    differs = tuple(_differing(held.content, row.content)) if row else ()
    about = (entry.aggregator, entry.message_id, entry.event_type, entry.received_at, held.version)
    ledger = (entry.outcome, entry.attempts, entry.error)
    wrote = row is not None and entry.applied_at == row.stored_at and not differs
    return Holding(*about, *ledger, _verdict(entry, held, row, differs), differs, wrote, held.series, held.content)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name, MISSING) != other.get(name, MISSING):
            yield name


def _verdict(entry: LedgerEntry, held: _Held, row: StoredRow | None, differs: tuple[str, ...]) -> Verdict:
    if entry.outcome == "dead":
        return "dead"
    if row and held.version == row.version:
        return "outranked" if differs else "won"
    if entry.outcome == "ignored":
        return "ignored"
    if row is None:
        return "gone"
    if held.version > row.version:
        return "newer"
    return "older" if differs else "same"


def _of_row(known: Explanation, row: StoredRow) -> str:
    """Why this is what is stored."""
    series = (row.provider, row.source_type, row.subtype)
    all_of_it = not known.question.resource.is_series
    about = [one for one in known.holdings if all_of_it or one.series == series]
    what = f"the version of {_moment(row.version)}" + (", which takes the record back," if row.is_deleted else "")
    if winners := [one for one in about if one.verdict == "won"]:
        name = winners[0].message_id
        return f"{what} stands because delivery {name} brought it{_first(about, name)}, and {_beaten(about)}"
    if row.origin in ("backfill", "reconcile"):
        return f"{what} was fetched from the provider, {_by(known, row)}, and {_beaten(about)}"
    if known.unkept:
        names = ", ".join(one.message_id for one in known.unkept)
        return f"{what} was stored with delivery {names}, which is no longer kept, so that it cannot be opened"
    if known.kept_since is None or row.stored_at < known.kept_since:
        return f"{what} came by {row.origin} before the oldest delivery that is still kept: the evidence is gone"
    return f"{what} came by {row.origin}, and no delivery that is kept explains it"


def _first(about: Sequence[Holding], name: str) -> str:
    """Whether another one had already said the same."""
    wrote = [one.message_id for one in about if one.wrote and one.message_id != name]
    return f" (what it says was first written with {wrote[0]})" if wrote else ""


def _beaten(about: Sequence[Holding]) -> str:
    others = Counter(one.verdict for one in about if one.verdict != "won")
    if not others:
        return "nothing else that is kept holds it"
    return "of the others that hold it " + ", ".join(
        f"{count} {'was' if count == 1 else 'were'} {verdict}" for verdict, count in others.items()
    )


def _by(known: Explanation, row: StoredRow) -> str:
    """The backfills that were at work when it was stored."""
    at_work = [
        one.id
        for one in known.fetches
        if one.started_at and one.started_at <= row.stored_at and (one.finished_at or row.stored_at) >= row.stored_at
    ]
    if not at_work:
        return "by a backfill that is no longer known"
    return f"by backfill {' or '.join(map(str, at_work))}"


def _of_nothing(known: Explanation) -> str:
    """Why nothing is stored."""
    if known.person.erased_at:
        return f"nothing is stored: the person was erased on {_moment(known.person.erased_at)}"
    if not known.holdings:
        return "nothing is stored, and no delivery that is kept holds it"
    verdicts = Counter(one.verdict for one in known.holdings)
    if verdicts["gone"]:
        return "nothing is stored, though it was delivered and applied: it has been removed since"
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return f"nothing is stored: of the deliveries that hold it, {told}"


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
