"""A whole `headrace up`: what is sent over HTTP ends in the views, whatever is killed meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil
import psycopg
import pytest

from tests.support import ROOT, event, heartrate, message_id, signed, until, workout

pytestmark = pytest.mark.stack
FIELDS = {
    *("web", "flower", "flower_auth", "database_url", "broker_url"),
    *("junction_webhook_secret", "terra_signing_secret", "processes"),
}
GROUPS = {"postgres", "broker", "web", "live", "backfill", "beat", "flower"}
KEPT = "SELECT 1 FROM health.workouts WHERE user_id = 'kept'"
SECRET_TITLE = "a title that nobody else may read"


class Stack:
    """A `headrace up` in a folder of its own, which may be started again there."""

    def __init__(self, folder: Path, **more: str) -> None:
        self.more = more  # variables of its environment
        self.data = folder / "data"
        self.output = folder / "output"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it is ready."""
        command = (sys.executable, "-m", "workers.cli", "up", "--data-dir", str(self.data), "--workers", "1")
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | self.more
        environment["HEADRACE_VISIBILITY_TIMEOUT_SECONDS"] = "5"  # how long a killed worker's message is waited for
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        until(lambda: self.file.exists() or self.process.poll() is not None, 120)
        assert self.file.exists(), self.output.read_text()

    def end(self, number: signal.Signals) -> int:
        """Sends a signal and waits for the end."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def file(self) -> Path:
        """Where it says what runs."""
        return self.data / "stack.json"

    @property
    def info(self) -> dict[str, Any]:
        """What stack.json says now."""
        return dict(json.loads(self.file.read_text()))

    def pid(self, group: str) -> int | None:
        """The main process of a group, if it has one now."""
        return next(iter(self.info["processes"][group]), None)

    def post(self, body: Any, name: str | None = None, secret: str | None = None) -> httpx.Response:
        """Sends an event as Junction does."""
        info, now = self.info, datetime.now(UTC)
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = signed(raw, name=name or message_id(now), at=now, secret=secret or info["junction_webhook_secret"])
        return httpx.post(f"{info['web']}/webhooks/junction", content=raw, headers=headers, timeout=20)

    def deliver(self, body: Any) -> None:
        """Sends an event until it is taken, as Junction does."""
        name = message_id(datetime.now(UTC))

        def taken() -> bool:
            try:
                return self.post(body, name).status_code == 202
            except httpx.TransportError:
                return False

        until(taken)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """A command that finds the stack by its folder, as an operator's does."""
        command = (sys.executable, "-m", "workers.cli", *words, "--data-dir", str(self.data))
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | self.more
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """What a reader sees; nothing while the database is away."""
        try:
            with psycopg.connect(self.info["database_url"], connect_timeout=5) as connection:
                return connection.execute(query, parameters).fetchall()
        except psycopg.OperationalError:
            return []

    def family(self) -> list[psutil.Process]:
        """Every process that belongs to it: by its environment, its command line or the folder it works in."""
        found = []
        for one in psutil.process_iter():
            try:
                told = one.environ().get("HEADRACE_DATA_DIR") == str(self.data)
                if told or str(self.data) in " ".join(one.cmdline()) or one.cwd().startswith(str(self.data)):
                    found.append(one)
            except psutil.Error:
                continue
        return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def started(**more: str) -> Iterator[Stack]:
    """A stack with these variables in its environment, which ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="headrace-end-to-end-"))
    folder.chmod(0o755)  # as root, PostgreSQL's own user must get through
    one = Stack(folder, **more)
    try:
        one.start()
        yield one
    finally:
        if one.process is not None and one.process.poll() is None:
            one.end(signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One stack for all tests."""
    with started() as one:
        yield one


def test_stack_json_is_as_promised(stack: Stack) -> None:
    """Breaks if programs that find the stack by its file do not, or others can read its passwords."""
    assert stack.file.stat().st_mode & 0o777 == 0o600
    info = stack.info
    assert set(info) >= FIELDS
    assert set(info["processes"]) >= GROUPS
    assert all(psutil.pid_exists(pid) for pids in info["processes"].values() for pid in pids)
    assert [len(info["processes"][group]) for group in ("live", "backfill", "beat")] == [1, 1, 1]
    assert info["database_url"].startswith("postgresql://")
    assert info["broker_url"].startswith("redis://")
    assert info["junction_webhook_secret"].startswith("whsec_")
    assert all("127.0.0.1" in info[name] for name in ("web", "flower", "database_url", "broker_url"))


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
def test_an_event_ends_in_its_view(stack: Stack, body: Any, query: str) -> None:
    """Breaks if any part of the way from the endpoint to the reader does not fit the next."""
    query = query.replace("value", "min(value)")
    assert stack.post(body).status_code == 202
    assert len(until(lambda: stack.rows(query))) == 1


def test_an_event_of_somebody_else_is_refused(stack: Stack) -> None:
    """Breaks if anybody who knows the address can write into the database."""
    assert stack.post(workout("stranger"), secret="whsec_" + "AAAA" * 8).status_code == 401
    stack.deliver(workout("friend"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = 'friend'"))
    assert stack.rows("SELECT 1 FROM health.users WHERE user_id = 'stranger'") == []


def test_whoever_is_erased_stays_so(stack: Stack) -> None:
    """Breaks if any of a hundred events in flight, or one that comes later, brings somebody back or harms others."""
    canary = "canary-2f9c51e0"
    names = [message_id(datetime.now(UTC)) for _ in range(110)]

    def send(number: int) -> None:
        body = workout("erased", f"w{number}", title=canary) if number % 2 else heartrate("erased", {number: 60})
        assert stack.post(body, names[number]).status_code == 202

    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send, number) for number in range(100)]
        stack.deliver(workout("neighbour"))
        until(lambda: stack.rows("SELECT 1 FROM headrace.users WHERE user_id = 'erased'"))
        done = stack.run("erase", "--user", "erased")
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
        about = (
            "%erased%" if table not in ("headrace.users", "headrace.audit", "headrace.deliveries") else f"%{canary}%"
        )
        assert stack.rows(f"SELECT t::text FROM {table} t WHERE t::text LIKE %s", about) == [], table
    assert stack.rows("SELECT erased_at IS NOT NULL, client_user_id FROM health.users WHERE user_id = 'erased'") == [
        (True, None)
    ]
    assert stack.rows("SELECT id FROM health.workouts WHERE user_id = 'neighbour'") == [("w1",)]


def test_the_web_process_has_no_database_driver(stack: Stack) -> None:
    """Breaks if the endpoint grows by what it has no use for, or could reach the database at all."""

    def mapped(pid: int) -> str:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return "".join(Path(f"/proc/{one.pid}/maps").read_text() for one in family)

    web, live = stack.pid("web"), stack.pid("live")
    assert web is not None
    assert live is not None
    assert "psycopg" in mapped(live)  # else this would not see it anywhere
    assert not [name for name in ("psycopg", "libpq", "sqlalchemy") if name in mapped(web)]


def test_status_finds_the_stack(stack: Stack) -> None:
    """Breaks if a command beside the running stack needs its addresses set by hand."""
    command = (sys.executable, "-m", "workers.cli", "status", "--json", "--data-dir", str(stack.data))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert {lane["name"] for lane in found["lanes"]} == {"live", "download", "backfill", "maintenance"}
    assert sum(row["total"] for row in found["deliveries"]) >= 1


def test_a_frozen_broker_is_answered_503_in_time(stack: Stack) -> None:
    """Breaks if a sender waits, gets another status, or a 202 for what nobody has taken."""
    broker = stack.pid("broker")
    assert broker is not None
    os.kill(broker, signal.SIGSTOP)
    try:
        for _ in range(2):
            answer = stack.post(workout("frozen"))
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            assert answer.elapsed.total_seconds() < 5  # the contract's own limit
        assert httpx.get(f"{stack.info['web']}/livez", timeout=20).status_code == 200
        assert httpx.get(f"{stack.info['web']}/readyz", timeout=20).status_code == 503
    finally:
        os.kill(broker, signal.SIGCONT)
    stack.deliver(workout("thawed"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = 'thawed'"))


@pytest.mark.parametrize("group", ["web", "live", "broker", "postgres"])
def test_what_is_killed_comes_back_and_nothing_is_lost(stack: Stack, group: str) -> None:
    """Breaks if a process that dies is not started again, is not told in stack.json, or takes a 202 with it."""
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


def test_nothing_that_was_sent_stands_in_a_log(stack: Stack) -> None:
    """Breaks if a body, a password or a signing secret is written where operators paste from."""
    info = stack.info
    secrets = [SECRET_TITLE, info["junction_webhook_secret"], info["terra_signing_secret"], info["flower_auth"]]
    secrets += [str(urlsplit(info[url]).password) for url in ("database_url", "broker_url")]
    for file in [stack.output, *(stack.data / "log").iterdir()]:
        text = file.read_text(errors="replace")
        assert not [one for one in secrets if one in text], file.name


def test_sigterm_ends_everything(stack: Stack) -> None:
    """Breaks if a process outlives its stack, or the file stays that says that it runs."""
    stack.deliver(workout("kept"))
    until(lambda: stack.rows(KEPT))
    children = [psutil.Process(pid) for pids in stack.info["processes"].values() for pid in pids]
    assert len(stack.family()) > len(children)
    assert stack.end(signal.SIGTERM) == 0
    assert stack.family() == []
    assert not [one for one in children if one.is_running()]
    assert not stack.file.exists()


def test_data_survives_and_a_killed_supervisor_leaves_no_process(stack: Stack) -> None:
    """Breaks if a second start begins anew, or kill -9 leaves servers behind that hold the data."""
    if stack.process is not None and stack.process.poll() is None:
        stack.deliver(workout("kept"))
        until(lambda: stack.rows(KEPT))
        stack.end(signal.SIGTERM)
    stack.start()
    assert stack.rows(KEPT)
    stack.deliver(workout("second"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE user_id = 'second'"))
    assert len(stack.family()) > len(GROUPS)
    stack.end(signal.SIGKILL)
    until(lambda: stack.family() == [], 30)
