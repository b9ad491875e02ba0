"""A browser of the console without JavaScript: it follows links, and sends the forms that a page has."""

import re
from typing import Any

import httpx
from flask import Flask
from werkzeug.test import TestResponse

PASSWORD = "correct horse battery"
CANARY = 7_713_131  # a health value that occurs in no id, count, date or time
CSRF = re.compile(r'name="csrf" value="([^"]+)"')
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
