"""Reads the state after a drill: the ledger, the views and the broker's queues."""

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import text

from app.broker.lanes import is_amqp
from app.config.settings import load
from app.delivery import unpack
from app.errors import Misconfigured, Unprocessable
from workers.redis_durability import redis_client
from workers.store.engine import make_engine, transaction
from workers.verify.expected import RowKey, stored


class LedgerReader:
    """Reads stored data about the drill's users. Every method raises TryLater while the database is unavailable."""

    def __init__(self, database_url: str, user_ids: Collection[str]) -> None:
        self._engine = make_engine(load({"DATABASE_URL": database_url}), "headrace-drill")
        self._user_ids = list(user_ids)
        self._began = datetime.now(UTC) - timedelta(minutes=1)  # the clocks may differ

    def need_empty(self) -> None:
        """Raises Misconfigured if these users are already stored."""
        query = "SELECT user_id FROM health.users WHERE user_id = ANY(:user_ids)"
        if self._query(query, user_ids=self._user_ids):
            raise Misconfigured(
                "already has the users of this drill; choose another --seed or database", setting="DATABASE_URL"
            )

    def settled(self) -> list[tuple[str, str]]:
        """The ledger's rows since the beginning: message id and outcome."""
        query = "SELECT message_id, outcome::text FROM health.deliveries WHERE received_at >= :began"
        return self._query(query, began=self._began)

    def backfills(self) -> Counter[str]:
        """The number of these users' backfills by status, including backfills of single streams."""
        query = "SELECT status::text, count(*) FROM headrace.backfills WHERE user_id = ANY(:user_ids) GROUP BY status"
        return Counter(dict(self._query(query, user_ids=self._user_ids)))

    def dead_letters(self) -> set[str]:
        """The message ids of the dead letters."""
        return {message_id for (message_id,) in self._query("SELECT message_id FROM headrace.dead_letters")}

    def rows(self) -> list[tuple[RowKey, Any]]:
        """These users' rows in every view. The second part of a key is the user_id."""
        with transaction(self._engine) as connection:
            return [(key, content) for key, content in stored(connection) if key[1] in self._user_ids]

    def positions(self, after: int) -> list[int]:
        """The positions in the change feed."""
        query = "SELECT position FROM health.changes WHERE position > :after ORDER BY position"
        return [position for (position,) in self._query(query, after=after)]

    def newest_position(self) -> int:
        """The newest position of the change feed."""
        ((newest,),) = self._query("SELECT newest_position FROM health.feed")
        return int(newest)

    def changed_ids(self, resource: str, after: int) -> set[str]:
        """The ids of the records of a resource that the change feed names after a position."""
        query = "SELECT DISTINCT id FROM health.changes WHERE resource = :resource AND position > :after"
        return {found for (found,) in self._query(query, resource=resource, after=after)}

    def unnumbered(self) -> int:
        """The number of changes that are not in the feed yet."""
        ((count,),) = self._query("SELECT count(*) FROM headrace.outbox")
        return int(count)

    def close(self) -> None:
        self._engine.dispose()

    def _query(self, query: str, **parameters: Any) -> list[Any]:
        with transaction(self._engine) as connection:
            return list(map(tuple, connection.execute(text(query), parameters)))


def queued_ids(broker_url: str) -> set[str] | None:
    """The ids of the deliveries in the broker; None for RabbitMQ, whose queues cannot be read without consuming."""
    if is_amqp(broker_url):
        return None
    with redis_client(broker_url) as client:
        lists = [one for name in ("live", "live:processing") for one in cast("list[bytes]", client.lrange(name, 0, -1))]
        held = [json.loads(one)[0] for one in cast("list[bytes]", client.hvals("unacked"))]
    found: set[str] = set()
    for raw in (*lists, *held):
        with contextlib.suppress(ValueError, KeyError, TypeError, Unprocessable):  # not a message of deliveries
            message = raw if isinstance(raw, dict) else json.loads(raw)
            (packed,), *_ = json.loads(base64.b64decode(message["body"]))
            found |= {delivery.message_id for delivery in unpack(packed)}
    return found
