"""`headrace erase`: removes a person, and says what was removed and what it cannot reach."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Engine

from workers.cli import options, output
from workers.operate.erase import Eraser, ErasureReceipt
from workers.store import backfill_admin
from workers.store.engine import make_writer, transaction

TOMBSTONE = "whatever comes of them from now on, also by replay or backfill, is recorded as ignored and not stored"
NOT_REMOVED = (
    "the aggregator's copy, and its sending: Junction ends with DELETE /v2/user/..., Terra /auth/deauthenticateUser",
    "backups, replicas that are behind, and exports: they go by your own rules; after a restore, erase again",
    "the broker's log on disk, sealed, until it is rewritten; PostgreSQL's pages, until they are vacuumed",
)


@click.command()
@click.option("--user", required=True, help="whom (user_id)")
@click.option("--dry-run", is_flag=True, help="only say what there is of them")
@click.option("--yes", is_flag=True, help="do not ask")
@options.data_dir_option
@options.json_option
def erase(*, user: str, dry_run: bool, yes: bool, data_dir: Path | None, as_json: bool) -> None:
    """Remove a person everywhere, for good, and let nothing of them in again.

    Broken off, it is safe to run again, and goes on.
    """
    settings = options.attached(data_dir, broker=False)
    engine = make_writer(settings, "headrace-erase")
    _check(engine, user)
    eraser = Eraser(engine, settings)
    found = eraser.count(user)
    if dry_run:
        output.print_json(found) if as_json else click.echo("\n".join([f"there is of {user}:", *_lines(found)]))
        return
    if not yes and output.can_answer():
        click.confirm(f"remove {user} and {sum(found.values())} rows for good?", abort=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = output.console()
    with Progress(*columns, console=screen, disable=as_json or not screen.is_terminal) as progress:
        task = progress.add_task("removed", total=sum(found.values()))
        receipt = eraser.erase(user, lambda done: progress.update(task, completed=done))
    if as_json:
        output.print_json(asdict(receipt) | {"tombstone": TOMBSTONE, "not_removed": NOT_REMOVED})
    else:
        click.echo("\n".join(_printed(receipt)))


def _check(engine: Engine, user: str) -> None:
    """Raises click.ClickException for a client_user_id or a former id: its tombstone would keep nobody out."""
    with transaction(engine) as connection:
        found = [user_id for user_id, _ in backfill_admin.resolve_user(connection, user)]
    if found and user not in found:
        raise click.ClickException(f"{user} is no user_id of today; --user is one of {', '.join(found)}")


def _printed(receipt: ErasureReceipt) -> Iterator[str]:
    yield f"erased {receipt.user_id}, {receipt.finished_at:%Y-%m-%d %H:%M:%S} UTC"
    if receipt.before == "unknown":
        yield "nobody of that name was known; what is on its way, or comes later, will find the tombstone"
    yield from _lines(receipt.removed)
    yield f"tombstone of {receipt.erased_at:%Y-%m-%d %H:%M:%S} UTC: {TOMBSTONE}"
    if receipt.unread:
        yield f"{receipt.unread} dead letters could not be opened and may hold something: headrace dead list, dead drop"
    if receipt.others:
        yield f"of the same client_user_id, and there still: {', '.join(receipt.others)}"
    yield "not removed, because Headrace cannot reach it:"
    yield from (f"  {one}" for one in NOT_REMOVED)


def _lines(found: Mapping[str, int]) -> Iterator[str]:
    """What there is or was, by table. Of the ledger only the name goes."""
    for table, number in found.items():
        yield f"  {table:24} {number:>12}" + ("  (the account stays, without a name)" if table == "deliveries" else "")
    if not found:
        yield "  nothing"
