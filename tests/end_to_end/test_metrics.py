"""Metrics of a running stack: dashboard and alerts ask for what it shows, and a real Prometheus answers them."""

import contextlib
import shutil
import subprocess
import time
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
from tests.support import ROOT, event, signed, until, workout
from tests.support.promql import ALERTS, Query, queries, selectors
from workers.fetch.rate_limits import Throttle
from workers.local.ports import free_port

pytestmark = [pytest.mark.services, pytest.mark.stack]
KEY = {"JUNCTION_API_KEY": "sk_us_nobody", "HEADRACE_REQUEST_RATE": "1/minute", "HEADRACE_MAX_BODY_BYTES": "20000"}
PERSON = "5b7ab2b4-0f6b-4b7e-9c6c-000000000001"


def show(stack: dict[str, Any]) -> str:
    """What its endpoint shows."""
    return httpx.get(f"{stack['web']}/metrics", timeout=20).text


def disturb(stack: dict[str, Any]) -> None:
    """A little of everything that can happen to events."""
    secret = stack["junction_webhook_secret"]

    def post(body: Any, **how: Any) -> int:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = signed(raw, **({"secret": secret} | how))
        return httpx.post(f"{stack['web']}/webhooks/junction", content=raw, headers=headers, timeout=20).status_code

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
    until(lambda: "headrace_requests_total{" in show(stack), 90)  # before the account is silent
    settings = load({"BROKER_URL": stack["broker_url"]})
    Throttle(settings).pause("junction", 300, "status 401: the API key is refused")
    with psycopg.connect(stack["database_url"]) as connection:
        connection.execute(
            "INSERT INTO headrace.gaps (user_id, provider, resource, part, whose, reason, is_pulling)"
            " VALUES (%s, 'oura', 'sleep', 'pulls', 'ours', 'a test', false)",
            [PERSON],
        )


@pytest.fixture(scope="module")
def stack() -> Iterator[dict[str, Any]]:
    """A stack to which something of everything has happened, and which has been looked at since."""
    with running_up("--workers", "1", environment=KEY) as found:
        disturb(found)
        wanted = ("headrace_gaps{", "headrace_dead_letters{", "headrace_account_paused", "headrace_throttled_total{")
        until(lambda: all(name in show(found) for name in wanted), 90)
        yield found


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
        return httpx.get(f"{url}/api/v1/{path}", params=parameters, timeout=20).json()
    except httpx.ConnectError:
        return None


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus on this machine (Debian: prometheus)")
def test_a_real_prometheus_answers_every_query(stack: dict[str, Any], tmp_path: Path) -> None:
    """Breaks if a query is one that only our parser takes, or an alert is not loaded or cannot be evaluated."""
    rules = ["promtool", "check", "rules", str(ALERTS)]
    assert subprocess.run(rules, capture_output=True, check=False, timeout=60).returncode == 0
    with prometheus(tmp_path, stack["web"].removeprefix("http://")) as url:
        until(lambda: (ask(url, "query", query="up") or {}).get("data", {}).get("result"), 60)
        time.sleep(5)  # a rate needs two looks
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
