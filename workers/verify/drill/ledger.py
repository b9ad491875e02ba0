"""What is found afterwards: in the ledger, in the views and in the broker."""

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from app.broker.lanes import is_amqp
from app.config.settings import load
from app.delivery import unpack
from app.errors import Misconfigured, Unprocessable
from workers.broker_admin import redis_client
from workers.store.engine import make_engine, transaction
from workers.verify.expected import RowKey, stored


class LedgerReader:
    """What is stored, as its readers find it. Every method raises TryLater while the database is away."""

    def __init__(self, database_url: str, people: Collection[str]) -> None:
        self._engine = make_engine(load({"DATABASE_URL": database_url}), "headrace-drill")
        self._people = frozenset(people)
        self._began = datetime.now(UTC) - timedelta(minutes=1)  # clocks differ

    def need_empty(self) -> None:
        """Raises Misconfigured if there is already something of these people."""
        with transaction(self._engine) as connection:
            known = set(connection.exec_driver_sql("SELECT user_id FROM health.users").scalars())
        if known & self._people:
            raise Misconfigured(
                "this drill was made there before; choose another --seed or database", setting="DATABASE_URL"
            )

    def settled(self) -> list[tuple[str, str]]:
        """The ledger's rows since the beginning: message id and outcome."""
        query = "SELECT message_id, outcome::text FROM health.deliveries WHERE received_at >= %(began)s"
        with transaction(self._engine) as connection:
            return [(row[0], row[1]) for row in connection.exec_driver_sql(query, {"began": self._began})]

    def backfills(self) -> Counter[str]:
        """How many of these people's backfills are how far, those of single streams among them."""
        query = "SELECT status::text, count(*) FROM headrace.backfills WHERE user_id = ANY(%(people)s) GROUP BY status"
        with transaction(self._engine) as connection:
            found = connection.exec_driver_sql(query, {"people": list(self._people)})
            return Counter({row[0]: row[1] for row in found})

    def dead_letters(self) -> set[str]:
        """The message ids of the dead letters."""
        with transaction(self._engine) as connection:
            return set(connection.exec_driver_sql("SELECT message_id FROM headrace.dead_letters").scalars())

    def rows(self) -> list[tuple[RowKey, Any]]:
        """Every row about these people in every view. The second part of a key is whose it is."""
        with transaction(self._engine) as connection:
            return [(key, content) for key, content in stored(connection) if key[1] in self._people]

    def close(self) -> None:
        """Ends the connections."""
        self._engine.dispose()


def waiting(broker_url: str) -> set[str] | None:
    """The ids of the deliveries in the broker, None if it cannot be looked into."""
    if is_amqp(broker_url):
        return None
    with redis_client(broker_url) as client:
        lists = [one for name in ("live", "live:processing") for one in cast("list[bytes]", client.lrange(name, 0, -1))]
        held = [json.loads(one)[0] for one in cast("list[bytes]", client.hvals("unacked"))]
    found: set[str] = set()
    for raw in (*lists, *held):
        with contextlib.suppress(ValueError, KeyError, TypeError, Unprocessable):  # another task than ours to apply
            message = raw if isinstance(raw, dict) else json.loads(raw)
            (packed,), *_ = json.loads(base64.b64decode(message["body"]))
            found |= {delivery.message_id for delivery in unpack(packed)}
    return found
