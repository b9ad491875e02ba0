"""A complete `headrace up`: events sent over HTTP reach the views, even if processes are killed."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from app.broker.lanes import LANES
from tests.support import HTTP, event, heartrate, message_id, status, until, workout
from tests.support.console import log_in
from tests.support.processes import memory_of
from tests.support.stack import Stack, started
from workers.local.secrets import WITHHELD, WITHHELD_BY_LANE, withheld
from workers.store.roles import WRITER_LOGIN as WRITER

pytestmark = pytest.mark.stack
FIELDS = {
    *("web", "flower", "flower_auth", "console", "console_auth", "database_url", "broker_url"),
    *("junction_webhook_secret", "terra_signing_secret", "processes"),
}
GROUPS = {"postgres", "broker", "web", "live", "backfill", "beat", "flower", "console"}
RESTARTED_USER = "SELECT 1 FROM health.workouts WHERE user_id = 'restarted'"
SECRET_TITLE = "a title that no log may contain"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One stack for all tests."""
    with started() as one:
        yield one


def test_stack_json_follows_the_contract(stack: Stack) -> None:
    """Breaks if stack.json lacks a field of the contract, or other users can read its passwords."""
    assert stack.file.stat().st_mode & 0o777 == 0o600
    info = stack.info
    assert set(info) >= FIELDS
    assert set(info["processes"]) >= GROUPS
    assert all(psutil.pid_exists(pid) for pids in info["processes"].values() for pid in pids)
    assert [len(info["processes"][group]) for group in ("live", "backfill", "beat")] == [1, 1, 1]
    assert info["database_url"].startswith("postgresql://")
    assert info["broker_url"].startswith("redis://")
    assert info["junction_webhook_secret"].startswith("whsec_")
    assert all("127.0.0.1" in info[name] for name in ("web", "flower", "console", "database_url", "broker_url"))


@pytest.mark.parametrize(
    ("body", "query"),
    [
        (workout("u1", title=SECRET_TITLE), "SELECT average_hr FROM health.workouts WHERE user_id = 'u1'"),
        (
            heartrate("u1", {0: 61, 1: 62}),
            "SELECT value FROM health.heartrate WHERE user_id = 'u1' HAVING count(*) = 2",
        ),
        (
            event("provider.connection.created", "u1", {"provider": {"slug": "oura"}}),
            "SELECT status FROM health.connections WHERE provider = 'oura'",
        ),
        (
            event("historical.data.sleep.created", "u1", {"user_id": "u1", "provider": "oura"}),
            "SELECT status FROM health.backfills WHERE resource = 'sleep'",
        ),
        (event("labtest.order.created", "u1", {}), "SELECT 1 FROM health.deliveries WHERE outcome = 'ignored'"),
        (b"{half", "SELECT 1 FROM health.deliveries WHERE outcome = 'dead'"),
    ],
    ids=["workout", "samples", "connection", "historical", "ignored", "unusable"],
)
def test_an_event_reaches_its_view(stack: Stack, body: Any, query: str) -> None:
    """Breaks if endpoint, broker, worker and view do not work together for this kind of event."""
    query = query.replace("value", "min(value)")
    assert stack.post(body).status_code == 202
    assert len(until(lambda: stack.rows(query))) == 1


def test_an_event_reaches_its_day(stack: Stack) -> None:
    """Breaks if no process numbers the change feed or computes days, or their tasks are not sent."""
    stack.deliver(workout("walker", "w-day") | {"client_user_id": "member-day"})
    query = "SELECT value FROM health.daily WHERE client_user_id = 'member-day' AND metric = 'workouts_count'"
    assert until(lambda: stack.rows(query)) == [(1,)]
    changes = "SELECT op FROM health.changes WHERE resource = 'daily' AND client_user_id = 'member-day'"
    assert until(lambda: stack.rows(changes)) == [("put",)]


@pytest.mark.parametrize("path", ["/webhooks/junction/", "//webhooks/junction", "/webhooks//junction"])
def test_additional_slashes_are_ignored(stack: Stack, path: str) -> None:
    """Breaks if the server redirects or rejects a webhook because of a slash."""
    assert HTTP.post(f"{stack.info['web']}{path}", content=b"{}").status_code == 401
    assert HTTP.post(f"{stack.info['web']}{path}x", content=b"{}").status_code == 404


def test_an_event_with_a_wrong_signature_is_rejected(stack: Stack) -> None:
    """Breaks if a sender without the secret can write into the database."""
    assert stack.post(workout("stranger"), secret="whsec_" + "AAAA" * 8).status_code == 401
    stack.deliver(workout("friend"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = 'friend'"))
    assert stack.rows("SELECT 1 FROM health.users WHERE user_id = 'stranger'") == []


def test_an_erased_user_stays_erased(stack: Stack) -> None:
    """Breaks if an event in flight, or a later one, restores an erased user, or the erasure affects others."""
    canary = "canary-2f9c51e0"
    names = [message_id(datetime.now(UTC)) for _ in range(110)]

    def send(number: int) -> None:
        body = workout("erased", f"w{number}", title=canary) if number % 2 else heartrate("erased", {number: 60})
        assert stack.post(body, names[number]).status_code == 202

    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send, number) for number in range(100)]
        stack.deliver(workout("neighbour"))
        until(lambda: stack.rows("SELECT 1 FROM headrace.users WHERE user_id = 'erased'"))
        done = stack.run("erase", "--user", "erased", "--yes")
        for one in sent:
            one.result()
    assert (done.returncode, done.stdout.startswith("erased erased, ")) == (0, True), done.stderr
    for number in (*range(10), *range(100, 110)):
        send(number)
    settled = "SELECT outcome, error FROM health.deliveries WHERE message_id = ANY(%s)"
    assert len(until(lambda: len(found := stack.rows(settled, names)) == 110 and found)) == 110
    assert set(stack.rows(settled, names[100:])) == {("ignored", "the user was erased")}
    tables = "SELECT 'headrace.' || quote_ident(tablename) FROM pg_tables WHERE schemaname = 'headrace'"
    for (table,) in stack.rows(tables):
        named = ("headrace.deliveries", "headrace.changes", "headrace.outbox")  # the change feed tells of the erasure
        may_name = table in ("headrace.users", "headrace.audit") or table.startswith(named)
        about = f"%{canary}%" if may_name else "%erased%"
        assert stack.rows(f"SELECT t::text FROM {table} t WHERE t::text LIKE %s", about) == [], table
    changes = "SELECT op FROM health.changes WHERE user_id = 'erased'"
    assert until(lambda: stack.rows(changes)) == [("erase",)]
    assert stack.rows("SELECT erased_at IS NOT NULL, client_user_id FROM health.users WHERE user_id = 'erased'") == [
        (True, None)
    ]
    assert stack.rows("SELECT id FROM health.workouts WHERE user_id = 'neighbour'") == [("w1",)]


def test_the_web_process_has_no_database_driver(stack: Stack) -> None:
    """Breaks if the endpoint loads a database driver, which costs memory and makes the database reachable."""

    def mapped(pid: int) -> str:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return "".join(Path(f"/proc/{one.pid}/maps").read_text() for one in family)

    web, live = stack.pid("web"), stack.pid("live")
    assert web is not None
    assert live is not None
    assert "psycopg" in mapped(live)  # shows that `mapped` would find it
    assert not [name for name in ("psycopg", "libpq", "sqlalchemy") if name in mapped(web)]


def test_processes_log_in_as_the_writer(stack: Stack) -> None:
    """Breaks if a compromised worker is the superuser of PostgreSQL, which runs programs, or finds its password."""
    stack.deliver(workout("written"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = 'written'"))
    logins = "SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name LIKE 'headrace-%%'"
    assert until(lambda: stack.rows(logins)) == [(WRITER,)]
    rights = "SELECT rolsuper, rolcreaterole, rolcreatedb, rolbypassrls FROM pg_roles WHERE rolname = %s"
    assert stack.rows(rights, WRITER) == [(False, False, False, False)]
    owner = urlsplit(stack.info["database_url"])
    assert owner.password
    assert [one.pid for one in stack.family() if owner.password in str(one.environ())] == []
    live = stack.pid("live")
    assert live is not None
    assert owner.password.encode() not in memory_of(live)  # a forked worker shows the environment of its fork server
    assert f"{WRITER}:".encode() in memory_of(live)


@pytest.mark.parametrize("group", sorted({*GROUPS & WITHHELD.keys(), "live", *WITHHELD_BY_LANE}))
def test_a_process_gets_no_secret_that_it_does_not_need(stack: Stack, group: str) -> None:
    """Breaks if the endpoint can read the database, or whoever controls Flower or beat can decrypt bodies."""
    pid = stack.pid(group)
    assert pid is not None
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    variables = {name for one in family for name in one.environ()}
    assert variables & withheld(("worker", "--lane", group) if group in LANES else (group,)) == set()
    assert "HEADRACE_DATA_DIR" in variables


def test_flower_and_beat_cannot_decrypt_bodies(stack: Stack) -> None:
    """Breaks if a process inherits the encryption key or a signing secret in its memory, however it was started."""
    secrets = json.loads((stack.data / "secrets.json").read_text())
    key, signing = secrets["encryption_key"].encode(), secrets["terra_signing_secret"].encode()
    groups = ("live", "notify", "derive", "beat", "flower", "forkserver")
    found = {group: memory_of(stack.pid(group) or 0) for group in groups}
    assert [group for group, memory in found.items() if key in memory] == ["live", "notify"]
    assert [group for group, memory in found.items() if signing in memory] == []


def test_the_account_of_stack_json_logs_in_to_the_console(stack: Stack) -> None:
    """Breaks if the console does not start with the stack, or its generated account lacks a role."""
    with httpx.Client(base_url=stack.info["console"], timeout=20) as browser:
        log_in(browser, stack.info["console_auth"])
        page = browser.get("/").text
        assert ">Overview</h1>" in page
        assert "(privacy)" in page
    assert httpx.get(f"{stack.info['console']}/people").headers["Location"] == "/login"


def test_the_console_is_one_process_that_shares_the_memory_of_the_fork_server(stack: Stack) -> None:
    """Breaks if the console, which is nearly always idle, takes 85 MB again."""
    (pid,) = stack.info["processes"]["console"]
    assert psutil.Process(pid).children() == []
    memory = psutil.Process(pid).memory_full_info()
    assert memory.uss < memory.rss / 2


def test_status_finds_the_stack(stack: Stack) -> None:
    """Breaks if a command does not find the URLs of the running stack in its data directory."""
    found = json.loads(stack.run("status", "--json").stdout)
    assert {lane["name"] for lane in found["lanes"]} == set(LANES)
    assert sum(row["total"] for row in found["deliveries"]) >= 1


def test_a_frozen_broker_is_answered_503_in_time(stack: Stack) -> None:
    """Breaks if a request blocks on a frozen broker, or gets another status than 503."""
    broker = stack.pid("broker")
    assert broker is not None
    os.kill(broker, signal.SIGSTOP)
    try:
        for _ in range(2):
            answer = stack.post(workout("frozen"))
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            assert answer.elapsed.total_seconds() < 5  # the limit of the contract
        assert status(f"{stack.info['web']}/livez") == 200
        assert status(f"{stack.info['web']}/readyz") == 503
    finally:
        os.kill(broker, signal.SIGCONT)
    stack.deliver(workout("thawed"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = 'thawed'"))


@pytest.mark.parametrize("group", ["web", "live", "broker", "postgres"])
def test_a_killed_process_is_restarted_and_nothing_is_lost(stack: Stack, group: str) -> None:
    """Breaks if a killed process is not restarted, is missing in stack.json, or loses an accepted event."""
    for number in range(20):
        stack.deliver(workout(f"before {group}", f"w{number}"))
    killed = stack.pid(group)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    until(lambda: stack.pid(group) not in (None, killed))
    stack.deliver(workout(f"after {group}"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = %s", f"after {group}"))
    count = "SELECT count(*) FROM health.workouts WHERE user_id = %s"
    until(lambda: stack.rows(count, f"before {group}") == [(20,)], 120)


def test_no_log_contains_a_body_or_a_secret(stack: Stack) -> None:
    """Breaks if a log contains part of a body, a password or a signing secret."""
    info = stack.info
    secrets = [SECRET_TITLE, info["junction_webhook_secret"], info["terra_signing_secret"], info["flower_auth"]]
    secrets.append(info["console_auth"].partition(":")[2])
    secrets += [str(urlsplit(info[url]).password) for url in ("database_url", "broker_url")]
    for file in [stack.output, *(stack.data / "log").iterdir()]:
        text = file.read_text(errors="replace")
        assert not [one for one in secrets if one in text], file.name


def test_sigterm_stops_every_process(stack: Stack) -> None:
    """Breaks if a process outlives its stack, or stack.json remains."""
    stack.deliver(workout("restarted"))
    until(lambda: stack.rows(RESTARTED_USER))
    children = [psutil.Process(pid) for pids in stack.info["processes"].values() for pid in pids]
    assert len(stack.family()) > len(children)
    assert stack.end(signal.SIGTERM) == 0
    assert stack.family() == []
    assert not [one for one in children if one.is_running()]
    assert not stack.file.exists()


def test_data_survives_and_a_killed_supervisor_leaves_no_process(stack: Stack) -> None:
    """Breaks if a second start loses data, or kill -9 of the supervisor leaves servers that lock the data directory."""
    if stack.process is not None and stack.process.poll() is None:
        stack.deliver(workout("restarted"))
        until(lambda: stack.rows(RESTARTED_USER))
        stack.end(signal.SIGTERM)
    stack.start()
    live = stack.pid("live")
    assert live is not None
    assert "DATABASE_URL" not in psutil.Process(live).environ(), "the worker was not forked"
    assert stack.rows(RESTARTED_USER)
    stack.deliver(workout("second"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = 'second'"))
    assert len(stack.family()) > len(GROUPS)
    stack.end(signal.SIGKILL)
    until(lambda: stack.family() == [], 30)
