"""The content of one delivery: its rows by resource and id, without values, and whether they are stored."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, text

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery
from app.sealing import is_encrypted
from workers.actions import Record, Samples
from workers.operate.explain import actions_of
from workers.store.ledger import DELIVERY_COLUMNS, to_delivery
from workers.store.schema import record_table

MAX_SEALED_BYTES = 512 * 1024  # a larger body takes longer to read than a page may take
MAX_SHOWN = 200
FIRST_BYTE = "octet_length(sealed) AS bytes, substring(sealed FROM 1 FOR 1) AS first"
SIZE = text(f"""
SELECT {FIRST_BYTE} FROM headrace.archive
WHERE aggregator = :aggregator AND message_id = :message_id AND received_at BETWEEN :start AND :stop""")
DEAD = text(f"""
SELECT id, {FIRST_BYTE} FROM headrace.dead_letters
WHERE aggregator = :aggregator AND message_id = :message_id ORDER BY item LIMIT 50""")
ARCHIVED = text(f"""
SELECT {DELIVERY_COLUMNS} FROM headrace.archive
WHERE aggregator = :aggregator AND message_id = :message_id AND received_at BETWEEN :start AND :stop LIMIT 1""")
OF_DEAD = text(f"SELECT {DELIVERY_COLUMNS} FROM headrace.dead_letters WHERE id = :id")
VERSIONS_OF_RECORDS = """
SELECT user_id, id, version FROM {table}
JOIN unnest(CAST(:users AS text[]), CAST(:ids AS text[])) AS given(user_id, id) USING (user_id, id)"""
VERSIONS_OF_SAMPLES = text("""
SELECT user_id, resource, provider, source_type, subtype, given.ts, version
FROM unnest(CAST(:users AS text[]), CAST(:resources AS text[]), CAST(:providers AS text[]),
            CAST(:source_types AS text[]), CAST(:subtypes AS text[]), CAST(:moments AS timestamptz[]))
     AS given(user_id, resource, provider, source_type, subtype, ts)
JOIN headrace.series n USING (user_id, resource, provider, source_type, subtype)
JOIN headrace.samples s ON s.series_id = n.id AND s.ts = given.ts""")


@dataclass(frozen=True)
class KeptBody:
    bytes: int = 0
    is_encrypted: bool = False
    dead_letters: tuple[int, ...] = ()
    delivery: Delivery | None = None
    where: str = ""


@dataclass(frozen=True)
class Content:
    """A record, or the samples of a series, in a delivery."""

    resource: str
    user_id: str
    id: str
    first: datetime | None
    last: datetime | None
    rows: int
    version: datetime
    stored: str


def open_delivery(connection: Connection, aggregator: str, message_id: str, received_at: datetime) -> KeptBody:
    """The sealed body, unless it is too large for a page."""
    around = {"start": received_at - timedelta(seconds=1), "stop": received_at + timedelta(seconds=1)}
    values = {"aggregator": aggregator, "message_id": message_id} | around
    dead = connection.execute(DEAD, values).all()
    archived = connection.execute(SIZE, values).first()
    found = archived or next(iter(dead), None)
    if found is None:
        return KeptBody()
    query, given = (ARCHIVED, values) if archived else (OF_DEAD, {"id": dead[0].id})
    row = connection.execute(query, given).one() if found.bytes <= MAX_SEALED_BYTES else None
    return KeptBody(
        found.bytes,
        is_encrypted(found.first),
        tuple(one.id for one in dead),
        to_delivery(row) if row else None,
        "archive" if archived else "dead letter",
    )


def contents_of(
    connection: Connection, settings: Settings, kept: KeptBody, entry: dict[str, Any]
) -> tuple[list[Content], int]:
    """The first records and series of the body, and the number of all.

    Empty if the body cannot be opened or parsed; the error in the ledger gives the reason.
    """
    actions = actions_of(kept.delivery, replace(settings, resources=(), providers=())) if kept.delivery else None
    found = [one for one in actions or () if isinstance(one, Record) or (isinstance(one, Samples) and one.rows)]
    shown = found[:MAX_SHOWN]
    stored = _versions_of_records(connection, [one for one in shown if isinstance(one, Record)])
    if entry["outcome"] == "applied":
        stored |= _versions_of_samples(connection, [one for one in shown if isinstance(one, Samples)])
    return [_content(one, stored) for one in shown], len(found)


def _key(one: Record | Samples) -> tuple[object, ...]:
    """Of a record, or of the first sample of a series."""
    return (one.resource, one.user_id, one.id) if isinstance(one, Record) else (*one.key, _first(one))


def _first(one: Samples) -> datetime:
    return min(row.ts for row in one.rows)


def _versions_of_records(connection: Connection, records: Sequence[Record]) -> dict[tuple[object, ...], datetime]:
    """The stored versions: one statement for each resource."""
    by_resource: defaultdict[str, list[Record]] = defaultdict(list)
    for one in records:
        by_resource[one.resource].append(one)
    found: dict[tuple[object, ...], datetime] = {}
    for resource, some in by_resource.items():
        query = text(VERSIONS_OF_RECORDS.format(table=record_table(catalogue()[resource])))
        values = {"users": [one.user_id for one in some], "ids": [one.id for one in some]}
        found |= {(resource, row.user_id, row.id): row.version for row in connection.execute(query, values)}
    return found


def _versions_of_samples(connection: Connection, series: Sequence[Samples]) -> dict[tuple[object, ...], datetime]:
    """The stored versions of the first sample of each series, in one statement."""
    if not series:
        return {}
    names = ("users", "resources", "providers", "source_types", "subtypes", "moments")
    columns = zip(*map(_key, series), strict=True)
    values = {name: list(column) for name, column in zip(names, columns, strict=True)}
    return {tuple(row[:6]): row.version for row in connection.execute(VERSIONS_OF_SAMPLES, values)}


def _content(one: Record | Samples, versions: Mapping[tuple[object, ...], datetime]) -> Content:
    version = versions.get(_key(one))
    if version is None:
        stored = "not stored"
    elif one.version == version:
        stored = "stored"
    else:
        stored = "a newer version is stored" if one.version < version else "an older version is stored"
    if isinstance(one, Record):
        return Content(one.resource, one.user_id, one.id, None, None, 1, one.version, stored)
    last = max(row.ts for row in one.rows)
    return Content(one.resource, one.user_id, "", _first(one), last, len(one.rows), one.version, stored)
