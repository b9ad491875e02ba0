"""`headrace status --watch`: the refreshing dashboard, fitted to the terminal."""

import http.client
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from urllib.error import HTTPError
from urllib.request import urlopen

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy import Engine

from app.config.settings import Settings
from app.errors import TryLater
from app.observability import metrics
from workers import broker_admin
from workers.fetch.rate_limits import Failures, Pause, failures, pauses
from workers.operate import health, status_view
from workers.operate.durations import format_duration, format_short
from workers.operate.health import Away, Endpoint, Problem, Status
from workers.store import status
from workers.store.backfill_admin import Backfill
from workers.store.status import OutcomeCounter

RATE_SECONDS = 10.0  # longest time over which a rate is computed: short enough to follow changes, long enough to smooth
ENDPOINT_SECONDS = 2.0
WIDE = 110  # columns; narrower terminals get shorter names and bars
BAR_WIDTH, NAME_WIDTH = 12, 28
MAX_PROBLEM_LINES = 8
URGENCY = ("running", "pending", "failed", "paused", "complete", "cancelled")  # of the states of backfills


class Watcher:
    """Takes snapshots, and keeps the recent ones to compute rates."""

    def __init__(self, engine: Engine, settings: Settings, web: str | None = None) -> None:
        self._engine, self._settings, self._web = engine, settings, web
        self._ledger = OutcomeCounter()
        self._seen: deque[Status] = deque()

    def poll(self) -> Status:
        """A snapshot. Raises TryLater if a service cannot be reached."""
        return self._read(None)

    def page(self) -> "Dashboard":
        """Like `poll`, with rates. Services that cannot be reached are listed on the page."""
        now = self._read([])
        while len(self._seen) > 1 and (now.at - self._seen[1].at).total_seconds() >= RATE_SECONDS:
            self._seen.popleft()
        self._seen.append(now)
        return Dashboard(now, self._seen[0], self._seen[-2] if len(self._seen) > 1 else None)

    def _read(self, away: list[Away] | None) -> Status:
        """Reads broker and database independently; the part of one that is added to `away` stays empty."""
        found, lanes = Status(), list[broker_admin.Lane]()
        accounts: tuple[list[Pause], list[Failures]] = [], []
        with _listed_in(away):
            lanes = broker_admin.lanes(self._settings)
            if self._settings.has_redis:
                accounts = pauses(self._settings), failures(self._settings)
        with _listed_in(away, "DATABASE_URL"):
            days = self._settings.feed_days
            found = status_view.read(self._engine, lanes, accounts[0], accounts[1], self._ledger, feed_days=days)
        found = replace(found, lanes=lanes, endpoint=scrape(self._web) if self._web else None, away=tuple(away or ()))
        if not self._settings.fetch_history:
            found = replace(found, idle=0)
        if found.is_outage:  # not otherwise, because the query reads two days of the ledger
            with suppress(TryLater):
                found = replace(found, since_last_delivery=status.since_last_delivery(self._engine))
        return found


@contextmanager
def _listed_in(away: list[Away] | None, setting: str = "") -> Iterator[None]:
    """Adds a service that cannot be reached to the list. Raises TryLater without one."""
    try:
        yield
    except TryLater as reason:
        if away is None:
            raise
        away.append(Away(setting or reason.setting, str(reason)))


def scrape(url: str) -> Endpoint:
    """Reads /metrics and /readyz of the operations port. Never raises on network errors."""
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
    """A part of the page that is cut to fit. The most important rows come first.

    Without rows, or without room for one, a title that holds a count moves to the last line of the page.
    """

    title: str
    rows: Sequence[ChartRow] = ()
    full_list: str = ""  # the command that shows all rows


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
        plain = options.reset_height()
        counts = [Text(), self._counts(options.max_width), self._facts(), Text()]
        shown = self._problems(lambda part: len(console.render_lines(part, plain, pad=False)))
        head = [self._title(), *(line for line, _ in shown), *counts]
        used = sum(len(console.render_lines(part, plain, pad=False)) for part in head)
        yield from head
        sections = self._sections(options.max_width, {one.reason for _, one in shown if one and one.reason})
        yield from _fitted(list(sections), (options.height or console.height) - used)

    def rate(self, name: str) -> float | None:
        """The growth of a total per second; None on the first page."""
        seconds = (self.now.at - self.since.at).total_seconds()
        return (_totals(self.now)[name] - _totals(self.since)[name]) / seconds if seconds > 0 else None

    def _title(self) -> RenderableType:
        line = Table.grid(Column(ratio=1), Column(justify="right"), expand=True)
        line.add_row(status_view.verdict(self.now, self.last), f"headrace status, {self.now.at:%H:%M:%S} UTC")
        return line

    def _problems(self, height: Callable[[RenderableType], int]) -> list[tuple[RenderableType, Problem | None]]:
        """The lines about the worst problems, each with its problem if it is about one."""
        lines = status_view.problems(self.now, self.last)
        found: list[tuple[RenderableType, Problem | None]] = []
        room = MAX_PROBLEM_LINES
        for place, one in enumerate(lines, 1):
            room -= height(one[0])
            if room < (place < len(lines)):  # one line is left for the number of those that follow
                return [*found, (Text(f"  and {len(lines) - place + 1} more: headrace status"), None)]
            found.append(one)
        return found

    def _counts(self, width: int) -> RenderableType:
        more = ("unacked", "retried") if width >= WIDE else ()
        lanes = _columns("lane", "queued", "oldest", "+- per s", *more)
        for lane in self.now.lanes:
            style = "bold red" if any(lane.name == one.lane for one in health.problems(self.now)) else ""
            unacked = "-" if lane.unacked is None else f"{lane.unacked:,}"
            values = [f"{lane.messages:,}", format_short(lane.oldest), _number(self.rate(lane.name), "+")]
            values += [unacked, f"{lane.retrying:,}"] if more else []
            lanes.add_row(lane.name, *values, style=style)
        deliveries = _columns("deliveries", "per s", "last hour", "total")
        for row in self.now.deliveries:
            name, rate = row["outcome"], _number(self.rate(row["outcome"]))
            deliveries.add_row(name, rate, f"{row['last_hour']:,}", f"{row['total']:,}")
        both = Table.grid(padding=(0, 6 if width >= WIDE else 2, 0, 0))
        both.add_row(lanes, deliveries)
        return both

    def _facts(self) -> RenderableType:
        facts = ["from 202 to row: no deliveries in 5 min"]
        if self.now.delay:
            median, p99 = format_short(self.now.delay.median), format_short(self.now.delay.p99)
            facts = [f"from 202 to row: median {median}, p99 {p99}"]
        if self.now.swept is not None:
            facts.append(f"last sweep {format_short(self.now.swept)} ago")
        return Text(" · ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")

    def _sections(self, width: int, reported: set[str]) -> Iterator[Section]:
        """The sections, without the rows whose reason a problem above has `reported`."""
        now = self.now
        paused = [(row,) for row in _paused(now, reported)]
        yield Section(_counted("Paused accounts", len(paused)), paused, "headrace status")
        counts = [
            f"{row['backfills']:,} {row['status']}"
            for row in sorted(now.backfills, key=lambda row: URGENCY.index(row["status"]))
        ]
        if (records := self.rate("records")) is not None:
            counts.append(f"{_number(records)} records/s")
        furthest = sorted(now.open_backfills, key=lambda one: (one.status != "running", -one.share))
        bars = [_bar(one, width) for one in furthest]
        title = f"Backfills: {' · '.join(counts)}" if now.backfills else ""
        yield Section(title, bars, "headrace backfill list")
        broken = Counter((row["provider"], row["error"] or "") for row in now.connections_in_error)
        rows = [(f"{count:,} {provider}: {error}",) for (provider, error), count in broken.most_common()]
        yield Section(_counted("Connections in error", broken.total()), rows, "headrace status")
        for title, found, count in (
            ("Dead letters", now.dead_letters, "dead_letters"),
            ("Refused items", now.refused_items, "items"),
        ):
            rest = [(f"{row[count]:,} {row['reason']}",) for row in found if row["reason"] not in reported]
            yield Section(_counted(title, sum(row[count] for row in found)), rest, "headrace dead list")
        gaps = [(f"{row['whose']}: {row['gaps']:,} gaps of {row['people']:,} people",) for row in now.gaps]
        yield Section(_counted("Gaps", sum(row["gaps"] for row in now.gaps)), gaps, "headrace status")


def _paused(now: Status, reported: set[str]) -> Iterator[str]:
    """A line for each account and reason, however many of its users are paused."""
    left = defaultdict[tuple[str, str, str], list[float]](list)
    for one in now.pauses:
        if one["because_of"] not in reported:
            account = one["account"].partition("/")[0]
            left[account, one["because_of"], health.key_note(one)].append(one["seconds_left"])
    for (account, reason, note), seconds in left.items():
        users = f" ({len(seconds):,} pauses)" if len(seconds) > 1 else ""
        longest = format_duration(max(seconds))
        yield f"{account} for {longest}: {reason}{users}" + (f" ({note})" if note else "")


def _counted(title: str, count: int) -> str:
    return f"{title}: {count:,}" if count else ""


def _fitted(sections: Sequence[Section], lines: int) -> Iterator[RenderableType]:
    """Fills `lines` lines: each section that fits with its title and one row, then one more row of each in turn."""
    shown = [one for one in sections if one.title and one.rows]
    titles = [one.title for one in sections if one.title and not one.rows]
    while shown and 2 * len(shown) + bool(titles) > lines:
        titles.insert(0, shown.pop().title)
    room = lines - 2 * len(shown) - bool(titles)
    counts = [1] * len(shown)
    while room > 0 and any(count < len(one.rows) for count, one in zip(counts, shown, strict=True)):
        for n, one in enumerate(shown):
            if room > 0 and counts[n] < len(one.rows):
                counts[n], room = counts[n] + 1, room - 1
    for count, one in zip(counts, shown, strict=True):
        cut = f" (all: {one.full_list})" if count < len(one.rows) and one.full_list else ""
        yield Text(one.title, style="bold", no_wrap=True, overflow="ellipsis").append(cut, style="dim")
        yield _grid(one.rows[:count])
    if titles and lines > 0:
        yield Text(" · ".join(titles), style="dim", no_wrap=True, overflow="ellipsis")


def _grid(rows: Sequence[ChartRow]) -> Table:
    grid = Table.grid(*(Column(no_wrap=True, overflow="ellipsis") for _ in rows[0]), padding=(0, 2, 0, 0))
    for row in rows:
        grid.add_row(*row)
    return grid


def _columns(first: str, *numbers: str) -> Table:
    columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
    return Table(Column(first, no_wrap=True), *columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)


def _bar(one: Backfill, width: int) -> ChartRow:
    wide = width >= WIDE
    about = f"{one.provider or 'any'} {one.resource}"[:NAME_WIDTH]
    whose = [one.user_id[:8]] if wide else []  # enough to distinguish users; the full list shows whole ids
    bar = ProgressBar(total=1, completed=one.share, width=BAR_WIDTH * (2 if wide else 1))
    rate = "" if one.rate is None else f"{_number(one.rate)}/s"
    records = f"{one.records:,}" + (" records" if wide else "")
    how = (f"{one.share:.0%}", records, rate, format_duration(one.left) if one.left else one.status)
    return (str(one.id), *whose, about, bar, *how)


def _totals(seen: Status) -> Counter[str]:
    """Messages by lane, deliveries by outcome, and the records of backfills."""
    found = Counter({lane.name: lane.messages for lane in seen.lanes})
    found.update({row["outcome"]: row["total"] for row in seen.deliveries})
    found["records"] = sum(row["records"] for row in seen.backfills)
    return found


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign},.0f}" if abs(value) >= 10 else f"{value:{sign}.1f}"
