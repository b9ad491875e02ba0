"""Actions on one person: reconcile, refresh, erase."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from flask import url_for
from sqlalchemy import Engine

from app.config.settings import Settings
from app.errors import Misconfigured, TryLater, Unprocessable
from workers.console.plans import Asked, known_user
from workers.console.sessions import Plan
from workers.operate.erase import Eraser
from workers.reconcile.comparisons import make_comparisons
from workers.reconcile.reconciler import AGGREGATOR
from workers.reconcile.refresh import refresh_user
from workers.reconcile.runs import Comparison, next_step
from workers.store import audit, jobs
from workers.store.backfill_admin import aggregator_of
from workers.store.engine import transaction
from workers.store.gaps import Gap

MAX_PAUSE_SECONDS, MAX_SECONDS = 5.0, 30.0  # of a comparison; `headrace reconcile` waits for longer
EARLIEST_COMPARED = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass
class Compared:
    gaps: list[Gap] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"gaps": 0, "opened": 0})
    notes: list[str] = field(default_factory=list)


def reconcile(asked: Asked) -> Plan:
    """Compares the person's data with the aggregator's, first without fetching anything."""
    engine, settings, user_id = asked.console.writer, asked.console.settings, known_user(asked)
    if not settings.fetch_history:
        raise Misconfigured("false, so no worker would fetch the gaps", setting="HEADRACE_FETCH_HISTORY")
    found = Compared()
    _compare(engine, settings, user_id, found, dry_run=True)

    def run() -> str:
        done = Compared()
        with audit.recorded(engine, "reconcile", user_id, done.counts):
            _compare(engine, settings, user_id, done, dry_run=False)
        opened = done.counts["opened"]
        return "; ".join([f"{len(done.gaps)} gaps", f"{opened} backfills were opened", *done.notes])

    return Plan(
        f"Reconcile {user_id}",
        "operator",
        (f"{len(found.gaps)} gaps were found. Those that Headrace can fill are fetched.", *found.notes),
        run,
        url_for("people.page", user=user_id),
        columns=("provider", "resource", "whose", "reason"),
        rows=tuple((one.key.provider, one.key.resource, one.whose, one.reason) for one in found.gaps),
        button="Reconcile",
    )


def _compare(engine: Engine, settings: Settings, user_id: str, found: Compared, *, dry_run: bool) -> None:
    """Adds to `found`. Raises Misconfigured, Unprocessable, and TryLater if the aggregator asks for a long pause."""
    with transaction(engine) as connection:
        aggregator = aggregator_of(connection, settings, user_id)
    comparisons = [one for one in make_comparisons(engine, settings, dry_run=dry_run) if one.aggregator == aggregator]
    if not comparisons:
        raise Misconfigured(f"not set, so users of {aggregator} cannot be compared", setting="TERRA_ADMIN_TOKEN")
    for one in comparisons:
        _run(one, engine, settings, user_id, found)


def _run(one: Comparison[Any], engine: Engine, settings: Settings, user_id: str, found: Compared) -> None:
    if one.is_exclusive:
        jobs.ensure_job(engine, one.job, settings.reconcile_hours * 3600.0)
        if not jobs.hold(engine, one.job):
            raise TryLater(f"a worker is comparing with {one.name}; try again when it has ended")
    at, until = one.start, time.monotonic() + MAX_SECONDS
    try:
        while at is not None:
            step = next_step(one, at, EARLIEST_COMPARED, user_id)
            at = step.to
            found.gaps += step.found
            found.counts["gaps"] += len(step.found)
            found.counts["opened"] += len(step.opened)
            found.notes += step.notes
            if step.unread:
                found.notes.append(f"{step.unread} entries of {one.listing} could not be read")
            if step.seconds > MAX_PAUSE_SECONDS or time.monotonic() > until:
                raise TryLater(f"{one.name} is slow or paused; use headrace reconcile --user {user_id}")
            time.sleep(step.seconds)
    finally:
        if one.is_exclusive:
            jobs.release(engine, one.job)


def refresh(asked: Asked) -> Plan:
    """Makes the person's providers send new data."""
    engine, settings, user_id = asked.console.writer, asked.console.settings, known_user(asked)
    settings.need_junction_api_key()
    with transaction(engine) as connection:
        if aggregator_of(connection, settings, user_id) != AGGREGATOR:
            raise Unprocessable("only users of Junction can be refreshed")

    def run() -> str:
        audit.record(engine, "refresh", user_id, {})
        answer = refresh_user(settings, user_id)
        if answer.error:
            raise TryLater(f"Junction reports: {answer.error}")
        return f"{len(answer.done)} refreshed, {len(answer.under_way)} in progress, {len(answer.failed)} failed"

    lines = ("Junction asks the person's providers for new data, which arrives by webhook. At most 8 times an hour.",)
    return Plan(f"Refresh {user_id}", "operator", lines, run, url_for("people.page", user=user_id), button="Refresh")


def erase(asked: Asked) -> Plan:
    """Deletes a person permanently, after the user_id was typed."""
    engine, user_id = asked.console.writer, known_user(asked, may_be_erased=True)
    eraser = Eraser(engine, asked.console.settings)
    counts = eraser.count(user_id)

    def run() -> str:
        receipt = eraser.erase(user_id, lambda _done: None)
        removed = sum(receipt.removed.values())
        others = f"; not erased, with the same client_user_id: {', '.join(receipt.others)}" if receipt.others else ""
        unread = f"; {receipt.unread} dead letters cannot be opened and may hold their data" if receipt.unread else ""
        return f"erased {user_id}: {removed} rows removed{others}{unread}"

    return Plan(
        f"Erase {user_id}",
        "privacy",
        (
            "All data of this person is deleted permanently, and later data is not stored.",
            "The aggregator keeps its copy, and so do backups: see `headrace erase`.",
        ),
        run,
        url_for("people.page", user=user_id),
        columns=("table", "rows"),
        rows=tuple(counts.items()),
        button="Erase permanently",
        typed=user_id,
    )
