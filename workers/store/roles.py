"""Database roles: the SQL that grants a writer and a reader the rights that they need."""

from workers.store.sql import quoted

WRITER = "-- the role of workers, `headrace etl` and the operator's commands"
READER = "-- the role of dashboards and analysts: the views only; views read their tables with their owner's rights"
WRITER_LOGIN = "headrace_writer"  # the login of the processes, where `headrace migrate` creates it
AUDIT_COLUMNS = "os_user, action, subject, detail"  # not `operator` and `at`: the database sets who acted, and when


def writer_statements(writer: str) -> list[str]:
    """Grants to the writer, to run as the schema's owner. Safe to run again, for example after a migration."""
    w = quoted(writer)
    grant = "'GRANT CONNECT, TEMPORARY ON DATABASE %I TO %I'"  # workers stage samples in a temporary table
    name = "'" + writer.replace("'", "''") + "'"
    return [
        WRITER,
        f"DO $$ BEGIN EXECUTE format({grant}, current_database(), {name}); END $$",
        f"GRANT USAGE ON SCHEMA headrace, health TO {w}",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA headrace TO {w}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA health TO {w}",
        "-- the audit log is append-only, and only the owner migrates",
        f"REVOKE INSERT, UPDATE, DELETE ON headrace.audit FROM {w}",
        f"GRANT INSERT ({AUDIT_COLUMNS}) ON headrace.audit TO {w}",
        f"REVOKE INSERT, UPDATE, DELETE ON headrace.schema_version FROM {w}",
        "-- only these functions create and drop partitions",
        f"GRANT EXECUTE ON FUNCTION headrace.create_partition, headrace.drop_partition TO {w}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA headrace GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {w}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA health GRANT SELECT ON TABLES TO {w}",
    ]


def reader_statements(reader: str) -> list[str]:
    """Grants to the reader, as `writer_statements`."""
    r = quoted(reader)
    return [
        READER,
        f"GRANT USAGE ON SCHEMA health TO {r}",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA health TO {r}",
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA health GRANT SELECT ON TABLES TO {r}",
    ]


def script(writer: str, reader: str) -> str:
    """All grants as one transaction for psql."""
    statements = writer_statements(writer) + reader_statements(reader)
    lines = (line if line.startswith("--") else f"{line};" for line in statements)
    return "\n".join(["BEGIN;", *lines, "COMMIT;"])
