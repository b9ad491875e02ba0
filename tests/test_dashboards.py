"""Dashboard and alerts, without a server: every query can be read, and asks for what is declared."""

import json

from prometheus_client.metrics import MetricWrapperBase

from app.observability import metrics
from tests.support.cases import Failures
from tests.support.promql import ALERTS, DASHBOARD, queries, selectors
from workers.cli.main import COMMANDS

OF_PROMETHEUS = {"up": {"job", "instance"}}


def declared() -> dict[str, set[str]]:
    """Every series' name with its labels, as app.observability.metrics declares them."""
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


def test_a_query_asks_for_what_is_declared() -> None:
    """Breaks if a metric or a label was renamed, so that a panel is empty or an alert never fires."""
    failures = Failures()
    for query in queries():
        with failures.of(query):
            known = declared() | OF_PROMETHEUS
            for one in selectors(query.text):
                assert one.metric in known
                assert one.labels <= known[one.metric]
    assert failures == {}


def test_everything_declared_is_somewhere_to_be_seen() -> None:
    """Breaks if something is counted that nobody looks at."""
    asked = {one.metric for query in queries() for one in selectors(query.text)}
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in asked}
    missing = {name for name in declared() if name not in asked}
    assert {name for name in missing if name.rpartition("_")[0] not in families} == set()


def test_no_label_says_whose_data_it_is() -> None:
    """Breaks if a person's id becomes a label: readable by whoever may see a dashboard, and a series for each."""
    few = {
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
        "le",
    }
    assert set().union(*declared().values()) == few


def test_the_commands_that_alerts_name_exist() -> None:
    """Breaks if somebody is woken up and told to type what there is not."""
    words = [part.split()[0] for part in ALERTS.read_text().split("headrace ")[1:] if "do:" in ALERTS.read_text()]
    named = {word.strip(",;") for word in words if word.strip(",;") in COMMANDS}
    assert named >= {"check", "status", "dead", "reconcile", "backfill", "beat", "worker"}


def test_panels_do_not_lie_on_each_other() -> None:
    """Breaks if a panel hides another one, or two have one number."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert max(x for x, _ in places) < 24
