"""Shared by all tests: secrets, events, deliveries, database queries, and processes."""

import base64
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
from sqlalchemy import Engine, text
from standardwebhooks.webhooks import Webhook

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.sealing import Sealer
from workers.aggregators.svix_ids import ALPHABET, KSUID_EPOCH
from workers.ingest.apply import Applier

JUNCTION_SECRET = "whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"
TERRA_SECRET = "terra-secret-for-tests"
ENCRYPTION_KEY = bytes(range(32))
SEALER = Sealer([ENCRYPTION_KEY])
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}  # in which Headrace can be started
# One client for all tests: creating one reads certificates, which costs 30 ms of CPU. It keeps no connection alive,
# because tests kill servers.
HTTP = httpx.Client(timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
START = datetime(2026, 3, 14, 6, 30, tzinfo=UTC)


def message_id(created_at: datetime, tail: int | None = None) -> str:
    """A Svix message id with this creation time."""
    elapsed = created_at - KSUID_EPOCH
    seconds, rest = divmod(elapsed, timedelta(seconds=1))
    tail = uuid.uuid4().int >> 8 if tail is None else tail
    number = (seconds << 128) | (rest // timedelta(milliseconds=4) << 120) | tail
    digits = ""
    for _ in range(27):
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    return "msg_" + digits


def workout(user_id: str, workout_id: str = "w1", **changes: Any) -> dict[str, Any]:
    """A `daily.data.workouts.created` event in Junction's current format."""
    data = {
        "id": workout_id,
        "user_id": user_id,
        "average_hr": 120,
        "distance": 8000.5,
        "calendar_date": "2026-03-14",
        "time_start": "2026-03-14T06:30:00+00:00",
        "time_end": "2026-03-14T07:15:00+00:00",
        "sport": {"id": 1, "name": "Running", "slug": "running"},
        "provider_id": "p1",
        "source": {"provider": "garmin", "type": "watch"},
        "created_at": "2026-03-14T06:30:00+00:00",
        "updated_at": "2026-03-14T06:30:00+00:00",
    }
    return event("daily.data.workouts.created", user_id, data | changes)


def heartrate(user_id: str, values: Mapping[int, float], **source: Any) -> dict[str, Any]:
    """A `daily.data.heartrate.created` event; `values` maps minutes after START to heart rates."""
    samples = [
        {"timestamp": (START + timedelta(minutes=minute)).isoformat(), "value": value, "unit": "bpm"}
        for minute, value in values.items()
    ]
    data = {"source": {"provider": "garmin", "type": "watch"} | source, "data": samples}
    return event("daily.data.heartrate.created", user_id, data)


def event(event_type: str, user_id: str, data: Any, client_user_id: str = "member-1") -> dict[str, Any]:
    """An event: Junction's current envelope around `data`."""
    return {"event_type": event_type, "user_id": user_id, "client_user_id": client_user_id, "data": data}


def delivery(
    body: dict[str, Any] | bytes, created_at: datetime = START, *, aggregator: str = "junction", name: str | None = None
) -> Delivery:
    """A delivery, sealed as by the endpoint."""
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return seal(aggregator, Receipt(name or message_id(created_at)), raw, SEALER)


def apply(engine: Engine, settings: Settings, *deliveries: Delivery) -> dict[str, int]:
    """Applies one message of these deliveries with a new worker. Returns the number of deliveries per outcome."""
    return dict(Applier(engine, settings).apply(pack(deliveries)).outcomes)


def until(condition: Callable[[], Any], seconds: float = 60, *, every: float = 0.05) -> Any:
    """Waits until the condition is true and returns its value. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(every)
    return found


def status(url: str, **how: Any) -> int:
    """The status of a GET; 0 without a response."""
    try:
        return HTTP.get(url, **how).status_code
    except httpx.TransportError:
        return 0


def rows(engine: Engine, query: str, **parameters: Any) -> list[dict[str, Any]]:
    """The result rows of a query."""
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(query), parameters).mappings()]


def signed(
    body: bytes, *, name: str = "msg_1", at: datetime | None = None, secret: str = JUNCTION_SECRET
) -> dict[str, str]:
    """The Svix headers that sign a body."""
    at = at or datetime.now(UTC)
    signature = Webhook(secret).sign(name, at, body.decode())
    return {"svix-id": name, "svix-timestamp": str(int(at.timestamp())), "svix-signature": signature}


@contextmanager
def program(*arguments: str, log: Path = Path(os.devnull), **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs `python -m` until the block ends, with only these environment variables. `log` gets its output."""
    command = (sys.executable, "-m", *arguments)
    with (
        log.open("ab") as out,
        subprocess.Popen(command, env=ENVIRONMENT | variables, stdout=out, stderr=out) as process,
    ):
        try:
            yield process
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Sends SIGTERM, and SIGKILL after 30 s."""
    process.terminate()
    try:
        process.wait(30)
    finally:
        process.kill()


def of_worker(settings: Settings) -> dict[str, str]:
    """The environment variables of a worker."""
    return {
        "BROKER_URL": settings.need_broker(),
        "DATABASE_URL": settings.need_database(),
        "HEADRACE_ENCRYPTION_KEY": base64.b64encode(ENCRYPTION_KEY).decode(),
        "HEADRACE_VISIBILITY_TIMEOUT_SECONDS": "2",
    }


@contextmanager
def worker(
    settings: Settings, log: Path, lane: str = "live", *, module: str = "workers.cli", **more: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a worker of the lane until the block ends, with `more` environment variables."""
    with program(module, "worker", "--lane", lane, log=log, **of_worker(settings) | more) as process:
        yield process
