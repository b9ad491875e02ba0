"""Tables and views that are generated from the catalogue: a table per record resource, a view per resource."""

import json

from sqlalchemy import Connection, Engine, text

from app.catalogue import Catalogue, Field, Resource, catalogue
from workers.aggregators.common import MAX_AHEAD
from workers.aggregators.terra.sports import SPORTS
from workers.store.comments import comment
from workers.store.merge import Target
from workers.store.sql import quoted

COLUMN_TYPES = {
    "text": "text",
    "integer": "bigint",
    "number": "double precision",
    "boolean": "boolean",
    "date": "date",
    "datetime": "timestamptz",
}
# Types for reading scalars from the payload. numeric is rounded half away from zero, double precision half to even.
READ_TYPES = COLUMN_TYPES | {"integer": "numeric"}


def record_table(resource: Resource) -> str:
    return f"headrace.{quoted(resource.name)}"


def record_target(resource: Resource) -> Target:
    """The upsert target of a resource. Ties are decided by the payload, from which the columns are derived.

    A deletion is content too: between two equal versions that differ only in it, the deletion wins.
    """
    scalars = (quoted(field.name) for field in resource.fields)
    content = ("provider", "source_type", *scalars, "payload", "deleted")
    rank = (("deleted", ""), ("payload", ""))
    return Target(record_table(resource), ("user_id", "id"), content, rank, is_record=True)


def record_source(resource: Resource, parameter: str, *, scalars: bool = True) -> str:
    """A FROM item over one JSON parameter, an array of records. Scalars are read from `columns`, or else the payload.

    One parameter instead of an array per column: PostgreSQL reads the columns from the document faster than Python
    builds 30 arrays.
    """
    read = resource.fields if scalars else ()
    columns = "".join(f", {_read(field)} AS {quoted(field.name)}" for field in read)
    read_types = ", ".join(f"{quoted(field.name)} {READ_TYPES[field.type]}" for field in read)
    given = "coalesce(given.columns, given.payload)"
    fields = f", jsonb_to_record({given}) AS field({read_types})" if read_types else ""
    return f"""(
    SELECT given.n, given.user_id, given.id, given.provider, given.source_type{columns},
           given.payload, coalesce(given.deleted, false) AS deleted, given.version, given.origin,
           coalesce(given.event_at, given.version) AS event_at
    FROM jsonb_to_recordset(CAST({parameter} AS jsonb)) AS given(n int, user_id text, id text, provider text,
         source_type text, columns jsonb, payload jsonb, deleted boolean, version timestamptz,
         origin headrace.origin, event_at timestamptz){fields}
) AS incoming"""


def _read(field: Field) -> str:
    name = f"field.{quoted(field.name)}"
    return f"CAST(round({name}) AS bigint)" if field.type == "integer" else name


SAMPLES = Target(
    table="headrace.samples",
    key=("series_id", "ts"),
    content=("ts_end", "value", "unit", "timezone_offset", "extra"),
    rank=(
        ("value", "'-Infinity'::float8"),
        ("ts_end", "'-infinity'::timestamptz"),
        ("unit", ""),
        ("timezone_offset", "-2147483648"),
        ("extra", "'null'::jsonb"),
    ),
)
CONNECTIONS = Target(
    table="headrace.connections",
    key=("user_id", "provider"),
    content=("status", "error"),
    rank=(("status", ""), ("error", "''")),
)
GRANTS = Target(
    table="headrace.grants",
    key=("user_id", "provider", "resource"),
    content=("granted",),
    rank=(("granted", ""),),
    has_since=True,
)
# A former id is only listed after an erasure, so that copies that still have rows under it are deleted too.
USERS_VIEW = """CREATE OR REPLACE VIEW health.users AS SELECT user_id, client_user_id, first_seen, erased_at
FROM headrace.users WHERE merged_into IS NULL OR erased_at IS NOT NULL"""


def sync(connection: Connection, catalogue: Catalogue) -> None:
    """Creates missing tables, columns and views of the catalogue, and comments on views. Drops nothing.

    Views are replaced, not dropped, because other views may depend on them. New fields are therefore appended. A table
    that has all columns is not locked: another `headrace migrate` may be building its index.
    """
    present = _columns_of_tables(connection)
    for resource in catalogue.values():
        if not resource.is_series:
            for statement in _record_ddl(resource, present.get(resource.name, frozenset())):
                connection.execute(text(statement))
        connection.execute(text(_view(resource, _columns_of_view(connection, resource))))
    connection.execute(text(_connections_view(catalogue)))
    connection.execute(text(USERS_VIEW))
    comment(connection, catalogue)


def _columns_of_tables(connection: Connection) -> dict[str, frozenset[str]]:
    query = text("""
SELECT table_name, array_agg(CAST(column_name AS text)) AS columns FROM information_schema.columns
WHERE table_schema = 'headrace' GROUP BY table_name""")
    return {row.table_name: frozenset(row.columns) for row in connection.execute(query)}


def _columns_of_view(connection: Connection, resource: Resource) -> dict[str, str]:
    """The view's present columns with their types, in order. PostgreSQL lets none of them be removed or moved."""
    query = text("""
SELECT column_name, format_type(atttypid, atttypmod) AS type
FROM information_schema.columns
JOIN pg_attribute ON attrelid = to_regclass('health.' || quote_ident(table_name)) AND attname = column_name
WHERE table_schema = 'health' AND table_name = :name ORDER BY ordinal_position""")
    return {row.column_name: row.type for row in connection.execute(query, {"name": resource.name})}


# Columns of views that are read from an object of the payload: Junction's, or Terra's.
SPORT = f"""coalesce(r.payload -> 'sport' ->> 'slug',
    CAST('{json.dumps(SPORTS)}' AS jsonb) ->> (r.payload -> 'metadata' ->> 'type'))"""
EXTRACTED = {"workouts": {"sport": SPORT}}
# Added after the first version.
LATER_COLUMNS = {
    "deleted": "boolean NOT NULL DEFAULT false",
    "event_at": "timestamptz NOT NULL DEFAULT '-infinity'",
    "deleted_version": "timestamptz",  # the newest version in which the record was deleted, even if it was restored
}


def _record_ddl(resource: Resource, present: frozenset[str]) -> list[str]:
    table = record_table(resource)
    columns = "".join(f"    {quoted(field.name)} {COLUMN_TYPES[field.type]},\n" for field in resource.fields)
    create = f"""
CREATE TABLE IF NOT EXISTS {table} (
    user_id text NOT NULL,
    id text NOT NULL,
    provider text NOT NULL,
    source_type text NOT NULL,
{columns}    payload jsonb NOT NULL,
    version timestamptz NOT NULL,
    origin headrace.origin NOT NULL,
    stored_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, id)
)"""
    added = {field.name: COLUMN_TYPES[field.type] for field in resource.fields} | LATER_COLUMNS
    missing = [f"{quoted(name)} {kind}" for name, kind in added.items() if name not in present]
    return [create, *(f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {column}" for column in missing)]


def _view(resource: Resource, present: dict[str, str]) -> str:
    """DDL of a view: its present columns in their order, then new ones. Fields removed from the catalogue stay."""
    samples = resource.is_series
    wanted = _sample_columns(resource) if samples else _record_columns(resource)
    gone = {
        name: f"CAST(s.extra ->> '{name}' AS {kind})" if samples else f"r.{quoted(name)}"
        for name, kind in present.items()
        if name not in wanted
    }
    columns = {name: (wanted | gone)[name] for name in present} | wanted
    selected = ", ".join(f"{expression} AS {quoted(name)}" for name, expression in columns.items())
    source = _SAMPLES_FROM if samples else f"{record_table(resource)} r LEFT JOIN headrace.users u USING (user_id)"
    where = f"n.resource = '{resource.name}'" if samples else f"NOT r.deleted AND NOT {_is_retracted(resource)}"
    return f"CREATE OR REPLACE VIEW health.{quoted(resource.name)} AS SELECT {selected} FROM {source} WHERE {where}"


def _is_retracted(resource: Resource) -> str:
    """A condition. A stream has the id of its record, and is hidden with it."""
    names = ", ".join(f"'{name}'" for name in (resource.name, resource.of) if name)
    return f"""EXISTS (SELECT 1 FROM headrace.retractions retraction
    WHERE retraction.user_id = r.user_id AND retraction.id = r.id AND retraction.resource IN ({names}))"""


_SAMPLES_FROM = """headrace.series n
JOIN headrace.samples s ON s.series_id = n.id LEFT JOIN headrace.users u ON u.user_id = n.user_id"""


def _record_columns(resource: Resource) -> dict[str, str]:
    names = ("provider", "source_type", "id", *(field.name for field in resource.fields), "payload", "version")
    columns = {"user_id": "r.user_id", "client_user_id": "u.client_user_id"}
    columns |= {name: f"r.{quoted(name)}" for name in names}
    return columns | {"origin": "CAST(r.origin AS text)", "stored_at": "r.stored_at"} | EXTRACTED.get(resource.name, {})


def _sample_columns(resource: Resource) -> dict[str, str]:
    names = ["provider", "source_type", "ts", "ts_end", "value", "unit", "subtype"]
    names += ["timezone_offset", "extra", "version"]
    columns = {"user_id": "n.user_id", "client_user_id": "u.client_user_id"}
    columns |= {name: f"n.{name}" if name in ("provider", "source_type", "subtype") else f"s.{name}" for name in names}
    columns |= {"origin": "CAST(s.origin AS text)", "stored_at": "s.stored_at"}
    own = {field.name: f"CAST(s.extra ->> '{field.name}' AS {COLUMN_TYPES[field.type]})" for field in resource.fields}
    return columns | own


def _connections_view(catalogue: Catalogue) -> str:
    """DDL of health.connections. `last_data_at` probes one index per series and table of records.

    With an aggregate over health.heartrate and the other views, every sample would be read. Data that is dated more
    than two days ahead comes from devices with a wrong clock, and would hide that the last month is missing.
    """
    latest = f"now() + interval '{MAX_AHEAD.days} days'"
    newest = [_newest_record(resource, latest) for resource in catalogue.values() if not resource.is_series]
    records = "".join(f"\n    UNION ALL {query}" for query in newest if query)
    return f"""CREATE OR REPLACE VIEW health.connections AS
SELECT c.user_id, c.provider, c.status, c.stored_at AS since, c.error, u.client_user_id, (
    SELECT max(newest.at) FROM (
    SELECT max(sample.ts) AS at FROM headrace.series n CROSS JOIN LATERAL (
        SELECT s.ts FROM headrace.samples s WHERE s.series_id = n.id AND s.ts <= {latest}
        ORDER BY s.ts DESC LIMIT 1) AS sample
    WHERE n.user_id = c.user_id AND n.provider = c.provider{records}) AS newest) AS last_data_at
FROM headrace.connections c LEFT JOIN headrace.users u USING (user_id)"""


def _newest_record(resource: Resource, latest: str) -> str | None:
    if (name := resource.day_field) is None:
        return None
    column = f"r.{quoted(name)}"
    is_date = any(field.name == name and field.type == "date" for field in resource.fields)
    at = f"CAST(max({column}) AS timestamp) AT TIME ZONE 'UTC'" if is_date else f"max({column})"
    limit = f"CAST({latest} AS date)" if is_date else latest
    return f"""SELECT {at} FROM {record_table(resource)} r
    WHERE r.user_id = c.user_id AND r.provider = c.provider AND {column} <= {limit}"""


def digests(engine: Engine) -> dict[str, str]:
    """A digest of each view's rows, independent of row order, `origin` and `stored_at`."""
    row = "to_jsonb(v) - 'stored_at' - 'origin'"
    digest = f"md5(coalesce(string_agg(md5(({row})::text), '' ORDER BY md5(({row})::text)), ''))"
    with engine.connect() as connection:
        return {
            f"health.{name}": str(connection.scalar(text(f"SELECT {digest} FROM health.{name} v")))
            for name in catalogue()
        }
