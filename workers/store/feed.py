"""The change feed: the outbox that writers fill, and the sequencer that numbers committed changes.

A transaction that changes rows inserts its changes into the outbox. After its commit, the sequencer moves them to
`headrace.changes` and numbers them. Only one transaction numbers at a time: it holds the lock of the row
`headrace.feed` until its commit. So a position becomes visible only after every lower one. See record 0077.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from sqlalchemy import Connection, Engine, text

from app.catalogue import Resource, catalogue
from workers.store import partitions
from workers.store.engine import delete_in_batches, execute, transaction
from workers.store.sql import RowParameters

Op = Literal["put", "remove", "erase"]
IsDue = Callable[[Engine], bool]  # whether a task that reads the feed has work
CHANNEL = "headrace_changes"
MAX_CHANGES = 50_000  # that one transaction numbers: about 0.5 s
GIVEN = RowParameters(
    "op text, user_id text, resource text, provider text, source_type text, record_id text, ts_min timestamptz, "
    "ts_max timestamptz, row_count int, origin text"
)
COLUMNS = GIVEN.columns
# The resource of a change, and for a stream that of its record, which has the same id.
_PARENTS = "".join(f" WHEN '{one.name}' THEN '{one.of}'" for one in catalogue().values() if one.of)
_RESOURCES = f"changed.resource, CASE changed.resource{_PARENTS} END"
# The views leave a retracted record out, and so does the feed. The lock makes the restoration of a record wait, so that
# it announces the record as it is after this transaction.
_RETRACTED = """SELECT {key} FROM {source} changed JOIN headrace.retractions retraction
    ON (retraction.user_id, retraction.id) = (changed.user_id, changed.{id}) AND retraction.resource IN ({resources})
    FOR SHARE OF retraction"""
ANNOUNCE = text(f"""
WITH given AS (
    SELECT * FROM {GIVEN.arrays} WITH ORDINALITY AS given({COLUMNS}, number)),
retracted AS MATERIALIZED (
    {_RETRACTED.format(key="number", source="given", id="record_id", resources=_RESOURCES)})
INSERT INTO headrace.outbox ({COLUMNS})
SELECT {COLUMNS} FROM given WHERE number NOT IN (SELECT number FROM retracted) ORDER BY number""")
# The changes of samples, from a CTE with the columns series_id, ts_min, ts_max and row_count, named like the parameter.
OF_SERIES = f"""
INSERT INTO headrace.outbox ({COLUMNS})
SELECT {{op}}, user_id, resource, provider, source_type, NULL, min(ts_min), max(ts_max), sum(row_count), {{origin}}
FROM {{source}} JOIN headrace.series ON series.id = series_id
GROUP BY user_id, resource, provider, source_type"""
CHANGED = RowParameters("series_id int, ts_min timestamptz, ts_max timestamptz, row_count int", "changed")
ANNOUNCE_SERIES = text(f"""
WITH changed AS (SELECT * FROM {CHANGED})
{OF_SERIES.format(op="CAST(:op AS text)", origin="CAST(:origin AS text)", source="changed")}""")
STORED = text("""
SELECT series_id, min(ts) AS first, max(ts) AS last, count(*) AS rows
FROM headrace.samples WHERE series_id = ANY(:series) GROUP BY series_id""")
# Changes whose transaction had not ended in the snapshot `seen` of an earlier pass, which has numbered all others.
# Without this condition, each pass would read the deleted rows that VACUUM cannot remove while another application
# holds a snapshot. An empty snapshot selects all changes.
UNSEEN = """(transaction >= pg_snapshot_xmax(CAST(:seen AS pg_snapshot))
    OR transaction = ANY (ARRAY(SELECT pg_snapshot_xip(CAST(:seen AS pg_snapshot)))))"""
NOTHING_SEEN = "1:1:"
IS_EMPTY = text(f"""
SELECT NOT EXISTS (SELECT FROM headrace.outbox WHERE {UNSEEN}) AS is_empty,
       CAST(pg_current_snapshot() AS text) AS seen""")
LOCK = text("SELECT newest FROM headrace.feed FOR UPDATE SKIP LOCKED")
# In the order in which rows were changed: a transaction that changes a row of an open transaction waits for its commit,
# and announces its own change afterwards. Changes of erased users are dropped: they were committed before the
# tombstone.
NUMBER = text(f"""
WITH moment AS (SELECT greatest(changed_at, clock_timestamp()) AS changed_at FROM headrace.feed),
taken AS (
    DELETE FROM headrace.outbox WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM headrace.outbox WHERE {UNSEEN} ORDER BY n LIMIT :limit)) RETURNING *),
numbered AS (
    INSERT INTO headrace.changes (position, changed_at, client_user_id, {COLUMNS})
    SELECT :newest + row_number() OVER (ORDER BY n), moment.changed_at, client_user_id, {COLUMNS}
    FROM taken LEFT JOIN headrace.users USING (user_id), moment
    WHERE op = 'erase' OR erased_at IS NULL
    RETURNING position)
SELECT (SELECT count(*) FROM taken) AS taken, (SELECT max(position) FROM numbered) AS newest,
       moment.changed_at, CAST(pg_current_snapshot() AS text) AS seen FROM moment""")
SET_DROPPED = text("""
UPDATE headrace.feed SET dropped = found.newest
FROM (SELECT max(position) AS newest FROM headrace.changes WHERE changed_at < :before) AS found
WHERE found.newest > dropped""")
# In the default partition, to which changes go while a lock prevents the partition of their day.
STRAY_ROWS = 10_000
REMOVE_STRAY = text("""
DELETE FROM headrace.changes_other WHERE ctid IN (
    SELECT ctid FROM headrace.changes_other WHERE changed_at < :before LIMIT :limit)""")
ADVANCE = text(f"""
UPDATE headrace.feed SET newest = :newest, changed_at = :changed_at
RETURNING pg_notify('{CHANNEL}', CAST(newest AS text))""")


class Change(NamedTuple):
    """Rows of one person, resource and source that one transaction changed: a record, or samples with their range."""

    op: Op
    user_id: str
    resource: str | None  # of the catalogue, `connections`, `history` or `daily`; None for the op `erase`
    provider: str | None
    source_type: str | None
    record_id: str | None
    ts_min: datetime | None
    ts_max: datetime | None
    row_count: int
    origin: str


@dataclass(frozen=True)
class ChangedSamples:
    """Samples of one series that were changed: their range and number."""

    series_id: int
    first: datetime
    last: datetime
    rows: int


def announce(connection: Connection, changes: Sequence[Change]) -> None:
    """Adds changes to the outbox, in the transaction of their rows. Leaves out records that an operator has hidden."""
    if changes:
        connection.execute(ANNOUNCE, GIVEN.values(changes))


def announced(op: Op, origin: str, source: str) -> str:
    """The INSERT of a statement whose CTE `source` has the columns series_id, ts_min, ts_max and row_count."""
    return OF_SERIES.format(op=f"'{op}'", origin=f"'{origin}'", source=source)


def announced_records(op: Op, origin: str, resource: Resource, source: str) -> str:
    """The INSERT of a statement whose CTE `source` has the key, provider, source_type and `deleted` of records.

    Leaves out records that the view does not show.
    """
    resources = ", ".join(f"'{name}'" for name in (resource.name, resource.of) if name)
    retracted = _RETRACTED.format(key="changed.user_id, changed.id", source=source, id="id", resources=resources)
    return f"""
INSERT INTO headrace.outbox ({COLUMNS})
SELECT '{op}', user_id, '{resource.name}', provider, source_type, id, NULL, NULL, 1, '{origin}' FROM {source}
WHERE NOT deleted AND (user_id, id) NOT IN ({retracted})"""


def announce_samples(connection: Connection, op: Op, changed: Iterable[ChangedSamples], origin: str) -> None:
    """As `announce`, for series that are known by their number."""
    rows = [(one.series_id, one.first, one.last, one.rows) for one in changed if one.rows]
    if rows:
        connection.execute(ANNOUNCE_SERIES, CHANGED.values(rows) | {"op": op, "origin": origin})


def stored_samples(connection: Connection, series: Sequence[int]) -> list[ChangedSamples]:
    return [ChangedSamples(**row) for row in connection.execute(STORED, {"series": series}).mappings()]


def drop_older(engine: Engine, before: datetime) -> list[str]:
    """Drops the changes before a day. Returns the names of the dropped partitions.

    `feed.dropped` is committed first: a consumer that has not read these changes gets an error instead of a gap.
    """
    execute(engine, SET_DROPPED, {"before": before})
    names = partitions.drop_older(engine, "changes", before)
    for _ in delete_in_batches(engine, REMOVE_STRAY, {"before": before}, STRAY_ROWS):
        pass
    return names


class Sequencer:
    """Numbers committed changes. Any number of processes may run one; a pass that finds the lock taken does nothing.

    A process remembers the snapshot of its last pass, only to read less: `run(everything=True)` reads the whole outbox.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Without BEGIN and COMMIT: nearly every pass of an idle stack ends after one statement.
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._seen = NOTHING_SEEN

    def run(self, *, everything: bool = False) -> int:
        """Numbers the changes that are committed now, and returns their number."""
        if everything:
            self._seen = NOTHING_SEEN
        total = 0
        while taken := self._pass():
            total += taken
            if taken < MAX_CHANGES:
                break
        return total

    def _pass(self) -> int:
        (found,) = execute(self._autocommit, IS_EMPTY, {"seen": self._seen})
        if found.is_empty:
            self._seen = found.seen
            return 0
        with transaction(self._engine) as connection:
            newest = connection.scalar(LOCK)
            if newest is None:
                return 0
            values = {"seen": self._seen, "newest": newest, "limit": MAX_CHANGES}
            done = connection.execute(NUMBER, values).one()
            if done.newest is not None:
                connection.execute(ADVANCE, {"newest": done.newest, "changed_at": done.changed_at})
        if done.taken < MAX_CHANGES:
            self._seen = done.seen
        return int(done.taken)
