"""The PromQL queries of the dashboard and the alerts, and the metrics and labels that they select."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import promql_parser
from ruamel.yaml import YAML

from tests.support import ROOT

DASHBOARD = ROOT / "deploy/grafana/dashboards/headrace.json"
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
PARTS = ("lhs", "rhs", "expr", "param", "vector_selector")


class Query(NamedTuple):
    """A query, and the panel or alert that contains it."""

    source: str
    text: str


class Selector(NamedTuple):
    """A metric that a query selects, and the labels that the query uses."""

    metric: str
    labels: frozenset[str]


def queries() -> list[Query]:
    """The queries of all panels and alerts, with Grafana's variables replaced."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [Query(panel["title"], one["expr"]) for panel in panels for one in panel.get("targets", ())]
    rules = [rule for group in YAML(typ="safe").load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    found += [Query(rule["alert"], rule["expr"]) for rule in rules]
    return [one._replace(text=one.text.replace("$__rate_interval", "1m")) for one in found]


def selectors(text: str) -> set[Selector]:
    """The selectors of a query. Labels of `by` and `on` apply to every metric within. Raises ValueError."""
    return set(_walk(promql_parser.parse(text), frozenset()))


def _walk(node: Any, labels: frozenset[str]) -> Iterator[Selector]:
    modifier = getattr(node, "modifier", None)
    if modifier is not None and getattr(modifier, "labels", None):
        labels |= frozenset(modifier.labels)
    if isinstance(node, promql_parser.VectorSelector):
        yield Selector(node.name, labels | {one.name for one in node.matchers.matchers})
    inner = [getattr(node, part, None) for part in PARTS] + list(getattr(node, "args", ()))
    for one in inner:
        if one is not None:
            yield from _walk(one, labels)
