"""`headrace status --watch`: the refreshing dashboard, fitted to the terminal."""

import http.client
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from urllib.error import HTTPError
from urllib.request import urlopen

from celery import Celery
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from app.config.settings import Settings
from app.errors import TryLater
from app.observability import metrics
from workers import broker_admin
from workers.fetch.rate_limits import Pause, pauses
from workers.operate import durations, health, status_view
from workers.operate.health import Away, Endpoint, Status
from workers.store import status
from workers.store.backfill_admin import Backfill
from workers.store.status import OutcomeCounter

RATE_SECONDS = 10.0  # longest time over which a rate is computed: short enough to follow changes, long enough to smooth
ENDPOINT_SECONDS = 2.0
WIDE = 110  # columns; narrower terminals get shorter names and bars
BAR_WIDTH, NAME_WIDTH = 12, 28
MAX_PROBLEMS = 5


class Watcher:
    """Takes snapshots, and keeps the recent ones to compute rates."""

    def __init__(self, engine: Engine, celery: Celery, settings: Settings, web: str | None = None) -> None:
        self._engine, self._celery, self._settings, self._web = engine, celery, settings, web
        self._ledger = OutcomeCounter()
        self._seen: deque[Status] = deque()

    def poll(self) -> Status:
        """A snapshot. Raises TryLater if a service cannot be reached."""
        lanes = broker_admin.lanes(self._celery, self._settings)
        found = status_view.read(self._engine, lanes, self._pauses(), self._ledger)
        return self._complete(replace(found, endpoint=self._endpoint()))

    def page(self) -> "Dashboard":
        """Like `poll`, with rates. Services that cannot be reached are listed on the page."""
        now = self._complete(self._reachable())
        while len(self._seen) > 1 and (now.at - self._seen[1].at).total_seconds() >= RATE_SECONDS:
            self._seen.popleft()
        self._seen.append(now)
        return Dashboard(now, self._seen[0], self._seen[-2] if len(self._seen) > 1 else None)

    def _reachable(self) -> Status:
        """Reads broker and database independently; a part that is away stays empty and is listed in `away`."""
        away: list[Away] = []
        lanes, pauses, found = list[broker_admin.Lane](), list[Pause](), Status()
        try:
            lanes = broker_admin.lanes(self._celery, self._settings)
            pauses = self._pauses()
        except TryLater as reason:
            away.append(Away(reason.setting, str(reason)))
        try:
            found = status_view.read(self._engine, lanes, pauses, self._ledger)
        except TryLater as reason:
            away.append(Away("DATABASE_URL", str(reason)))
        return replace(found, lanes=lanes, endpoint=self._endpoint(), away=tuple(away))

    def _complete(self, found: Status) -> Status:
        """Drops `idle` where history is not fetched. In an outage, adds the time since the last delivery.

        Not otherwise, because that query reads two days of the ledger.
        """
        if not self._settings.fetch_history:
            found = replace(found, idle=0)
        if not found.is_outage:
            return found
        try:
            return replace(found, since_last_delivery=status.since_last_delivery(self._engine))
        except TryLater:
            return found

    def _pauses(self) -> list[Pause]:
        return pauses(self._settings) if self._settings.has_redis else []

    def _endpoint(self) -> Endpoint | None:
        return scrape(self._web) if self._web else None


def scrape(url: str) -> Endpoint:
    """Reads /metrics and /readyz. Never raises on network errors."""
    try:
        with urlopen(f"{url}/metrics", timeout=ENDPOINT_SECONDS) as answer:  # noqa: S310 - the operator's own URL
            text = answer.read().decode()
        answers = metrics.counts(text, "headrace_answers_total", "status")
        refused = metrics.counts(text, "headrace_refused_total", "reason")
        with urlopen(f"{url}/readyz", timeout=ENDPOINT_SECONDS):  # noqa: S310
            return Endpoint(url, answers=answers, refused=refused)
    except HTTPError as error:  # /readyz answers 503 with one line
        with error:
            return Endpoint(url, error.read(200).decode(errors="replace").strip())
    except (OSError, http.client.HTTPException):
        return Endpoint(url, f"the endpoint does not answer at {url}")


ChartRow = tuple[RenderableType, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page that is cut to fit. The most important rows come first."""

    title: str
    rows: Sequence[ChartRow] = ()
    full_list: str = ""  # the command that shows all rows
    stands_alone: bool = False  # the title is shown even without rows


@dataclass(frozen=True)
class Dashboard:
    """A snapshot fitted to the terminal. Rates are relative to `since`, rejected webhooks to `last`."""

    now: Status
    since: Status
    last: Status | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Limited to the height of a terminal; unlimited elsewhere."""
        if not console.is_terminal:
            yield Text(f"{self.now.at:%Y-%m-%d %H:%M:%S} UTC")
            yield status_view.render(self.now)
            return
        head = [self._title(), *self._verdict(), Text(), self._counts(options.max_width), self._facts(), Text()]
        used = sum(len(console.render_lines(part, options.reset_height(), pad=False)) for part in head)
        yield from head
        yield from _fitted(list(self._sections(options.max_width)), (options.height or console.height) - used)

    def rate(self, count: Callable[[Status], float]) -> float | None:
        """The growth of a count per second; None on the first page."""
        seconds = (self.now.at - self.since.at).total_seconds()
        return (count(self.now) - count(self.since)) / seconds if seconds > 0 else None

    def _title(self) -> RenderableType:
        line = Table.grid(expand=True)
        line.add_column(ratio=1)
        line.add_column(justify="right")
        line.add_row(status_view.verdict(self.now, self.last), f"headrace status, {self.now.at:%H:%M:%S} UTC")
        return line

    def _verdict(self) -> list[RenderableType]:
        lines = status_view.problems(self.now, self.last)
        more = len(lines) - MAX_PROBLEMS
        return [*lines[:MAX_PROBLEMS], *([Text(f"  and {more} more: headrace status")] if more > 0 else [])]

    def _counts(self, width: int) -> RenderableType:
        lanes = _columns("lane", "queued", "oldest", "+- per s")
        for lane in self.now.lanes:
            grows = self.rate(lambda seen, name=lane.name: _depth(seen, name))  # type: ignore[misc]
            style = "bold red" if any(lane.name == one.lane for one in health.problems(self.now)) else ""
            oldest = "-" if lane.oldest is None else durations.format_short(lane.oldest)
            lanes.add_row(lane.name, f"{lane.messages:,}", oldest, _signed(grows), style=style)
        deliveries = _columns("deliveries", "per s", "last hour", "total")
        for row in self.now.deliveries:
            came = self.rate(lambda seen, name=row["outcome"]: _outcome(seen, name))  # type: ignore[misc]
            deliveries.add_row(row["outcome"], _number(came), f"{row['last_hour']:,}", f"{row['total']:,}")
        both = Table.grid(padding=(0, 6 if width >= WIDE else 2, 0, 0))
        both.add_row(lanes, deliveries)
        return both

    def _facts(self) -> RenderableType:
        facts = ["from 202 to row: no deliveries in 5 min"]
        if self.now.delay:
            median = durations.format_short(timedelta(seconds=self.now.delay.median))
            p99 = durations.format_short(timedelta(seconds=self.now.delay.p99))
            facts = [f"from 202 to row: median {median}, p99 {p99}"]
        if self.now.swept is not None:
            facts.append(f"last sweep {durations.format_short(self.now.swept)} ago")
        return Text(" · ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")

    def _sections(self, width: int) -> Iterator[Section]:
        now = self.now
        paused = [(one["account"], f"for {one['seconds_left']} s", one["because_of"]) for one in now.pauses]
        yield Section("Paused accounts", paused)
        counts = [f"{row['backfills']:,} {row['status']}" for row in now.backfills]
        if (records := self.rate(_records)) is not None:
            counts.append(f"{_number(records)} records/s")
        furthest = sorted(now.open_backfills, key=lambda one: (one.status != "running", -one.share))
        bars = [_bar(one, width) for one in furthest]
        title = f"Backfills: {' · '.join(counts)}" if now.backfills else ""
        yield Section(title, bars, "headrace backfill list", stands_alone=True)
        broken = [
            (row["user_id"], row["provider"], f"{row['since']:%m-%d %H:%M}", row["error"] or "")
            for row in reversed(now.connections_in_error)  # the newest first
        ]
        yield Section(f"Connections in error: {len(broken):,}", broken, "headrace status")
        dead_letters = [(f"{row['dead_letters']:,}", row["reason"]) for row in now.dead_letters]
        total = sum(row["dead_letters"] for row in now.dead_letters)
        yield Section(f"Dead letters: {total:,}", dead_letters, "headrace dead list")
        gaps = [(row["whose"], f"{row['gaps']:,} gaps", f"{row['people']:,} people") for row in now.gaps]
        yield Section("Gaps, by responsible party", gaps, "headrace status")


def _fitted(sections: Sequence[Section], lines: int) -> Iterator[RenderableType]:
    """Fills `lines` lines: every title first, then one row of each section in turn."""
    shown = [one for one in sections if one.title and (one.rows or one.stands_alone)][: max(lines, 0)]
    room = lines - len(shown)
    counts = [0] * len(shown)
    while room > 0 and any(count < len(one.rows) for count, one in zip(counts, shown, strict=True)):
        for n, one in enumerate(shown):
            if room > 0 and counts[n] < len(one.rows):
                counts[n], room = counts[n] + 1, room - 1
    for count, one in zip(counts, shown, strict=True):
        cut = f" (all: {one.full_list})" if count < len(one.rows) and one.full_list else ""
        yield Text(one.title, style="bold", no_wrap=True, overflow="ellipsis").append(cut, style="dim")
        if count:
            yield _grid(one.rows[:count])


def _grid(rows: Sequence[ChartRow]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in rows[0]:
        grid.add_column(no_wrap=True, overflow="ellipsis")
    for row in rows:
        grid.add_row(*row)
    return grid


def _columns(first: str, *numbers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _bar(one: Backfill, width: int) -> ChartRow:
    wide = width >= WIDE
    about = f"{one.provider or 'any'} {one.resource}"[:NAME_WIDTH]
    whose = [one.user_id[:8]] if wide else []  # enough to distinguish users; the full list shows whole ids
    bar = ProgressBar(total=1, completed=one.share, width=BAR_WIDTH * (2 if wide else 1))
    rate = "" if one.rate is None else f"{_number(one.rate)}/s"
    records = f"{one.records:,}" + (" records" if wide else "")
    how = (f"{one.share:.0%}", records, rate, durations.format_duration(one.left) if one.left else one.status)
    return (str(one.id), *whose, about, bar, *how)


def _depth(seen: Status, name: str) -> int:
    return sum(lane.messages for lane in seen.lanes if lane.name == name)


def _outcome(seen: Status, name: str) -> int:
    return sum(row["total"] for row in seen.deliveries if row["outcome"] == name)


def _records(seen: Status) -> int:
    return sum(row["records"] for row in seen.backfills)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+,.0f}" if abs(value) >= 10 else f"{value:+.1f}"
