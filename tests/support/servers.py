"""The services of a test run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Servers:
    """The URLs of the services. The database `headrace` is migrated: the tests' databases are copies of it."""

    database_url: str
    broker_url: str
