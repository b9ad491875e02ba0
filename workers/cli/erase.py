"""`headrace erase`: removes a user, and prints a receipt."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import click

from workers.cli import options, output
from workers.cli.users import resolve_user
from workers.operate.erase import Eraser, ErasureReceipt
from workers.store.engine import make_writer

TOMBSTONE = "later data of this user, including replays and backfills, is recorded as ignored and not stored"
NOT_REMOVED = (
    "the aggregator's copy: also call DELETE /v2/user/... at Junction, or /auth/deauthenticateUser at Terra",
    "backups, lagging replicas and exports: apply your own rules; after restoring a backup, erase the user again",
    "encrypted bodies in the broker's log until it is rewritten, and deleted rows until PostgreSQL vacuums them",
)


@click.command()
@click.option("--user", required=True, help="the user to erase: the current user_id")
@click.option("--dry-run", is_flag=True, help="only count the user's rows")
@click.option("--yes", is_flag=True, help="do not ask for confirmation")
@options.data_dir_option
@options.json_option
def erase(*, user: str, dry_run: bool, yes: bool, data_dir: Path | None, as_json: bool) -> None:
    """Delete all data of a user permanently. Data that arrives later is blocked. Safe to run again if interrupted."""
    settings = options.attached(data_dir, broker=False)
    engine = make_writer(settings, "headrace-erase")
    # A tombstone for a client_user_id or a former user_id would block nothing.
    if (user_id := resolve_user(engine, user).user_id) != user:
        raise click.ClickException(f"{user} is a client_user_id or a former user_id; use --user {user_id}")
    eraser = Eraser(engine, settings)
    found = eraser.count(user)
    if dry_run:
        output.print_json(found) if as_json else click.echo("\n".join([f"rows of {user}:", *_lines(found)]))
        return
    if not yes and output.can_answer():
        click.confirm(f"delete {user} and {sum(found.values())} rows permanently?", abort=True)
    with output.progress("rows removed", sum(found.values()), quiet=as_json) as update:
        receipt = eraser.erase(user, update)
    if as_json:
        output.print_json(asdict(receipt) | {"tombstone": TOMBSTONE, "not_removed": NOT_REMOVED})
    else:
        click.echo("\n".join(_printed(receipt)))


def _printed(receipt: ErasureReceipt) -> Iterator[str]:
    yield f"erased {receipt.user_id}, {receipt.finished_at:%Y-%m-%d %H:%M:%S} UTC"
    if receipt.before == "unknown":
        yield "the user was unknown; a tombstone now blocks any in-flight or future data"
    yield from _lines(receipt.removed)
    yield f"tombstone of {receipt.erased_at:%Y-%m-%d %H:%M:%S} UTC: {TOMBSTONE}"
    if receipt.unread:
        yield f"{receipt.unread} dead letters cannot be decrypted and may hold data of this user: headrace dead list"
    if receipt.others:
        yield f"other users with the same client_user_id, not erased: {', '.join(receipt.others)}"
    yield "not removed, because Headrace cannot reach them:"
    yield from (f"  {one}" for one in NOT_REMOVED)


def _lines(found: Mapping[str, int]) -> Iterator[str]:
    for table, number in found.items():
        yield f"  {table:24} {number:>12}" + ("  (rows stay, without the user_id)" if table == "deliveries" else "")
    if not found:
        yield "  nothing"
