"""An aggregator API for tests, with history and scripted responses."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any

import httpx
from sqlalchemy import Engine

from app.config.settings import Settings
from workers.aggregators import junction
from workers.backfill.fetcher import Fetcher
from workers.backfill.pending import CommitLimits
from workers.fetch.client import AggregatorClient
from workers.fetch.http import Client
from workers.fetch.rate_limits import Throttle

DAY = timedelta(days=1)
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
GARMIN = {"provider": "garmin", "type": "watch"}
Answer = Callable[[httpx.Request], httpx.Response]


class Killed(BaseException):
    """Raised in place of a SIGKILL."""


@dataclass
class Provider:
    """An API that records its requests and answers with `answer`."""

    answer: Answer
    limit: int = 5000
    name: str = "junction"
    requests: list[httpx.Request] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        with self.lock:
            self.requests.append(request)
            assert len(self.requests) <= self.limit, "too many requests"
        return self.answer(request)

    def all(self, name: str) -> list[str | None]:
        """The value of a query parameter in each request so far."""
        return [request.url.params.get(name) for request in self.requests]

    def fetcher(self, engine: Engine, settings: Settings, **limits: float) -> Fetcher:
        """A new worker that reads from this API."""
        client = mock_client(self, settings, self.name)
        return Fetcher(engine, settings, [client], CommitLimits(**limits))  # type: ignore[arg-type]


def mock_client(answer: Answer, settings: Settings, name: str = "junction") -> AggregatorClient:
    """A client that gets its responses from this function."""
    return AggregatorClient(name, Client("https://provider.test", {}, httpx.MockTransport(answer)), Throttle(settings))


@contextmanager
def junction_client(settings: Settings) -> Iterator[AggregatorClient]:
    """A client of the Junction API at the base URL of the settings."""
    base_url, headers = junction.connect(settings)
    with closing(Client(base_url, headers)) as client:
        yield AggregatorClient("junction", client, Throttle(settings))


def inside(request: httpx.Request, moments: Iterable[datetime]) -> list[datetime]:
    """The moments within the window of a request."""
    start, end = (datetime.fromisoformat(request.url.params[name]) for name in ("start_date", "end_date"))
    return [moment for moment in moments if start <= moment <= end]


def heartrates(moments: Iterable[datetime], size: int = 1000, value: float = 60) -> Answer:
    """An API with a sample at each of these moments, `size` per page."""
    moments = list(moments)

    def answer(request: httpx.Request) -> httpx.Response:
        found, begin = inside(request, moments), int(request.url.params.get("next_cursor") or 0)
        data = [{"timestamp": ts.isoformat(), "value": value, "unit": "bpm"} for ts in found[begin : begin + size]]
        next_cursor = str(begin + size) if begin + size < len(found) else None
        groups = {"garmin": [{"source": GARMIN, "data": data}]}
        return httpx.Response(200, json={"groups": groups, "next_cursor": next_cursor})

    return answer


def workouts(moments: Iterable[datetime], **changes: Any) -> Answer:
    """An API with a workout at each of these moments and a stream for each."""
    moments = list(moments)

    def answer(request: httpx.Request) -> httpx.Response:
        if found := re.fullmatch(r"/v2/timeseries/workouts/(.+)/stream", request.url.path):
            return httpx.Response(200, json={"time": [1, 2], "heartrate": [60, None], "of": found[1]})
        user = request.url.path.rpartition("/")[2]
        found_times = inside(request, moments)
        found_rows = [{"id": f"{user}-{at:%m%d%H}", "user_id": user, "source": GARMIN} | changes for at in found_times]
        return httpx.Response(200, json={"workouts": found_rows})

    return answer


def daily(count: int) -> list[datetime]:
    """Noon of each of `count` days from FIRST."""
    return [FIRST + number * DAY + DAY / 2 for number in range(count)]


def hourly(days: int) -> list[datetime]:
    """Every hour of `days` days from FIRST."""
    return [FIRST + number * DAY / 24 for number in range(24 * days)]


def gone_streams(status_code: int) -> Provider:
    """An API that returns this status for the stream of one of its ten workouts."""
    inner = workouts(daily(10))

    def answer(request: httpx.Request) -> httpx.Response:
        is_missing = request.url.path.endswith("u1-010512/stream")
        return httpx.Response(status_code) if is_missing else inner(request)

    return Provider(answer, limit=200)
