"""`headrace subscriptions`: subscribers of notifications."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
from sqlalchemy import Connection, Engine

from app.config.settings import Settings
from app.sealing import Sealer
from workers.cli import options, output
from workers.cli.options import Command, Moment
from workers.fetch.http import addresses
from workers.fetch.webhooks import Poster, PostResult, check_addresses, check_url
from workers.notify import planner
from workers.notify.retries import RETRY_DAYS
from workers.notify.signing import body_of_test, new_secret, open_secrets, seal_secret, signed_headers
from workers.store import audit, notifications
from workers.store import subscriptions as store
from workers.store.engine import make_engine, transaction
from workers.store.subscriptions import ROTATION_HOURS, Subscription, SubscriptionSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAX_WINDOW = 86_400
SHOWN = 10  # the newest notifications in `show`
PAUSED_BY = "paused by an operator"


class EventGlob(click.ParamType[str]):
    """A glob that matches at least one type of notification."""

    name = "glob"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        """Raises click.BadParameter, which suggests similar types."""
        types = planner.event_types()
        if not any(fnmatchcase(one, value) for one in types):
            near = options.did_you_mean(value, types) or "; examples: 'workouts.changed', 'sleep*', 'user.*'"
            self.fail(f"{value!r} matches no type of notification{near}", param, context)
        return str(value)


@click.group("subscriptions", cls=options.Group)
def subscriptions() -> None:
    """Send signed webhooks about new data to your programs. A notification names what changed, never a value."""


def _named(command: Command) -> Command:
    return options.data_dir_option(click.argument("name")(command))


@contextmanager
def _opened(data_dir: Path | None) -> Iterator[tuple[Settings, Engine]]:
    settings = options.attached(data_dir, broker=False)
    engine = make_engine(settings, "headrace-subscriptions")
    yield settings, engine
    engine.dispose()


@contextmanager
def _changing(data_dir: Path | None, name: str, action: str, **detail: Any) -> Iterator[tuple[Connection, Settings]]:
    """The transaction of a change of an existing subscription, with its entry in the audit log. Raises NotFound."""
    with _opened(data_dir) as (settings, engine), transaction(engine, confirm=True) as connection:
        store.find(connection, name)
        yield connection, settings
        audit.note(connection, f"subscriptions {action}", name, detail)


@subscriptions.command()
@_named
@click.option("--url", required=True, help="https URL of the subscriber; http for localhost only")
@click.option(
    "--event",
    "events",
    multiple=True,
    type=EventGlob(),
    help="types to send, e.g. 'workouts.*', repeatable (default: all)",
)
@click.option(
    "--window",
    type=click.IntRange(0, MAX_WINDOW),
    default=10,
    show_default=True,
    help="seconds in which changes of one person and resource become one notification",
)
@click.option("--allow-private", is_flag=True, help="permit addresses of private networks")
def add(
    *, name: str, url: str, events: tuple[str, ...], window: int, allow_private: bool, data_dir: Path | None
) -> None:
    """Add a subscription. Prints its signing secret, once.

    It begins with the next change. For older changes, use `headrace subscriptions resend --since`.
    """
    if not NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r} is not a name: use letters, digits, dots, hyphens and underscores (63)")
    host = check_url(url).host
    check_addresses(host, addresses(host), allow_private=allow_private)  # each request checks them again
    secret, new = new_secret(), SubscriptionSettings(name, url, events or ("*",), window, allow_private)
    with _opened(data_dir) as (settings, engine), transaction(engine, confirm=True) as connection:
        if not store.add(connection, new, seal_secret(Sealer(settings.encryption_keys), name, secret)):
            raise click.ClickException(f"a subscription {name!r} exists; headrace subscriptions list shows all")
        audit.note(connection, "subscriptions add", name, {"events": list(new.events), "allow_private": allow_private})
    click.echo(f"added {name}; it begins with the next change")
    click.echo(f"signing secret, shown only now: {secret}")


@subscriptions.command("list")
@options.data_dir_option
@options.json_option
def list_command(*, data_dir: Path | None, as_json: bool) -> None:
    """List the subscriptions."""
    with _opened(data_dir) as (_, engine), transaction(engine) as connection:
        found = store.listed(connection)
    if as_json:
        output.print_json([asdict(one) for one in found])
    elif not found:
        click.echo("no subscriptions; headrace subscriptions add creates one")
    else:
        output.print_rows([_row(one) for one in found])


def _row(one: Subscription) -> dict[str, Any]:
    return {
        "name": one.name,
        "url": one.url,
        "events": " ".join(one.events),
        "status": one.status if not one.failures else f"{one.status}, failing",
        "pending": one.pending,
        "dead": one.dead,
        "behind": one.behind,
        "last sent": one.last_sent,
        "reason": one.reason or one.last_error,
    }


@subscriptions.command()
@_named
@options.json_option
def show(*, name: str, data_dir: Path | None, as_json: bool) -> None:
    """Show a subscription and its newest notifications, without the secret."""
    with _opened(data_dir) as (_, engine), transaction(engine) as connection:
        found = store.find(connection, name)
        newest = notifications.of_subscription(connection, name, SHOWN)
    if as_json:
        output.print_json(asdict(found) | {"notifications": [asdict(one) for one in newest]})
        return
    for key, value in asdict(found).items():
        click.echo(f"{key.replace('_', ' '):15} {' '.join(value) if isinstance(value, list) else value}")
    output.print_rows(
        [
            {
                "id": one.id,
                "type": one.type,
                "user": one.user_id,
                "rows": one.row_count,
                "due": one.due_at,
                "status": one.status,
                "attempts": one.attempts,
                "last error": one.last_error,
            }
            for one in newest
        ]
    )


@subscriptions.command()
@_named
def pause(*, name: str, data_dir: Path | None) -> None:
    """Pause a subscription. When resumed, it continues at the same place of the feed."""
    with _changing(data_dir, name, "pause") as (connection, _):
        store.pause(connection, name, PAUSED_BY)
    click.echo(f"paused {name}")


@subscriptions.command()
@_named
def resume(*, name: str, data_dir: Path | None) -> None:
    """Resume a subscription that an operator or a 410 paused, or retry a failing endpoint now."""
    with _changing(data_dir, name, "resume") as (connection, _):
        store.resume(connection, name, RETRY_DAYS)
    click.echo(f"resumed {name}")


@subscriptions.command()
@_named
def rotate(*, name: str, data_dir: Path | None) -> None:
    """Replace the signing secret. Prints the new secret, once. For 24 hours the old one also signs."""
    secret = new_secret()
    with _changing(data_dir, name, "rotate") as (connection, settings):
        store.rotate(connection, name, seal_secret(Sealer(settings.encryption_keys), name, secret))
    click.echo(f"rotated {name}; the old secret also signs for {ROTATION_HOURS} hours")
    click.echo(f"signing secret, shown only now: {secret}")


@subscriptions.command()
@_named
def remove(*, name: str, data_dir: Path | None) -> None:
    """Remove a subscription with its notifications."""
    with _changing(data_dir, name, "remove") as (connection, _):
        store.remove(connection, name)
    click.echo(f"removed {name}")


@subscriptions.command("test")
@_named
def test_command(*, name: str, data_dir: Path | None) -> None:
    """Send one signed notification of type subscription.test now, from this machine."""
    with _opened(data_dir) as (settings, engine):
        with transaction(engine) as connection:
            found = store.find(connection, name)
            sealed = store.sealed_secrets(connection, found.id)
        secrets = open_secrets(Sealer(settings.encryption_keys), name, sealed)
        audit.record(engine, "subscriptions test", name, {})
    result = asyncio.run(_post_test(found, secrets))
    if result.error:
        raise click.ClickException(f"the test notification was not accepted: {result.error}")
    click.echo(f"{name} accepted the test notification (status {result.status})")


async def _post_test(to: Subscription, secrets: Sequence[str]) -> PostResult:
    now = datetime.now(UTC)
    body = body_of_test(to.name, now)
    async with Poster() as poster:
        headers = signed_headers(f"msg_{uuid4().hex}", body, secrets, now)
        return await poster.post(to.url, headers, body, allow_private=to.allow_private)


@subscriptions.command()
@_named
@click.option(
    "--since", required=True, type=Moment(), help="notifications created, or changes made, at or after this time"
)
@click.option("--dead", is_flag=True, help="only dead notifications, not accepted ones")
def resend(*, name: str, since: datetime, dead: bool, data_dir: Path | None) -> None:
    """Send notifications again, with the same ids.

    Also sends notifications of changes from before the subscription was added, as far back as the feed reaches.
    """
    with _opened(data_dir) as (_, engine):
        with transaction(engine) as connection:
            found = store.find(connection, name)
        click.echo(planner.resend(engine, found, since, only_dead=dead))
    if found.status == "paused":
        click.echo(f"{name} is paused; headrace subscriptions resume {name} starts it", err=True)
