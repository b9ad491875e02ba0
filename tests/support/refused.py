"""Refused items in the database, for the tests of what shows them."""

from typing import NamedTuple

from sqlalchemy import Engine, text

INSERT = text("""
INSERT INTO headrace.dead_letters
    (aggregator, message_id, item, items, user_id, event_type, received_at, died_at, reason, sealed)
VALUES ('junction', :message_id, :item, :items, :user_id, :event_type,
        now() - CAST(:age AS interval), now() - CAST(:age AS interval), :reason, '')""")


class Refused(NamedTuple):
    """A dead letter of refused items; `message_id` is `history` for those of a fetched page."""

    message_id: str
    reason: str
    items: int = 1
    age: str = "0"
    user_id: str | None = "u1"
    event_type: str | None = "fetch.heartrate"


def add_refused(engine: Engine, *rows: Refused) -> None:
    """Stores a dead letter for each row."""
    with engine.begin() as connection:
        for number, row in enumerate(rows):
            connection.execute(INSERT, row._asdict() | {"item": f"digest-{number}"})
