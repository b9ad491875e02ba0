"""Tracing: no effect when off; linked spans from the request to the row, without contents, when on."""

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler, TraceIdRatioBased
from opentelemetry.trace import SpanKind
from sqlalchemy import Engine

from app.broker.lanes import APPLY
from app.config.settings import Settings, load
from app.delivery import Delivery
from app.errors import PublishFailed
from app.observability import logs, tracing
from app.web.app import create_app
from app.web.batcher import Batcher
from app.web.publishing import in_thread
from tests.support import ROOT, TERRA_SECRET, delivery, program, signed, until, workout
from tests.support.broker import BlockingPublisher, arguments, waiting
from tests.support.collector import attributes, collector, linked, named, span_ids
from workers.ingest.apply import Applier
from workers.local.ports import free_port

PROMISED = 5.0  # seconds: what a sender is promised
USER, TITLE = "u-whose-it-is", "a title that nobody may read"


class Endpoint:
    """The endpoint with a given publish function."""

    def __init__(self, settings: Settings, publish: Any) -> None:
        batcher = Batcher(settings, in_thread(publish))
        self._client = create_app(settings, batcher, lambda: None).test_client()

    def post(self, name: str, *, secret: str | None = None, **headers: str) -> int:
        """Sends a workout and returns the status."""
        body = msgspec.json.encode(workout(USER, name, title=TITLE))
        sent = signed(body, name=name, **({"secret": secret} if secret else {})) | headers
        return self._client.post("/webhooks/junction", data=body, headers=sent).status_code


def worked_on(engine: Engine, settings: Settings, message: Mapping[str, Any]) -> None:
    """Applies a message of the broker as a worker does."""
    headers = message["headers"]
    with tracing.consumer_span(APPLY, "live", headers["id"], headers):
        Applier(engine, settings).apply(arguments(dict(message))[0])


def test_a_request_its_message_and_its_row_are_linked(
    engine: Engine, settings: Settings, broker_url: str, exported: InMemorySpanExporter
) -> None:
    """Breaks if the spans of a delivery's request, message and task are not linked."""
    publisher = BlockingPublisher(settings)

    def slowly(some: Sequence[Delivery]) -> None:
        time.sleep(0.2)
        publisher.publish(some)

    endpoint = Endpoint(settings, slowly)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(endpoint.post, ("msg_1", "msg_2", "msg_3"))) == [202] * 3
    publisher.close()
    for message in (messages := waiting(broker_url)):
        worked_on(engine, settings, message)
    requests = {attributes(one)["headrace.delivery"]: one for one in named(exported, "POST /webhooks/junction")}
    assert requests.keys() == {"msg_1", "msg_2", "msg_3"}
    assert {one.kind for one in requests.values()} == {SpanKind.SERVER}
    assert {attributes(one)["http.response.status_code"] for one in requests.values()} == {202}
    sent = named(exported, "publish live")
    assert len(sent) == len(messages) < 3
    assert sorted(link for one in sent for link in linked(one)) == sorted(span_ids(one) for one in requests.values())
    taken = named(exported, "headrace.apply live")
    assert [(linked(one), one.kind) for one in taken] == [([span_ids(one)], SpanKind.CONSUMER) for one in sent]
    assert [attributes(one)["headrace.task_id"] for one in taken] == [one["headers"]["id"] for one in messages]
    for one in (*sent, *taken):
        assert (attributes(one)["messaging.system"], attributes(one)["messaging.destination.name"]) == ("redis", "live")
        assert one.parent is None
    counts = [len(linked(one)) for one in sent]
    for some in (sent, taken):
        assert [attributes(one)["messaging.batch.message_count"] for one in some] == counts
    assert sum(attributes(one)["headrace.applied"] for one in taken) == 3
    opened = named(exported, "open")
    assert {attributes(one)["headrace.delivery"] for one in opened} == requests.keys()
    for stage in ("open", "commit"):
        parents = {one.parent.span_id for one in named(exported, stage) if one.parent}
        assert parents == {span_ids(one)[1] for one in taken}
    for stage in ("merge", "settle"):
        assert {one.parent.span_id for one in named(exported, stage) if one.parent} == {
            span_ids(one)[1] for one in named(exported, "commit")
        }
    everything = "".join(one.to_json() for one in exported.get_finished_spans())
    assert not any(secret in everything for secret in (USER, TITLE, "8000.5", "whsec_", "member-1", str(ROOT)))


def test_a_rejected_request_is_a_span_without_an_id(plain_settings: Settings, exported: InMemorySpanExporter) -> None:
    """Breaks if an unverified sender controls a span's attributes, or a failed publish is not visible in traces."""

    def refuse(_: Sequence[Delivery]) -> None:
        raise PublishFailed("away")

    endpoint = Endpoint(plain_settings, refuse)
    assert endpoint.post("msg_1", secret="whsec_" + "b3RoZXItb3RoZXItb3RoZXItb3RoZXI=") == 401
    assert endpoint.post("msg_2") == 503
    stranger, ours = named(exported, "POST /webhooks/junction")
    assert (attributes(stranger)["http.response.status_code"], "headrace.delivery" in attributes(stranger)) == (
        401,
        False,
    )
    assert (attributes(ours)["http.response.status_code"], attributes(ours)["headrace.delivery"]) == (503, "msg_2")
    assert (stranger.status.is_ok, ours.status.is_ok) == (True, False)
    (sent,) = named(exported, "publish live")
    assert (attributes(sent)["error.type"], sent.status.is_ok, sent.events) == ("PublishFailed", False, ())


def test_a_senders_traceparent_is_not_looked_at(plain_settings: Settings, exported: InMemorySpanExporter) -> None:
    """Breaks if a sender controls the trace id or the sampling: no signature covers that header."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    assert Endpoint(plain_settings, list).post("msg_1", traceparent=f"00-{trace}-b7ad6b7169203331-01") == 202
    assert all(one.parent is None or one.name != "POST /webhooks/junction" for one in exported.get_finished_spans())
    assert trace not in "".join(one.to_json() for one in exported.get_finished_spans())


@pytest.mark.parametrize("given", [{}, {"traceparent": 7}, {"traceparent": "00-x"}, {"traceparent": None}])
def test_a_message_without_valid_trace_context_is_processed(
    given: dict[str, Any], exported: InMemorySpanExporter
) -> None:
    """Breaks if a message of an older version, or with an invalid header, cannot be consumed."""
    with tracing.consumer_span(APPLY, "live", "t-1", given):
        assert len(tracing.trace_id()) == 32
    (one,) = exported.get_finished_spans()
    assert one.links == ()


@pytest.mark.parametrize("sampler", [TraceIdRatioBased(0.5), ALWAYS_OFF])
def test_spans_of_a_sampled_request_are_sampled(sampler: Sampler, exported: InMemorySpanExporter) -> None:
    """Breaks if the spans of one delivery are sampled independently."""
    for _ in range(200):
        request = tracing.server_span("junction")
        assert request is not None
        with tracing.producer_span("live", [request]):
            headers = tracing.inject()
        with tracing.consumer_span(APPLY, "live", "t-1", headers), tracing.span("open"):
            pass
        request.end(202)
    counts = [len(named(exported, name)) for name in ("POST /webhooks/junction", "publish live", "open")]
    assert len(set(counts)) == 1
    assert 50 < counts[0] < 150 or (sampler is ALWAYS_OFF and not counts[0])


def test_an_error_is_exported_by_its_type_only(exported: InMemorySpanExporter) -> None:
    """Breaks if the text of an exception, which may quote a body, is exported."""
    with pytest.raises(ValueError, match=TITLE), tracing.span("merge"):
        raise ValueError(TITLE)
    (one,) = exported.get_finished_spans()
    assert (attributes(one)["error.type"], one.events, one.status.description) == ("ValueError", (), None)


def test_a_line_of_the_log_names_its_trace(exported: InMemorySpanExporter, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a log line lacks the id of its trace, or a line outside of a trace has one."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logs.configure(replace(Settings(), log_format="json"))
        with tracing.consumer_span(APPLY, "live", "t-1", {}):
            logging.getLogger("workers.ingest.apply").warning("within")
        logging.getLogger("workers.ingest.apply").warning("without")
    finally:
        root.handlers[:], root.level = before
    within, without = map(json.loads, capsys.readouterr().err.splitlines())
    (one,) = exported.get_finished_spans()
    assert within["trace_id"] == f"{span_ids(one)[0]:032x}"
    assert "trace_id" not in without


# Off, or not to be had


def test_tracing_is_off_by_default(plain_settings: Settings) -> None:
    """Breaks if spans are created without an endpoint."""
    tracing.start(plain_settings, "web", "redis")
    assert tracing.server_span("junction") is None
    assert tracing.inject() == {}
    assert tracing.trace_id() == ""
    assert tracing.span("open", delivery="m") is tracing.producer_span("live", [])
    assert load({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}).traces
    assert load({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}).traces  # not ours, and no reason not to start
    assert load({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}).traces


BLOCKED = """
import sys
sys.modules["opentelemetry"] = None
from app.web.app import from_environment
server = from_environment()
from app.observability import tracing
print(tracing.server_span("junction"))
"""


def test_without_the_package_a_warning_is_logged() -> None:
    """Breaks if an endpoint without the extra does not start, or does not log why there are no traces."""
    environment = {"BROKER_URL": "redis://127.0.0.1:1/0", "TERRA_SIGNING_SECRET": TERRA_SECRET}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    command = [sys.executable, "-c", BLOCKED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert "pip install 'headrace[tracing]'" in done.stderr


def test_the_token_of_a_collector_is_not_logged() -> None:
    """Breaks if a malformed header is logged, as the library does."""
    environment = {"BROKER_URL": "redis://127.0.0.1:1/0", "TERRA_SIGNING_SECRET": TERRA_SECRET}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    environment |= {"OTEL_EXPORTER_OTLP_HEADERS": "authorization Bearer sesame"}
    command = [sys.executable, "-c", "from app.web.app import from_environment; from_environment()"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert "OTEL_EXPORTER_OTLP_HEADERS: not usable" in done.stderr
    assert "sesame" not in done.stderr


def web(broker_url: str, endpoint: str, port: int, log: Path) -> Any:
    """An endpoint of two processes that sends its spans there."""
    return program(
        "workers.cli",
        "web",
        log=log,
        BROKER_URL=broker_url,
        JUNCTION_WEBHOOK_SECRET="whsec_" + "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0",
        HEADRACE_PORT=str(port),
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        OTEL_BSP_SCHEDULE_DELAY="500",  # milliseconds
    )


def send(port: int, number: int) -> int:
    """Sends an event, which must be answered within the promised time."""
    body = msgspec.json.encode(workout("u1"))
    headers = signed(body, name=f"msg_{number}")
    url = f"http://127.0.0.1:{port}/webhooks/junction"
    return httpx.post(url, content=body, headers=headers, timeout=PROMISED).status_code


def is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_an_unavailable_collector_delays_nothing(broker_url: str, tmp_path: Path, how: str) -> None:
    """Breaks if a collector that refuses or hangs slows down requests or the shutdown, or fills the log."""
    port, log = free_port(), tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = silent.getsockname()[1] if how == "silent" else free_port()
        with web(broker_url, f"http://127.0.0.1:{where}", port, log) as process:
            until(lambda: is_up(port))
            times = []
            for number in range(60):
                began = time.monotonic()
                assert send(port, number) == 202
                times.append(time.monotonic() - began)
            until(lambda: "export" in log.read_text().lower(), 10)  # which is tried every half second
            assert send(port, 60) == 202
            began = time.monotonic()
            process.terminate()
            assert process.wait(30) == 0
            assert time.monotonic() - began < 10
    assert sorted(times)[30] < 0.5
    said = [line for line in log.read_text().splitlines() if "export" in line.lower()]
    assert len(said) <= 2, said  # one a process
    assert "Traceback" not in log.read_text()


def test_spans_are_exported_before_the_process_stops(broker_url: str, tmp_path: Path) -> None:
    """Breaks if the spans of the last seconds are lost when a process stops."""
    port = free_port()
    with collector() as found, web(broker_url, found.url, port, tmp_path / "log") as process:
        until(lambda: is_up(port))
        assert [send(port, number) for number in range(20)] == [202] * 20
        process.terminate()
        assert process.wait(30) == 0
        requests = found.named("POST /webhooks/junction")
        assert {one.attributes["headrace.delivery"] for one in requests} == {f"msg_{n}" for n in range(20)}
        assert {one.service for one in found.spans} == {"headrace-web"}


def test_headers_reach_the_worker(settings: Settings, broker_url: str, exported: InMemorySpanExporter) -> None:
    """Breaks if the headers of a message, which Flower shows, contain more than the trace id."""
    publisher = BlockingPublisher(settings)
    with tracing.producer_span("live", []):
        wanted = tracing.inject()
        publisher.publish([delivery(workout("u1"))])
    publisher.close()
    (message,) = waiting(broker_url)
    assert {name: message["headers"][name] for name in ("traceparent",)} == dict(wanted)
    assert exported.get_finished_spans()
