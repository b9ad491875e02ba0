"""`python -P -m workers.local.writer_role`: creates the role of the workers in the embedded PostgreSQL.

In a process of its own, because the libraries would cost the supervisor 25 MB as long as it runs.
"""

import psycopg
from psycopg import sql

from app.config.settings import process_environment
from workers.local.embedded_postgres import WRITER
from workers.store.roles import transaction_script, writer_statements


def grant_writer(owner_url: str, password: str) -> None:
    """Creates the role in a migrated database, or renews its password and grants."""
    with psycopg.connect(owner_url, autocommit=True) as connection:
        exists = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (WRITER,)).fetchone()
        hashed = connection.pgconn.encrypt_password(password.encode(), WRITER.encode(), b"scram-sha-256").decode()
        statement = sql.SQL("{} ROLE {} LOGIN NOSUPERUSER NOCREATEROLE NOCREATEDB PASSWORD {}")
        verb = sql.SQL("ALTER" if exists else "CREATE")
        connection.execute(statement.format(verb, sql.Identifier(WRITER), sql.Literal(hashed)))
        connection.execute(transaction_script(writer_statements(WRITER)).encode())


if __name__ == "__main__":
    environment = process_environment()
    grant_writer(environment["DATABASE_URL"], environment["HEADRACE_WRITER_PASSWORD"])
