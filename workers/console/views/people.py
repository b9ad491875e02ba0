"""People: search, one person, their values, and the origin of a stored value."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Any

from flask import Blueprint, abort, render_template
from sqlalchemy import Row

from app.catalogue import catalogue
from workers.console import formats, guards, ledger, people
from workers.console.context import console, record_look
from workers.operate.explain import SAYS, Question, explain
from workers.store import backfill_admin
from workers.store.engine import transaction

pages = Blueprint("people", __name__)
MAX_VALUES = 2000  # on a page


@pages.get("/people")
def search() -> str:
    name = formats.text("name")
    with transaction(console().reader) as connection:
        found = people.search(connection, name, formats.text("after"))
    rows = found[: formats.PAGE_ROWS]
    users = [row.user_id for row in rows]
    record_look("people", users)
    return render_template("people.html", name=name, rows=rows, after=users[-1] if len(found) > len(rows) else "")


@pages.get("/person")
def page() -> str:
    """The page of a person. With the role privacy, the map shows the values of health.daily on hover."""
    first, last = people.bounds(formats.day("until", formats.text("until")))
    shows_values = guards.may("privacy")
    with transaction(console().reader) as connection:
        one = people.person(connection, formats.text("user"))
        about = people.names(connection, one)
        gaps = people.gaps(connection, one.user_id)
        known = people.days_of(connection, one.user_id, gaps, first, last)
        values = people.values(connection, one, first, last) if shows_values else []
        delivered = ledger.newest_of(connection, (one.user_id, *about["former"]), 10)
        connected = people.connections(connection, one.user_id)
    record_look("person", [one.user_id], values=shows_values)
    return render_template(
        "person.html",
        one=one,
        **about,
        connections=connected,
        gaps=gaps,
        rows=list(_strips(known, values, first)),
        first=first,
        last=last,
        earlier=first - timedelta(days=1),
        later=last + timedelta(days=people.DAYS),
        deliveries=delivered,
        backfills=backfill_admin.listed(console().reader, backfill_admin.Filter(user_ids=(one.user_id,)), 20),
        resources=catalogue(),
    )


def _strips(known: list[people.ResourceDays], values: Sequence[Row[Any]], first: date) -> Iterator[dict[str, Any]]:
    """The rows of the map, each with a square per day, and values in the text of the squares."""
    by_day: defaultdict[tuple[str, date], list[str]] = defaultdict(list)
    for one in values:
        by_day[_resource_of(one.metric), one.local_date].append(f"{one.metric} {one.value:.6g} {one.unit}")
    for row in known:
        days = [(first + timedelta(days=number), *one) for number, one in enumerate(row.days)]
        cells = [(state, "; ".join([f"{day}: {about}", *by_day[row.resource, day]])) for day, state, about in days]
        counts = {state: sum(one[0] == state for one in cells) for state in ("stored", "fetching", "gap", "empty")}
        label = f"{row.resource}: " + ", ".join(f"{count} days {state}" for state, count in counts.items())
        yield {"resource": row.resource, "counts": counts, "cells": cells, "label": label}


def _resource_of(metric: str) -> str:
    """The resource of a metric of health.daily: the longest name with which the metric begins."""
    if metric in catalogue():
        return metric
    names = [name for name in catalogue() if metric.startswith(f"{name}_")]
    return max(names, key=len, default="sleep" if metric == "nap_total" else "")


@pages.get("/values")
def values() -> str:
    """The values of a person's days as a table, for the role privacy."""
    guards.require("privacy")
    first, last = people.bounds(formats.day("until", formats.text("until")))
    with transaction(console().reader) as connection:
        one = people.person(connection, formats.text("user"))
        found = people.values(connection, one, first, last)
    record_look("values", [one.user_id], first=first, last=last)
    earlier = first - timedelta(days=1)
    shown, is_cut = found[:MAX_VALUES], len(found) > MAX_VALUES
    return render_template("values.html", one=one, rows=shown, is_cut=is_cut, first=first, last=last, earlier=earlier)


@pages.get("/explain")
def origin() -> str:
    """Where a stored value came from, as `headrace explain`; its content only with the role privacy."""
    if formats.text("resource") not in catalogue():
        abort(400, "The resource is unknown.")
    with transaction(console().reader) as connection:
        one = people.person(connection, formats.text("user"))
        if not people.is_explained(connection, one.user_id):
            abort(409, f"This person has too many deliveries for a page: headrace explain --user {one.user_id}")
    resource = catalogue()[formats.text("resource")]
    at = formats.instant("at", formats.text("at"))
    if not (formats.text("id") if not resource.is_series else at):
        abort(400, "State the time of a sample, or the id of a record.")
    asked = Question(one.user_id, resource, formats.text("id") or None, at)
    shows_values = guards.may("privacy")
    found = explain(console().writer, console().settings, asked, lambda _done, _total: None, values=shows_values)
    return render_template("explain.html", asked=asked, found=found, says=SAYS, shows_values=shows_values)
