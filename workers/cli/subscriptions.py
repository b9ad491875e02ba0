"""`headrace subscriptions`: subscribers of notifications."""

from __future__ import annotations

import asyncio
import fnmatch
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import click

from app.sealing import Sealer
from workers.cli import options, output
from workers.cli.deployment import Deployment, deployment_option, query_options
from workers.cli.options import Command
from workers.fetch import http, webhooks
from workers.notify import planner, retries, signing
from workers.store import audit, notifications
from workers.store import subscriptions as store

if TYPE_CHECKING:
    from sqlalchemy import Connection

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
MAX_WINDOW = 86_400
SHOWN = 10  # the newest notifications in `show`
PAUSED_BY = "paused by an operator"


def event_glob(value: str) -> str:
    """The type of a glob of notifications' types. Raises click.BadParameter, which suggests similar types."""
    types = planner.event_types()
    if not fnmatch.filter(types, value):
        near = options.did_you_mean(value, types, "; examples: 'workouts.changed', 'sleep*', 'user.*'")
        raise click.BadParameter(f"{value!r} matches no type of notification{near}")
    return value


@click.group("subscriptions", cls=options.Group)
def subscriptions() -> None:
    """Send signed webhooks about new data to your programs. A notification names what changed, never a value."""


def _named(command: Command) -> Command:
    return deployment_option(click.argument("name")(command))


@contextmanager
def _changing(deployment: Deployment, name: str, action: str) -> Iterator[Connection]:
    """The transaction of a change of an existing subscription, with its entry in the audit log. Raises NotFound."""
    with deployment.transaction(confirm=True) as connection:
        store.find(connection, name)
        yield connection
        audit.note(connection, f"subscriptions {action}", name, {})


def _new_secret(deployment: Deployment, name: str) -> tuple[str, bytes]:
    """A signing secret, in the clear and sealed."""
    sealer = Sealer(deployment.settings.encryption_keys)
    secret = signing.new_secret()
    return secret, signing.seal_secret(sealer, name, secret)


@subscriptions.command()
@_named
@click.option("--url", required=True, help="https URL of the subscriber; http for localhost only")
@click.option(
    "--event",
    "events",
    multiple=True,
    type=event_glob,
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
    *, name: str, url: str, events: tuple[str, ...], window: int, allow_private: bool, deployment: Deployment
) -> None:
    """Add a subscription. Prints its signing secret, once.

    It begins with the next change. For older changes, use `headrace subscriptions resend --since`.
    """
    if not NAME.fullmatch(name):
        raise click.BadParameter(f"{name!r} is not a name: use letters, digits, dots, hyphens and underscores (63)")
    secret, sealed = _new_secret(deployment, name)
    host = webhooks.check_url(url).host
    webhooks.check_addresses(host, http.addresses(host), allow_private=allow_private)  # each request checks them again
    new = store.SubscriptionSettings(name, url, events or ("*",), window, allow_private)
    with deployment.transaction(confirm=True) as connection:
        if not store.add(connection, new, sealed):
            raise click.ClickException(f"a subscription {name!r} exists; headrace subscriptions list shows all")
        audit.note(connection, "subscriptions add", name, {"events": list(new.events), "allow_private": allow_private})
    click.echo(f"added {name}; it begins with the next change")
    click.echo(f"signing secret, shown only now: {secret}")


@subscriptions.command("list")
@query_options
def list_command(*, deployment: Deployment) -> None:
    """List the subscriptions."""
    with deployment.transaction() as connection:
        found = store.listed(connection)
    rows, plain = [_row(one) for one in found], [asdict(one) for one in found]
    output.print_rows(rows, plain, empty="no subscriptions; headrace subscriptions add creates one")


def _row(one: store.Subscription) -> dict[str, Any]:
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
def show(*, name: str, deployment: Deployment) -> None:
    """Show a subscription and its newest notifications, without the secret."""
    with deployment.transaction() as connection:
        found = store.find(connection, name)
        newest = notifications.of_subscription(connection, name, SHOWN)
    if output.is_json():
        output.print_json(asdict(found) | {"notifications": [asdict(one) for one in newest]})
        return
    output.print_fields(asdict(found))
    output.print_rows([_notification_row(one) for one in newest])


def _notification_row(one: notifications.Notification) -> dict[str, Any]:
    return {
        "id": one.id,
        "type": one.type,
        "user": one.user_id,
        "rows": one.row_count,
        "due": one.due_at,
        "status": one.status,
        "attempts": one.attempts,
        "last error": one.last_error,
    }


@subscriptions.command()
@_named
def pause(*, name: str, deployment: Deployment) -> None:
    """Pause a subscription. When resumed, it continues at the same place of the feed."""
    with _changing(deployment, name, "pause") as connection:
        store.pause(connection, name, PAUSED_BY)
    click.echo(f"paused {name}")


@subscriptions.command()
@_named
def resume(*, name: str, deployment: Deployment) -> None:
    """Resume a subscription that an operator or a 410 paused, or retry a failing endpoint now."""
    with _changing(deployment, name, "resume") as connection:
        store.resume(connection, name, retries.RETRY_DAYS)
    click.echo(f"resumed {name}")


@subscriptions.command()
@_named
def rotate(*, name: str, deployment: Deployment) -> None:
    """Replace the signing secret. Prints the new secret, once. For 24 hours the old one also signs."""
    secret, sealed = _new_secret(deployment, name)
    with _changing(deployment, name, "rotate") as connection:
        store.rotate(connection, name, sealed)
    click.echo(f"rotated {name}; the old secret also signs for {store.ROTATION_HOURS} hours")
    click.echo(f"signing secret, shown only now: {secret}")


@subscriptions.command()
@_named
@options.yes_option
def remove(*, name: str, yes: bool, deployment: Deployment) -> None:
    """Remove a subscription with its secret and its notifications.

    --yes is not required without a terminal, because NAME is exactly one subscription.
    """
    with deployment.transaction() as connection:
        pending = store.find(connection, name).pending
    output.confirm(f"remove {name} and {pending} pending notifications?", yes=yes or not output.can_answer())
    with _changing(deployment, name, "remove") as connection:
        store.remove(connection, name)
    click.echo(f"removed {name}")


@subscriptions.command("test")
@_named
def test_command(*, name: str, deployment: Deployment) -> None:
    """Send one signed notification of type subscription.test now, from this machine."""
    with deployment.transaction() as connection:
        found = store.find(connection, name)
        sealed = store.sealed_secrets(connection, found.id)
    secrets = signing.open_secrets(Sealer(deployment.settings.encryption_keys), name, sealed)
    audit.record(deployment.engine, "subscriptions test", name, {})
    result = asyncio.run(_post_test(found, secrets))
    if result.error:
        raise click.ClickException(f"the test notification was not accepted: {result.error}")
    click.echo(f"{name} accepted the test notification (status {result.status})")


async def _post_test(to: store.Subscription, secrets: Sequence[str]) -> webhooks.PostResult:
    now = datetime.now(UTC)
    body = signing.body_of_test(to.name, now)
    async with webhooks.Poster() as poster:
        headers = signing.signed_headers(f"msg_{uuid4().hex}", body, secrets, now)
        return await poster.post(to.url, headers, body, allow_private=to.allow_private)


@subscriptions.command()
@_named
@options.since_option("notifications created, or changes made, at or after this time")
@click.option("--dead", is_flag=True, help="only dead notifications, not accepted ones")
def resend(*, name: str, since: datetime, dead: bool, deployment: Deployment) -> None:
    """Send notifications again, with the same ids.

    Also sends notifications of changes from before the subscription was added, as far back as the feed reaches.
    """
    with deployment.transaction() as connection:
        found = store.find(connection, name)
    click.echo(planner.resend(deployment.engine, found, since, only_dead=dead))
    if found.status == "paused":
        click.echo(f"{name} is paused; headrace subscriptions resume {name} starts it", err=True)
