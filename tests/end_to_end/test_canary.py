"""Canaries: marker values in bodies and pages reach the views, and no log, metric, span, output or broker file."""

import base64
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from app.accounts import ROLES, Account, hash_password
from app.delivery import pack
from app.sealing import Sealer
from tests.support import ENVIRONMENT, HTTP, SEALER, delivery, event, heartrate, message_id, until, workout
from tests.support.collector import Collector, collector
from tests.support.console import PASSWORD, log_in
from tests.support.http_servers import Handler, serving
from tests.support.stack import Stack, started

pytestmark = pytest.mark.stack
NAME, NUMBER, TOKEN, NOTE = "Canaria Gelbfink", 87.654321, "tok-canary-5d0e7c", "canary: felt dizzy at noon"
CANARIES = [one.encode() for one in (NAME, str(NUMBER), TOKEN, NOTE)]
USER = "canary-cage"
ACCOUNTS = ",".join(Account(role, hash_password(PASSWORD), role).line for role in ROLES)
LINK = re.compile(r'href="(/[^"]+)"')
MAX_PAGES = 80  # of the console, by role
SOURCE = {"provider": "garmin", "type": "watch"}
BASE64_RUN = re.compile(rb"[A-Za-z0-9+/_-]{32,}={0,2}")
FLOWER = (
    "/",
    "/tasks",
    "/workers",
    "/broker",
    "/api/tasks?limit=10000",
    "/api/workers",
    "/api/queues/length",
    "/metrics",
)


def readable(content: bytes, depth: int = 4) -> Iterator[bytes]:
    """The bytes, then everything in them that is base64 or compressed, decoded recursively."""
    yield content
    if depth == 0:
        return
    for open_it in (zlib.decompress, gzip.decompress):
        with suppress(zlib.error, OSError, EOFError):
            yield from readable(open_it(content), depth - 1)
    for run in BASE64_RUN.findall(content):
        with suppress(ValueError):
            yield from readable(base64.b64decode(run.translate(bytes.maketrans(b"-_", b"+/")) + b"==="), depth - 1)


def leaks(places: dict[str, bytes]) -> list[str]:
    """The places that contain a canary, each with the canary."""
    return [
        f"{place}: {canary.decode()}"
        for place, content in places.items()
        for layer in readable(content)
        for canary in CANARIES
        if canary in layer
    ]


class Provider(Handler):
    """Junction's read API with canaries: a page of samples, an invalid page, and errors that quote a canary."""

    def do_GET(self) -> None:  # noqa: N802 - the name of http.server
        samples = [{"timestamp": "2026-03-01T12:00:00+00:00", "value": NUMBER, "unit": "bpm"}]
        answers: dict[str, tuple[int, Any]] = {
            "/heartrate/": (200, {"groups": {"garmin": [{"source": SOURCE, "data": samples}]}, "next_cursor": None}),
            "/sleep/": (200, {"sleep": [{"id": [NAME], "user_id": USER, "source": SOURCE, "duration": NOTE}]}),
            "/activity/": (422, {"detail": f"{NAME} {TOKEN}"}),
        }
        status, body = next((found for part, found in answers.items() if part in self.path), (500, {"detail": TOKEN}))
        self.answer(status, json.dumps(body).encode(), **{"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def spans_collector() -> Iterator[Collector]:
    """The collector that receives the stack's spans."""
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def stack(spans_collector: Collector) -> Iterator[Stack]:
    """A stack that fetches history from Provider."""
    with serving(Provider) as base:
        more = {"JUNCTION_BASE_URL": base, "OTEL_EXPORTER_OTLP_ENDPOINT": spans_collector.url}
        with started(JUNCTION_API_KEY=f"sk_us_{TOKEN}", HEADRACE_CONSOLE_USERS=ACCOUNTS, **more) as one:
            yield one


def canary_events(number: int) -> list[Any]:
    """Valid events that contain canaries."""
    note = {"source": SOURCE, "data": [{"timestamp": "2026-03-14T12:00:00+00:00", "value": NOTE, "unit": "text"}]}
    return [
        workout(USER, f"w{number}", title=NAME, distance=NUMBER, access_token=TOKEN),
        heartrate(USER, {number: NUMBER}),
        event("daily.data.note.created", USER, note),
    ]


def invalid_events() -> list[Any]:
    """Events of which something is refused or stored as NULL, each for another reason."""
    return [
        workout(USER, "b1", average_hr=NOTE),
        workout(USER, "b2", time_start=TOKEN),
        workout(USER, "b3", title=f"{NAME}\u0000"),
        workout(USER, "b4", average_hr=NUMBER),
        workout(USER, "b5", calendar_date=f"2026-03-14 {TOKEN}"),
        workout(USER, [NAME], title=NOTE),
        event(
            "daily.data.heartrate.created", USER, {"source": SOURCE, "data": [{"timestamp": TOKEN, "value": NUMBER}]}
        ),
        event(
            "daily.data.heartrate.created",
            USER,
            {"source": SOURCE, "data": [{"timestamp": "2026-03-02T12:00:00Z", "value": value} for value in (60, NOTE)]},
        ),
        NOTE.encode(),
        b'{"event_type": "' + TOKEN.encode() + b'", "event_type": "x"}',
    ]


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Suspends these processes and their children during the block."""
    family = [one for pid in pids for one in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
    for one in family:
        os.kill(one.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in family:
            os.kill(one.pid, signal.SIGCONT)


def files(root: Path) -> dict[str, bytes]:
    """Every file of the stack, except PostgreSQL's tables, which hold the data, and the files that hold its secrets."""
    found = {}
    for folder, names, some in os.walk(root):
        if "PG_VERSION" in some:
            names[:] = [name for name in names if name in ("log", "pg_log")]
            some = [name for name in some if name.endswith(".log")]  # noqa: PLW2901
        for name in some:
            if name not in ("stack.json", "secrets.json"):
                found[str(Path(folder) / name)] = (Path(folder) / name).read_bytes()
    return found


def pages(stack: Stack) -> dict[str, bytes]:
    """The pages of Flower and the metrics of the endpoint."""
    info = stack.info
    user, _, password = info["flower_auth"].partition(":")
    with httpx.Client(base_url=info["flower"], auth=(user, password), timeout=30) as flower:

        def seen() -> list[str]:
            """The tasks that Flower lists. On a busy machine it receives events only some time after it serves."""
            return re.findall(r'"uuid": "([\w-]+)"', flower.get("/api/tasks?limit=10000").text)

        tasks = until(seen, 60)
        found = {path: flower.get(path).content for path in FLOWER}
        found |= {f"/task/{task}": flower.get(f"/task/{task}").content for task in tasks[:30]}
    return found | {"/metrics": HTTP.get(f"{info['operations']}/metrics").content}


def console_pages(stack: Stack, role: str) -> dict[str, bytes]:
    """The pages of the console that an account reaches by links, also without the separators of digits."""
    found: dict[str, bytes] = {}
    with httpx.Client(base_url=stack.info["console"], timeout=30) as browser:
        log_in(browser, f"{role}:{PASSWORD}")
        waiting = [
            f"/person?user={USER}",
            f"/deliveries?user={USER}",
            "/",
            "/dead",
            f"/person?user={USER}&until=2026-03-20",
        ]
        while waiting and len(found) < MAX_PAGES:
            path = waiting.pop(0)
            answer = browser.get(path)
            assert answer.status_code == 200, (path, answer.text)
            found[path] = answer.content + re.sub(r"[\s\u00a0]", "", answer.text).encode()
            links = {link.replace("&amp;", "&") for link in LINK.findall(answer.text)}
            waiting += sorted(links - found.keys() - set(waiting))
    assert {"/dead", "/backfills", "/people", "/feed"} <= found.keys()
    assert any(path.startswith("/explain") for path in found)
    return {f"console {role} {path}": page for path, page in found.items()}


def test_the_search_finds_an_unencrypted_body() -> None:
    """Breaks if the search of this file misses a canary in a base64-encoded message."""
    open_body = delivery(workout(USER, title=NAME))
    message = json.dumps([[pack([open_body])], {}]).encode()
    assert leaks({"sealed": base64.b64encode(message)}) == []
    bare = open_body.with_body(open_body.open(SEALER), Sealer([]))
    message = json.dumps([[pack([bare])], {}]).encode()
    assert leaks({"open": b'{"body": "' + base64.b64encode(message) + b'"}'}) != []


def test_canaries_are_stored_and_not_disclosed(stack: Stack, spans_collector: Collector) -> None:
    """Breaks if a name, number, token or note is written to a log, metric, span, output or broker file."""
    sent = [message_id(datetime.now(UTC)) for _ in range(len(canary_events(0)) * 5 + len(invalid_events()))]
    bodies = [one for number in range(5) for one in canary_events(number)] + invalid_events()
    for name, body in zip(sent, bodies, strict=True):
        assert stack.post(body, name).status_code == 202
    for resource in ("heartrate", "sleep", "activity"):
        window = {"user_id": USER, "provider": "garmin", "start_date": "2026-02-20", "end_date": "2026-03-10"}
        assert stack.post(event(f"historical.data.{resource}.created", USER, window)).status_code == 202
    settled = "SELECT 1 FROM health.deliveries WHERE message_id = ANY(%s)"
    until(lambda: len(stack.rows(settled, sent)) == len(sent), 90)
    until(lambda: stack.rows("SELECT 1 FROM health.heartrate WHERE origin = 'backfill' AND value = %s", NUMBER), 90)
    until(lambda: len(stack.rows("SELECT 1 FROM headrace.backfills WHERE error IS NOT NULL")) >= 2, 90)
    assert stack.rows("SELECT title, distance FROM health.workouts WHERE id = 'w1'") == [(NAME, NUMBER)]
    places = outputs_of_errors(stack)
    with stopped(stack.info["processes"]["live"]):
        for body in canary_events(9):
            assert stack.post(body).status_code == 202
        places |= files(stack.data) | pages(stack)
    places |= console_pages(stack, "viewer") | console_pages(stack, "operator")
    assert leaks(console_pages(stack, "privacy")) != []  # shows values, which must not be in the logs
    places |= outputs_of_commands(stack) | files(stack.data / "log")
    for one in stack.family():
        places[f"command line of {one.pid}"] = " ".join(one.cmdline()).encode()
    assert any("aof" in place for place in places)
    until(lambda: {one.attributes.get("headrace.delivery") for one in spans_collector.named("open")} >= set(sent), 30)
    names = {"POST /webhooks/junction", "publish live", "headrace.apply live", "page"}
    until(lambda: names <= {one.name for one in spans_collector.spans}, 30)  # processes export every 5 s
    places |= {f"spans {number}": raw for number, raw in enumerate(spans_collector.raw)}
    assert not any(USER.encode() in raw for raw in spans_collector.raw)
    assert leaks(places) == []


def outputs_of_errors(stack: Stack) -> dict[str, bytes]:
    """Output of unexpected errors: a table that is missing for a while, and a command that fails with a traceback."""
    change = "ALTER TABLE headrace.{} RENAME TO {}"
    with psycopg.connect(stack.info["database_url"], autocommit=True) as connection:
        connection.execute(change.format("workouts", "workouts_away"))
        try:
            assert stack.post(workout(USER, "w99", title=NAME, distance=NUMBER)).status_code == 202
            log = stack.data / "log"
            until(lambda: any("UndefinedTable" in one.read_text(errors="replace") for one in log.iterdir()), 60)
        finally:
            connection.execute(change.format("workouts_away", "workouts"))
    until(lambda: stack.rows("SELECT 1 FROM health.workouts WHERE id = 'w99'"), 90)
    environment = ENVIRONMENT | {
        "DATABASE_URL": f"postgresql://u:{TOKEN}@127.0.0.1:1/x",
        "BROKER_URL": f"redis://:{TOKEN}@127.0.0.1:1",
    }
    command = (sys.executable, "-m", "workers.cli", "--debug", "dead", "list")
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert b"Traceback" in done.stderr
    return {"a traceback": done.stdout + done.stderr}


def outputs_of_commands(stack: Stack) -> dict[str, bytes]:
    """The output of commands, and the operational tables: reasons, errors, audit entries and jobs."""
    (dead_letter,) = stack.rows("SELECT min(id) FROM headrace.dead_letters")
    (number,) = stack.rows("SELECT min(id) FROM headrace.backfills")
    commands = [
        ("status",),
        ("status", "--json"),
        ("report", "completeness", "--since", "2026-01-01", "--json"),
        ("report", "completeness", "--since", "2026-01-01"),
        ("explain", "--user", USER, "--resource", "workouts", "--id", "w1", "--json"),
        ("explain", "--user", USER, "--resource", "workouts", "--id", "w1"),
        ("explain", "--user", USER, "--resource", "heartrate", "--at", "2026-03-14T06:31:00Z", "--json"),
        ("dead", "list", "--json"),
        ("dead", "list"),
        ("dead", "show", str(dead_letter[0])),
        ("dead", "replay", "--json"),
        ("backfill", "list", "--json"),
        ("backfill", "show", str(number[0]), "--json"),
        ("replay", "--since", "2026-01-01", "--json"),
        ("retention", "--dry-run"),
        ("audit", "--since", "2026-01-01", "--json"),
        ("check", "--json"),
    ]
    found = {}
    for words, (status, output) in zip(commands, stack.run_all(*commands), strict=True):
        assert status in (0, 1), (words, output)
        assert output, words
        found["headrace " + " ".join(words)] = output.encode()
    queries = {
        "reasons": "SELECT reason, event_type FROM headrace.dead_letters",
        "errors": "SELECT error, event_type FROM headrace.deliveries",
        "backfills": "SELECT error FROM headrace.backfills",
        "audit": "SELECT t::text FROM headrace.audit t",
        "jobs": "SELECT t::text FROM headrace.jobs t",
    }
    return found | {name: repr(stack.rows(query)).encode() for name, query in queries.items()}
