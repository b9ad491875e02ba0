"""The origin of a stored value: the deliveries and fetches that contained it, and which version won."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from sqlalchemy import Engine

from app.catalogue import Resource, catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from app.sealing import Sealer
from workers.actions import Action, Record, Samples
from workers.aggregators.registry import AGGREGATORS
from workers.store import audit, provenance, retractions
from workers.store.engine import transaction
from workers.store.provenance import Fetch, LedgerEntry, StoredRow
from workers.store.users import Person, person

Verdict = Literal["won", "same", "older", "outranked", "newer", "ignored", "dead", "gone"]
SeriesName = tuple[str, str, str]  # provider, source type, subtype
MISSING = object()
SAYS: dict[Verdict, str] = {
    "won": "this version is stored",
    "same": "same content, older version",
    "older": "different content, older version",
    "outranked": "same version, different content; the tie-break chose the stored content",
    "newer": "newer than the stored version, but not stored; apply it with headrace replay",
    "ignored": "a setting or rule excluded it from storage",
    "dead": "could not be applied",
    "gone": "applied, but no longer stored",
}


@dataclass(frozen=True)
class Question:
    """The value to explain: a record by its id, or the samples at a moment."""

    user_id: str
    resource: Resource
    id: str | None = None
    at: datetime | None = None


@dataclass(frozen=True)
class Version:
    series: SeriesName
    version: datetime
    content: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Holding(Version):
    """A delivery that contains the record or the sample, compared with the stored row."""

    entry: LedgerEntry
    verdict: Verdict
    differs: tuple[str, ...]  # fields that differ from the stored row
    wrote: bool  # wrote the stored row


@dataclass(frozen=True)
class Explanation:
    question: Question
    person: Person
    rows: list[StoredRow]
    holdings: list[Holding]
    fetches: list[Fetch]
    unkept: list[LedgerEntry]  # applied with the row, but no longer archived
    unread: int  # deliveries that may contain it but cannot be decrypted or parsed
    looked_at: int
    kept_since: datetime | None  # of the archive; None if no delivery is old enough to have been removed from it
    retracted: Mapping[str, datetime]  # by resource: an operator hid the record, or the record of a stream

    @property
    def is_unknown(self) -> bool:
        """Whether no trace of the value exists: a row, a delivery, a retraction, or an erasure of the user."""
        return not (self.rows or self.holdings or self.retracted or self.person.erased_at or self.unread)

    @property
    def why(self) -> list[str]:
        """A sentence for each row, or one sentence about why no row exists; then one for each retraction."""
        stored = [_of_row(self, row) for row in self.rows] or [_of_nothing(self)]
        return stored + [_of_retraction(self.question, name, at) for name, at in self.retracted.items()]


def explain(
    engine: Engine, settings: Settings, asked: Question, on_progress: Callable[[int, int], None], *, values: bool
) -> Explanation:
    """`on_progress` gets the number of deliveries read so far and their total. Raises TryLater."""
    resource, user_id = asked.resource, asked.user_id
    with transaction(engine) as connection:
        about = {"resource": resource.name, "id": asked.id, "at": asked.at, "values": values}
        audit.note(connection, "explain", user_id, about)
        about_user = person(connection, user_id)
        users = (user_id, *about_user.former)
        if resource.is_series and asked.at:
            rows = provenance.of_sample(connection, resource, user_id, asked.at)
        else:
            rows = provenance.of_record(connection, resource, user_id, asked.id or "")
        day = next((row.day for row in rows if row.day), asked.at)
        fetches = provenance.fetches(connection, resource.name, user_id, asked.id or "", day)
        known = provenance.entries(connection, users)
        named = [one for row in rows for one in provenance.same_moment(connection, row.stored_at, users)]
        edge = datetime.now(UTC)  # deliveries from before it are not archived
        if settings.keep_days:
            edge = edge.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=settings.keep_days)
        since = provenance.archived_since(connection, edge)
        retracted = {} if asked.id is None else retractions.find(connection, resource, user_id, asked.id)
    entries = [one for one in known if _may_hold(one, resource)]
    here = {one.message_id for one in entries}
    unkept = [one for one in dict.fromkeys(named) if one.message_id not in here and _may_hold(one, resource)]
    found, unread = _read(engine, settings, asked, users=users, entries=entries, on_progress=on_progress)
    holdings = [_compare(entry, held, asked, rows) for entry, held in found]
    providers = {row.provider for row in rows} or {one.series[0] for one in holdings}
    return Explanation(
        question=asked,
        person=about_user,
        rows=rows,
        holdings=sorted(holdings, key=lambda one: (one.version, one.entry.received_at)),
        fetches=[one for one in fetches if not (providers and one.provider) or one.provider in providers],
        unkept=unkept,
        unread=unread,
        looked_at=len(entries),
        kept_since=since,
        retracted=retracted,
    )


def _may_hold(entry: LedgerEntry, resource: Resource) -> bool:
    """Judged by the event type. A Junction event is about one resource; a Terra object maps to several."""
    if entry.aggregator != "junction" or entry.event_type is None:
        return True
    event = catalogue().event(entry.event_type)
    return event.does in ("data", "device") and event.resource is resource


def _read(
    engine: Engine,
    settings: Settings,
    asked: Question,
    *,
    users: Sequence[str],
    entries: Sequence[LedgerEntry],
    on_progress: Callable[[int, int], None],
) -> tuple[list[tuple[LedgerEntry, Version]], int]:
    """Opens the user's deliveries. Returns those that contain the value, and how many cannot be read."""
    everything = replace(settings, resources=(), providers=())  # include what the settings exclude today
    found, unread = [], 0
    for n, (entry, delivery) in enumerate(provenance.opened(engine, users, entries), 1):
        actions = actions_of(delivery, everything)
        unread += actions is None
        found += [(entry, held) for action in actions or () for held in _contents(action, asked)]
        on_progress(n, len(entries))
    return found, unread


def actions_of(delivery: Delivery, everything: Settings) -> Sequence[Action] | None:
    """None if the delivery cannot be opened or parsed. `everything` are settings that exclude nothing."""
    try:
        body = delivery.open(Sealer(everything.encryption_keys))
        return AGGREGATORS[delivery.aggregator].parse(delivery, body, everything).actions
    except (Unprocessable, KeyError):
        return None


def _contents(action: Action, asked: Question) -> Iterator[Version]:
    """The action's versions of the value. The user needs no check: a delivery is about one user."""
    if isinstance(action, Record) and action.resource == asked.resource.name and action.id == asked.id:
        payload = msgspec.json.decode(action.payload)
        content = provenance.content_of_record(payload, is_deleted=action.is_deleted)
        yield Version((action.provider, action.source_type, ""), action.version, content)
    elif isinstance(action, Samples) and action.resource == asked.resource.name and asked.at:
        for one in action.rows:
            if one.ts == asked.at:
                extra = msgspec.json.decode(one.extra) if one.extra else None
                content = {name: getattr(one, name) for name in ("ts_end", "value", "unit", "timezone_offset")}
                series = (action.provider, action.source_type, action.subtype)
                yield Version(series, action.version, content | {"extra": extra})


def _compare(entry: LedgerEntry, held: Version, asked: Question, rows: Sequence[StoredRow]) -> Holding:
    """Compares with the stored row: a record has one, a moment has one per series."""
    of_series = (row for row in rows if (row.provider, row.source_type, row.subtype) == held.series)
    row = next(of_series if asked.resource.is_series else iter(rows), None)
    differs = _differing(held.content, row.content) if row else ()
    wrote = row is not None and entry.applied_at == row.stored_at and not differs
    verdict = _verdict(entry, held, row, differs)
    return Holding(**vars(held), entry=entry, verdict=verdict, differs=differs, wrote=wrote)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, ...]:
    names = sorted(one.keys() | other.keys())
    return tuple(name for name in names if one.get(name, MISSING) != other.get(name, MISSING))


def _verdict(entry: LedgerEntry, held: Version, row: StoredRow | None, differs: tuple[str, ...]) -> Verdict:
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
    series = (row.provider, row.source_type, row.subtype)
    is_record = not known.question.resource.is_series
    about = [one for one in known.holdings if is_record or one.series == series]
    what = f"the version of {_moment(row.version)}" + (", which deletes the record," if row.is_deleted else "")
    if winners := [one for one in about if one.verdict == "won"]:
        name = winners[0].entry.message_id
        wrote = [one.entry.message_id for one in about if one.wrote and one.entry.message_id != name]
        first = f" (delivery {wrote[0]} first wrote the same content)" if wrote else ""
        return f"{what} is stored because delivery {name} contained it{first}; {_losers(about)}"
    if row.origin in ("backfill", "reconcile"):
        return f"{what} was fetched from the provider by {_fetched_by(known, row)}; {_losers(about)}"
    if known.unkept:
        names = ", ".join(one.message_id for one in known.unkept)
        return f"{what} was stored with delivery {names}, which is not archived and cannot be opened"
    if known.kept_since and row.stored_at < known.kept_since:
        return f"{what} was stored by {row.origin} before the oldest archived delivery: its delivery is no longer kept"
    return f"{what} was stored by {row.origin}, but no archived delivery contains it"


def _losers(about: Sequence[Holding]) -> str:
    others = Counter(one.verdict for one in about if one.verdict != "won")
    if not others:
        return "no other archived delivery contains it"
    return f"other deliveries that contain it: {_counted(others)}"


def _counted(verdicts: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def _fetched_by(known: Explanation, row: StoredRow) -> str:
    running = [
        str(one.id)
        for one in known.fetches
        if one.provider in {"", row.provider}
        and one.started_at
        and one.started_at <= row.stored_at
        and (one.finished_at or row.stored_at) >= row.stored_at
    ]
    return f"backfill {' or '.join(running)}" if running else "a backfill that has since been deleted"


def _of_nothing(known: Explanation) -> str:
    if known.person.erased_at:
        return f"nothing is stored: the user was erased on {_moment(known.person.erased_at)}"
    if not known.holdings:
        return "nothing is stored, and no archived delivery contains it"
    verdicts = Counter(one.verdict for one in known.holdings)
    if verdicts["gone"]:
        return "nothing is stored: it was delivered and applied, and has been removed since"
    return f"nothing is stored; deliveries that contain it: {_counted(verdicts)}"


def _of_retraction(asked: Question, name: str, at: datetime) -> str:
    hidden = "the record is" if name == asked.resource.name else f"the stream is hidden with its record of {name},"
    command = f"headrace retract --user {asked.user_id} --resource {name} --id {asked.id} --undo"
    return f"{hidden} retracted since {_moment(at)}: health.{asked.resource.name} leaves it out; `{command}` shows it"


def _moment(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
