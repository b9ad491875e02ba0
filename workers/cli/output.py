"""What commands print: tables, JSON, durations, and views that refresh."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timedelta
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

MAX_REFRESH_SHARE = 4  # times as long as it took


def can_answer() -> bool:
    """Whether somebody is there to be asked: a program that runs a command is not."""
    return sys.stdin.isatty()


def console() -> Console:
    """A terminal; into a file or a pipe, tables are as wide as they are, and not cut at 80."""
    # What a provider says may hold brackets and colons, which are no markup.
    return Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Plain values, dataclasses, times as ISO 8601 and durations in seconds."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """A table, or a list of objects."""
    if as_json:
        print_json(list(rows))
    elif rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        console().print(table)


def live_view(picture: Callable[[], RenderableType], every: float) -> None:
    """Shows a picture until Ctrl-C: on a terminal in place, elsewhere again and again.

    A look that takes long is taken less often: whoever watches must not be what is wrong.
    """
    screen = console()
    with contextlib.suppress(KeyboardInterrupt):
        shown, took = _timed(picture)
        if not screen.is_terminal:
            while True:
                screen.print(shown)
                time.sleep(max(every, MAX_REFRESH_SHARE * took))
                shown, took = _timed(picture)
        with Live(shown, console=screen, screen=True) as live:
            while True:
                time.sleep(max(every, MAX_REFRESH_SHARE * took))
                shown, took = _timed(picture)
                live.update(shown, refresh=True)


def _timed(picture: Callable[[], RenderableType]) -> tuple[RenderableType, float]:
    began = time.monotonic()
    return picture(), time.monotonic() - began


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(type(value).__name__)
