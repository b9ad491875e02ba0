"""A snapshot of the installation, and the problems in it, each with the command that helps. No I/O."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from workers.aggregators.admin_token import Token
from workers.broker_admin import Lane
from workers.daily.queue import FailedDays
from workers.notify.retries import OPEN_AFTER
from workers.operate.durations import format_duration
from workers.store.backfill_admin import Backfill

LATE = timedelta(seconds=60)  # a live event that is queued longer is late
BUSY = timedelta(minutes=5)  # a message that a worker works on for longer; a statement may take 45 s
MANY_RETRIES = 5  # of one message; fewer end by themselves, for example when PostgreSQL is restarted
MISSED = timedelta(seconds=60)  # the sweep runs every five seconds
# How long a sender retries one event, from its first attempt. Junction's eight attempts (Svix) end after 27 h
# 35 min. Terra has two statements: at most 10 retries, the first after 30 s, each delay twice the last (its page on
# webhooks), which is 8 h 31 min; and "a little over 24 h" (its help centre). The shorter one counts.
SENDER_RETRY_WINDOW = {"junction": timedelta(hours=27, minutes=35), "terra": timedelta(hours=8, minutes=31)}
TOKEN_WARNING = timedelta(days=14)  # before the token of Terra's Admin API expires: a person has to act
DAYS_BEHIND = timedelta(minutes=5)  # a day is computed within 5 s of its change
CONSUMER_WARNING = timedelta(days=2)  # before the first change is dropped that a consumer has not read
MANY_UNNUMBERED = 50_000  # changes; a sequencer numbers as many in a second
MIN_REPORTED_PAUSE = 60  # seconds; shorter pauses are routine after a 429
MIN_FAILURES = 3  # requests in a row without a usable answer; fewer are routine
NAMES = {"junction": "Junction", "terra": "Terra"}
# Fields of a status that `headrace status --json` does not print, or prints under another name.
NOT_PRINTED = ("failed_jobs", "since_last_delivery", "endpoint", "away", "at")
PRINTED_AS = {"unnumbered": "unnumbered_changes", "terra_token": "terra_admin_token"}


@dataclass(frozen=True)
class Problem:
    what: str
    do: str  # the command that helps
    lane: str = ""  # the affected lane, if any
    reason: str = ""  # the stored reason that `what` quotes, if any


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
    dead_letters: list[dict[str, Any]] = field(default_factory=list)  # whole deliveries, by reason
    refused_items: list[dict[str, Any]] = field(default_factory=list)  # of webhooks and of history
    failures: list[dict[str, Any]] = field(default_factory=list)  # accounts whose last requests were not answered
    delay: Delay | None = None
    swept: timedelta | None = None  # since the last sweep; None: no sweep yet
    crashed_deliveries: int = 0  # deliveries that were being processed when a worker crashed
    lost_deliveries: int = 0  # that the sender gave up, and no reconciliation has followed yet
    idle: int = 0  # due backfills while no worker fetches
    failed_jobs: Mapping[str, str] = field(default_factory=dict)  # the error of a scheduled job, by its name
    terra_token: Token | None = None  # of Terra's Admin API; None: no reconciliation has used one yet
    since_last_delivery: Mapping[str, timedelta] = field(default_factory=dict)  # by aggregator; only in an outage
    consumers: list[dict[str, Any]] = field(default_factory=list)  # of the change feed
    unnumbered: int = 0  # changes that no sequencer has numbered yet
    subscriptions: list[dict[str, Any]] = field(default_factory=list)  # those with a problem
    days_behind: timedelta = timedelta(0)  # since the oldest change that the lane derive has not processed
    days_failed: list[FailedDays] = field(default_factory=list)
    endpoint: Endpoint | None = None  # None: its address is unknown
    away: tuple[Away, ...] = ()
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def is_outage(self) -> bool:
        """Whether senders cannot deliver their events."""
        return any(one.setting == "BROKER_URL" for one in self.away) or bool(self.endpoint and self.endpoint.why_not)

    def plain(self) -> dict[str, Any]:
        """The contents of `headrace status --json`."""
        printed = {one.name: plain(getattr(self, one.name)) for one in fields(self) if one.name not in NOT_PRINTED}
        printed |= {new: printed.pop(name) for name, new in PRINTED_AS.items()}
        faults = [{"what": one.what, "do": one.do} for one in problems(self)]
        return printed | {"outage": plain(retry_window_left(self)), "faults": faults}


def plain(value: Any) -> Any:
    """JSON values: durations in seconds, times in ISO 8601, a backfill with its rate and the time left."""
    match value:
        case dict():
            value = {name: plain(one) for name, one in value.items()}
        case list():
            value = [plain(one) for one in value]
        case timedelta():
            value = round(value.total_seconds(), 1)
        case datetime():
            value = value.isoformat()
        case Backfill():
            value = plain(asdict(value) | {"rate": value.rate, "left": value.left})
        case Lane() | Delay():
            value = plain(asdict(value))
        case FailedDays():
            value = value._asdict()
        case Token():
            value = msgspec.to_builtins(value)
    return value


def problems(now: Status, before: Status | None = None) -> Iterator[Problem]:
    """The worst first. Rejected webhooks are reported only if their number has grown since `before`."""
    for one in now.away:
        yield Problem(one.why, "headrace check")
    if now.endpoint and now.endpoint.why_not:
        is_known = any(one.setting == "BROKER_URL" for one in now.away)  # the problem above gives the reason
        yield Problem("webhooks are answered 503" + ("" if is_known else f": {now.endpoint.why_not}"), "headrace check")
    yield from _refused(now, before)
    for find in (_stuck, _unanswered, _paused, _terra_token, _behind, _subscriptions, _left_over):
        yield from find(now)


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
            what = f"{lane.messages} messages queued in lane {lane.name}, the oldest for {format_duration(lane.oldest)}"
            yield Problem(what, f"headrace worker --lane {lane.name}", lane.name)
    for lane in now.lanes:
        if lane.unacked_for and lane.unacked_for > BUSY:
            busy = format_duration(lane.unacked_for)
            what = f"a message of lane {lane.name} has not been acknowledged for {busy}"
            yield Problem(what, "read the workers' logs", lane.name)
        if lane.retries >= MANY_RETRIES:
            what = f"{lane.retrying} messages of lane {lane.name} are retried"
            since = f" for {format_duration(lane.retrying_for)}" if lane.retrying_for else ""
            yield Problem(f"{what}{since}: {lane.retry_reason}", "headrace check", lane.name, lane.retry_reason)
    if now.swept is not None and now.swept > MISSED:
        what = f"the sweep has not run for {format_duration(now.swept)}"
        yield Problem(what, "headrace beat, headrace worker --lane maintenance")
    if now.idle and not any(pause["is_own_key"] is not False for pause in now.pauses):
        what = f"{now.idle} backfills are due but no worker fetches: none runs in lane backfill, or it has no API key"
        yield Problem(what, "headrace worker --lane backfill", "backfill")
    if now.crashed_deliveries:
        what = f"workers crashed while processing {now.crashed_deliveries} deliveries that are not applied yet"
        yield Problem(what, "read the workers' logs")


def _unanswered(now: Status) -> Iterator[Problem]:
    for one in now.failures:
        if one["failures"] >= MIN_FAILURES:
            name, note = NAMES.get(one["account"], one["account"]), key_note(one)
            what = f"{name} does not answer: {one['because_of']}, {one['failures']} times in a row"
            yield Problem(f"{what} ({note})" if note else what, "headrace check")


def _paused(now: Status) -> Iterator[Problem]:
    users = defaultdict[tuple[str, str], list[int]](list)
    for pause in now.pauses:
        account, reason, seconds, note = pause["account"], pause["because_of"], pause["seconds_left"], key_note(pause)
        name, _, user = account.partition("/")
        if user:
            users[name, reason].append(seconds)
        elif pause["kind"] == "key_refused":
            # A pause of another key is that of the workers, or of a command in a shell with a wrong key.
            verb = "set" if pause["is_own_key"] is not False else "compare the workers'"
            what = f"{name}: {reason}" + (f" ({note})" if note else "")
            yield Problem(what, f"{verb} {name.upper()}_API_KEY", reason=reason)
        elif seconds > MIN_REPORTED_PAUSE:
            why = f"{reason}; {note}" if note else reason
            yield Problem(f"{name} is paused for {format_duration(seconds)} ({why})", "headrace status", reason=reason)
    for (name, reason), left in users.items():
        if max(left) > MIN_REPORTED_PAUSE:
            what = f"{name} is paused for {len(left)} users, for up to {format_duration(max(left))} ({reason})"
            yield Problem(what, "headrace status", reason=reason)


def _terra_token(now: Status) -> Iterator[Problem]:
    token = now.terra_token
    # An old state is of a token that is no longer set.
    if token is None or token.checked_at is None or now.at - token.checked_at > TOKEN_WARNING:
        return
    if token.fault:
        yield Problem(token.fault, token.do)
    elif token.expires_at and token.expires_at - now.at < TOKEN_WARNING:
        left = token.expires_at - now.at
        is_valid = left > timedelta()
        when = f"expires in {format_duration(left)}" if is_valid else "has expired"
        can_rotate = is_valid and token.approve_by and token.approve_by > token.expires_at
        how = "rotate it" if can_rotate else "a person has to approve a new one"
        yield Problem(f"the token of Terra's Admin API {when}: {how}", "set TERRA_ADMIN_TOKEN")


def _behind(now: Status) -> Iterator[Problem]:
    """A change feed without progress, days that are late, and consumers that will lose changes soon."""
    if now.unnumbered >= MANY_UNNUMBERED:
        what = f"at least {now.unnumbered:,} changes are not in the change feed yet"
        yield Problem(what, "headrace worker --lane notify", "notify")
    if now.days_behind > DAYS_BEHIND:
        what = f"values per day are {format_duration(now.days_behind)} behind the stored rows"
        yield Problem(what, "headrace worker --lane derive", "derive")
    for failed in now.days_failed:
        what = f"days of {failed.resource} of {failed.people} people cannot be computed: {failed.error}"
        yield Problem(what, "headrace derive rebuild", reason=failed.error)
    for one in now.consumers:
        left, name = one["expires_in"], one["consumer"]
        if one["is_dropped"]:
            what = f"changes were dropped that consumer {name} of the change feed has not read"
            yield Problem(what, f"headrace feed reset --consumer {name} --to now, then read the tables again")
        elif left is not None and left < CONSUMER_WARNING.total_seconds():
            soon, lag = format_duration(left), one["lag"]
            what = f"consumer {name} of the change feed loses changes in {soon}, {lag:,} are unread"
            yield Problem(what, f"start it, or headrace feed remove --consumer {name}")


def _subscriptions(now: Status) -> Iterator[Problem]:
    for one in now.subscriptions:
        name, is_open = one["name"], one["failures"] >= OPEN_AFTER
        if one["status"] == "paused":
            why = f": {one['reason']}" if one["reason"] else ""
            yield Problem(f"subscription {name} is paused{why}", f"headrace subscriptions resume {name}")
        elif one["reason"]:
            yield Problem(f"subscription {name}: {one['reason']}", f"headrace subscriptions resume {name}")
        elif is_open:
            since = f" for {format_duration(one['failing'])}" if one["failing"] else ""
            what = f"subscription {name} fails{since}: {one['last_error']}"
            yield Problem(what, f"headrace subscriptions test {name}", reason=one["last_error"])
        elif not one["failures"]:
            what = f"notifications of subscription {name} are {format_duration(one['late'])} late"
            yield Problem(what, "headrace worker --lane notify", "notify")


def key_note(row: Mapping[str, Any]) -> str:
    """Which API key a pause belongs to; empty for the key of this shell, and if no key is recorded."""
    if not row["key"] or row["is_own_key"]:
        return ""
    return f"key {row['key']}" + ("" if row["is_own_key"] is None else ", not the one in this shell")


def _left_over(now: Status) -> Iterator[Problem]:
    for job, error in now.failed_jobs.items():
        yield Problem(f"job {job}: {error}", "read the workers' logs", reason=error)
    if now.lost_deliveries:
        what = f"{now.lost_deliveries} deliveries lost: Junction gave up after its last attempt"
        yield Problem(what, "headrace reconcile")
    for row in now.dead_letters:
        if row["last_hour"]:
            what = f"{row['last_hour']} dead letters in the last hour: {row['reason']}"
            yield Problem(what, "headrace dead list", reason=row["reason"])
    if refused := [row for row in now.refused_items if row["last_hour"]]:
        count, most = sum(row["last_hour"] for row in refused), max(refused, key=lambda row: row["last_hour"])
        what = f"{count} items refused in the last hour: {most['reason']}"
        yield Problem(what, "headrace dead list", reason=most["reason"])
    for row in now.backfills:
        if row["status"] == "failed" and row["last_day"]:
            what = f"{row['last_day']} backfills failed in the last day"
            yield Problem(what, "headrace backfill list --status failed")
    for row in now.gaps:
        if row["whose"] == "ours":
            yield Problem(f"{row['gaps']} gaps to fill, the oldest since {row['since'][:16]}", "headrace reconcile")
