"""Safety of the console: login, sessions, CSRF, headers, hosts, and hostile input."""

import logging
import re
from urllib.parse import quote

import pytest
from flask import Flask
from sqlalchemy import Engine

from tests.support import rows
from tests.support.console import PASSWORD, Browser, Clock, subscribe
from workers.console.app import BLUEPRINTS
from workers.console.sessions import IDLE_SECONDS, MAX_SECONDS

PAGES = ("/", "/deliveries", "/delivery?aggregator=junction&id=x", "/dead", "/dead/1", "/backfills", "/backfills/1")
PAGES += ("/people", "/person?user=u1", "/values?user=u1", "/explain?user=u1&resource=sleep&id=1", "/feed")
PAGES += ("/subscription?name=s",)
HOSTILE = ("'", '"><script>alert(1)</script>', "../../etc/passwd", "%00", "\u202e", "1; DROP TABLE headrace.users")
HOSTILE += (
    "{{ 7*7 }}",
    "\\",
    "%",
    "_",
    "*",
    "9" * 30,
    "-1",
    "0",
    "2026-99-99",
    "0001-01-01",
    "0001-01-01T00:00:30+14:00",
    "9999-12-31",
    "9999-12-31T23:59:59.999999",
    "\ud800\udfff",
)
FIELDS = {
    "/deliveries": ("id", "user", "type", "outcome", "since", "until", "before", "before_aggregator", "before_id"),
    "/delivery": ("id", "aggregator"),
    "/dead": ("reason", "before"),
    "/backfills": ("status", "user", "before"),
    "/people": ("name", "after"),
    "/person": ("user", "until"),
    "/values": ("user", "until"),
    "/explain": ("user", "resource", "id", "at"),
    "/subscription": ("name",),
}
START = {"user": "u1", "since": "2026-01-01", "until": "2026-02-01", "provider": "garmin", "resource": "sleep"}
ACTIONS = {
    "dead-replay": {"id": "1", "reason": "x"},
    "dead-drop": {"id": "1", "reason": "x"},
    "backfill-pause": {"id": "1"},
    "backfill-resume": {"id": "1"},
    "backfill-cancel": {"id": "1"},
    "backfill-start": START,
    "subscription-pause": {"name": "crm"},
    "subscription-resume": {"name": "crm"},
    "subscription-resend": {"name": "crm", "since": "2026-01-01", "dead": "yes"},
    "reconcile": {"user": "u1"},
    "refresh": {"user": "u1"},
    "erase": {"user": "u1"},
    "x": {"id": "1"},
}
CONFIRMED = {"backfill-start", "subscription-resend"}  # whose fields are used only then


def test_every_page_asks_for_a_login(browser: Browser) -> None:
    """Breaks if a page is served without a session."""
    for path in PAGES:
        answer = browser.get(path)
        assert (answer.status_code, answer.headers["Location"]) == (303, "/login"), path
    assert browser.post("/confirm", {"csrf": "x"}).status_code == 403
    assert len(BLUEPRINTS) == 7


def test_a_wrong_password_or_name_fails_alike(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if the answer shows which accounts exist, or the log has what was typed."""
    with caplog.at_level(logging.WARNING):
        first, second = browser.log_in("viewer-1", "wrong"), browser.log_in("my-typed-password", "wrong")
    assert (first.status_code, second.status_code) == (401, 401)
    assert first.text == second.text
    assert "my-typed-password" not in caplog.text
    assert "of viewer-1" in caplog.text
    assert browser.get("/").status_code == 303


def test_failures_lock_the_name(browser: Browser, clock: Clock) -> None:
    for _ in range(5):
        assert browser.log_in("viewer-1", "wrong").status_code == 401
    assert browser.log_in("viewer-1").status_code == 429
    clock.now += 31
    assert browser.log_in("viewer-1").status_code == 303


def test_the_cookie_is_strict_and_secure_behind_tls(app: Flask) -> None:
    plain = Browser(app).log_in("viewer-1").headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(plain.split("; "))
    assert "Secure" not in plain
    behind = Browser(app, host="console.example.com", scheme="https")
    answer = behind.log_in("viewer-1")
    assert answer.headers["Set-Cookie"].startswith("__Host-headrace_console=")
    assert {"Secure", "HttpOnly", "SameSite=Strict"} <= set(answer.headers["Set-Cookie"].split("; "))
    assert behind.get("/").headers["Strict-Transport-Security"]


def test_a_logout_ends_the_session(viewer: Browser) -> None:
    """Breaks if a copied cookie still works after a logout."""
    cookie = viewer.client.get_cookie("headrace_console", domain=viewer.host)
    assert cookie is not None
    assert viewer.post("/logout", {"csrf": viewer.csrf()}).status_code == 303
    viewer.client.set_cookie("headrace_console", cookie.value, domain=viewer.host)
    assert viewer.get("/").status_code == 303


def test_a_session_ends_when_it_is_idle_or_old(app: Flask, clock: Clock) -> None:
    idle = Browser(app, "viewer-1")
    clock.now += IDLE_SECONDS + 1
    assert idle.get("/people").status_code == 303
    old = Browser(app, "viewer-1")
    for _ in range(int(MAX_SECONDS / 1000)):
        clock.now += 1000
        assert old.get("/feed").status_code == 200
    clock.now += 1000
    assert old.get("/feed").status_code == 303


def test_every_post_needs_the_token_of_the_session(operator: Browser, app: Flask) -> None:
    """Breaks if another site can act with the session of an operator."""
    other = Browser(app, "operator-1").csrf()
    paths = [rule.rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())]
    assert len(paths) == 4
    for path in (one.replace("<name>", "dead-replay") for one in paths):
        for token in ("", "x", other):
            assert operator.post(path, {"csrf": token, "id": "1"}).status_code == 403, path
    known = operator.csrf()
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        answer = operator.post("/actions/dead-replay", {"csrf": known, "id": "1"}, headers=headers)
        assert answer.status_code == 403


def test_a_login_needs_the_token_of_its_page(browser: Browser) -> None:
    """Breaks if another site can log a browser in with an account of its own."""
    answer = browser.post("/login", {"name": "viewer-1", "password": PASSWORD, "csrf": "a" * 43})
    assert answer.status_code == 403


def test_answers_forbid_scripts_frames_and_caches(viewer: Browser) -> None:
    for path in ("/", "/login", "/nothing", "/person?user=unknown", "/static/style.css"):
        headers = viewer.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'self';"), path
        assert "script" not in policy
        assert "unsafe" not in policy
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert ("no-store" in headers["Cache-Control"]) == ("static" not in path)


def test_pages_load_nothing_and_have_no_script(viewer: Browser, person: str) -> None:
    """Breaks if a page needs a script, an inline style, or anything from another host."""
    for path in (*PAGES, f"/person?user={person}"):
        text = viewer.get(path).text
        assert re.findall(r"<script|<style|<iframe|<object|<embed| style=| on[a-z]+=|javascript:", text) == [], path
        assert re.findall(r'(?:src|href|action)="(?!/|#)[^"]*"', text) == [], path


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:5556", "127.0.0.1.evil.example", "10.0.0.7", "[::1", ""]
)
def test_another_host_is_refused(app: Flask, host: str) -> None:
    """Breaks if a page of another site can read the console through a name that resolves to this machine."""
    answer = app.test_client().get("/login", base_url="http://localhost", headers={"Host": host})
    assert answer.status_code in {400, 421}


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1:5556", "[::1]:5556", "console.example.com"])
def test_own_hosts_are_accepted(app: Flask, host: str) -> None:
    assert app.test_client().get("/login", headers={"Host": host}).status_code == 200


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("others", [{}, {"user": "u1", "resource": "heartrate", "before_id": "msg_workout"}], ids=str)
def test_hostile_input_in_every_field_is_answered_with_a_page(
    privacy: Browser, engine: Engine, path: str, others: dict[str, str]
) -> None:
    """Breaks if input is executed, reflected as HTML, or ends in an error of the console or of PostgreSQL."""
    subscribe(engine)
    for field in FIELDS[path]:
        for value in HOSTILE:
            answer = privacy.get(path, **{**others, field: value.encode(errors="replace")})
            assert answer.status_code in {200, 400, 404}, (field, value, answer.text)
            assert "<script" not in answer.text


@pytest.mark.usefixtures("person")
def test_hostile_input_in_every_action_is_answered_with_a_page(privacy: Browser, engine: Engine) -> None:
    """Each action is otherwise complete, so that the value reaches the function behind it, and is confirmed."""
    subscribe(engine)
    token = privacy.csrf()
    for action, fields in ACTIONS.items():
        for field in fields:
            for value in HOSTILE:
                data = fields | {field: value.encode(errors="replace").decode()}
                answer = privacy.post(f"/actions/{action}", data | {"csrf": token})
                assert answer.status_code in {200, 400, 404, 409, 503}, (action, field, value, answer.text)
                assert "<script" not in answer.text
                if answer.status_code == 200 and action in CONFIRMED:
                    done = privacy.confirm(answer)
                    assert done.status_code == 200, (action, field, value, done.text)
                    assert "<script" not in done.text
    assert rows(engine, "SELECT erased_at FROM headrace.users WHERE user_id = 'u1'") == [{"erased_at": None}]


@pytest.mark.usefixtures("person")
def test_hostile_input_in_a_confirmation_is_answered_with_a_page(privacy: Browser) -> None:
    for value in HOSTILE:
        text = value.encode(errors="replace").decode()
        answer = privacy.confirm(privacy.propose("erase", {"user": "u1"}), typed=text)
        assert "Nothing was done." in answer.text
        assert "<script" not in answer.text
        assert privacy.post("/confirm", {"plan": text, "csrf": privacy.csrf()}).status_code == 409


def test_hostile_input_in_the_login_is_answered_with_its_page(browser: Browser, clock: Clock) -> None:
    for value in (*HOSTILE, "x" * 500):
        text = value.encode(errors="replace").decode()
        for name, password in ((text, PASSWORD), ("viewer-1", text), ("viewer-1", text + "\x00\n")):
            clock.now += 1000
            answer = browser.log_in(name, password)
            assert answer.status_code == 401, (name, password, answer.text)
            assert "<script" not in answer.text


@pytest.mark.parametrize("path", ["/dead/{}", "/backfills/{}", "/actions/{}", "/static/{}"])
def test_hostile_input_in_a_path_is_answered_with_a_page(privacy: Browser, path: str) -> None:
    for value in (*HOSTILE, "9" * 5000, "9" * 19):
        answer = privacy.get(path.format(quote(value, errors="replace")))
        assert answer.status_code in {404, 405}, (value, answer.text)
        assert "<script" not in answer.text


def test_control_characters_and_long_values_are_refused(viewer: Browser) -> None:
    for value in ("a\x00b", "a\nb", "x" * 501):
        assert viewer.get("/people", name=value).status_code == 400


def test_logins_are_audited_with_the_accounts_name(engine: Engine, viewer: Browser) -> None:
    del viewer
    (row,) = rows(engine, "SELECT os_user, action, subject FROM headrace.audit")
    assert row == {"os_user": "console:viewer-1", "action": "console login", "subject": "console"}
