"""`headrace status --watch`: fits the terminal, shows rates, and works while services are away."""

import contextlib
import http.server
import io
import itertools
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fcntl import ioctl
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import ROOT, apply, delivery, workout
from workers.broker_admin import Lane
from workers.local.ports import free_port
from workers.operate import watch_view
from workers.operate.health import Delay, Status
from workers.operate.watch_view import Dashboard, Watcher
from workers.store.backfill_admin import Backfill
from workers.store.engine import make_engine
from workers.store.jobs import SWEPT, touch

T0 = datetime(2026, 3, 14, 6, 30, tzinfo=UTC)
LANES = [Lane("live", 12, timedelta(seconds=3)), Lane("backfill", 400, None)]


def backfill(number: int) -> Backfill:
    texts = ("5b7ab2b4-0f6b-4b7e-9c6c-000000000001", "garmin", "heartrate", "", "notice", "running")
    times = (T0, T0, True, 4, 2, 1204, 9, 0, T0, T0, None, T0)
    return Backfill(number, *texts, *times, None, 0.5, 60.0)  # type: ignore[arg-type]


FULL = Status(
    lanes=LANES,
    deliveries=[
        {"outcome": "applied", "total": 1000, "last_hour": 90},
        {"outcome": "dead", "total": 7, "last_hour": 0},
    ],
    backfills=[{"status": "running", "backfills": 40, "last_day": 0, "records": 500}],
    open_backfills=[backfill(n) for n in range(10)],
    pauses=[
        {
            "account": "junction",
            "because_of": "status 401: the API key is refused",
            "seconds_left": 200,
            "kind": "key_refused",
            "key": "1f2e3d4c",
            "is_own_key": False,
        }
    ],
    connections_in_error=[{"user_id": f"u{n}", "provider": "oura", "since": T0, "error": "expired"} for n in range(30)],
    dead_letters=[{"reason": f"reason {n}", "dead_letters": 3, "last_hour": 1} for n in range(9)],
    delay=Delay(0.012, 0.08),
    swept=timedelta(seconds=4),
    at=T0,
)


def shown(page: Dashboard, width: int, height: int) -> list[str]:
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height)
    screen.print(page, height=height)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 30), (140, 50), (60, 24), (200, 24)])
def test_the_page_fits_the_terminal(width: int, height: int) -> None:
    lines = shown(Dashboard(FULL, FULL), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("not healthy")
    text = " ".join(" ".join(lines).split())
    for part in (
        "compare the workers' JUNCTION_API_KEY",
        "live",
        "12",
        "applied",
        "median 12 ms",
        "Backfills: 40 running",
    ):
        assert part in text
    assert "Dead letters: 27" in text
    assert "more: headrace status" in text


def test_a_wide_page_shows_user_ids() -> None:
    user = "5b7ab2b4"
    assert user in "".join(shown(Dashboard(FULL, FULL), 140, 50))
    assert user not in "".join(shown(Dashboard(FULL, FULL), 80, 24))


def test_rates_compare_two_snapshots() -> None:
    deliveries = [{"outcome": "applied", "total": 1250, "last_hour": 340}]
    lanes, later = [Lane("live", 2, None)], T0 + timedelta(seconds=10)
    after = replace(FULL, deliveries=deliveries, lanes=lanes, at=later, pauses=[], dead_letters=[])
    lines = shown(Dashboard(after, FULL), 100, 24)
    (line,) = [line for line in lines if line.startswith("live")]
    assert line.split() == ["live", "2", "-", "-1.0", "applied", "25", "340", "1,250"]
    assert lines[0].startswith("healthy")


def test_the_first_page_has_no_rates() -> None:
    (line,) = [line for line in shown(Dashboard(FULL, FULL), 100, 24) if line.startswith("live")]
    assert line.split()[4] == "-"


@pytest.fixture
def watcher(engine: Engine, settings: Settings, broker_url: str) -> Watcher:
    del broker_url
    return Watcher(engine, settings)


def test_a_snapshot_of_a_running_installation(watcher: Watcher, engine: Engine, settings: Settings) -> None:
    apply(engine, settings, delivery(workout("u1")))
    touch(engine, SWEPT)
    assert [row["total"] for row in watcher.page().now.deliveries] == [1]
    apply(engine, settings, delivery(workout("u2", "w2")), delivery(b"half"))
    now = watcher.page().now
    assert {row["outcome"]: row["total"] for row in now.deliveries} == {"applied": 2, "dead": 1}
    assert now.swept is not None
    assert now.swept < timedelta(seconds=30)
    assert now.delay is not None
    assert 0 <= now.delay.median <= now.delay.p99 < 30


def test_the_page_stays_while_services_are_away(engine: Engine, settings: Settings) -> None:
    apply(engine, settings, delivery(workout("u1")))
    away = replace(settings, broker_url=f"redis://127.0.0.1:{free_port()}/0", redis_url=None)
    page = Watcher(engine, away).page()
    text = "\n".join(shown(page, 80, 24))
    assert text.startswith("not healthy")
    assert "BROKER_URL: the broker cannot be reached" in text
    assert "junction keeps retrying its oldest event for at least 1 d 3 h" in text
    assert "applied" in text
    gone = make_engine(replace(settings, database_url=f"postgresql+psycopg://u:p@127.0.0.1:{free_port()}/d"))
    both = Watcher(gone, away).page()
    assert {one.setting for one in both.now.away} == {"BROKER_URL", "DATABASE_URL"}
    gone.dispose()


@contextmanager
def endpoint(status: int, text: str) -> Iterator[str]:
    """Answers /metrics with the text, and /readyz with the status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else status)
            self.end_headers()
            self.wfile.write(text.encode() if self.path == "/metrics" else b"the broker is away\n")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_endpoint_is_scraped() -> None:
    exposition = 'headrace_answers_total{aggregator="junction",status="202"} 5.0\n'
    exposition += 'headrace_answers_total{aggregator="terra",status="202"} 2.0\n'
    exposition += 'headrace_refused_total{aggregator="junction",reason="stale"} 3.0\n'
    exposition = "# TYPE headrace_answers counter\n# TYPE headrace_refused counter\n" + exposition
    with endpoint(200, exposition) as url:
        found = watch_view.scrape(url)
    assert (found.why_not, found.answers, found.refused) == (None, {"202": 7}, {"stale": 3})
    with endpoint(503, exposition) as url:
        assert watch_view.scrape(url).why_not == "the broker is away"
    assert "does not answer" in str(watch_view.scrape(url).why_not)


def environment(settings: Settings) -> dict[str, str]:
    database = settings.need_database().replace("+psycopg", "")
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    return known | {"DATABASE_URL": database, "BROKER_URL": settings.need_broker()}


def test_ctrl_c_restores_the_terminal(settings: Settings, broker_url: str) -> None:
    """The alternate screen is closed, the cursor is shown, and the exit status is 0."""
    del broker_url
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = (sys.executable, "-m", "workers.cli", "status", "--watch", "--interval", "0.2")
    with (
        subprocess.Popen(command, env=environment(settings), stdin=slave, stdout=slave, stderr=slave) as process,
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(process.kill)  # a test that has failed must not wait for it
        os.close(slave)
        output, deadline = b"", time.monotonic() + 60
        while output.count(b"healthy") < 3:
            assert time.monotonic() < deadline, output
            if select.select([master], [], [], 0.5)[0]:
                output += os.read(master, 65_536)
        process.send_signal(signal.SIGINT)
        while select.select([master], [], [], 20)[0]:
            try:
                more = os.read(master, 65_536)
            except OSError:
                break
            output += more
        assert process.wait(30) == 0
    os.close(master)
    assert output.rstrip().endswith(b"\x1b[?1049l")
    assert b"Aborted" not in output
    assert b"Traceback" not in output


def test_output_to_a_pipe_has_no_control_characters(settings: Settings, broker_url: str) -> None:
    del broker_url
    command = (sys.executable, "-m", "workers.cli", "status", "--watch", "--interval", "0.2")
    with (
        subprocess.Popen(
            command, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(process.kill)
        assert process.stdout is not None
        lines: list[str] = []
        while lines.count("healthy") < 2:
            lines.append(process.stdout.readline().rstrip())
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")
    assert "\x1b" not in "".join(lines) + rest
    assert any("Lanes" in line for line in lines)


def test_a_lane_is_marked_for_its_own_problem() -> None:
    """A text match would find "live" in "deliveries"."""

    def marked(now: Status) -> list[str]:
        screen = Console(width=100, record=True, force_terminal=True, file=io.StringIO())
        screen.print(Dashboard(now, now)._counts(100))
        lines = screen.export_text(styles=True).split("\n")
        return [line for line in lines if "\x1b[1;31m" in line]

    lanes = [Lane("live", 12, timedelta(seconds=3)), Lane("download", 1, timedelta(minutes=9))]
    assert marked(Status(lanes=lanes[:1], crashed_deliveries=2)) == []
    (line,) = marked(Status(lanes=lanes, crashed_deliveries=2))
    assert "download" in line


BUSY_AND_FAULTY = replace(
    FULL,
    lanes=[
        Lane(name, 12_345, timedelta(minutes=3))
        for name in ("live", "download", "backfill", "maintenance", "notify", "derive")
    ],
    deliveries=[
        {"outcome": name, "total": 1_234_567, "last_hour": 12_345}
        for name in ("applied", "dead", "duplicate", "ignored", "stale")
    ],
    backfills=[
        {"status": name, "backfills": 1204, "last_day": 3, "records": 10**9}
        for name in ("cancelled", "complete", "failed", "paused", "pending", "running")
    ],
    pauses=[
        *FULL.pauses,
        *(
            {
                "account": account,
                "because_of": "status 429",
                "seconds_left": 1800,
                "kind": "asked",
                "key": "1f2e3d4c",
                "is_own_key": True,
            }
            for account in ("terra", *(f"terra/{n}" for n in range(50)))
        ),
    ],
    gaps=[{"whose": whose, "gaps": 12, "people": 3, "since": "2026-03-14 06:30"} for whose in ("ours", "provider")],
    refused_items=[
        {"origin": origin, "items": 900, "last_hour": 9, "reason": "a sample without a value"}
        for origin in ("webhooks", "history")
    ],
    failures=[
        {"account": "junction", "because_of": "no answer", "failures": 12, "key": "1f2e3d4c", "is_own_key": True}
    ],
    crashed_deliveries=3,
    swept=timedelta(minutes=9),
)


@pytest.mark.parametrize("worst", range(9))
def test_a_busy_and_faulty_page_fits_80_by_24(worst: int) -> None:
    """Breaks if lines are lost below the screen, a reason is printed twice, or a title has no rows.

    `worst` leaves out as many of the dead letters, so that the sections have more room.
    """
    now = replace(BUSY_AND_FAULTY, dead_letters=FULL.dead_letters[worst:])
    lines = shown(Dashboard(now, FULL), 80, 24)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    reasons = {"status 401", "no answer", "a sample without a value", "expired", *(f"reason {n}" for n in range(9))}
    assert {one: text.count(one) for one in reasons if text.count(one) > 1} == {}
    assert "more: headrace status" in text
    assert "Backfills: " in text
    titles = ("Paused", "Backfills:", "Connections", "Dead", "Refused", "Gaps")
    for above, below in itertools.pairwise(lines):
        assert not (above.startswith(titles) and below.startswith(titles))


def test_a_reason_of_a_problem_is_not_repeated_below() -> None:
    """Breaks if the reason of a pause or of dead letters is printed as a problem and again in its section."""
    now = Status(
        pauses=BUSY_AND_FAULTY.pauses,
        dead_letters=[*FULL.dead_letters[:1], {"reason": "an old one", "dead_letters": 2, "last_hour": 0}],
        refused_items=BUSY_AND_FAULTY.refused_items,
    )
    lines = shown(Dashboard(now, now), 100, 50)
    text = "\n".join(lines)
    for once in ("status 401", "reason 0", "an old one", "a sample without a value"):
        assert text.count(once) == 1, once
    assert text.count("status 429") == 2  # of the account, and of 50 users
    assert "Dead letters: 5" in text
    assert "Refused items: 1,800" in lines[-1]
    assert "Paused" not in text


def test_a_title_without_rows_is_a_count_on_the_last_line() -> None:
    """Breaks if a title stands above nothing."""
    section = watch_view.Section
    full = section("Dead letters: 2", [("1", "a"), ("1", "b")], "headrace dead list")
    sections = [section("Backfills: 40 complete"), full, section("", []), section("Gaps: 3", [("ours",)])]
    for lines, titles in (
        (6, ["Dead letters: 2", "Gaps: 3", "Backfills: 40 complete"]),
        (5, ["Dead letters: 2 (all: headrace dead list)", "Gaps: 3", "Backfills: 40 complete"]),
        (4, ["Dead letters: 2", "Gaps: 3 · Backfills: 40 complete"]),
        (1, ["Dead letters: 2 · Gaps: 3 · Backfills: 40 complete"]),
        (0, []),
    ):
        found = list(watch_view._fitted(sections, lines))
        assert [str(one) for one in found if isinstance(one, Text)] == titles
        rows = sum(one.row_count for one in found if isinstance(one, Table))
        assert len(titles) + rows <= lines
    assert list(watch_view._fitted([section("")], 5)) == []
