r"""Comments on the views of schema `health` and their columns, which psql's `\d+` and database clients show."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from app.catalogue import Catalogue, Resource
from workers.store.sql import RowParameters

COMMON = {
    "user_id": "the person: the id at the aggregator",
    "client_user_id": "the person: your own id; null for a user without one",
    "provider": "the provider that the data comes from, such as garmin",
    "source_type": "the type of the source: watch, ring, phone, scale, app ...",
    "version": "the time that decides between two versions: the greatest is stored",
    "origin": "the path by which the row came: webhook, backfill, replay or reconcile",
    "stored_at": "when the row was last written",
}
OF_RECORDS = {
    "id": "the id of the record at the provider's aggregator; unique per user_id and resource",
    "payload": "the whole object as received",
    "sport": "the sport, such as running: the slug of Junction, or the name of Terra's number in that form",
}
OF_SAMPLES = {
    "ts": "the time of the sample; of an interval its start",
    "ts_end": "the end of the interval; null for a moment",
    "unit": "the unit of the value",
    "timezone_offset": "seconds east of UTC where the person was; null if the sample does not say",
    "extra": "further fields of the sample, as received",
}
# Units of fields by Junction's API reference. Other fields are named by their own name.
UNITS = {
    "kcal": "calories calories_total calories_active",
    "m": "distance daily_movement total_elevation_gain elev_high elev_low",
    "m/s": "average_speed max_speed",
    "W": "average_watts device_watts max_watts weighted_average_watts",
    "beats per minute": "average_hr max_hr hr_lowest hr_average heart_rate_mean",
    "s": "moving_time",
    "s east of UTC": "timezone_offset",
    "%": "efficiency fat water_percentage muscle_mass_percentage bone_mass_percentage hr_dip",
    "°C": "temperature_delta skin_temperature",
    "breaths per minute": "respiratory_rate",
    "kg": "weight lean_body_mass_kilogram",
    "kg/m²": "body_mass_index",
    "cm": "height waist_circumference_centimeter",
    "Hz": "sampling_frequency_hz",
    "mmHg": "systolic diastolic",
}
FIELD_UNITS = {name: unit for unit, names in UNITS.items() for name in names.split()}
FIELDS = {
    "date": "the date as the provider's aggregator names it, at midnight UTC",
    "calendar_date": "the local date of the person, as the provider counts it",
    "created_at": "when the aggregator created the record",
    "updated_at": "when the aggregator last changed the record",
    "total": "seconds asleep: light, rem and deep",
    "duration": "seconds from the start to the end",
    "awake": "seconds awake in bed",
    "light": "seconds of light sleep",
    "rem": "seconds of REM sleep",
    "deep": "seconds of deep sleep",
    "latency": "seconds until asleep",
    "hr_resting": "resting heart rate, beats per minute",
    "low": "minutes of low activity",
    "medium": "minutes of medium activity",
    "high": "minutes of high activity",
    "average_hrv": "heart rate variability (RMSSD), mean, ms",
}
# Views of the migrations; "" is the view itself. Those of 0009 to 0011 have comments of their own.
VIEWS = {
    "users": {
        "": "One row per person at an aggregator. Former ids are listed only after an erasure.",
        "first_seen": "when the user_id was first received",
        "erased_at": "when the person was erased; null otherwise",
    },
    "connections": {
        "": "One row per person and connected provider.",
        "provider": "the connected provider",
        "status": "connected, disconnected or error, by the last event about the connection",
        "since": "when the status was stored",
        "error": "the reason of an error",
        "last_data_at": "the time of the newest sample, or midnight UTC of the newest record's date; null without data",
    },
    "grants": {
        "": "What a person allowed a provider to share, one row per resource of Junction.",
        "resource": "the resource",
        "granted": "false if the person denied a scope that the resource requires",
        "since": "the time of the first event with this answer",
    },
    "deliveries": {
        "": "The ledger: one row per delivery id, with its outcome.",
        "provider": "the aggregator, as in the column aggregator: junction or terra",
        "message_id": "the delivery id of the aggregator",
        "event_type": "the type of the event",
        "received_at": "when the endpoint received it first",
        "applied_at": "when its outcome was stored",
        "outcome": "applied, duplicate, stale (a newer version is stored), ignored or dead",
        "attempts": "how often it was delivered",
        "error": "the reason of a dead delivery, or the fields that were refused; contains no value",
        "aggregator": "junction or terra",
        "user_id": "the person at the aggregator; null after an erasure and for events without a person",
    },
    "large_requests": {
        "": "History that Terra sends in parts, one row per request.",
        "reference": "Terra's reference of the request",
        "expected": "the number of parts; null if Terra did not say",
        "received": "the number of parts that are stored",
        "is_complete": "whether all parts are stored; null if their number is not known",
        "announced_at": "when Terra announced it",
    },
    "backfills": {
        "": "The history of a person: one row per provider, resource and request.",
        "resource": "the resource that is fetched",
        "status": "pending, running, complete, failed, paused or cancelled",
        "window_start": "the start of the time range; null until it is known",
        "window_end": "the end of the time range; null until it is known",
        "is_final_seen": "whether the aggregator has announced the last part of the history",
        "chunks_total": "the number of announced time ranges",
        "chunks_done": "the number of time ranges that are stored",
        "records": "the number of records and samples that were fetched",
        "started_at": "when the first page was requested",
        "finished_at": "when it was complete, failed or cancelled",
        "error": "the last error, or the number of refused items with the first reason",
        "id": "the id, as in `headrace backfill`",
    },
    "changes": {
        "provider": "the provider of the rows; null for erase",
        "source_type": "the source type of the rows; null for erase",
    },
    "feed": {
        "oldest_position": "the first position that can be read; older ones have been dropped",
        "newest_position": "the last position that can be read",
    },
}
# Only those that differ: each comment writes to the system catalogue.
WANTED = RowParameters("view text, column_name text, comment text")
DIFFERING = text(f"""
SELECT CASE column_name WHEN '' THEN format('COMMENT ON VIEW %s IS %L', view, comment)
       ELSE format('COMMENT ON COLUMN %s.%I IS %L', view, column_name, comment) END AS statement
FROM (SELECT to_regclass(format('health.%I', given.view)) AS view, column_name, comment FROM {WANTED}) AS wanted
LEFT JOIN pg_attribute ON attrelid = view AND attname = column_name
WHERE view IS NOT NULL AND (column_name = '' OR attnum IS NOT NULL)
  AND comment IS DISTINCT FROM CASE column_name WHEN '' THEN obj_description(view, 'pg_class')
                               ELSE col_description(view, attnum) END""")


def comment(connection: Connection, catalogue: Catalogue) -> None:
    """Sets the comments that differ, of the catalogue's views and of those in VIEWS."""
    wanted = WANTED.values(_wanted(catalogue))
    if statements := list(connection.scalars(DIFFERING, wanted)):
        connection.exec_driver_sql("; ".join(statements), execution_options={"no_parameters": True})


def _wanted(catalogue: Catalogue) -> Iterator[tuple[str, str, str]]:
    """View, column and comment."""
    views = {name: ({} if name in ("changes", "feed") else COMMON) | own for name, own in VIEWS.items()}
    for one in catalogue.values():
        own = OF_SAMPLES | _of_value(one) if one.is_series else OF_RECORDS
        fields = {field.name: field_comment(field.name) for field in one.fields}
        views[one.name] = {"": _of_view(one)} | COMMON | own | fields
    for view, comments in views.items():
        for column, comment in comments.items():
            yield view, column, comment


def field_comment(name: str) -> str:
    """The comment on a field of a public schema: its meaning, or its name with the unit."""
    words = name.replace("_", " ")
    return FIELDS.get(name) or (f"{words}, {FIELD_UNITS[name]}" if name in FIELD_UNITS else words)


def _of_view(resource: Resource) -> str:
    name = resource.name.replace("_", " ")
    if resource.is_series:
        return f"Samples of {name}, one row per source and time." + (
            " health.daily has one value per day." if resource.day else ""
        )
    if resource.kind == "stream":
        return f"One row per record of {resource.of}: its stream in payload, or the notice of it until it is fetched."
    return f"Records of {name}, one row per id, in their newest version."


def _of_value(resource: Resource) -> dict[str, str]:
    unit = f" in {resource.unit}" if resource.unit else "; see unit"
    named = " and ".join(field.name for field in resource.fields)
    value = f"null: the columns {named} have the values" if named else f"{resource.name.replace('_', ' ')}{unit}"
    keys = " and ".join(key.removeprefix("source.") for key in resource.key)
    subtype = f"distinguishes samples of one time: {keys}" if keys else "'': this resource has no subtypes"
    return {"value": value, "subtype": subtype}
