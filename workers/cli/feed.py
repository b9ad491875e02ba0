"""`headrace feed`: named consumers of the change feed."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Engine

from workers.cli import options, output
from workers.store import consumers
from workers.store.consumers import To
from workers.store.engine import make_engine, transaction

PAGE = 1000

consumer_option = click.option("--consumer", "name", required=True, help="the name of the consumer")


@click.group()
def feed() -> None:
    """Read the change feed.

    It lists what has changed in the tables, in order, each change exactly once. A program can also read the view
    health.changes with SQL.
    """


@feed.command("list")
@options.data_dir_option
@options.json_option
def list_(*, data_dir: Path | None, as_json: bool) -> None:
    """List the consumers with their position and lag."""
    with transaction(_engine(data_dir)) as connection:
        found = consumers.consumers(connection)
    now = datetime.now(UTC)
    rows = [
        {
            "consumer": one.name,
            "position": one.position,
            "lag": one.changes,
            "lag_seconds": round((now - one.since).total_seconds(), 1) if one.since else 0.0,
            "moved_at": one.moved_at,
            "state": "dropped" if one.is_dropped else "ok",
        }
        for one in found
    ]
    output.print_rows(rows, as_json=as_json)


@feed.command()
@consumer_option
@click.option("--limit", type=click.IntRange(1, 100_000), default=PAGE, show_default=True, help="changes to read")
@click.option("--follow", is_flag=True, help="print new changes until Ctrl-C")
@options.data_dir_option
@options.json_option
def read(*, name: str, limit: int, follow: bool, data_dir: Path | None, as_json: bool) -> None:
    """Print the next changes of a consumer. `ack` moves its position; without it, they are printed again.

    A new consumer starts at the oldest change. With --json, each line is one change. Exit status 3: changes were
    dropped before the consumer read them.
    """
    engine = _engine(data_dir)
    show = _as_json if as_json else _as_text
    found = consumers.read(engine, name, limit)
    _print(found, show)
    if follow:
        position = found[-1]["position"] if found else _position(engine, name)
        for page in consumers.follow(engine, name, position, limit):
            _print(page, show)


@feed.command()
@consumer_option
@click.argument("position", type=click.IntRange(0))
@options.data_dir_option
def ack(*, name: str, position: int, data_dir: Path | None) -> None:
    """Move a consumer to POSITION: it has processed this change and all before it."""
    consumers.acknowledge(_engine(data_dir), name, position)


class _To(click.ParamType[To]):
    name = "start|now|POSITION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> To:
        if value in ("start", "now") or isinstance(value, int):
            place: To = value
            return place
        if value.isascii() and value.isdigit():
            return int(value)
        return self.fail(f"{value!r} is not `start`, `now` or a position", param, ctx)


@feed.command()
@consumer_option
@click.option("--to", required=True, type=_To(), help="the oldest change, the end of the feed, or a position")
@options.data_dir_option
def reset(*, name: str, to: To, data_dir: Path | None) -> None:
    """Set the position of a consumer, which may be new."""
    click.echo(f"consumer {name} continues after position {consumers.reset(_engine(data_dir), name, to)}")


@feed.command()
@consumer_option
@options.data_dir_option
def remove(*, name: str, data_dir: Path | None) -> None:
    """Remove a consumer. Its lag is no longer reported."""
    consumers.remove(_engine(data_dir), name)


def _engine(data_dir: Path | None) -> Engine:
    return make_engine(options.attached(data_dir, broker=False), "headrace-feed-reader")


def _position(engine: Engine, name: str) -> int:
    with transaction(engine) as connection:
        return next(one.position for one in consumers.consumers(connection) if one.name == name)


def _print(changes: Any, show: Callable[[Mapping[str, Any]], str]) -> None:
    for one in changes:
        click.echo(show(one))


def _as_json(change: Mapping[str, Any]) -> str:
    return json.dumps(change, default=datetime.isoformat)


def _as_text(change: Mapping[str, Any]) -> str:
    what = change["id"] or ""
    if change["ts_min"]:
        what = f"{change['ts_min']:%Y-%m-%d %H:%M:%S} to {change['ts_max']:%Y-%m-%d %H:%M:%S}"
    source = "/".join(filter(None, (change["provider"], change["source_type"])))
    parts = (change["op"], change["user_id"], change["resource"] or "", source, what, f"{change['rows']} rows")
    return f"{change['position']}  {change['changed_at']:%Y-%m-%d %H:%M:%S}  " + "  ".join(filter(None, parts))
