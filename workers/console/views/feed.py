"""The change feed: its consumers and subscriptions."""

from datetime import UTC, datetime
from urllib.parse import urlsplit

from flask import Blueprint, render_template
from sqlalchemy import text

from workers.console import formats
from workers.console.context import console, record_look
from workers.store import consumers, notifications, subscriptions
from workers.store.engine import transaction

pages = Blueprint("feed", __name__)
SHOWN = 50
RANGE = text("SELECT oldest_position, newest_position FROM health.feed")


@pages.get("/feed")
def page() -> str:
    with transaction(console().reader) as connection:
        bounds = connection.execute(RANGE).one()
        following, subscribed = consumers.consumers(connection), subscriptions.listed(connection)
    days, now = console().settings.feed_days, datetime.now(UTC)
    return render_template(
        "feed.html", bounds=bounds, consumers=following, subscriptions=subscribed, days=days, now=now
    )


@pages.get("/subscription")
def subscription() -> str:
    """A subscription with its newest notifications, which hold ids and counts. Its URL may contain a token."""
    name = formats.text("name")
    with transaction(console().reader) as connection:
        found = subscriptions.find(connection, name)
        newest = notifications.of_subscription(connection, name, SHOWN)
    record_look("subscription", [one.user_id for one in newest], subscription=name)
    return render_template("subscription.html", one=found, newest=newest, host=urlsplit(found.url).netloc)
