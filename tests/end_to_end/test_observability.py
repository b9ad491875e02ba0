"""Metrics and traces of a running stack, as a real Prometheus and a real collector get them.

Dashboard and alerts ask for what it shows; a delivery is followed from its request to what it set off.
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

from app.config.settings import load
from tests.bench.stack import running_up
from tests.support import HTTP, ROOT, event, signed, until, workout
from tests.support.collector import Collector, Seen, collector
from tests.support.promql import ALERTS, Query, queries, selectors
from workers.fetch.rate_limits import Throttle
from workers.local.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.stack]
KEY = {
    "JUNCTION_API_KEY": "sk_us_nobody",
    # An address at which nobody answers: what is asked is traced all the same.
    "JUNCTION_BASE_URL": "http://127.0.0.1:1",
    "HEADRACE_REQUEST_RATE": "1/minute",
    "HEADRACE_MAX_BODY_BYTES": "20000",
    "HEADRACE_WEB_PROCESSES": "1",
    "OTEL_BSP_SCHEDULE_DELAY": "3600000",
}
FOLLOWED = {"headrace.delivery": "msg_followed"}
FETCHED = "headrace.fetch backfill"
USER = "somebody-who-is-nobodys-business"
PERSON = "5b7ab2b4-0f6b-4b7e-9c6c-000000000001"


def show(stack: dict[str, Any]) -> str:
    """What its endpoint shows."""
    return HTTP.get(f"{stack['web']}/metrics").text


def disturb(stack: dict[str, Any]) -> None:
    """A little of everything that can happen to events."""
    secret = stack["junction_webhook_secret"]

    def post(body: Any, **how: Any) -> int:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = signed(raw, **({"secret": secret} | how))
        return HTTP.post(f"{stack['web']}/webhooks/junction", content=raw, headers=headers).status_code

    # Whose history is asked for before the rate and the account's silence keep everybody waiting.
    notice = event("historical.data.sleep.created", USER, {"user_id": USER, "provider": "oura", "is_final": True})
    assert post(notice, name="msg_followed") == 202
    until(lambda: 'headrace_requests_total{aggregator="junction",status="none"}' in show(stack), 90)
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
    settings = load({"BROKER_URL": stack["broker_url"]})
    Throttle(settings).pause("junction", 300, "status 401: the API key is refused")
    with psycopg.connect(stack["database_url"]) as connection:
        connection.execute(
            "INSERT INTO headrace.gaps (user_id, provider, resource, part, whose, reason, is_pulling)"
            " VALUES (%s, 'oura', 'sleep', 'pulls', 'ours', 'a test', false)",
            [PERSON],
        )


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    """Where the stack's spans go."""
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def life() -> Iterator[contextlib.ExitStack]:
    """What ends the stack."""
    with contextlib.ExitStack() as one:
        yield one


@pytest.fixture(scope="module")
def stack(life: contextlib.ExitStack, collected: Collector) -> dict[str, Any]:
    """A stack to which something of everything has happened, and which has been looked at since."""
    environment = KEY | {"OTEL_EXPORTER_OTLP_ENDPOINT": collected.url}
    found = life.enter_context(running_up("--workers", "1", environment=environment))
    disturb(found)
    wanted = ("headrace_gaps{", "headrace_dead_letters{", "headrace_account_paused", "headrace_throttled_total{")
    wanted += ('SUCCESS",task="headrace.sweep"}',)
    until(lambda: all(name in show(found) for name in wanted), 90)
    return found


def test_every_query_asks_for_what_a_stack_shows(stack: dict[str, Any]) -> None:
    """Breaks if a metric is declared and nobody counts it, workers and beat included; or with other labels."""
    shown: dict[str, set[str]] = {"up": {"job"}}
    for family in text_string_to_metric_families(show(stack)):
        for sample in family.samples:
            shown.setdefault(sample.name, set()).update(sample.labels)
    for query in queries():
        for one in selectors(query.text):
            assert one.metric in shown, query
            assert one.labels <= shown[one.metric], query


def test_nothing_shows_whose_it_was(stack: dict[str, Any]) -> None:
    """Breaks if an id, or a worker's name which changes with every start, gets into a label."""
    text = show(stack)
    assert PERSON not in text
    assert "msg_" not in text
    assert "@" not in text


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """A real one, with the alerts, that looks at the target every second."""
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
    """What it answers; None if it is not there yet."""
    try:
        answer = HTTP.get(f"{url}/api/v1/{path}", params=parameters)
    except httpx.ConnectError:
        return None
    return None if answer.status_code == 503 else answer.json()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus on this machine (Debian: prometheus)")
def test_a_real_prometheus_answers_every_query(stack: dict[str, Any], tmp_path: Path) -> None:
    """Breaks if a query is one that only our parser takes, or an alert is not loaded or cannot be evaluated."""
    rules = ["promtool", "check", "rules", str(ALERTS)]
    assert subprocess.run(rules, capture_output=True, check=False, timeout=60).returncode == 0
    with prometheus(tmp_path, stack["web"].removeprefix("http://")) as url:
        looks = "count_over_time(up[1m]) > 2"  # a rate needs two
        until(lambda: (ask(url, "query", query=looks) or {}).get("data", {}).get("result"), 60)
        for query in queries():
            answer = ask(url, "query", query=query.text)
            assert answer["status"] == "success", query
            for one in selectors(query.text):
                assert ask(url, "query", query=one.metric)["data"]["result"], (query, one)
        groups = ask(url, "rules")["data"]["groups"]
        found = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        alerts = {query.where for query in queries()} & found.keys()
        assert len(alerts) == len(found) > 10
        assert set(found.values()) == {"ok"}


def test_a_query_is_a_query() -> None:
    """Breaks if the test before would pass whatever stands in a file."""
    with pytest.raises(ValueError, match=r"."):
        selectors("sum(rate(headrace_answers_total[5m])")
    assert Query("a", "b").where == "a"


# Traces, which come with the end of the stack


def after(found: Collector, one: Seen) -> list[Seen]:
    """What links to a span."""
    return [other for other in found.spans if one.id in other.links]


def below(found: Collector, one: Seen) -> list[Seen]:
    """The parts of a span, theirs as well."""
    parts = [other for other in found.spans if other.parent == one.id]
    return parts + [deeper for part in parts for deeper in below(found, part)]


@pytest.fixture
def found(life: contextlib.ExitStack, stack: dict[str, Any], collected: Collector) -> Collector:
    """Everything that the stack has sent by its end. Nothing can be asked of it any more."""
    life.close()
    return collected


def test_a_delivery_is_followed_to_what_it_set_off(found: Collector) -> None:
    """Breaks if a process is not traced, does not send what it has when it ends, or the thread is lost between two."""
    requests = [one for one in found.named("POST /webhooks/junction") if FOLLOWED.items() <= one.attributes.items()]
    (request,) = requests
    assert (request.service, request.kind, request.parent) == ("headrace-web", "SERVER", "")
    assert request.attributes["http.response.status_code"] == 202
    (message,) = after(found, request)
    assert (message.service, message.name, message.kind) == ("headrace-web", "publish live", "PRODUCER")
    (applied,) = after(found, message)
    assert (applied.service, applied.name, applied.kind) == ("headrace-live", "headrace.apply live", "CONSUMER")
    assert {one.name for one in below(found, applied)} == {"open", "commit", "merge", "settle"}
    (opened,) = (one for one in below(found, applied) if one.name == "open")
    assert opened.attributes["headrace.delivery"] == "msg_followed"
    assert len({request.trace, message.trace, applied.trace}) == 3
    fetched = [one for one in after(found, applied) if one.name == FETCHED]
    assert [one.service for one in fetched] == ["headrace-backfill"]
    (asked,) = (one for one in below(found, fetched[0]) if one.name == "GET")
    assert (asked.attributes["error.type"], asked.is_error, asked.attributes["headrace.provider"]) == (
        "no_answer",
        True,
        "oura",
    )
    assert {one.service for one in found.spans} == {
        f"headrace-{name}" for name in ("web", "live", "backfill", "maintenance")
    }
    assert not any(USER.encode() in raw for raw in found.raw)
