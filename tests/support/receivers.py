"""Receivers of notifications: real HTTP servers on the loopback interface, and changes of the feed."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, text
from standardwebhooks.webhooks import Webhook

from tests.support import SEALER
from tests.support.http_servers import Handler, serving
from workers.notify.signing import new_secret, seal_secret
from workers.store import subscriptions
from workers.store.engine import transaction
from workers.store.feed import Change, Sequencer, announce
from workers.store.subscriptions import SubscriptionSettings


@dataclass(frozen=True)
class Received:
    """A request, and the status of its answer."""

    at: float  # monotonic
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Endpoint:
    """A subscriber's endpoint: `answer` returns the status of each request, and may block."""

    answer: Callable[["Endpoint"], int]
    headers: dict[str, str] = field(default_factory=dict)  # of every response
    received: list[Received] = field(default_factory=list)
    url: str = ""
    hung: threading.Event = field(default_factory=threading.Event)  # ends the requests that hang

    def hang(self) -> int:
        self.hung.wait(30)
        return 500

    @property
    def accepted(self) -> list[Received]:
        return [one for one in self.received if one.status < 300]

    def ids(self) -> set[str]:
        """The ids of the records in accepted notifications."""
        return {one for received in self.accepted for one in received.json["data"]["ids"]}


@contextmanager
def endpoint(answer: Callable[[Endpoint], int] = lambda _: 204, **headers: str) -> Iterator[Endpoint]:
    """A receiver that serves inside the block."""
    found = Endpoint(answer, headers)

    class Hook(Handler):
        def do_POST(self) -> None:  # noqa: N802 - the name of http.server
            body = self.read_body()
            status = found.answer(found)
            given = {name.lower(): value for name, value in self.headers.items()}
            found.received.append(Received(time.monotonic(), given, body, status))
            self.answer(status, b"", **found.headers)

        def handle(self) -> None:
            with suppress(ConnectionError):  # the sender has given up
                super().handle()

    with serving(Hook) as url:
        found.url = f"{url}/hook"
        try:
            yield found
        finally:
            found.hung.set()


def refusing(first: int, status: int = 500) -> Callable[[Endpoint], int]:
    """An endpoint that refuses its first requests."""
    return lambda one: status if len(one.received) < first else 204


def subscribe(
    engine: Engine, url: str, name: str = "app", events: Sequence[str] = ("*",), window: int = 0, **more: Any
) -> str:
    """Adds a subscription. Returns its secret."""
    secret = new_secret()
    settings = SubscriptionSettings(name, url, events, window, more.get("allow_private", False))
    with transaction(engine) as connection:
        assert subscriptions.add(connection, settings, seal_secret(SEALER, name, secret))
    return secret


def change(record_id: str | None = "w1", user: str = "u1", resource: str | None = "workouts", **more: Any) -> Change:
    """A change of one record."""
    values = {"op": "put", "provider": "garmin", "source_type": "watch", "ts_min": None, "ts_max": None}
    values |= {"row_count": 1, "origin": "webhook"} | more
    return Change(user_id=user, resource=resource, record_id=record_id, **values)


def commit(engine: Engine, *changes: Change) -> None:
    """Makes changes readable in the feed."""
    with transaction(engine) as connection:
        announce(connection, changes)
    Sequencer(engine).run(everything=True)


def verify(received: Received, secret: str) -> None:
    """Raises WebhookVerificationError."""
    Webhook(secret).verify(received.body, received.headers)


def make_due(engine: Engine) -> None:
    """Ends all pauses, as time does."""
    with transaction(engine) as connection:
        connection.execute(text("UPDATE headrace.subscriptions SET retry_at = '-infinity'"))
        connection.execute(text("UPDATE headrace.notifications SET due_at = now() WHERE status = 'pending'"))


def now() -> datetime:
    return datetime.now(UTC)
