"""`headrace subscriptions` and `headrace listen`: output, errors, the audit log, and secrets."""

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import HTTP, rows
from tests.support.cli import Headrace, error_line, invoke
from tests.support.database import run
from tests.support.receivers import change, commit, endpoint, now, refusing, verify
from workers.cli import listen, output
from workers.cli.listen import NotificationReceiver
from workers.fetch.webhooks import REFUSED_ADDRESS
from workers.notify.sender import Notifier
from workers.notify.signing import new_secret, signed_headers

URL = "https://app.test/hook"
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]+")
LATER = ("--since", "2026-01-01")


def add(headrace: Headrace, url: str = URL, *more: str) -> str:
    """Adds a subscription. Returns its secret."""
    done = headrace("subscriptions", "add", "app", "--url", url, "--window", "0", *more)
    assert done.exit_code == 0, done.output
    return SECRET.findall(done.stdout)[0]


def shown(headrace: Headrace) -> Any:
    return json.loads(headrace("subscriptions", "show", "app", "--json").stdout)


def test_the_secret_is_shown_once_and_stored_sealed(headrace: Headrace, engine: Engine) -> None:
    """Breaks if a secret can be read from a later command, the audit log or the database."""
    secrets = [add(headrace)]
    rotated = headrace("subscriptions", "rotate", "app")
    secrets += SECRET.findall(rotated.stdout)
    assert len(set(secrets)) == 2
    for words in (("show", "app"), ("show", "app", "--json"), ("list",), ("list", "--json")):
        assert "whsec_" not in headrace("subscriptions", *words).output
    assert "whsec_" not in headrace("audit", *LATER, "--json").output
    (stored,) = rows(engine, "SELECT secret, old_secret FROM headrace.subscriptions")
    assert all(secret[6:].encode() not in bytes(value) for secret in secrets for value in stored.values())


def test_every_change_of_a_subscription_is_audited(headrace: Headrace, engine: Engine) -> None:
    """Breaks if an operator can redirect or stop notifications without a trace."""
    with endpoint() as app:
        add(headrace, app.url)
        for words in (("pause",), ("resume",), ("rotate",), ("test",), ("resend", *LATER), ("remove",)):
            name, *more = words
            assert headrace("subscriptions", name, "app", *more).exit_code == 0
        assert len(app.received) == 1
    found = json.loads(headrace("audit", *LATER, "--json").stdout)
    actions = [one["action"].removeprefix("subscriptions ") for one in found]
    assert actions == ["add", "pause", "resume", "rotate", "test", "resend", "remove"]
    assert {one["subject"] for one in found} == {"app"}


def test_list_and_show(headrace: Headrace, engine: Engine) -> None:
    assert headrace("subscriptions", "list").stdout == "no subscriptions; headrace subscriptions add creates one\n"
    add(headrace, URL, "--event", "workouts.*", "--event", "user.*")
    headrace("subscriptions", "pause", "app")
    assert "paused" in headrace("subscriptions", "list").stdout
    (found,) = json.loads(headrace("subscriptions", "list", "--json").stdout)
    assert (found["name"], found["url"], found["events"]) == ("app", URL, ["workouts.*", "user.*"])
    assert (found["status"], found["reason"], found["retry_at"]) == ("paused", "paused by an operator", None)
    assert shown(headrace)["notifications"] == []
    assert URL in headrace("subscriptions", "show", "app").stdout


def test_remove_asks_only_on_a_terminal(headrace: Headrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a secret is deleted without a question, or a program that names the subscription needs --yes."""
    for words, answer, code in ((("app",), "n\n", 1), (("app",), "y\n", 0), (("app", "--yes"), "", 0)):
        add(headrace, URL)
        with monkeypatch.context() as terminal:
            terminal.setattr(output, "can_answer", lambda: True)
            assert headrace("subscriptions", "remove", *words, answer=answer).exit_code == code
        assert headrace("subscriptions", "remove", "app").exit_code == (4 if code == 0 else 0)


@pytest.mark.parametrize(
    ("words", "text", "code"),
    [
        (("add", "app", "--url", "http://app.test/"), "the URL must be https", 1),
        (("add", "app", "--url", "https://u:sesame@app.test/"), "the URL must have no user, password", 1),
        (("add", "a b", "--url", URL), "'a b' is not a name", 2),
        (("add", "app", "--url", URL, "--event", "workuots.changed"), "did you mean workouts.changed", 2),
        (("add", "app", "--url", URL, "--event", "none.*"), "matches no type of notification", 2),
        (("add", "app", "--url", URL, "--window", "-1"), "--window", 2),
        (("show", "nobody"), "no subscription 'nobody' (known: none exists)", 4),
        (("remove", "nobody"), "no subscription 'nobody'", 4),
        (("resend", "nobody", "--since", "2026-01-01"), "no subscription 'nobody'", 4),
    ],
)
def test_errors(headrace: Headrace, words: tuple[str, ...], text: str, code: int) -> None:
    """Breaks if a mistake is accepted, or its message does not name it."""
    done = headrace("subscriptions", *words)
    assert done.exit_code == code
    assert text in " ".join(done.stderr.split())
    assert "sesame" not in done.stderr


def test_a_name_is_used_once(headrace: Headrace) -> None:
    add(headrace)
    done = headrace("subscriptions", "add", "app", "--url", URL)
    assert "a subscription 'app' exists" in error_line(done)


def test_test_reports_the_answer(headrace: Headrace, engine: Engine) -> None:
    """Breaks if an operator cannot see why a subscriber gets nothing."""
    with endpoint(refusing(1, 503)) as app:
        secret = add(headrace, app.url)
        assert "was not accepted: status 503" in error_line(headrace("subscriptions", "test", "app"))
        assert "accepted the test notification (status 204)" in headrace("subscriptions", "test", "app").stdout
        verify(app.received[1], secret)
        assert app.received[1].json["type"] == "subscription.test"
    run(engine, "UPDATE headrace.subscriptions SET url = 'https://127.0.0.2.nip.invalid/'")
    assert "was not accepted" in error_line(headrace("subscriptions", "test", "app"))


def test_a_private_address_needs_allow_private(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if a subscriber can be an address of our network without the operator's consent."""
    words = ("subscriptions", "add", "app", "--url", "https://10.255.255.1/")
    assert REFUSED_ADDRESS in error_line(headrace(*words))
    assert headrace(*words, "--allow-private").exit_code == 0
    assert shown(headrace)["allow_private"] is True
    run(engine, "UPDATE headrace.subscriptions SET allow_private = false")
    assert REFUSED_ADDRESS in error_line(headrace("subscriptions", "test", "app"))


def test_resend(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if dead, sent or older notifications cannot be sent again, or get another id."""
    commit(engine, change("w0", "u0"))
    with endpoint(refusing(1)) as app:
        add(headrace, app.url)
        commit(engine, change("w1"))
        sender = Notifier(engine, settings, slice_seconds=0.3)
        sender.run()
        run(engine, "UPDATE headrace.notifications SET status = 'dead'")
        run(engine, "UPDATE headrace.subscriptions SET failures = 0, retry_at = '-infinity'")
        done = headrace("subscriptions", "resend", "app", *LATER, "--dead")
        assert done.stdout == "1 notifications are sent again, and notifications of 1 older changes are sent\n"
        sender.run()
        assert app.ids() == {"w0", "w1"}
        again = headrace("subscriptions", "resend", "app", *LATER)
        assert again.stdout == "2 notifications are sent again, and notifications of 0 older changes are sent\n"
        sender.run()
    assert len(app.received) == 5
    assert len({(one.id, one.body) for one in app.received}) == 2


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def receiver(lines: list[str]) -> Iterator[tuple[str, str]]:
    """The URL of a receiver that refuses once, and its secret."""
    secret = new_secret()
    with NotificationReceiver(0, 1, secret, lines.append) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", secret
        server.shutdown()
        thread.join()


def test_listen_prints_and_refuses(receiver: tuple[str, str], lines: list[str]) -> None:
    """Breaks if users cannot test their subscriptions without a program of their own."""
    url, secret = receiver
    headers = signed_headers("msg_1", b'{"type":"a"}', [secret], now())
    statuses = [HTTP.post(url, content=b'{"type":"a"}', headers=headers).status_code for _ in range(2)]
    statuses.append(HTTP.post(url, content=b'{"type":"b"}', headers=headers).status_code)
    assert statuses == [503, 204, 401]
    assert lines == [
        '503 msg_1 (signature valid) {"type":"a"}',
        '204 msg_1 (signature valid) {"type":"a"}',
        '401 msg_1 (signature wrong) {"type":"b"}',
    ]


def test_listen_prints_the_command_that_subscribes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen.NotificationReceiver, "serve_forever", lambda _: None)
    assert "headrace subscriptions add NAME --url http://127.0.0.1:" in invoke("listen").stdout
