"""Runs programs of the environment with dlt and dbt."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from workers.store.roles import reader_statements

# Importing dbt takes 4 s, so one process runs all its commands.
PROGRAM = """
import sys
from dbt.cli.main import dbtRunner
for line in sys.stdin:
    print("succeeded:", dbtRunner().invoke(line.split()).success, flush=True)
"""


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """An environment without telemetry, with a folder as the home."""
    quiet = {"HOME": str(folder), "DO_NOT_TRACK": "1", "RUNTIME__DLTHUB_TELEMETRY": "false"}
    return {"PATH": os.environ["PATH"]} | quiet | variables


def created_reader(connection: psycopg.Connection, database_url: str) -> str:
    """Creates a role with the rights of a reader, and a schema of its own. Returns its URL of the database."""
    for statement in ("CREATE ROLE examples LOGIN PASSWORD 'examples'", *reader_statements("examples")):
        connection.execute(statement)
    connection.execute("CREATE SCHEMA analytics AUTHORIZATION examples")
    where = urlsplit(database_url.replace("+psycopg", ""))
    return where._replace(netloc=f"examples:examples@{where.hostname}:{where.port}").geturl()


class Dbt:
    """A process that runs commands of dbt."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout

    def run(self, *arguments: str) -> tuple[bool, str]:
        """Runs a command. Returns whether it succeeded, and its output."""
        print("--no-version-check", *arguments, file=self._input, flush=True)
        lines: list[str] = []
        while not lines or not lines[-1].startswith("succeeded: "):
            lines.append(self._output.readline())
            assert lines[-1], lines  # the process has ended
        return lines[-1] == "succeeded: True\n", "".join(lines)


@contextmanager
def dbt(python: Path, project: Path, database_url: str) -> Iterator[Dbt]:
    """Starts dbt in a project, whose profile reads libpq's variables."""
    where = urlsplit(database_url)
    variables = environment(
        project,
        PGHOST=where.hostname or "",
        PGPORT=str(where.port),
        PGUSER=where.username or "",
        PGPASSWORD=where.password or "",
        PGDATABASE=where.path.strip("/"),
    )
    with subprocess.Popen(
        (python, "-c", PROGRAM),
        cwd=project,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Dbt(process)
        finally:
            process.communicate()
