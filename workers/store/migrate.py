"""Migration of the database schema."""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from app.catalogue import Catalogue, catalogue
from app.errors import Misconfigured
from workers.store import schema
from workers.store.engine import scalars, transaction
from workers.store.ledger_partitioning import VALIDITY, create_index, one_at_a_time, partition_ledger
from workers.store.partitions import maintain_partitions
from workers.store.roles import WRITER_LOGIN, writer_statements
from workers.store.sql import quoted

MIGRATIONS = Path(__file__).parent.parent / "migrations"
# From PostgreSQL 16 on, CREATEROLE alone does not allow to change a role that another one created.
MAY_CREATE_ROLES = text("""
SELECT rolsuper OR rolcreaterole AND (
    current_setting('server_version_num')::int < 160000 OR NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :name)
    OR EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid
               WHERE r.rolname = :name AND m.member = me.oid AND m.admin_option))
FROM pg_roles me WHERE rolname = current_user""")
MIGRATION_LOCK = 0x48454144  # the advisory lock that every `headrace migrate` takes; the number is arbitrary


def migrate(engine: Engine) -> str:
    """Upgrades the schema to the newest version and returns that version. Safe to run repeatedly and concurrently.

    Also creates the partitions of the next days and months.

    Raises Misconfigured if the schema is newer than this program, or if the database is not in UTF-8.
    """
    # Importing Alembic costs 0.12 s of CPU, and `headrace dead` and `replay` migrate only with --into.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    with transaction(engine) as connection:
        need_utf8(connection)
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        connection.execute(text("CREATE SCHEMA IF NOT EXISTS headrace"))
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError:  # Alembic's message names its own files
            raise Misconfigured(
                "the schema was created by a newer version of Headrace and was not changed; "
                "this version's workers can use it, so no migration is needed",
                setting="DATABASE_URL",
            ) from None
        schema.sync(connection, catalogue())
        version = str(connection.scalar(text("SELECT version_num FROM headrace.schema_version")))
    partition_ledger(engine)
    index_records(engine, catalogue())
    # None: drops no archived delivery, because HEADRACE_KEEP_DAYS may not be set here.
    maintain_partitions(engine, None)
    return version


def index_records(engine: Engine, catalogue: Catalogue) -> None:
    """Builds an index of each table of records that have a day: by user, provider and day.

    Queries for one person's time range use it, as does health.connections for the newest record. `stored_at` is not
    indexed: every update of a record would then write the indexes. Safe to interrupt, repeat and run twice.
    """
    days = {f"{one.name}_days": one for one in catalogue.values() if one.day_field and not one.is_series}
    missing = [name for name in days if scalars(engine, VALIDITY, {"name": name}) != [True]]
    if not missing:
        return
    with one_at_a_time(engine) as connection:
        for name in missing:
            columns = f"(user_id, provider, {quoted(days[name].day_field or '')})"
            create_index(connection, name, f"headrace.{quoted(days[name].name)} {columns}")


def create_writer(engine: Engine, password: str) -> None:
    """Creates the login of the processes in a migrated database, or renews its password and rights.

    The password is hashed here, so that no log of the server has it. Raises Misconfigured if the login of DATABASE_URL
    may not create roles.
    """
    with transaction(engine) as connection:
        if not connection.scalar(MAY_CREATE_ROLES, {"name": WRITER_LOGIN}):
            raise Misconfigured(
                "the login of DATABASE_URL may not create or change the role headrace_writer: grant it CREATEROLE and, "
                "if the role exists, the role WITH ADMIN OPTION; or unset this and create the role as described under "
                "Database roles in deploy/docs/retention-and-roles.md",
                setting="HEADRACE_WRITER_PASSWORD",
            )
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        exists = connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :name"), {"name": WRITER_LOGIN})
        server: Any = connection.connection.driver_connection
        hashed = server.pgconn.encrypt_password(password.encode(), WRITER_LOGIN.encode(), b"scram-sha-256").decode()
        login = f"{'ALTER' if exists else 'CREATE'} ROLE {quoted(WRITER_LOGIN)} LOGIN PASSWORD '{hashed}'"
        for statement in (login, *writer_statements(WRITER_LOGIN)):
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def need_utf8(connection: Connection) -> None:
    """Raises Misconfigured unless the database is in UTF-8. Others lack characters; SQL_ASCII checks none."""
    encoding = connection.scalar(text("SHOW server_encoding"))
    if encoding != "UTF8":
        raise Misconfigured(
            f"the encoding of the database is {encoding}, but it must be UTF8. Create another database with "
            "`createdb -E UTF8 -T template0 NAME`, and set its name here",
            setting="DATABASE_URL",
        )
