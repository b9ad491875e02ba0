"""Dashboard and alerts, without a server: every query is valid and uses declared metrics and labels."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase
from ruamel.yaml import YAML

from app.observability import metrics
from tests.support.cases import Failures
from tests.support.promql import ALERTS, DASHBOARD, queries, selectors
from workers.cli.main import COMMANDS

OF_PROMETHEUS = {"up": {"job", "instance"}}


def declared() -> dict[str, set[str]]:
    """The labels of every series, by its name, as app.observability.metrics declares them."""
    found: dict[str, set[str]] = {}
    for one in vars(metrics).values():
        if isinstance(one, MetricWrapperBase):
            (family,) = one.describe()
            labels = set(one._labelnames)
            if family.type == "histogram":
                found |= {f"{family.name}{end}": labels for end in ("_sum", "_count")}
                found[f"{family.name}_bucket"] = labels | {"le"}
            else:
                found[family.name + ("_total" if family.type == "counter" else "")] = labels
    return found


def test_every_query_uses_declared_metrics() -> None:
    """Breaks if a metric or a label was renamed, so that a panel is empty or an alert never fires."""
    failures = Failures()
    for query in queries():
        with failures.of(query):
            known = declared() | OF_PROMETHEUS
            for one in selectors(query.text):
                assert one.metric in known
                assert one.labels <= known[one.metric]
    assert failures == {}


def test_every_declared_metric_is_used() -> None:
    """Breaks if a metric appears in neither the dashboard nor an alert."""
    queried = {one.metric for query in queries() for one in selectors(query.text)}
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in queried}
    missing = {name for name in declared() if name not in queried}
    assert {name for name in missing if name.rpartition("_")[0] not in families} == set()


def test_no_label_identifies_a_user() -> None:
    """Breaks if a user id becomes a label: visible to every reader of the dashboard, and one series per user."""
    allowed = {
        "aggregator",
        "status",
        "reason",
        "result",
        "task",
        "state",
        "outcome",
        "kind",
        "origin",
        "lane",
        "whose",
        "subscription",
        "consumer",
        "le",
    }
    assert set().union(*declared().values()) == allowed


def test_the_commands_that_alerts_name_exist() -> None:
    """Breaks if an alert names a command that does not exist."""
    words = [part.split()[0] for part in ALERTS.read_text().split("headrace ")[1:] if "do:" in ALERTS.read_text()]
    named = {word.strip(",;") for word in words if word.strip(",;") in COMMANDS}
    assert named >= {"check", "status", "dead", "reconcile", "backfill", "beat", "worker"}


def test_panels_do_not_overlap() -> None:
    """Breaks if a panel covers another one, or two have the same id."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert max(x for x, _ in cells) < 24


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize("origin", ["webhook", "backfill"])
def test_refused_items_fire_their_alert(tmp_path: Path, origin: str) -> None:
    """Breaks if nobody is told about refused items of webhooks or of history, or the alert never ends."""
    name = "HeadraceRefusedItems"
    rules = [rule for group in YAML(typ="safe").load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    (rule,) = (one for one in rules if one.get("alert") == name)
    notes = {key: value.replace("{{ $labels.origin }}", origin) for key, value in rule["annotations"].items()}
    fired = {"exp_labels": rule["labels"] | {"origin": origin}, "exp_annotations": notes}
    times = {"9m": [], "15m": [fired], "2h": []}
    series = {"series": f'headrace_refused_items_total{{origin="{origin}", job="headrace"}}', "values": "0x10 3x120"}
    alerts = [{"eval_time": at, "alertname": name, "exp_alerts": expected} for at, expected in times.items()]
    case = {"interval": "1m", "input_series": [series], "alert_rule_test": alerts}
    path = tmp_path / "test.yml"
    YAML(typ="safe").dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [case]}, path)
    done = subprocess.run(
        ["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
