"""`headrace status --watch`: fits the terminal, shows rates, and works while services are away."""

import contextlib
import http.server
import io
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
from sqlalchemy import Engine

from app.broker.celery import make_celery
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
    for part in ("set JUNCTION_API_KEY", "live", "12", "applied", "median 12 ms", "Backfills: 40 running"):
        assert part in text
    assert "Dead letters: 27" in text
    assert ("all: headrace dead list" in text) == (height < 50)


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
    return Watcher(engine, make_celery(settings, "publisher"), settings)


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
    page = Watcher(engine, make_celery(away, "publisher"), away).page()
    text = "\n".join(shown(page, 80, 24))
    assert text.startswith("not healthy")
    assert "BROKER_URL: the broker cannot be reached" in text
    assert "junction keeps retrying its oldest event for at least 1 d 3 h" in text
    assert "applied" in text
    gone = make_engine(replace(settings, database_url=f"postgresql+psycopg://u:p@127.0.0.1:{free_port()}/d"))
    both = Watcher(gone, make_celery(away, "publisher"), away).page()
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


@pytest.mark.parametrize(("stands_alone", "count"), [(True, 1), (False, 0)])
def test_a_section_without_rows(*, stands_alone: bool, count: int) -> None:
    found = list(watch_view._fitted([watch_view.Section("Whatever", stands_alone=stands_alone)], 5))
    assert len(found) == count
