"""The services of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Servers:
    """Where the services of this run are. The database `headrace` is migrated, and a template."""

    database_url: str
    broker_url: str
