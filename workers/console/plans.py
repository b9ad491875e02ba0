"""Actions on dead letters, backfills and subscriptions: what each would do, and the call of the command's function."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flask import url_for
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.errors import NotFound, Unprocessable, UserErased
from workers.console import formats
from workers.console.context import Console, record_look
from workers.console.sessions import Plan
from workers.ingest.apply import Applier
from workers.ingest.replay import replay_dead_letters
from workers.notify.planner import plan_since
from workers.notify.retries import RETRY_DAYS
from workers.store import audit, backfill_admin, dead_letters, notifications, subscriptions
from workers.store.backfill_admin import BackfillPlan, Filter, HistoryWanted
from workers.store.dead_letters import DeadLetter
from workers.store.engine import transaction
from workers.store.user_lookup import find

MAX_SELECTED = 500  # in one action; the commands have no limit
PAUSED_BY = "paused by an operator"


@dataclass(frozen=True)
class Asked:
    """The form of an action."""

    console: Console
    name: str
    numbers: tuple[int, ...] = ()  # ids
    fields: dict[str, str] | None = None
    resources: tuple[str, ...] = ()

    def field(self, name: str) -> str:
        return (self.fields or {}).get(name, "")

    def record_look(self, users: Iterable[str | None]) -> None:
        """A dry run shows people, and may ask their aggregator, so it is audited also if it is not confirmed."""
        record_look(f"proposed {self.name}", users)


def known_user(asked: Asked, *, may_be_erased: bool = False) -> str:
    """The user_id, which must be stated in full. Raises NotFound, and UserErased."""
    user_id = asked.field("user")
    with transaction(asked.console.reader) as connection:
        found = [one for one in find(connection, user_id) if one.user_id == user_id]
    if not found:
        raise NotFound(f"unknown user {user_id}")
    if found[0].is_erased and not may_be_erased:
        raise UserErased(f"{user_id} was erased, and is not fetched again")
    asked.record_look([user_id])
    return user_id


def _dead_letters(asked: Asked) -> list[DeadLetter]:
    """The selected dead letters, by id or by reason. Raises NotFound."""
    if not asked.numbers and not asked.field("reason"):
        raise Unprocessable("select dead letters first")
    ids = list(asked.numbers[:MAX_SELECTED]) or None
    found = dead_letters.listed(asked.console.reader, ids, asked.field("reason") or None, MAX_SELECTED)
    if not found:
        raise NotFound("none of these dead letters exists any more")
    asked.record_look([one.user_id for one in found])
    return found


def _plan(button: str, lines: tuple[str, ...], run: Callable[[], str], found: Sequence[DeadLetter]) -> Plan:
    return Plan(
        f"{button} dead letters",
        "operator",
        lines,
        run,
        url_for("dead.listed"),
        columns=("id", "event", "user", "items", "reason"),
        rows=tuple((one.id, one.event_type, one.user_id, one.items if one.item else None, one.reason) for one in found),
        button=button,
    )


def dead_replay(asked: Asked) -> Plan:
    found, engine, settings = _dead_letters(asked), asked.console.writer, asked.console.settings

    def run() -> str:
        detail: dict[str, Any] = {"dead_letters": len(found)}
        with audit.recorded(engine, "dead replay", "dead letters", detail):
            outcomes = replay_dead_letters(engine, Applier(engine, settings), _present(engine, found))
            detail["outcomes"] = dict(outcomes)
        return _sentence("applied again", outcomes)

    lines = (f"{len(found)} dead letters are applied again. Those that can be applied leave the list.",)
    return _plan("Replay", lines, run, found)


def dead_drop(asked: Asked) -> Plan:
    found, engine = _dead_letters(asked), asked.console.writer

    def run() -> str:
        with audit.recorded(engine, "dead drop", "dead letters", {"dead_letters": [one.id for one in found]}):
            return f"dropped {dead_letters.drop(engine, found)}"

    lines = (f"{len(found)} dead letters are deleted permanently. Their outcome in the ledger stays dead.",)
    return _plan("Drop", lines, run, found)


def _present(engine: Engine, found: Sequence[DeadLetter]) -> list[DeadLetter]:
    """Those that another operator has not replayed or dropped meanwhile."""
    return dead_letters.listed(engine, [one.id for one in found], limit=len(found))


def _sentence(done: str, outcomes: Mapping[Any, int]) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return f"{sum(outcomes.values())} {done}: {counts or 'nothing to do'}"


Change = Callable[[Engine, Sequence[int]], list[int]]


def change_backfills(name: str, change: Change, meaning: str) -> Callable[[Asked], Plan]:
    """The builder of an action that changes the status of backfills."""

    def build(asked: Asked) -> Plan:
        engine = asked.console.writer
        if not asked.numbers:
            raise Unprocessable("select backfills first")
        found = backfill_admin.listed(engine, Filter(ids=asked.numbers[:MAX_SELECTED]), MAX_SELECTED)
        if not found:
            raise NotFound("none of these backfills exists any more")
        asked.record_look([one.user_id for one in found])

        def run() -> str:
            changed = change(engine, [one.id for one in found])
            for user in sorted({one.user_id for one in found}):
                mine = [one.id for one in found if one.user_id == user and one.id in changed]
                audit.record(engine, f"backfill {name}", user, {"backfills": mine})
            return f"{name}: {len(changed)} of {len(found)} backfills"

        return Plan(
            f"{name.capitalize()} backfills",
            "operator",
            (meaning,),
            run,
            url_for("backfills.listed"),
            columns=("id", "user", "provider", "resource", "status"),
            rows=tuple((one.id, one.user_id, one.provider, one.resource, one.status) for one in found),
            button=name.capitalize(),
        )

    return build


def start_backfills(asked: Asked) -> Plan:
    """History of one user, as `headrace backfill start`."""
    engine, settings, user_id = asked.console.writer, asked.console.settings, known_user(asked)
    since, until = (formats.instant(name, asked.field(name)) for name in ("since", "until"))
    end = min(until or datetime.now(UTC), datetime.now(UTC))
    if since is None or since >= end:
        raise Unprocessable("state a start that is before the end")
    if unknown := [name for name in asked.resources if name not in catalogue()]:
        raise Unprocessable(f"unknown resource {unknown[0]}")
    with transaction(engine) as connection:
        providers: tuple[str, ...] = (asked.field("provider").lower(),) if asked.field("provider") else ()
        if set(providers) - backfill_admin.known_providers(connection, providers):
            raise NotFound(f"unknown provider {providers[0]}")
        aggregator = backfill_admin.aggregator_of(connection, settings, user_id)
        wanted = HistoryWanted(user_id, since, end, providers, asked.resources, aggregator)
        plans = backfill_admin.plan(connection, settings, wanted)
    if not plans:
        raise Unprocessable("HEADRACE_RESOURCES and HEADRACE_PROVIDERS exclude everything that was requested")
    requests = sum(one.requests for one in plans)
    return Plan(
        "Start backfills",
        "operator",
        (f"{len(plans)} backfills are started, with about {requests} requests.",),
        lambda: _start(engine, plans),
        url_for("people.page", user=user_id),
        columns=("provider", "resource", "requests"),
        rows=tuple((one.provider, one.resource, one.requests) for one in plans),
        button="Start",
    )


def _start(engine: Engine, plans: Sequence[BackfillPlan]) -> str:
    with transaction(engine, confirm=True) as connection:
        numbers = [backfill_admin.start(connection, one) for one in plans]
        detail = {"backfills": numbers, "since": plans[0].since, "until": plans[0].until}
        audit.note(connection, "backfill start", plans[0].user_id, detail)
    return f"started {len(numbers)} backfills; workers begin within seconds"


def change_subscription(name: str) -> Callable[[Asked], Plan]:
    """The builder of pause and resume."""

    def build(asked: Asked) -> Plan:
        engine, subject = asked.console.writer, asked.field("name")
        with transaction(engine) as connection:
            subscriptions.find(connection, subject)

        def run() -> str:
            with transaction(engine, confirm=True) as connection:
                if name == "pause":
                    subscriptions.pause(connection, subject, PAUSED_BY)
                else:
                    subscriptions.resume(connection, subject, RETRY_DAYS)
                audit.note(connection, f"subscriptions {name}", subject, {})
            return f"{name}d {subject}"

        meaning = {
            "pause": "No notification is sent. The subscription continues at the same place when it is resumed.",
            "resume": "Pending notifications are sent, and the subscription reads on in the feed.",
        }
        back = url_for("feed.subscription", name=subject)
        title = f"{name.capitalize()} the subscription {subject}"
        return Plan(title, "operator", (meaning[name],), run, back, button=name.capitalize())

    return build


def resend(asked: Asked) -> Plan:
    """Notifications again, as `headrace subscriptions resend`."""
    engine, subject = asked.console.writer, asked.field("name")
    since = formats.instant("since", asked.field("since"))
    if since is None:
        raise Unprocessable("state since when")
    only_dead = asked.field("dead") == "yes"
    with transaction(engine) as connection:
        found = subscriptions.find(connection, subject)
    statuses: tuple[notifications.NotificationStatus, ...] = ("dead",) if only_dead else ("dead", "sent")

    def run() -> str:
        detail: dict[str, Any] = {"since": since, "only_dead": only_dead}
        with audit.recorded(engine, "subscriptions resend", subject, detail):
            detail["older_changes"] = older = plan_since(engine, subject, since, found.start_position)
            with transaction(engine, confirm=True) as connection:
                count = notifications.resend(connection, subject, since, statuses, RETRY_DAYS)
            detail["notifications"] = count
        return f"{count} notifications are sent again, and notifications of {older} older changes are sent"

    what = "dead notifications" if only_dead else "notifications that were sent or are dead"
    lines = (
        f"All {what} since {since:%Y-%m-%d %H:%M:%S} UTC are sent again, under their ids.",
        "Changes of that time from before the subscription was added are sent too.",
    )
    back = url_for("feed.subscription", name=subject)
    return Plan(f"Resend notifications to {subject}", "operator", lines, run, back, button="Resend")
