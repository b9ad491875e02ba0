"""A snapshot of the installation, and the problems in it, each with the command that helps. No I/O."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from workers.broker_admin import Lane
from workers.operate.durations import format_duration
from workers.store.backfill_admin import Backfill

LATE = timedelta(seconds=60)  # a live event that is queued longer is late
MISSED = timedelta(seconds=60)  # the sweep runs every five seconds
# How long a sender retries one event, from its first attempt. Junction's eight attempts (Svix) end after 27 h
# 35 min; Terra's "a little over 24 h" counts as 24 h, because Terra then disables the destination.
SENDER_RETRY_WINDOW = {"junction": timedelta(hours=27, minutes=35), "terra": timedelta(hours=24)}
MIN_REPORTED_PAUSE = 60  # seconds; shorter pauses are routine after a 429


@dataclass(frozen=True)
class Problem:
    what: str
    do: str  # the command that helps
    lane: str = ""  # the affected lane, if any


@dataclass(frozen=True)
class Away:
    """A service that cannot be reached, named by the setting that holds its address."""

    setting: str
    why: str


@dataclass(frozen=True)
class Endpoint:
    """The endpoint's readiness and counters. Counters start at 0 with its processes."""

    url: str
    why_not: str | None = None  # why it is not ready; None: ready
    answers: Mapping[str, int] = field(default_factory=dict)  # by HTTP status
    refused: Mapping[str, int] = field(default_factory=dict)  # invalid signatures, by reason


@dataclass(frozen=True)
class Delay:
    """Seconds from the 202 to the stored row, for deliveries of the last five minutes."""

    median: float
    p99: float


@dataclass(frozen=True)
class Status:
    lanes: list[Lane] = field(default_factory=list)
    deliveries: list[dict[str, Any]] = field(default_factory=list)
    backfills: list[dict[str, Any]] = field(default_factory=list)
    open_backfills: list[Backfill] = field(default_factory=list)
    pauses: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    connections_in_error: list[dict[str, Any]] = field(default_factory=list)
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    delay: Delay | None = None
    swept: timedelta | None = None  # since the last sweep; None: no sweep yet
    crashed_deliveries: int = 0  # deliveries that were being processed when a worker crashed
    idle: int = 0  # due backfills while no worker fetches
    since_last_delivery: Mapping[str, timedelta] = field(default_factory=dict)  # by aggregator; only in an outage
    endpoint: Endpoint | None = None  # None: its address is unknown
    away: tuple[Away, ...] = ()
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def is_outage(self) -> bool:
        """Whether senders cannot deliver their events."""
        return any(one.setting == "BROKER_URL" for one in self.away) or bool(self.endpoint and self.endpoint.why_not)

    def plain(self) -> dict[str, Any]:
        """JSON values: durations in seconds, times in ISO 8601."""
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
    """The worst first. Rejected webhooks are reported only if their number has grown since `before`."""
    for one in now.away:
        yield Problem(one.why, "headrace check")
    if now.endpoint and now.endpoint.why_not:
        yield Problem(f"webhooks are answered 503: {now.endpoint.why_not}", "headrace check")
    yield from _refused(now, before)
    yield from _stuck(now)
    yield from _paused(now)
    yield from _left_over(now)


def retry_window_left(now: Status) -> dict[str, timedelta]:
    """How long each sender keeps retrying its oldest undelivered event; empty outside an outage.

    A lower bound: every rejected event is newer than the last one in the ledger, and queued events, which were
    accepted later, are not in the ledger yet.
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
            hint = "timedatectl (is this machine's clock right?)" if reason == "stale" else "headrace check"
            yield Problem(f"{more} webhooks rejected just now: signature {reason}", hint)
    more = now.endpoint.answers.get("413", 0) - before.endpoint.answers.get("413", 0)
    if more > 0:
        yield Problem(f"{more} webhooks rejected just now: body too large", "raise HEADRACE_MAX_BODY_BYTES")


def _stuck(now: Status) -> Iterator[Problem]:
    for lane in now.lanes:
        if lane.oldest and lane.oldest > LATE and lane.name in ("live", "download"):
            yield Problem(
                f"{lane.messages} messages queued in lane {lane.name}, the oldest for {format_duration(lane.oldest)}",
                f"headrace worker --lane {lane.name}",
                lane.name,
            )
    if now.swept is not None and now.swept > MISSED:
        yield Problem(
            f"the sweep has not run for {format_duration(now.swept)}",
            "headrace beat, headrace worker --lane maintenance",
        )
    if now.idle and not now.pauses:
        yield Problem(
            f"{now.idle} backfills are due but no worker fetches: none runs in lane backfill, or it has no API key",
            "headrace worker --lane backfill",
            "backfill",
        )
    if now.crashed_deliveries:
        yield Problem(
            f"workers crashed while processing {now.crashed_deliveries} deliveries that are not applied yet",
            "read the workers' logs",
        )


def _paused(now: Status) -> Iterator[Problem]:
    for pause in now.pauses:
        if pause["kind"] == "key_refused":
            yield Problem(f"{pause['account']}: {pause['because_of']}", f"set {pause['account'].upper()}_API_KEY")
        elif pause["seconds_left"] > MIN_REPORTED_PAUSE:
            left = format_duration(timedelta(seconds=pause["seconds_left"]))
            yield Problem(f"{pause['account']} is paused for {left} ({pause['because_of']})", "headrace status")


def _left_over(now: Status) -> Iterator[Problem]:
    for dead_letters in now.dead_letters:
        if dead_letters["last_hour"]:
            yield Problem(
                f"{dead_letters['last_hour']} dead letters in the last hour: {dead_letters['reason']}",
                "headrace dead list",
            )
    for row in now.backfills:
        if row["status"] == "failed" and row["last_day"]:
            yield Problem(
                f"{row['last_day']} backfills failed in the last day", "headrace backfill list --status failed"
            )
    for row in now.gaps:
        if row["whose"] == "ours":
            yield Problem(f"{row['gaps']} gaps to fill, the oldest since {row['since'][:16]}", "headrace reconcile")


def plain(one: Backfill) -> dict[str, Any]:
    """A backfill as JSON values, with its rate and the time left."""
    values = asdict(one) | {"rate": one.rate, "left": _seconds(one.left)}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _seconds(age: timedelta | None) -> float | None:
    return None if age is None else round(age.total_seconds(), 1)
