"""Backfills: which history was announced, in which chunks. What fetches them is not here."""

from sqlalchemy import Connection, text

from app.actions import Notice
from app.delivery import Delivery

KNOWN = text("SELECT 1 FROM headrace.chunks WHERE aggregator = :aggregator AND message_id = :message_id")
OPEN = text("""
INSERT INTO headrace.backfills AS stored (user_id, provider, resource, window_start, window_end, is_final_seen)
VALUES (:user_id, :provider, :resource, :window_start, :window_end, :is_final)
ON CONFLICT (user_id, provider, resource) WHERE status IN ('pending', 'running', 'paused') DO UPDATE SET
    window_start = least(stored.window_start, excluded.window_start),
    window_end = greatest(stored.window_end, excluded.window_end),
    is_final_seen = stored.is_final_seen OR excluded.is_final_seen
RETURNING id""")
ADD_CHUNK = text("""
INSERT INTO headrace.chunks (backfill_id, aggregator, message_id, window_start, window_end, is_final)
VALUES (:backfill_id, :aggregator, :message_id, :window_start, :window_end, :is_final)
ON CONFLICT (aggregator, message_id) DO NOTHING""")


def open_backfill(connection: Connection, delivery: Delivery, notice: Notice) -> bool:
    """Opens a backfill for a notice, or extends the open one; false if this very notice was already taken.

    Pulls are told apart by delivery id and not by (user, resource): after a re-authorisation the same notice comes
    again under a new id and means a new pull.
    """
    identity = {"aggregator": delivery.aggregator, "message_id": delivery.message_id}
    if connection.execute(KNOWN, identity).first():
        return False
    window = {"window_start": notice.window_start, "window_end": notice.window_end, "is_final": notice.is_final}
    whose = {"user_id": notice.user_id, "provider": notice.provider, "resource": notice.resource}
    backfill_id = connection.scalar(OPEN, whose | window)
    connection.execute(ADD_CHUNK, identity | window | {"backfill_id": backfill_id})
    return True
