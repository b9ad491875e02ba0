"""Commits that are interrupted by a crash or a lost connection."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, event

from tests.support.provider import Killed


@contextmanager
def interrupted_commit(engine: Engine, commit: int, how: str) -> Iterator[None]:
    """Interrupts the commit with this number, from 1: raises Killed before or after it, or closes its connection.

    `how` is "before", "after" or "cut".
    """
    counted = itertools.count(1)

    def interrupt(connection: Connection) -> None:
        if next(counted) != commit:
            return
        driver: Any = connection.connection.driver_connection
        if how == "cut":
            with psycopg.connect(driver.info.dsn, password=driver.info.password, autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", (driver.info.backend_pid,))
            return
        if how == "after":
            driver.commit()
        raise Killed

    event.listen(engine, "commit", interrupt)
    try:
        yield
    finally:
        event.remove(engine, "commit", interrupt)
