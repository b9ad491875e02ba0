"""Downloads of announced events: retried in time, applied like other deliveries, never lost silently."""

import base64
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import redis
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY
from sqlalchemy import Connection, Engine

from app.broker.celery import make_celery
from app.broker.lanes import DOWNLOAD
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.errors import RetryAlone, TryLater
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, heartrate, rows
from tests.support.broker import arguments, waiting
from tests.support.cases import Failures
from tests.support.collector import attributes, named
from tests.support.database import emptied
from tests.support.deliveries import bodies
from workers.aggregators.registry import AGGREGATORS
from workers.celery.context import WorkerContext
from workers.fetch.http import Files
from workers.ingest import commit
from workers.ingest.apply import Applier
from workers.ingest.download import GRACE, Downloader
from workers.ingest.outcomes import MAX_LIVE_BYTES, Applied
from workers.store import dead_letters
from workers.store.users import Claim

URL = "https://payloads.s3.eu-west-2.amazonaws.com/5f0f/activity.json?X-Amz-Signature=0123456789abcdef"
USER = {"user_id": "terra-1", "provider": "PELOTON", "reference_id": "member-1"}
RIDE = {"summary_id": "ride-1", "start_time": "2026-03-14T06:30:00+00:00", "end_time": "2026-03-14T07:00:00+00:00"}
EVENT = {"type": "activity", "user": USER, "data": [{"metadata": RIDE | {"type": 1, "upload_type": 1}}]}
SEALER = Sealer([ENCRYPTION_KEY])
DELIVERIES = "SELECT message_id, event_type, outcome, error FROM health.deliveries"


def announcement(url: Any = URL, expires_in: float = 300, age: float = 0) -> Delivery:
    """A delivery of Terra's that contains only a URL."""
    body = msgspec.json.encode({"type": "s3_payload", "status": "success", "url": url, "expires_in": expires_in})
    receipt = Receipt("trace-1", 1_773_512_405_000, "reference-1")
    return seal("terra", receipt, body, SEALER, received_at=datetime.now(UTC).timestamp() - age)


@pytest.fixture
def download(engine: Engine, settings: Settings) -> Callable[..., Applied]:
    """Downloads and applies over a network that returns the given response."""

    def run(answer: Callable[[httpx.Request], httpx.Response], announced: Delivery | None = None) -> Applied:
        client = httpx.Client(transport=httpx.MockTransport(answer))
        files = Files(settings.download_hosts, 10_000, resolve=lambda _: ["52.95.149.1"], client=client)
        downloader = Downloader(Applier(engine, settings), settings, files)
        return downloader.run(pack([announced or announcement()]))

    return run


def given(body: Any, status: int = 200) -> Callable[[httpx.Request], httpx.Response]:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return lambda _: httpx.Response(status, content=content)


def test_an_announcement_has_no_outcome_yet(engine: Engine, settings: Settings) -> None:
    """Breaks if an event that is not downloaded yet counts as applied, or delays its neighbours."""
    beside = seal("terra", Receipt("trace-2"), msgspec.json.encode(EVENT), SEALER)
    announced = announcement()
    applied = Applier(engine, settings).apply(pack([announced, beside]))
    assert applied.for_download == (announced,)
    assert [row["message_id"] for row in rows(engine, DELIVERIES)] == ["trace-2"]


def test_the_downloaded_event_is_the_delivery(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if the rows miss the announcement's id or time, or the signed URL is stored anywhere."""
    assert download(given(EVENT)).outcomes == {"applied": 1}
    assert rows(engine, DELIVERIES) == [
        {"message_id": "trace-1", "event_type": "activity", "outcome": "applied", "error": None}
    ]
    (ride,) = rows(engine, "SELECT id, user_id, provider, version FROM health.workouts")
    assert (ride["id"], ride["user_id"], ride["provider"]) == ("ride-1", "terra-1", "peloton")
    assert ride["version"] == datetime.fromtimestamp(1_773_512_405, UTC)
    (body,) = bodies(engine, "archive")
    assert b"amazonaws" not in body


def test_a_repeated_download_is_applied_once(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if a worker that crashed after the commit duplicates the event."""
    assert [download(given(EVENT)).outcomes for _ in range(2)] == [{"applied": 1}, {"duplicate": 1}]
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 1


def test_a_failed_download_is_retried_until_the_url_expires(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if a transient error of the store loses an event that a retry could download."""
    failures = Failures()
    for status in (500, 502, 503, 504, 429, 408):
        with failures.of(status), emptied(engine):
            with pytest.raises(TryLater):
                download(given(b"", status))
            with pytest.raises(TryLater):
                download(given(b"", status), announcement(age=300 + GRACE.total_seconds() - 5))
            assert rows(engine, DELIVERIES) == []
    assert failures == {}


def test_a_connection_error_is_retried(download: Callable[..., Applied]) -> None:
    """Breaks if a connection error counts as a rejection."""

    def cut(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone")

    with pytest.raises(TryLater):
        download(cut)


def test_a_lost_event_becomes_a_dead_letter(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if a lost event counts as received, or is requested for ever."""
    failures = Failures()
    for answer, announced, reason in (
        (given(b"expired", 400), {}, "could not be downloaded: HTTP 400"),
        (given(b"", 403), {}, "could not be downloaded: HTTP 403"),
        (given(b"", 404), {}, "could not be downloaded: HTTP 404"),
        (given(b"", 302), {}, "could not be downloaded: HTTP 302"),
        (given(b"", 503), {"age": 1000}, "could not be downloaded: HTTP 503"),
        (given(bytes(10_001)), {}, "larger than HEADRACE_MAX_DOWNLOAD_BYTES"),
        (given(EVENT), {"url": "http://payloads.s3.amazonaws.com/a"}, "not https on port 443, or not of a host"),
        (given(EVENT), {"url": "https://metadata.internal/a"}, "not https on port 443, or not of a host"),
        (given({"type": "s3_payload", "url": URL}), {}, "only another URL"),
    ):
        with failures.of(answer, announced, reason), emptied(engine):
            assert download(answer, announcement(**announced)).outcomes == {"dead": 1}
            (entry,) = rows(engine, DELIVERIES)
            assert (entry["outcome"], entry["event_type"]) == ("dead", "s3_payload")
            assert reason in entry["error"]
            assert "amazonaws" not in entry["error"]
    assert failures == {}


def test_a_lost_event_names_its_type_and_person(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if an operator cannot see whose event could not be downloaded, although the announcement says it."""
    body = {"type": "s3_payload", "user": USER, "url": URL, "expires_in": 300}
    announced = announcement().with_body(msgspec.json.encode(body), SEALER)
    download(given(b"", 403), announced)
    (entry,) = dead_letters.listed(engine)
    assert (entry.event_type, entry.user_id) == ("s3_payload", "terra-1")


def test_a_dead_letter_of_a_damaged_user_row_keeps_its_reason(
    engine: Engine, download: Callable[..., Applied], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a lost event is retried for ever because the row of its person is locked or damaged."""
    upsert = commit.upsert_users

    def fail(connection: Connection, claims: Mapping[Claim, Any]) -> Any:
        if claims:
            raise RetryAlone("lock", "lock_timeout")
        return upsert(connection, claims)

    monkeypatch.setattr(commit, "upsert_users", fail)
    body = {"type": "s3_payload", "user": USER, "url": URL, "expires_in": 300}
    download(given(b"", 403), announcement().with_body(msgspec.json.encode(body), SEALER))
    (entry,) = dead_letters.listed(engine)
    assert (entry.user_id, entry.reason) == (None, "the announced event could not be downloaded: HTTP 403")


def test_a_replayed_announcement_names_its_type(engine: Engine, settings: Settings) -> None:
    """Breaks if a dead letter has no event type because its URL has expired."""
    assert Applier(engine, settings).replay([announcement()]).outcomes == {"dead": 1}
    assert [entry.event_type for entry in dead_letters.listed(engine)] == ["s3_payload"]


def test_an_invalid_download_becomes_a_dead_letter_with_its_body(
    engine: Engine, download: Callable[..., Applied]
) -> None:
    """Breaks if a downloaded body is lost because it could not be parsed."""
    assert download(given(b"{")).outcomes == {"dead": 1}
    assert bodies(engine, "dead_letters") == [b"{"]


def test_a_replay_needs_no_url(engine: Engine, settings: Settings, download: Callable[..., Applied]) -> None:
    """Breaks if a replay of archived deliveries requests expired URLs."""
    download(given(EVENT))
    again = announcement().with_body(bodies(engine, "archive")[0], SEALER)
    assert Applier(engine, settings).replay([again]).outcomes == {"duplicate": 1}
    assert Applier(engine, settings).replay([announcement()]).for_download == ()


@pytest.mark.parametrize("packed", ["", "nonsense", base64.b64encode(b"{}").decode(), pack([])])
def test_a_foreign_message_becomes_a_dead_letter(engine: Engine, settings: Settings, packed: str) -> None:
    """Breaks if foreign bytes in the queue crash a worker, or are lost."""
    assert Downloader(Applier(engine, settings), settings, Files((), 1)).run(packed).outcomes == {"dead": 1}


def test_a_download_is_traced_without_its_url(download: Callable[..., Applied], exported: InMemorySpanExporter) -> None:
    """Breaks if a trace contains the signed URL, or does not show the rejection."""
    assert download(given(b"<Code>ExpiredToken</Code>", 403)).outcomes == {"dead": 1}
    (asked,) = named(exported, "GET")
    assert attributes(asked)["http.response.status_code"] == 403
    assert attributes(asked)["headrace.delivery"] == "trace-1"
    assert not any(word in asked.to_json() for word in ("amazonaws", "Signature", "Expired"))


# Large deliveries


def large(noise: str) -> Delivery:
    """A delivery whose body is larger than the live lane applies."""
    one = EVENT["data"][0] | {"noise": noise}  # type: ignore[index]
    return seal(
        "terra", Receipt("trace-large", 1_773_512_405_000), msgspec.json.encode(EVENT | {"data": [one]}), SEALER
    )


@pytest.mark.parametrize("noise", [os.urandom(MAX_LIVE_BYTES).hex(), "x" * MAX_LIVE_BYTES], ids=["random", "repeated"])
@pytest.mark.parametrize("redelivered", [False, True])
def test_a_large_delivery_is_passed_on_unparsed(
    engine: Engine,
    settings: Settings,
    broker: "redis.Redis",
    monkeypatch: pytest.MonkeyPatch,
    noise: str,
    *,
    redelivered: bool,
) -> None:
    """Breaks if the live lane waits for an event of 60 MB, which may be 0.3 MB sealed, or if that event is lost."""
    one, beside = large(noise), seal("terra", Receipt("trace-2", 1_773_512_405_000), msgspec.json.encode(EVENT), SEALER)
    opened: list[str] = []
    parse = AGGREGATORS["terra"].parse

    def note(given: Delivery, *rest: Any) -> Any:
        opened.append(given.message_id)
        return parse(given, *rest)

    monkeypatch.setitem(AGGREGATORS, "terra", SimpleNamespace(parse=note))  # type: ignore[arg-type]
    celery = make_celery(settings, "publisher")
    context = WorkerContext(celery, settings)
    context.apply(pack([one, beside]), redelivered=redelivered)
    assert opened == ["trace-2"]
    assert [row["message_id"] for row in rows(engine, DELIVERIES)] == ["trace-2"]
    (message,) = waiting(settings.need_broker(), "download")
    assert (message["headers"]["task"], message["headers"]["argsrepr"]) == (DOWNLOAD, "(1 deliveries)")
    context.downloader.run(*arguments(message))
    outcomes = {row["message_id"]: row["outcome"] for row in rows(engine, DELIVERIES)}
    assert outcomes == {"trace-2": "applied", "trace-large": "applied"}
    context.engine.dispose()
    celery.close()


def test_a_large_delivery_may_contain_only_a_url(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if the size of an announcement makes it a dead letter."""
    noise = os.urandom(MAX_LIVE_BYTES).hex()
    body = msgspec.json.encode({"type": "s3_payload", "url": URL, "expires_in": 300, "noise": noise})
    announced = seal("terra", Receipt("trace-1", 1_773_512_405_000), body, SEALER)
    assert download(given(EVENT), announced).outcomes == {"applied": 1}


def test_a_delivery_of_the_lane_may_be_small(engine: Engine, download: Callable[..., Applied]) -> None:
    """Breaks if events are lost that an older worker has passed on, or that came into the lane by mistake."""
    small = seal("terra", Receipt("trace-1", 1_773_512_405_000), msgspec.json.encode(EVENT), SEALER)
    assert download(given(b"", 503), small).outcomes == {"applied": 1}
    unknown = seal("nobody", Receipt("trace-2"), b"{}", SEALER)
    assert download(given(b"", 503), unknown).outcomes == {"dead": 1}
    assert [row["error"] for row in rows(engine, DELIVERIES) if row["error"]] == ["unknown aggregator"]


def test_duplicate_samples_of_a_delivery_are_counted_once(download: Callable[..., Applied]) -> None:
    """Breaks if a small delivery of this lane, or a repeated one without a time, counts each time it is parsed."""
    body = heartrate("u1", {0: 70})
    body["data"]["data"] += heartrate("u1", {0: 71})["data"]["data"]
    small = seal("junction", Receipt("msg-1"), msgspec.json.encode(body), SEALER)
    before = REGISTRY.get_sample_value("headrace_duplicate_samples_total") or 0
    assert download(given(b"", 503), small).outcomes == {"applied": 1}
    assert (REGISTRY.get_sample_value("headrace_duplicate_samples_total") or 0) - before == 1
