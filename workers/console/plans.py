"""Actions of the console: what each would do, and the call of the command's function."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

from flask import url_for

from app.catalogue import catalogue
from app.errors import Misconfigured, NotFound, TryLater, Unprocessable, UserErased
from workers.console import formats, people
from workers.console.context import console, record_look
from workers.console.sessions import Plan
from workers.ingest.apply import Applier
from workers.ingest.replay import replay_dead_letters
from workers.notify.planner import resend
from workers.notify.retries import RETRY_DAYS
from workers.operate.erase import Eraser
from workers.reconcile.comparisons import make_comparisons
from workers.reconcile.reconciler import AGGREGATOR
from workers.reconcile.refresh import refresh_user
from workers.reconcile.runs import EARLIEST_COMPARED, leased_steps
from workers.store import audit, backfill_admin, dead_letters, subscriptions
from workers.store.coverage import Gap
from workers.store.engine import transaction

MAX_SELECTED = 500  # in one action; the commands have no limit
PAUSED_BY = "paused by an operator"
MAX_PAUSE_SECONDS, MAX_SECONDS = 5.0, 30.0  # of a comparison; `headrace reconcile` waits for longer


class Asked(NamedTuple):
    """The form of an action."""

    action: str  # its name, for example backfill-pause
    numbers: tuple[int, ...]  # ids
    fields: Mapping[str, str]  # '' for one that is missing
    resources: tuple[str, ...]

    def record_look(self, users: Iterable[str | None]) -> None:
        """A dry run shows people, and may ask their aggregator, so it is audited also if it is not confirmed."""
        record_look(f"proposed {self.action}", users)


def _known_user(asked: Asked, *, may_be_erased: bool = False) -> str:
    """The user_id, which must be stated in full. Raises NotFound, and UserErased."""
    user_id = asked.fields["user"]
    with transaction(console().reader) as connection:
        found = people.person(connection, user_id)
    if found.merged_into:
        raise NotFound(f"{user_id} is now {found.merged_into}")
    if found.erased_at and not may_be_erased:
        raise UserErased(f"{user_id} was erased, and is not fetched again")
    asked.record_look([user_id])
    return user_id


def dead_replay(asked: Asked) -> Plan:
    found, engine = _dead_letters(asked), console().writer
    applier = Applier(engine, console().settings)

    def run() -> str:
        detail: dict[str, Any] = {"dead_letters": len(found)}
        with audit.recorded(engine, "dead replay", "dead letters", detail):
            # Another operator may have replayed or dropped some meanwhile.
            present = dead_letters.listed(engine, [one.id for one in found], limit=len(found))
            outcomes = replay_dead_letters(engine, applier, present)
            detail["outcomes"] = dict(outcomes)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        return f"{outcomes.total()} applied again: {counts or 'nothing to do'}"

    line = f"{len(found)} dead letters are applied again. Those that can be applied leave the list."
    return _of_dead_letters("Replay", line, run, found)


def dead_drop(asked: Asked) -> Plan:
    found, engine = _dead_letters(asked), console().writer

    def run() -> str:
        with audit.recorded(engine, "dead drop", "dead letters", {"dead_letters": [one.id for one in found]}):
            return f"dropped {dead_letters.drop(engine, found)}"

    line = f"{len(found)} dead letters are deleted permanently. Their outcome in the ledger stays dead."
    return _of_dead_letters("Drop", line, run, found)


def _dead_letters(asked: Asked) -> list[dead_letters.DeadLetter]:
    """The selected dead letters, by id or by reason. Raises NotFound."""
    reason = asked.fields["reason"]
    if not (asked.numbers or reason):
        raise Unprocessable("select dead letters first")
    found = dead_letters.listed(console().reader, asked.numbers[:MAX_SELECTED], reason, MAX_SELECTED)
    if not found:
        raise NotFound("none of these dead letters exists any more")
    asked.record_look(one.user_id for one in found)
    return found


def _of_dead_letters(button: str, line: str, run: Callable[[], str], found: Sequence[dead_letters.DeadLetter]) -> Plan:
    columns = ("id", "event", "user", "items", "reason")
    rows = [(one.id, one.event_type, one.user_id, one.items if one.item else None, one.reason) for one in found]
    return Plan(f"{button} dead letters", (line,), run, url_for("dead.listed"), button, columns, rows)


BACKFILL_CHANGES = {
    "pause": (backfill_admin.pause, "These backfills stop after their current page."),
    "resume": (backfill_admin.resume, "These backfills continue where they stopped."),
    "cancel": (backfill_admin.cancel, "These backfills end after their current page; fetched data stays stored."),
}


def change_backfills(asked: Asked) -> Plan:
    engine, verb = console().writer, asked.action.removeprefix("backfill-")
    change, meaning = BACKFILL_CHANGES[verb]
    if not asked.numbers:
        raise Unprocessable("select backfills first")
    found = backfill_admin.listed(engine, backfill_admin.Filter(ids=asked.numbers[:MAX_SELECTED]), MAX_SELECTED)
    if not found:
        raise NotFound("none of these backfills exists any more")
    asked.record_look(one.user_id for one in found)

    def run() -> str:
        changed = change(engine, [one.id for one in found])
        for user in sorted({one.user_id for one in found}):
            theirs = [one.id for one in found if one.user_id == user and one.id in changed]
            audit.record(engine, f"backfill {verb}", user, {"backfills": theirs})
        return f"{verb}: {len(changed)} of {len(found)} backfills"

    columns = ("id", "user", "provider", "resource", "status")
    rows = [(one.id, one.user_id, one.provider, one.resource, one.status) for one in found]
    button = verb.capitalize()
    return Plan(f"{button} backfills", (meaning,), run, url_for("backfills.listed"), button, columns, rows)


def start_backfills(asked: Asked) -> Plan:
    """History of one user, as `headrace backfill start`."""
    engine, settings, user_id = console().writer, console().settings, _known_user(asked)
    since, until = (formats.instant(name, asked.fields[name]) for name in ("since", "until"))
    end = min(until or datetime.now(UTC), datetime.now(UTC))
    if since is None or since >= end:
        raise Unprocessable("state a start that is before the end")
    if unknown := [name for name in asked.resources if name not in catalogue()]:
        raise Unprocessable(f"unknown resource {unknown[0]}")
    provider = asked.fields["provider"].lower()
    providers = (provider,) if provider else ()
    with transaction(engine) as connection:
        if set(providers) - backfill_admin.known_providers(connection, providers):
            raise NotFound(f"unknown provider {provider}")
        aggregator = backfill_admin.aggregator_of(connection, settings, user_id)
        wanted = backfill_admin.HistoryWanted(user_id, since, end, providers, asked.resources, aggregator)
        plans = backfill_admin.plan(connection, settings, wanted)
    if not plans:
        raise Unprocessable("HEADRACE_RESOURCES and HEADRACE_PROVIDERS exclude everything that was requested")

    def run() -> str:
        with transaction(engine, confirm=True) as connection:
            numbers = [backfill_admin.start(connection, one) for one in plans]
            detail = {"backfills": numbers, "since": since, "until": end}
            audit.note(connection, "backfill start", user_id, detail)
        return f"started {len(numbers)} backfills; workers begin within seconds"

    line = f"{len(plans)} backfills are started, with about {sum(one.requests for one in plans)} requests."
    rows = [(one.provider, one.resource, one.requests) for one in plans]
    columns, back = ("provider", "resource", "requests"), url_for("people.page", user=user_id)
    return Plan("Start backfills", (line,), run, back, "Start", columns, rows)


SUBSCRIPTION_CHANGES = {
    "pause": "No notification is sent. The subscription continues at the same place when it is resumed.",
    "resume": "Pending notifications are sent, and the subscription reads on in the feed.",
}


def change_subscription(asked: Asked) -> Plan:
    engine, name, verb = console().writer, asked.fields["name"], asked.action.removeprefix("subscription-")
    with transaction(engine) as connection:
        subscriptions.find(connection, name)

    def run() -> str:
        with transaction(engine, confirm=True) as connection:
            if verb == "pause":
                subscriptions.pause(connection, name, PAUSED_BY)
            else:
                subscriptions.resume(connection, name, RETRY_DAYS)
            audit.note(connection, f"subscriptions {verb}", name, {})
        return f"{verb}d {name}"

    title, back = f"{verb.capitalize()} the subscription {name}", url_for("feed.subscription", name=name)
    return Plan(title, (SUBSCRIPTION_CHANGES[verb],), run, back, verb.capitalize())


def resend_notifications(asked: Asked) -> Plan:
    """Notifications again, as `headrace subscriptions resend`."""
    engine, name, only_dead = console().writer, asked.fields["name"], asked.fields["dead"] == "yes"
    since = formats.instant("since", asked.fields["since"])
    if since is None:
        raise Unprocessable("state since when")
    with transaction(engine) as connection:
        found = subscriptions.find(connection, name)
    what = "dead notifications" if only_dead else "notifications that were sent or are dead"
    lines = (
        f"All {what} since {since:%Y-%m-%d %H:%M:%S} UTC are sent again, under their ids.",
        "Changes of that time from before the subscription was added are sent too.",
    )
    back = url_for("feed.subscription", name=name)
    run = partial(resend, engine, found, since, only_dead=only_dead)
    return Plan(f"Resend notifications to {name}", lines, run, back, "Resend")


@dataclass
class Compared:
    gaps: list[Gap] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"gaps": 0, "opened": 0})  # for the audit log
    notes: list[str] = field(default_factory=list)


def reconcile(asked: Asked) -> Plan:
    """Compares the person's data with the aggregator's, first without fetching anything."""
    user_id = _known_user(asked)
    if not console().settings.fetch_history:
        raise Misconfigured("false, so no worker would fetch the gaps", setting="HEADRACE_FETCH_HISTORY")
    found = Compared()
    _compare(user_id, found, dry_run=True)

    def run() -> str:
        done = Compared()
        with audit.recorded(console().writer, "reconcile", user_id, done.counts):
            _compare(user_id, done, dry_run=False)
        return "; ".join([f"{len(done.gaps)} gaps", f"{done.counts['opened']} backfills were opened", *done.notes])

    lines = (f"{len(found.gaps)} gaps were found. Those that Headrace can fill are fetched.", *found.notes)
    columns, back = ("provider", "resource", "whose", "reason"), url_for("people.page", user=user_id)
    rows = [(one.key.provider, one.key.resource, one.whose, one.reason) for one in found.gaps]
    return Plan(f"Reconcile {user_id}", lines, run, back, "Reconcile", columns, rows)


def _compare(user_id: str, found: Compared, *, dry_run: bool) -> None:
    """Adds to `found`. Raises Misconfigured, Unprocessable, and TryLater if the aggregator asks for a long pause."""
    engine, settings = console().writer, console().settings
    with transaction(engine) as connection:
        aggregator = backfill_admin.aggregator_of(connection, settings, user_id)
    comparisons = [one for one in make_comparisons(engine, settings, dry_run=dry_run) if one.aggregator == aggregator]
    if not comparisons:
        raise Misconfigured(f"not set, so users of {aggregator} cannot be compared", setting="TERRA_ADMIN_TOKEN")
    for one in comparisons:
        until, period = monotonic() + MAX_SECONDS, settings.reconcile_hours * 3600.0
        with closing(leased_steps(engine, one, period, EARLIEST_COMPARED, [user_id])) as steps:
            for step in steps:
                found.gaps += step.found
                found.counts["gaps"] += len(step.found)
                found.counts["opened"] += len(step.opened)
                found.notes += step.notes
                if step.unread:
                    found.notes.append(f"{step.unread} entries of {one.listing} could not be read")
                if step.seconds > MAX_PAUSE_SECONDS or monotonic() > until:
                    raise TryLater(f"{one.name} is slow or paused; use headrace reconcile --user {user_id}")


def refresh(asked: Asked) -> Plan:
    engine, settings, user_id = console().writer, console().settings, _known_user(asked)
    settings.need_junction_api_key()
    with transaction(engine) as connection:
        if backfill_admin.aggregator_of(connection, settings, user_id) != AGGREGATOR:
            raise Unprocessable("only users of Junction can be refreshed")

    def run() -> str:
        audit.record(engine, "refresh", user_id, {})
        answer = refresh_user(settings, user_id)
        if answer.error:
            raise TryLater(f"Junction reports: {answer.error}")
        return f"{len(answer.done)} refreshed, {len(answer.under_way)} in progress, {len(answer.failed)} failed"

    line = "Junction asks the person's providers for new data, which arrives by webhook. At most 8 times an hour."
    return Plan(f"Refresh {user_id}", (line,), run, url_for("people.page", user=user_id), "Refresh")


def erase(asked: Asked) -> Plan:
    """Deletes a person permanently, after the user_id was typed."""
    user_id = _known_user(asked, may_be_erased=True)
    eraser = Eraser(console().writer, console().settings)
    counts = eraser.count(user_id)

    def run() -> str:
        receipt = eraser.erase(user_id, lambda _done: None)
        removed = sum(receipt.removed.values())
        others = f"; not erased, with the same client_user_id: {', '.join(receipt.others)}" if receipt.others else ""
        unread = f"; {receipt.unread} dead letters cannot be opened and may hold their data" if receipt.unread else ""
        return f"erased {user_id}: {removed} rows removed{others}{unread}"

    lines = (
        "All data of this person is deleted permanently, and later data is not stored.",
        "The aggregator keeps its copy, and so do backups: see `headrace erase`.",
    )
    back, rows = url_for("people.page", user=user_id), list(counts.items())
    return Plan(f"Erase {user_id}", lines, run, back, "Erase permanently", ("table", "rows"), rows, typed=user_id)
