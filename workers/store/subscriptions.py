"""Subscriptions to notifications: their settings, sealed secrets, places in the feed, and states."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from app.errors import NotFound

ROTATION_HOURS = 24  # in which the old secret signs too
COLUMNS = """s.id, s.name, s.url, s.events, s.window_seconds, s.allow_private, s.status, s.reason, s.start_position,
s.position, s.failures, s.failing_since, s.last_error,
nullif(s.retry_at, '-infinity') AS retry_at, s.created_at"""
# Active subscriptions that have not seen all changes of the feed.
BEHIND = """SELECT FROM headrace.subscriptions
    WHERE status = 'active' AND position < (SELECT newest FROM headrace.feed)"""
ADD = text("""
INSERT INTO headrace.subscriptions
    (name, url, events, window_seconds, allow_private, secret, start_position, position)
SELECT :name, :url, CAST(:events AS text[]), :window_seconds, :allow_private, :secret, newest, newest
FROM (SELECT coalesce((SELECT newest FROM headrace.feed), 0) AS newest) AS feed
ON CONFLICT (name) DO NOTHING RETURNING id""")
LIST = text(f"""
SELECT {COLUMNS}, coalesce((SELECT newest FROM headrace.feed), 0) - s.position AS behind,
       n.pending, n.dead, n.oldest_due, n.last_sent
FROM headrace.subscriptions s, LATERAL (
    SELECT count(*) FILTER (WHERE status = 'pending') AS pending, count(*) FILTER (WHERE status = 'dead') AS dead,
           min(due_at) FILTER (WHERE status = 'pending' AND (attempts > 0 OR due_at < now())) AS oldest_due,
           max(sent_at) AS last_sent
    FROM headrace.notifications WHERE subscription_id = s.id) AS n
WHERE CAST(:name AS text) IS NULL OR s.name = :name ORDER BY s.name""")
NAMES = text("SELECT name FROM headrace.subscriptions ORDER BY name")
PAUSE = text("UPDATE headrace.subscriptions SET status = 'paused', reason = :reason WHERE name = :name")
# A notification that waited during the pause gets the full time for retries again.
RESUME = text("""
WITH resumed AS (
    UPDATE headrace.subscriptions SET status = 'active', reason = '', failures = 0, failing_since = NULL,
           last_error = '', retry_at = '-infinity' WHERE name = :name RETURNING id)
UPDATE headrace.notifications SET expires_at = now() + make_interval(days => :days),
       due_at = CASE WHEN attempts > 0 THEN least(due_at, now()) ELSE due_at END
WHERE status = 'pending' AND subscription_id IN (SELECT id FROM resumed)""")
ROTATE = text("""
UPDATE headrace.subscriptions
SET old_secret = secret, old_secret_until = now() + make_interval(hours => :hours), secret = :secret
WHERE name = :name""")
SECRETS = text("""
SELECT array_remove(ARRAY[secret, CASE WHEN old_secret_until > now() THEN old_secret END], NULL)
FROM headrace.subscriptions WHERE id = :id""")
REMOVE = text("DELETE FROM headrace.subscriptions WHERE name = :name")


@dataclass(frozen=True)
class Subscription:
    """A subscription without its secrets, and the number of its notifications."""

    id: int
    name: str
    url: str
    events: list[str]
    window_seconds: int
    allow_private: bool
    status: str  # active or paused
    reason: str  # of the pause
    start_position: int
    position: int
    failures: int  # requests in a row without a 2xx
    failing_since: datetime | None
    last_error: str
    retry_at: datetime | None  # no request is sent before
    created_at: datetime
    behind: int = 0  # changes of the feed that are not planned yet
    pending: int = 0
    dead: int = 0
    oldest_due: datetime | None = None
    last_sent: datetime | None = None


@dataclass(frozen=True)
class SubscriptionSettings:
    """The settings of a new subscription."""

    name: str
    url: str
    events: Sequence[str]
    window_seconds: int
    allow_private: bool


def add(connection: Connection, new: SubscriptionSettings, sealed: bytes) -> bool:
    """Adds a subscription at the present end of the feed. False if its name exists."""
    values = vars(new) | {"events": list(new.events), "secret": sealed}
    return connection.execute(ADD, values).first() is not None


def listed(connection: Connection) -> list[Subscription]:
    return [Subscription(**row) for row in connection.execute(LIST, {"name": None}).mappings()]


def find(connection: Connection, name: str) -> Subscription:
    """Raises NotFound."""
    row = connection.execute(LIST, {"name": name}).mappings().first()
    if row is None:
        known = ", ".join(connection.scalars(NAMES)) or "none exists"
        raise NotFound(f"no subscription {name!r} (known: {known})")
    return Subscription(**row)


def pause(connection: Connection, name: str, reason: str) -> None:
    connection.execute(PAUSE, {"name": name, "reason": reason})


def resume(connection: Connection, name: str, retry_days: int) -> None:
    """Resumes a subscription: it continues in the feed at its place, and its failed notifications are due now."""
    connection.execute(RESUME, {"name": name, "days": retry_days})


def rotate(connection: Connection, name: str, sealed: bytes) -> None:
    """Sets a new secret. The present one signs too for 24 h; the one before it no longer signs."""
    connection.execute(ROTATE, {"name": name, "secret": sealed, "hours": ROTATION_HOURS})


def sealed_secrets(connection: Connection, subscription_id: int) -> list[bytes]:
    """The sealed secrets that sign now, the newest first."""
    found = connection.scalar(SECRETS, {"id": subscription_id})
    return [bytes(one) for one in found or ()]


def remove(connection: Connection, name: str) -> None:
    connection.execute(REMOVE, {"name": name})
