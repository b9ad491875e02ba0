"""What commands print: tables, JSON, progress, and views that refresh."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

import click
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from workers.cli.options import JSON

MAX_REFRESH_SHARE = 4  # a pause lasts at least this many times as long as a refresh
LINE_SECONDS = 10  # between two lines of progress without a terminal


def can_answer() -> bool:
    """Whether standard input is a terminal, so that a question can be answered."""
    return sys.stdin.isatty()


def require_answer(*, yes: bool) -> None:
    """Raises click.UsageError if a command that deletes data cannot ask and --yes is missing."""
    if not (yes or can_answer()):
        raise click.UsageError("standard input is not a terminal, so the command cannot ask: add --yes to confirm")


def confirm(question: str, *, yes: bool) -> None:
    """Asks unless `yes` is set. Raises click.Abort on any answer but yes, and click.UsageError without a terminal."""
    require_answer(yes=yes)
    if not yes:
        click.confirm(question, abort=True)


def console() -> Console:
    """Standard output. In a file or pipe, tables are up to 200 columns wide instead of 80."""
    # A provider's error text may contain brackets and colons, which are not markup.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)


def is_json() -> bool:
    """Whether the running command has the option --json."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(JSON))


def show(plain: Any, text: str | Iterable[str]) -> None:
    """Prints the plain value as JSON with --json, otherwise the text or its lines."""
    if is_json():
        print_json(plain)
    else:
        click.echo(text if isinstance(text, str) else "\n".join(text))


def print_json(value: Any) -> None:
    """Plain values, dataclasses, times as ISO 8601 and durations in seconds."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def print_rows(rows: Sequence[Mapping[str, Any]], plain: Sequence[Any] | None = None, *, empty: str = "") -> None:
    """A table; with --json, a list of objects: `plain` or the rows. Without rows, the text of `empty`."""
    if is_json():
        print_json(list(rows if plain is None else plain))
    elif not rows:
        click.echo(empty, nl=bool(empty))
    else:
        table = Table()
        for name in rows[0]:  # ids stay whole for the next command; other cells are wrapped
            least = max(len(_cell(row[name])) for row in rows) if name == "id" else None
            table.add_column(name, overflow="fold", min_width=least)
        for row in rows:
            table.add_row(*map(_cell, row.values()))
        console().print(table)


def print_list(rows: Sequence[Mapping[str, Any]], title: str, limit: int | None = None) -> None:
    """A part of a report: a title and the first rows; nothing without rows."""
    if rows:
        click.echo(f"\n{title}")
        print_rows(rows[:limit])
        if limit and len(rows) > limit:
            click.echo(f"and {len(rows) - limit} more; --json lists all")


def print_fields(fields: Mapping[str, Any]) -> None:
    """A line for each field, with the values in one column; with --json, an object."""
    width = max(map(len, fields))
    values = {name: " ".join(value) if isinstance(value, list) else value for name, value in fields.items()}
    show(fields, (f"{name.replace('_', ' '):{width}} {value}" for name, value in values.items()))


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    return "" if value is None else str(value)


class Update(Protocol):
    def __call__(self, done: float, total: float | None = None, *, phase: str = "", detail: str = "") -> None: ...


@contextlib.contextmanager
def progress(phase: str, total: float | None = None, *, screen: Console | None = None) -> Iterator[Update]:
    """A bar on a terminal; elsewhere a line every LINE_SECONDS and at each new phase. Nothing with --json.

    Prints to standard error. The yielded function may change `phase` and `total`; `detail` replaces "done/total".
    """
    screen = screen or Console(stderr=True, quiet=is_json())
    detail_column = TextColumn("{task.fields[detail]}", markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), detail_column, TimeRemainingColumn())
    bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    task = bar.add_task(phase, total=total, detail="")
    current, due = phase, time.monotonic() + LINE_SECONDS

    def update(done: float, total: float | None = total, *, phase: str = "", detail: str = "") -> None:
        nonlocal current, due
        is_new, current = bool(phase) and phase != current, phase or current
        detail = detail or (f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}")
        if is_new:
            bar.reset(task)
        bar.update(task, description=current, completed=done, total=total, detail=detail)
        if not screen.is_terminal and (is_new or time.monotonic() >= due):
            due = time.monotonic() + LINE_SECONDS
            screen.print(f"{current}: {detail}", markup=False, highlight=False, soft_wrap=True)

    with bar:
        yield update


def live_view(render: Callable[[], RenderableType], every: float) -> None:
    """Refreshes a view until Ctrl-C: in place on a terminal, one below the other elsewhere.

    Slow views refresh less often, so that watching does not load the database.
    """
    screen = console()
    with contextlib.suppress(KeyboardInterrupt):
        shown, took = _timed(render)  # before the terminal is cleared, so that an error is visible
        with Live(shown, console=screen, screen=True) if screen.is_terminal else contextlib.nullcontext() as live:
            while True:
                if live is None:
                    screen.print(shown)
                time.sleep(max(every, MAX_REFRESH_SHARE * took))
                shown, took = _timed(render)
                if live is not None:
                    live.update(shown, refresh=True)


def _timed(render: Callable[[], RenderableType]) -> tuple[RenderableType, float]:
    began = time.monotonic()
    return render(), time.monotonic() - began


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(type(value).__name__)
