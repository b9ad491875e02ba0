"""`headrace feed`: named consumers of the change feed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import click

from workers.cli import output
from workers.cli.deployment import Deployment, deployment_option, query_options
from workers.store import consumers

PAGE = 1000

consumer_option = click.option("--consumer", "name", required=True, help="the name of the consumer")


@click.group()
def feed() -> None:
    """Read the change feed.

    It lists what has changed in the tables, in order, each change exactly once. A program can also read the view
    health.changes with SQL.
    """


@feed.command("list")
@query_options
def list_(*, deployment: Deployment) -> None:
    """List the consumers with their position and lag."""
    with deployment.transaction() as connection:
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
    output.print_rows(rows)


@feed.command()
@consumer_option
@click.option("--limit", type=click.IntRange(1, 100_000), default=PAGE, show_default=True, help="changes to read")
@click.option("--follow", is_flag=True, help="print new changes until Ctrl-C")
@query_options
def read(*, name: str, limit: int, follow: bool, deployment: Deployment) -> None:
    """Print the next changes of a consumer. `ack` moves its position; without it, they are printed again.

    A new consumer starts at the oldest change. With --json, each line is one change. Exit status 3: changes were
    dropped before the consumer read them.
    """
    show = _as_json if output.is_json() else _as_text
    engine = deployment.engine
    found = consumers.read(engine, name, limit)
    position = found[-1]["position"] if found else _position(deployment, name) or 0
    following = consumers.follow(engine, name, position, limit) if follow else ()
    for change in itertools.chain(found, itertools.chain.from_iterable(following)):
        click.echo(show(change))


@feed.command()
@consumer_option
@click.argument("position", type=click.IntRange(0))
@deployment_option
def ack(*, name: str, position: int, deployment: Deployment) -> None:
    """Move a consumer to POSITION: it has processed this change and all before it."""
    engine = deployment.engine
    consumers.acknowledge(engine, name, position)


def _place(value: Any) -> consumers.To:
    """Raises click.BadParameter."""
    if value in ("start", "now"):
        place: consumers.To = value
        return place
    if value.isascii() and value.isdigit():
        return int(value)
    raise click.BadParameter(f"{value!r} is not `start`, `now` or a position")


@feed.command()
@consumer_option
@click.option(
    "--to",
    required=True,
    type=_place,
    metavar="start|now|POSITION",
    help="the oldest change, the end of the feed, or a position",
)
@deployment_option
def reset(*, name: str, to: consumers.To, deployment: Deployment) -> None:
    """Set the position of a consumer, which may be new. Prints the position before and after."""
    before = _position(deployment, name)
    after = consumers.reset(deployment.engine, name, to)
    click.echo(f"consumer {name} continues after position {after}{'' if before is None else f', it was at {before}'}")


@feed.command()
@consumer_option
@deployment_option
def remove(*, name: str, deployment: Deployment) -> None:
    """Remove a consumer, whose lag is then no longer reported. Prints its position, for `reset`."""
    position = _position(deployment, name)
    consumers.remove(deployment.engine, name)
    click.echo(f"removed consumer {name}, which was at position {position}")


def _position(deployment: Deployment, name: str) -> int | None:
    """The position of a consumer; None if it does not exist."""
    with deployment.transaction() as connection:
        return next((one.position for one in consumers.consumers(connection) if one.name == name), None)


def _as_json(change: Mapping[str, Any]) -> str:
    return json.dumps(change, default=datetime.isoformat)


def _as_text(change: Mapping[str, Any]) -> str:
    what = change["id"] or ""
    if change["ts_min"]:
        what = f"{change['ts_min']:%Y-%m-%d %H:%M:%S} to {change['ts_max']:%Y-%m-%d %H:%M:%S}"
    source = "/".join(filter(None, (change["provider"], change["source_type"])))
    parts = (change["op"], change["user_id"], change["resource"] or "", source, what, f"{change['rows']} rows")
    return f"{change['position']}  {change['changed_at']:%Y-%m-%d %H:%M:%S}  " + "  ".join(filter(None, parts))
