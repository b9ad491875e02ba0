"""Bodies of stored deliveries; deliveries with another time of receipt, with another key, or of connection events."""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Engine, text

from app.delivery import Delivery, Receipt, seal
from app.sealing import Sealer
from tests.support import SEALER, START, delivery, event, message_id
from workers.store.ledger import DELIVERY_COLUMNS, to_delivery


def received(one: Delivery, at: datetime) -> Delivery:
    """The same delivery with another time of receipt."""
    return one.with_fields(SEALER, received_at=at.timestamp())


def bodies(engine: Engine, table: str) -> list[bytes]:
    """The bodies of the deliveries in this table of schema `headrace`, opened."""
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT {DELIVERY_COLUMNS} FROM headrace.{table}"))
        return [to_delivery(row).open(SEALER) for row in found]


def connection_event(user: str, at: datetime, *, error: str | None = None) -> Delivery:
    """A connection event: `created`, or `error` if there is an error type."""
    kind, more = ("error", {"error_type": error}) if error else ("created", {})
    return delivery(event(f"provider.connection.{kind}", user, {"provider": {"slug": "oura"}} | more), at)


OTHER_KEY = bytes(range(32, 64))


def sealed_with_another_key(body: dict[str, Any], at: datetime = START) -> Delivery:
    """A delivery that can be opened only with OTHER_KEY."""
    return seal("junction", Receipt(message_id(at)), msgspec.json.encode(body), Sealer([OTHER_KEY]))
