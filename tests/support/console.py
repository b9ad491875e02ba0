"""A browser of the console without JavaScript: it follows links, and sends the forms that a page has."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from flask import Flask
from sqlalchemy import Engine, event, text
from werkzeug.test import TestResponse

from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY
from workers.notify.signing import new_secret, seal_secret
from workers.store import subscriptions
from workers.store.engine import transaction
from workers.store.subscriptions import SubscriptionSettings

PASSWORD = "correct horse battery"
CANARY = 7_713_131  # a health value that occurs in no id, count, date or time
CSRF = re.compile(r'name="csrf" value="([^"]+)"')
NOTIFICATION = text("""
INSERT INTO headrace.notifications (id, subscription_id, type, user_id, resource, provider, ids, row_count,
    first_position, last_position, changed_at, due_at, expires_at)
SELECT 'msg_n', id, 'workouts.changed', 'u1', 'workouts', 'garmin', '{w1}', 1, 1, 1, now(), now(), now()
FROM headrace.subscriptions""")
# Deliveries of the last seconds, without a user; every 100th has another type, every 1000th is dead.
LEDGER = text("""
INSERT INTO headrace.deliveries (aggregator, message_id, event_type, received_at, applied_at, outcome, attempts, month)
SELECT 'junction', 'msg_' || n, CASE n % 100 WHEN 0 THEN 'daily.data.sleep.created' ELSE 'daily.data.steps.created' END,
       now() - n * interval '1 second', now(), CASE n % 1000 WHEN 0 THEN 'dead' ELSE 'applied' END, 1,
       headrace.ledger_month()
FROM generate_series(1, :count) AS n""")
PLAN = re.compile(r'name="plan" value="([^"]+)"')


def log_in(browser: httpx.Client, credentials: str) -> None:
    """Logs an HTTP client in to a running console with NAME:PASSWORD."""
    name, _, password = credentials.partition(":")
    found = CSRF.search(browser.get("/login").text)
    assert found is not None
    answer = browser.post("/login", data={"name": name, "password": password, "csrf": found[1]})
    assert answer.status_code == 303, answer.text


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Browser:
    """Keeps cookies. Logs in with a name, if one is given."""

    def __init__(self, app: Flask, name: str | None = None, host: str = "127.0.0.1:5556", scheme: str = "http") -> None:
        self.client = app.test_client()
        self.base = f"{scheme}://{host}"
        self.host = host.partition(":")[0]
        if name:
            assert self.log_in(name).status_code == 303

    def get(self, path: str, **query: Any) -> TestResponse:
        return self.client.get(path, query_string=query or None, base_url=self.base, buffered=True)

    def post(self, path: str, data: Any = None, **named: Any) -> TestResponse:
        return self.client.post(path, data=data, base_url=self.base, **named)

    def csrf(self, path: str = "/people") -> str:
        found = CSRF.search(self.get(path).text)
        assert found is not None
        return found[1]

    def log_in(self, name: str, password: str = PASSWORD) -> TestResponse:
        return self.post("/login", {"name": name, "password": password, "csrf": self.csrf("/login")})

    def propose(self, action: str, data: Any) -> TestResponse:
        """The dry run of an action."""
        return self.post(f"/actions/{action}", {**data, "csrf": self.csrf()})

    def confirm(self, page: TestResponse, **data: str) -> TestResponse:
        """Confirms a dry run, and follows to the next page."""
        found = PLAN.search(page.text)
        assert found is not None, page.text
        return self.post("/confirm", {"csrf": self.csrf(), "plan": found[1], **data}, follow_redirects=True)


def subscribe(engine: Engine) -> None:
    """The subscription crm, whose URL has a token, with a notification about u1."""
    new = SubscriptionSettings("crm", "https://crm.example/hook?token=sesame", ("*",), 10, False)
    with transaction(engine) as connection:
        subscriptions.add(connection, new, seal_secret(Sealer((ENCRYPTION_KEY,)), "crm", new_secret()))
        connection.execute(NOTIFICATION)


@contextmanager
def statements(app: Flask) -> Iterator[list[str]]:
    """The statements that the pages' engines execute during the block."""
    found: list[str] = []

    def note(*given: Any) -> None:
        found.append(given[2])

    engines = [app.extensions["console"].reader, app.extensions["console"].writer]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
