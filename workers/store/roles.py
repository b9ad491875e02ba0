"""What a writer and a reader may do: the SQL that gives a role what it needs and no more."""

WRITER = "-- what workers, `headrace etl` and the operator's commands log in as"
READER = "-- what dashboards and analysts log in as: the views, which read with their owner's rights, and nothing below"


def quoted(name: str) -> str:
    """A role's name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def statements(writer: str, reader: str) -> list[str]:
    """To be run as the owner of the schema, after the roles were made; again after each migration does no harm."""
    w, r = quoted(writer), quoted(reader)
    grant = "'GRANT CONNECT, TEMPORARY ON DATABASE %I TO %I'"  # workers stage samples in a temporary table
    name = "'" + writer.replace("'", "''") + "'"
    return [
        WRITER,
        f"DO $$ BEGIN EXECUTE format({grant}, current_database(), {name}); END $$",
        f"GRANT USAGE ON SCHEMA headrace, health TO {w}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA headrace TO {w}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA health TO {w}",
        "-- the audit is only ever added to, and migrations are the owner's",
        f"REVOKE UPDATE, DELETE ON headrace.audit FROM {w}",
        f"REVOKE INSERT, UPDATE, DELETE ON headrace.schema_version FROM {w}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA headrace GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {w}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA health GRANT SELECT ON TABLES TO {w}",
        READER,
        f"GRANT USAGE ON SCHEMA health TO {r}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA health TO {r}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA health GRANT SELECT ON TABLES TO {r}",
    ]


def script(writer: str, reader: str) -> str:
    """All of it, for psql."""
    lines = (one if one.startswith("--") else f"{one};" for one in statements(writer, reader))
    return "\n".join(["BEGIN;", *lines, "COMMIT;"])
