"""A moment's picture of everything, and what is wrong in it: each fault with the command to type. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from workers.broker_admin import Lane
from workers.store.backfill_admin import Backfill

LATE = timedelta(seconds=60)  # a live event that waits longer is late
MISSED = timedelta(seconds=60)  # a sweep comes every five seconds
# How long a sender tries one event again, from its first attempt. Junction's eight attempts (Svix) end after 27 h
# 35 min; Terra's "a little over 24 h" are counted as 24, because its destination is disabled then.
SENDER_RETRY_WINDOW = {"junction": timedelta(hours=27, minutes=35), "terra": timedelta(hours=24)}
# Seconds. Shorter pauses are not reported: they are routine after a 429.
MIN_REPORTED_PAUSE = 60


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to type about it."""

    what: str
    do: str
    lane: str = ""  # that it is about


@dataclass(frozen=True)
class Away:
    """Something that cannot be reached: the setting that says where it is, and why."""

    setting: str
    why: str


@dataclass(frozen=True)
class Endpoint:
    """What the endpoint says of itself. Counts are since its processes were started."""

    url: str
    why_not: str | None = None  # it cannot take anything now
    answers: Mapping[str, int] = field(default_factory=dict)  # by status
    refused: Mapping[str, int] = field(default_factory=dict)  # signatures, by what was wrong


@dataclass(frozen=True)
class Delay:
    """How long it takes from the 202 to the row, in seconds, of what came in the last five minutes."""

    median: float
    p99: float


@dataclass(frozen=True)
class Status:
    """A moment's picture, in plain values."""

    lanes: list[Lane] = field(default_factory=list)
    deliveries: list[dict[str, Any]] = field(default_factory=list)
    backfills: list[dict[str, Any]] = field(default_factory=list)
    open_backfills: list[Backfill] = field(default_factory=list)
    pauses: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    connections_in_error: list[dict[str, Any]] = field(default_factory=list)
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    delay: Delay | None = None
    swept: timedelta | None = None  # since the last sweep; None: there was none yet
    crashed_deliveries: int = 0  # deliveries that workers have died with
    idle: int = 0  # backfills that nobody goes on with
    since_last_delivery: Mapping[str, timedelta] = field(
        default_factory=dict
    )  # in an outage, since an aggregator's last event
    endpoint: Endpoint | None = None  # where somebody says where it is
    away: tuple[Away, ...] = ()
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def is_outage(self) -> bool:
        """Whether senders cannot get rid of their events."""
        return any(one.setting == "BROKER_URL" for one in self.away) or bool(self.endpoint and self.endpoint.why_not)

    def plain(self) -> dict[str, Any]:
        """As JSON would have it: ages in seconds, times as text."""
        return {
            "lanes": [{**asdict(lane), "oldest": _seconds(lane.oldest)} for lane in self.lanes],
            "deliveries": self.deliveries,
            "backfills": self.backfills,
            "open_backfills": [plain(one) for one in self.open_backfills],
            "pauses": self.pauses,
            "gaps": self.gaps,
            "connections_in_error": [{**row, "since": row["since"].isoformat()} for row in self.connections_in_error],
            "dead_letters": self.dead_letters,
            "delay": None if self.delay is None else asdict(self.delay),
            "swept": _seconds(self.swept),
            "crashed_deliveries": self.crashed_deliveries,
            "idle": self.idle,
            "outage": {name: _seconds(left) for name, left in retry_window_left(self).items()},
            "faults": [{"what": one.what, "do": one.do} for one in problems(self)],
        }


def problems(now: Status, before: Status | None = None) -> Iterator[Problem]:
    """What is wrong, the worst first. With an earlier picture, what is refused is told while it is."""
    for one in now.away:
        yield Problem(one.why, "headrace check")
    if now.endpoint and now.endpoint.why_not:
        yield Problem(f"nothing is taken: {now.endpoint.why_not}", "headrace check")
    yield from _refused(now, before)
    yield from _stuck(now)
    yield from _paused(now)
    yield from _left_over(now)


def retry_window_left(now: Status) -> dict[str, timedelta]:
    """How long each sender still tries the oldest event that it may not have got rid of; empty if nothing is wrong.

    Counted from the last event that was taken, as the ledger has it: whatever was refused came after that, so it is
    the least that is left. What is still queued was taken as well, and makes it more.
    """
    return {
        name: SENDER_RETRY_WINDOW[name] - since
        for name, since in now.since_last_delivery.items()
        if name in SENDER_RETRY_WINDOW
    }


def _refused(now: Status, before: Status | None) -> Iterator[Problem]:
    if now.endpoint is None or before is None or before.endpoint is None:
        return
    for reason, count in now.endpoint.refused.items():
        more = count - before.endpoint.refused.get(reason, 0)
        if more > 0:
            hint = "is this machine's clock right? timedatectl" if reason == "stale" else "headrace check"
            yield Problem(f"{more} webhooks refused just now: signature {reason}", hint)
    more = now.endpoint.answers.get("413", 0) - before.endpoint.answers.get("413", 0)
    if more > 0:
        yield Problem(f"{more} webhooks refused just now: too large", "set HEADRACE_MAX_BODY_BYTES")


def _stuck(now: Status) -> Iterator[Problem]:
    for lane in now.lanes:
        if lane.oldest and lane.oldest > LATE and lane.name in ("live", "download"):
            yield Problem(
                f"{lane.messages} messages wait in lane {lane.name}, the oldest for {_minutes(lane.oldest)}",
                f"headrace worker --lane {lane.name}",
                lane.name,
            )
    if now.swept is not None and now.swept > MISSED:
        yield Problem(
            f"nobody has looked for work that is due for {_minutes(now.swept)}",
            "headrace beat, headrace worker --lane maintenance",
        )
    if now.idle and not now.pauses:
        yield Problem(
            f"{now.idle} backfills wait, and nobody fetches: no worker of their lane, or it has no API key",
            "headrace worker --lane backfill",
            "backfill",
        )
    if now.crashed_deliveries:
        yield Problem(
            f"workers have died with {now.crashed_deliveries} deliveries that are still to be applied",
            "look at their logs",
        )


def _paused(now: Status) -> Iterator[Problem]:
    for pause in now.pauses:
        if pause["kind"] == "key_refused":
            yield Problem(f"{pause['account']}: {pause['because_of']}", f"set {pause['account'].upper()}_API_KEY")
        elif pause["seconds_left"] > MIN_REPORTED_PAUSE:
            left = _minutes(timedelta(seconds=pause["seconds_left"]))
            yield Problem(f"{pause['account']} is left alone for {left}: {pause['because_of']}", "headrace status")


def _left_over(now: Status) -> Iterator[Problem]:
    for dead_letters in now.dead_letters:
        if dead_letters["last_hour"]:
            yield Problem(
                f"{dead_letters['last_hour']} dead letters within the hour: {dead_letters['reason']}",
                "headrace dead list",
            )
    for row in now.backfills:
        if row["status"] == "failed" and row["last_day"]:
            yield Problem(
                f"{row['last_day']} backfills failed within the day", "headrace backfill list --status failed"
            )
    for row in now.gaps:
        if row["whose"] == "ours":
            yield Problem(f"{row['gaps']} gaps that are ours to fill, since {row['since'][:16]}", "headrace reconcile")


def _minutes(duration: timedelta) -> str:
    seconds = int(duration.total_seconds())
    return f"{seconds // 60} min" if seconds >= 120 else f"{seconds} s"


def plain(one: Backfill) -> dict[str, Any]:
    """A backfill with what follows from it, as JSON would have it."""
    values = asdict(one) | {"rate": one.rate, "left": _seconds(one.left)}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _seconds(age: timedelta | None) -> float | None:
    return None if age is None else round(age.total_seconds(), 1)
