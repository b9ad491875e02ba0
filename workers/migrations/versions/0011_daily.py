"""One value per day: priorities, zones, days and the sessions that were kept.

A `person` is the client_user_id of users, or the user_id of one who has none. Rows of tables with a column `user_id`
are deleted with the user; workers/store/erase.py names the others.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# `zone` of daily_people is the fallback zone of the aggregator, that of daily_zones was set by an operator.
TABLES = """
CREATE INDEX users_person ON headrace.users (coalesce(client_user_id, user_id));

CREATE TABLE headrace.daily_priorities (
    person text NOT NULL,  -- '*': everyone
    resource text NOT NULL,  -- '*': every resource
    sources text[] NOT NULL,  -- PROVIDER/SOURCE_TYPE, best first
    set_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (person, resource)
);

CREATE TABLE headrace.daily_zones (
    person text PRIMARY KEY,
    zone text NOT NULL,
    set_at timestamptz NOT NULL DEFAULT now()
);

-- The person of each user when days were last computed.
CREATE TABLE headrace.daily_people (
    user_id text PRIMARY KEY,
    person text NOT NULL,
    zone text
);
CREATE INDEX daily_people_person ON headrace.daily_people (person);

-- What the samples of a series have had so far: the greatest length, the offsets, and whether one had no offset. From
-- this follows which days a changed sample can touch, and which samples can touch a day.
CREATE TABLE headrace.daily_series (
    series_id int PRIMARY KEY REFERENCES headrace.series ON DELETE CASCADE,
    longest interval NOT NULL,
    min_offset int,
    max_offset int,
    lacks_offset boolean NOT NULL
);

-- The times of records, which their tables have no index for. They also show on which days a record stood before.
CREATE TABLE headrace.daily_records (
    user_id text NOT NULL,
    resource text NOT NULL,
    id text NOT NULL,
    starts timestamptz NOT NULL,
    ends timestamptz NOT NULL,
    timezone_offset int,
    PRIMARY KEY (user_id, resource, id)
);
CREATE INDEX daily_records_starts ON headrace.daily_records (user_id, resource, starts);

-- Days to compute. One row per person and resource, so that a long history does not delay other people's days.
CREATE TABLE headrace.daily_queue (
    person text NOT NULL,
    resource text NOT NULL,
    dates datemultirange NOT NULL,  -- without a bound: from the first or to the last sample
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    origin text NOT NULL,
    PRIMARY KEY (person, resource)
);
CREATE INDEX daily_queue_since ON headrace.daily_queue (since);

-- The position in the change feed up to which changes are in the queue. At most one row.
CREATE TABLE headrace.daily_feed (
    position bigint NOT NULL,
    people_checked_at timestamptz NOT NULL DEFAULT now(),
    requested_at timestamptz NOT NULL DEFAULT '-infinity',  -- when a task was sent
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row)
);

-- The moment before which retention may have deleted rows of a resource. Earlier days are kept.
CREATE TABLE headrace.daily_expiry (
    resource text PRIMARY KEY,
    before timestamptz NOT NULL
);

CREATE TABLE headrace.days (
    person text NOT NULL,
    metric text NOT NULL,
    local_date date NOT NULL,
    sources int NOT NULL,
    user_id text,  -- null: rows of several users were compared
    resource text NOT NULL,
    value double precision NOT NULL,
    summary_value double precision,
    covered_minutes int,
    samples int NOT NULL,  -- that were compared
    computed_at timestamptz NOT NULL DEFAULT now(),
    unit text NOT NULL,
    provider text NOT NULL,
    source_type text NOT NULL,
    method text NOT NULL,
    zone_source text NOT NULL,
    PRIMARY KEY (person, metric, local_date)
);
CREATE INDEX days_user_id ON headrace.days (user_id);
CREATE INDEX days_local_date ON headrace.days (local_date, metric);

CREATE TABLE headrace.kept_sessions (
    user_id text NOT NULL,
    resource text NOT NULL,
    id text NOT NULL,
    person text NOT NULL,
    local_date date NOT NULL,
    is_night boolean NOT NULL,
    starts timestamptz NOT NULL,
    ends timestamptz NOT NULL,
    provider text NOT NULL,
    source_type text NOT NULL,
    parts double precision[] NOT NULL,
    also text[] NOT NULL,
    zone_source text NOT NULL,
    PRIMARY KEY (user_id, resource, id)
);
CREATE INDEX kept_sessions_person ON headrace.kept_sessions (person, resource, local_date);
"""
VIEWS = """
CREATE VIEW health.daily AS
SELECT nullif(person, user_id) AS client_user_id, user_id, local_date, metric, value, unit, provider, source_type,
       sources, covered_minutes, summary_value, method, zone_source, computed_at
FROM headrace.days;

CREATE VIEW health.best_sleep AS
SELECT nullif(person, user_id) AS client_user_id, user_id, local_date, is_night, id, provider, source_type,
       starts AS bedtime_start, ends AS bedtime_stop, parts[1] AS total, parts[2] AS deep, parts[3] AS rem,
       parts[4] AS light, parts[5] AS awake, also, zone_source
FROM headrace.kept_sessions WHERE resource = 'sleep';

CREATE VIEW health.best_workouts AS
SELECT nullif(person, user_id) AS client_user_id, user_id, local_date, id, provider, source_type,
       starts AS time_start, ends AS time_end, extract(epoch FROM ends - starts)::double precision AS duration,
       parts[1] AS distance, parts[2] AS calories, also, zone_source
FROM headrace.kept_sessions WHERE resource = 'workouts';

CREATE VIEW health.source_priorities AS
SELECT nullif(person, '*') AS client_user_id, resource, CAST(entry.place AS int) AS rank,
       split_part(entry.name, '/', 1) AS provider, split_part(entry.name, '/', 2) AS source_type, set_at
FROM headrace.daily_priorities, unnest(sources) WITH ORDINALITY AS entry(name, place);
"""
COMMENTS = {
    "daily": {
        "": "One value per person, local day and metric, computed from the stored rows. See deploy/docs/daily.md.",
        "client_user_id": "the person: your own id; null for a user without one",
        "user_id": "the id at the aggregator; null if rows of several users were compared",
        "local_date": "the date on the wall clock where the person was",
        "metric": "a resource, or NAME_avg, NAME_min and NAME_max, sleep_total, workouts_count ...",
        "value": "the value of the day",
        "unit": "the unit of the value; s for durations of sleep and workouts",
        "provider": "of the source that contributed most",
        "source_type": "of the source that contributed most",
        "sources": "the number of sources that contributed",
        "covered_minutes": "the minutes of the day with data; null for a last value and for a summary",
        "summary_value": "what the daily summary of the best-ranked source says; null without one",
        "method": "samples, or summary if the best-ranked source has no samples on this day",
        "zone_source": "the origin of the local date: sample, neighbour, user or utc; the least reliable one",
        "computed_at": "when the value last changed",
    },
    "best_sleep": {
        "": "Sleep sessions without those that another source recorded better.",
        "client_user_id": "the person: your own id; null for a user without one",
        "user_id": "the id at the aggregator",
        "local_date": "the local date of the end",
        "is_night": "whether it is the longest session of its date; the others are naps",
        "id": "of the session in health.sleep",
        "provider": "of the session",
        "source_type": "of the session",
        "bedtime_start": "the start",
        "bedtime_stop": "the end",
        "total": "seconds asleep",
        "deep": "seconds of deep sleep",
        "rem": "seconds of REM sleep",
        "light": "seconds of light sleep",
        "awake": "seconds awake",
        "also": "the ids of the sessions for which it stands",
        "zone_source": "the origin of the local date: sample, neighbour, user or utc",
    },
    "best_workouts": {
        "": "Workouts without those that another source recorded better.",
        "client_user_id": "the person: your own id; null for a user without one",
        "user_id": "the id at the aggregator",
        "local_date": "the local date of the start",
        "id": "of the workout in health.workouts",
        "provider": "of the workout",
        "source_type": "of the workout",
        "time_start": "the start",
        "time_end": "the end",
        "duration": "seconds from the start to the end",
        "distance": "meters",
        "calories": "kcal",
        "also": "the ids of the workouts for which it stands",
        "zone_source": "the origin of the local date: sample, neighbour, user or utc",
    },
    "source_priorities": {
        "": "The lists of headrace priorities. Sources that no list names follow, by their source type.",
        "client_user_id": "the person, or the user_id of one without a client_user_id; null: everyone",
        "resource": "the resource; *: every resource",
        "rank": "1 is the best",
        "provider": "the provider; *: every provider",
        "source_type": "the source type; *: every source type",
        "set_at": "when the list was set",
    },
}
# Existing roles: what `headrace roles` grants to a new one.
GRANTS = """
DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT DISTINCT grantee::regrole AS role FROM pg_class, aclexplode(relacl)
        WHERE oid = 'headrace.samples'::regclass AND privilege_type = 'DELETE' AND grantee NOT IN (0, relowner)
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON headrace.daily_priorities, headrace.daily_zones,
            headrace.daily_people, headrace.daily_series, headrace.daily_records, headrace.daily_queue,
            headrace.daily_feed, headrace.daily_expiry, headrace.days, headrace.kept_sessions TO %s', one.role);
        EXECUTE format('GRANT SELECT ON health.daily, health.best_sleep, health.best_workouts,
            health.source_priorities TO %s', one.role);
    END LOOP;
END $$;
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(VIEWS)
    for view, comments in COMMENTS.items():
        for column, comment in comments.items():
            what = f"COLUMN health.{view}.{column}" if column else f"VIEW health.{view}"
            op.execute(f"COMMENT ON {what} IS '{comment}'")
    op.execute(GRANTS)
