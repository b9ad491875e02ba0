"""Events that wait at a URL: fetched in time, applied as if they had come by themselves, and never lost silently."""

import base64
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.errors import TryLater
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, rows
from tests.support.cases import Failures
from tests.support.collector import attributes, named
from tests.support.database import emptied
from workers.fetch.http import Files
from workers.ingest.apply import Applier
from workers.ingest.download import GRACE, Downloader
from workers.ingest.outcomes import Applied

URL = "https://payloads.s3.eu-west-2.amazonaws.com/5f0f/activity.json?X-Amz-Signature=0123456789abcdef"
USER = {"user_id": "terra-1", "provider": "PELOTON", "reference_id": "member-1"}
RIDE = {"summary_id": "ride-1", "start_time": "2026-03-14T06:30:00+00:00", "end_time": "2026-03-14T07:00:00+00:00"}
EVENT = {"type": "activity", "user": USER, "data": [{"metadata": RIDE | {"type": 1, "upload_type": 1}}]}
SEALER = Sealer([ENCRYPTION_KEY])
DELIVERIES = "SELECT message_id, event_type, outcome, error FROM health.deliveries"


def announcement(url: Any = URL, expires_in: float = 300, age: float = 0) -> Delivery:
    """A delivery of Terra's that only says where the event is."""
    body = msgspec.json.encode({"type": "s3_payload", "status": "success", "url": url, "expires_in": expires_in})
    found = seal("terra", Receipt("trace-1", 1_773_512_405_000, "reference-1"), body, SEALER)
    return replace(found, received_at=datetime.now(UTC).timestamp() - age)


@pytest.fixture
def download(engine: Engine, settings: Settings) -> Callable[..., Applied]:
    """Fetches and applies over a network that answers as it is told."""

    def run(answer: Callable[[httpx.Request], httpx.Response], announced: Delivery | None = None) -> Applied:
        client = httpx.Client(transport=httpx.MockTransport(answer))
        files = Files(settings.download_hosts, 10_000, resolve=lambda _: ["52.95.149.1"], client=client)
        downloader = Downloader(Applier(engine, settings), settings, files)
        return downloader.run(pack([announced or announcement()]))

    return run


def given(body: Any, status: int = 200) -> Callable[[httpx.Request], httpx.Response]:
    """A network on which everybody answers this."""
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return lambda _: httpx.Response(status, content=content)


def test_an_announcement_is_not_settled_but_handed_on(engine: Engine, settings: Settings) -> None:
    """Breaks if what is not here yet counts as applied, so that nobody misses it, or if its neighbours wait for it."""
    beside = seal("terra", Receipt("trace-2"), msgspec.json.encode(EVENT), SEALER)
    announced = announcement()
    applied = Applier(engine, settings).apply(pack([announced, beside]))
    assert applied.by_reference == (announced,)
    assert [row["message_id"] for row in rows(engine, DELIVERIES)] == ["trace-2"]


def test_what_is_fetched_is_the_delivery(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if its rows miss the announcement's id or moment, or if the URL with its signature is kept anywhere."""
    assert download(given(EVENT)).outcomes == {"applied": 1}
    assert rows(engine, DELIVERIES) == [
        {"message_id": "trace-1", "event_type": "activity", "outcome": "applied", "error": None}
    ]
    (ride,) = rows(engine, "SELECT id, user_id, provider, version FROM health.workouts")
    assert (ride["id"], ride["user_id"], ride["provider"]) == ("ride-1", "terra-1", "peloton")
    assert ride["version"] == datetime.fromtimestamp(1_773_512_405, UTC)
    (kept,) = rows(engine, "SELECT sealed, reference FROM headrace.archive")
    assert b"amazonaws" not in SEALER.open(bytes(kept["sealed"]), "terra:trace-1")


def test_it_is_fetched_twice_and_applied_once(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if a worker that died after the commit makes two of one event."""
    assert [download(given(EVENT)).outcomes for _ in range(2)] == [{"applied": 1}, {"duplicate": 1}]
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 1


def test_a_fault_is_tried_again_while_the_url_lives(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if one bad minute of the store loses an event that could be fetched in the next."""
    failures = Failures()
    for status in (500, 502, 503, 504, 429, 408):
        with failures.of(status), emptied(engine):
            with pytest.raises(TryLater):
                download(given(b"", status))
            with pytest.raises(TryLater):
                download(given(b"", status), announcement(age=300 + GRACE.total_seconds() - 5))
            assert rows(engine, DELIVERIES) == []
    assert failures == {}


def test_no_answer_is_tried_again(download: Callable[..., Applied]) -> None:
    """Breaks if a cut line is taken for a refusal."""

    def cut(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone")

    with pytest.raises(TryLater):
        download(cut)


def test_what_cannot_be_had_is_a_dead_letter(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if an event that is lost for good looks like one that came, or is asked for without an end."""
    failures = Failures()
    for answer, announced, reason in (
        (given(b"expired", 400), {}, "could not be fetched: status 400"),
        (given(b"", 403), {}, "could not be fetched: status 403"),
        (given(b"", 404), {}, "could not be fetched: status 404"),
        (given(b"", 302), {}, "could not be fetched: status 302"),
        (given(b"", 503), {"age": 1000}, "could not be fetched: status 503"),
        (given(bytes(10_001)), {}, "larger than HEADRACE_MAX_DOWNLOAD_BYTES"),
        (given(EVENT), {"url": "http://payloads.s3.amazonaws.com/a"}, "not https, or not of a host"),
        (given(EVENT), {"url": "https://metadata.internal/a"}, "not https, or not of a host"),
        (given({"type": "s3_payload", "url": URL}), {}, "another announcement"),
    ):
        with failures.of(answer, announced, reason), emptied(engine):
            assert download(answer, announcement(**announced)).outcomes == {"dead": 1}
            (entry,) = rows(engine, DELIVERIES)
            assert entry["outcome"] == "dead"
            assert reason in entry["error"]
            assert "amazonaws" not in entry["error"]
    assert failures == {}


def test_a_body_that_is_no_event_is_a_dead_letter_with_that_body(
    engine: Engine, download: Callable[..., Applied]
) -> None:
    """Breaks if what was fetched is thrown away because it could not be read."""
    assert download(given(b"{")).outcomes == {"dead": 1}
    (letter,) = rows(engine, "SELECT sealed FROM headrace.dead_letters")
    assert SEALER.open(bytes(letter["sealed"]), "terra:trace-1") == b"{"


def test_a_replay_needs_no_url(engine: Engine, settings: Settings, download: Callable[..., Applied]) -> None:
    """Breaks if a replay of what was kept asks for URLs that have long expired."""
    download(given(EVENT))
    (kept,) = rows(engine, "SELECT sealed, ordering_ms FROM headrace.archive")
    again = replace(announcement(), sealed=bytes(kept["sealed"]))
    assert Applier(engine, settings).replay([again]).outcomes == {"duplicate": 1}
    assert Applier(engine, settings).replay([announcement()]).by_reference == ()


@pytest.mark.parametrize("packed", ["", "nonsense", base64.b64encode(b"{}").decode(), pack([])])
def test_what_is_no_announcement_is_kept(engine: Engine, settings: Settings, packed: str) -> None:
    """Breaks if bytes that somebody has put in the lane end a worker, or are dropped."""
    files = Files((), 1)
    applied = Downloader(Applier(engine, settings), settings, files).run(packed)
    files.close()
    assert applied.outcomes == {"dead": 1}


def test_a_download_is_traced_without_its_url(download: Callable[..., Applied], exported: InMemorySpanExporter) -> None:
    """Breaks if a URL that opens somebody's data is in a trace, or nobody sees that it was refused."""
    assert download(given(b"<Code>ExpiredToken</Code>", 403)).outcomes == {"dead": 1}
    (asked,) = named(exported, "GET")
    assert attributes(asked)["http.response.status_code"] == 403
    assert attributes(asked)["headrace.delivery"] == "trace-1"
    assert not any(word in asked.to_json() for word in ("amazonaws", "Signature", "Expired"))
