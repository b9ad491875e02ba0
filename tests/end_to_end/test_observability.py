"""Metrics and traces of a running stack, as a real Prometheus and a real collector receive them.

The queries of the dashboard and the alerts match the exported metrics; the trace of a delivery continues from its
request to the backfill that it started.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from app.broker.lanes import LANES
from app.config.settings import load
from tests.bench.stack import running_up
from tests.support import HTTP, ROOT, event, signed, until, workout
from tests.support.collector import Collector, ReceivedSpan, collector
from tests.support.promql import ALERTS, Query, queries, selectors
from workers.fetch.rate_limits import Throttle
from workers.local.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.stack]
KEY = {
    "JUNCTION_API_KEY": "sk_us_tests",
    # No server listens here; failed requests are traced as well.
    "JUNCTION_BASE_URL": "http://127.0.0.1:1",
    "HEADRACE_REQUEST_RATE": "1/minute",
    "HEADRACE_MAX_BODY_BYTES": "20000",
    "HEADRACE_WEB_PROCESSES": "1",
    "OTEL_BSP_SCHEDULE_DELAY": "3600000",
}
FOLLOWED = {"headrace.delivery": "msg_followed"}
FETCHED = "headrace.fetch backfill"
USER = "user-that-no-span-may-name"
PERSON = "5b7ab2b4-0f6b-4b7e-9c6c-000000000001"


def metrics_text(stack: dict[str, Any]) -> str:
    """The metrics of all processes."""
    return HTTP.get(f"{stack['operations']}/metrics").text


def send_everything(stack: dict[str, Any]) -> None:
    """Sends events with every kind of outcome, so that every metric has a value."""
    secret = stack["junction_webhook_secret"]

    def post(body: Any, **how: Any) -> int:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = signed(raw, **({"secret": secret} | how))
        return HTTP.post(f"{stack['web']}/webhooks/junction", content=raw, headers=headers).status_code

    # This backfill runs before the rate limit and the pause of the account delay every request.
    notice = event("historical.data.sleep.created", USER, {"user_id": USER, "provider": "oura", "is_final": True})
    assert post(notice, name="msg_followed") == 202
    until(lambda: 'headrace_requests_total{aggregator="junction",status="none"}' in metrics_text(stack), 90)
    notices = [
        event(f"historical.data.{name}.created", PERSON, {"user_id": PERSON, "provider": "oura", "is_final": True})
        for name in ("sleep", "activity", "body")
    ]
    broken = event("provider.connection.error", PERSON, {"provider": "oura", "error_type": "expired"})
    good = [workout(PERSON), workout(PERSON, "w2"), broken, *notices, b"half"]
    answers = [post(body, name=f"msg_{n}") for n, body in enumerate(good)]
    assert answers == [202] * len(good)
    assert post(b"late", at=datetime.now(UTC) - timedelta(minutes=9)) == 401
    assert post(b"x" * 30_000) == 413
    assert post(b"x" * 50_000) == 413  # more than twice the limit: its signature is not checked
    settings = load(KEY | {"BROKER_URL": stack["broker_url"]})
    Throttle(settings).pause("junction", 300, "status 401: the API key is refused")
    with psycopg.connect(stack["database_url"]) as connection:
        connection.execute(
            "INSERT INTO headrace.gaps (user_id, provider, resource, part, whose, reason, is_pulling)"
            " VALUES (%s, 'oura', 'sleep', 'pulls', 'ours', 'a test', false)",
            [PERSON],
        )
        connection.execute(
            "INSERT INTO headrace.subscriptions"
            " (name, url, events, window_seconds, allow_private, secret, start_position, position)"
            " VALUES ('app', 'https://app.test/', '{}', 10, false, '', 0, 0)"
        )
        connection.execute("INSERT INTO headrace.consumers (name, position) VALUES ('app', 0)")


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    """The collector that receives the stack's spans."""
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def stack_lifetime() -> Iterator[contextlib.ExitStack]:
    """Stops the stack when it is closed."""
    with contextlib.ExitStack() as one:
        yield one


@pytest.fixture(scope="module")
def stack(stack_lifetime: contextlib.ExitStack, collected: Collector) -> dict[str, Any]:
    """A stack that processed `send_everything`, and whose sweep has sampled the gauges since."""
    environment = KEY | {"OTEL_EXPORTER_OTLP_ENDPOINT": collected.url}
    found = stack_lifetime.enter_context(running_up("--workers", "1", environment=environment))
    send_everything(found)
    wanted = ("headrace_gaps{", "headrace_dead_letters{", "headrace_account_paused", "headrace_throttled_total{")
    wanted += ("headrace_notifications_oldest_seconds{", "headrace_feed_consumer_lag{")
    wanted += ('SUCCESS",task="headrace.sweep"}',)
    until(lambda: all(name in metrics_text(found) for name in wanted), 90)
    return found


def test_every_query_matches_exported_metrics(stack: dict[str, Any]) -> None:
    """Breaks if a process, also a worker or beat, does not export a metric or a label that a query uses."""
    exported: dict[str, set[str]] = {"up": {"job"}}
    for family in text_string_to_metric_families(metrics_text(stack)):
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
    for query in queries():
        for one in selectors(query.text):
            assert one.metric in exported, query
            assert one.labels <= exported[one.metric], query


def test_no_metric_contains_an_id(stack: dict[str, Any]) -> None:
    """Breaks if a label contains a user id, a message id or the name of a worker, which changes with every start."""
    text = metrics_text(stack)
    assert PERSON not in text
    assert "msg_" not in text
    assert "@" not in text


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """The URL of a real Prometheus with the alerts that scrapes the target every second."""
    config = YAML(typ="safe").load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    YAML().dump(config, folder / "prometheus.yml")
    shutil.copy(ALERTS, folder / "alerts.yml")
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(url: str, path: str, **parameters: str) -> Any:
    """The response of Prometheus; None while it starts."""
    try:
        answer = HTTP.get(f"{url}/api/v1/{path}", params=parameters)
    except httpx.ConnectError:
        return None
    return None if answer.status_code == 503 else answer.json()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian: prometheus)")
def test_a_real_prometheus_answers_every_query(stack: dict[str, Any], tmp_path: Path) -> None:
    """Breaks if only our parser accepts a query, or an alert is not loaded or cannot be evaluated."""
    rules = ["promtool", "check", "rules", str(ALERTS)]
    assert subprocess.run(rules, capture_output=True, check=False, timeout=60).returncode == 0
    with prometheus(tmp_path, stack["operations"].removeprefix("http://")) as url:
        looks = "count_over_time(up[1m]) > 2"  # rate() needs two samples
        until(lambda: (ask(url, "query", query=looks) or {}).get("data", {}).get("result"), 60)
        for query in queries():
            answer = ask(url, "query", query=query.text)
            assert answer["status"] == "success", query
            for one in selectors(query.text):
                assert ask(url, "query", query=one.metric)["data"]["result"], (query, one)
        groups = ask(url, "rules")["data"]["groups"]
        found = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        alerts = {query.source for query in queries()} & found.keys()
        assert len(alerts) == len(found) > 10
        assert set(found.values()) == {"ok"}


def test_an_invalid_query_is_an_error() -> None:
    """Breaks if the parser accepts an invalid query, so that the tests above cannot fail."""
    with pytest.raises(ValueError, match=r"."):
        selectors("sum(rate(headrace_answers_total[5m])")
    assert Query("a", "b").source == "a"


# Traces: processes export their spans when the stack stops


def linked_to(found: Collector, one: ReceivedSpan) -> list[ReceivedSpan]:
    """The spans that link to a span."""
    return [other for other in found.spans if one.id in other.links]


def descendants(found: Collector, one: ReceivedSpan) -> list[ReceivedSpan]:
    """The child spans of a span, recursively."""
    parts = [other for other in found.spans if other.parent == one.id]
    return parts + [deeper for part in parts for deeper in descendants(found, part)]


@pytest.fixture
def found(stack_lifetime: contextlib.ExitStack, stack: dict[str, Any], collected: Collector) -> Collector:
    """Stops the stack; the collector then has all of its spans."""
    stack_lifetime.close()
    return collected


def test_a_trace_links_a_delivery_to_its_backfill(found: Collector) -> None:
    """Breaks if a process is not traced, does not export its spans when it stops, or loses the trace context."""
    requests = [one for one in found.named("POST /webhooks/junction") if FOLLOWED.items() <= one.attributes.items()]
    (request,) = requests
    assert (request.service, request.kind, request.parent) == ("headrace-web", "SERVER", "")
    assert request.attributes["http.response.status_code"] == 202
    (message,) = linked_to(found, request)
    assert (message.service, message.name, message.kind) == ("headrace-web", "publish live", "PRODUCER")
    (applied,) = linked_to(found, message)
    assert (applied.service, applied.name, applied.kind) == ("headrace-live", "headrace.apply live", "CONSUMER")
    assert {one.name for one in descendants(found, applied)} == {"open", "commit", "merge", "settle"}
    (opened,) = (one for one in descendants(found, applied) if one.name == "open")
    assert opened.attributes["headrace.delivery"] == "msg_followed"
    assert len({request.trace, message.trace, applied.trace}) == 3
    fetched = [one for one in linked_to(found, applied) if one.name == FETCHED]
    assert [one.service for one in fetched] == ["headrace-backfill"]
    (asked,) = (one for one in descendants(found, fetched[0]) if one.name == "GET")
    assert (asked.attributes["error.type"], asked.is_error, asked.attributes["headrace.provider"]) == (
        "no_answer",
        True,
        "oura",
    )
    services = {one.service.removeprefix("headrace-") for one in found.spans}
    # The other lanes have tasks only if there is work for them.
    assert {"web", "live", "backfill", "maintenance"} <= services <= {"web", *LANES}
    assert not any(USER.encode() in raw for raw in found.raw)
