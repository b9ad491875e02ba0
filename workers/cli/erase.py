"""`headrace erase`: removes a user, and prints a receipt."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import click
from sqlalchemy import Engine

from app.errors import NotFound
from workers.aggregators.common import canonical_id
from workers.cli import options, output
from workers.cli.users import resolve_users
from workers.operate.erase import Eraser, ErasureReceipt
from workers.store import erase as store
from workers.store.engine import make_writer

TOMBSTONE = "later data of this user, including replays and backfills, is recorded as ignored and not stored"
UNVACUUMED = "deleted rows in PostgreSQL's files, until VACUUM: `headrace erase --user ... --vacuum` runs it now"
NOT_REMOVED = (
    "the aggregator's copy: call DELETE /v2/user/... at Junction, or /auth/deauthenticateUser at Terra",
    "backups, lagging replicas and exports: apply your own rules; after restoring a backup, erase the user again",
    "PostgreSQL's write-ahead log (WAL), until its files are reused after checkpoints; copies in a WAL archive",
    "the free space of PostgreSQL's pages, until new rows overwrite it: only VACUUM FULL rewrites a whole table",
    "encrypted bodies in the broker's log, until it is rewritten",
)


@click.command()
@options.user_option("the user to erase")
@options.all_option
@click.option("--unknown", is_flag=True, help="block a user_id that has no stored data yet")
@click.option("--vacuum", is_flag=True, help="also run VACUUM, which removes the deleted rows from PostgreSQL's files")
@click.option("--dry-run", is_flag=True, help="only count the user's rows")
@options.yes_option
@options.data_dir_option
@options.json_option
def erase(
    *,
    user: str,
    all_users: bool,
    unknown: bool,
    vacuum: bool,
    dry_run: bool,
    yes: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Delete all data of a user permanently. Data that arrives later is blocked. Safe to run again if interrupted.

    Without a terminal, --yes is required unless --user is a known user_id in full.
    """
    settings = options.attached(data_dir, broker=False)
    engine = make_writer(settings, "headrace-erase")
    users = _resolve(engine, user, all_users=all_users, unknown=unknown)
    # A user_id in full names exactly one user; any other name may belong to another user.
    is_answered = yes or (users == (canonical_id(user),) and not unknown and not output.can_answer())
    if not dry_run:
        output.require_answer(yes=is_answered)
    eraser = Eraser(engine, settings)
    found = {one: eraser.count(one) for one in users}
    if dry_run:
        _print_counts(found, all_users=all_users, as_json=as_json)
        return
    rows = sum(sum(counts.values()) for counts in found.values())
    output.confirm(f"delete {', '.join(users)} and {rows} rows permanently?", yes=is_answered)
    receipts = []
    for one, counts in found.items():
        with output.progress(f"rows of {one} removed", sum(counts.values()), quiet=as_json) as update:
            receipts.append(eraser.erase(one, update))
        if not as_json:
            click.echo("\n".join(_printed(receipts[-1])))
    done, skipped = store.vacuum(engine) if vacuum else ([], [])
    left = _not_removed(is_vacuumed=vacuum and not skipped)
    if as_json:
        more = {"vacuumed": done, "not_vacuumed": skipped, "tombstone": TOMBSTONE, "not_removed": left}
        plain = [asdict(one) | more for one in receipts]
        output.print_json(plain if all_users else plain[0])
        return
    if done:
        click.echo(f"vacuumed {len(done)} tables")
    if skipped:
        click.echo(f"not vacuumed, which needs the owner's login or MAINTAIN: {', '.join(skipped)}")
    click.echo("\n  ".join(["not removed:", *left]))


def _resolve(engine: Engine, name: str, *, all_users: bool, unknown: bool) -> tuple[str, ...]:
    """The user_ids to erase. Raises NotFound, unless an unknown name is accepted as a user_id (`unknown`)."""
    try:
        return tuple(one.user_id for one in resolve_users(engine, name, all_users=all_users))
    except NotFound as error:
        if unknown:
            return (canonical_id(name),)
        raise NotFound(f"{error} (--unknown blocks a user_id in advance)") from None


def _print_counts(found: Mapping[str, Mapping[str, int]], *, all_users: bool, as_json: bool) -> None:
    if as_json:
        output.print_json(found if all_users else next(iter(found.values())))
        return
    for user, counts in found.items():
        click.echo("\n".join([f"rows of {user}:", *_lines(counts)]))


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


def _not_removed(*, is_vacuumed: bool) -> tuple[str, ...]:
    """The copies that still exist after the erasure."""
    return NOT_REMOVED if is_vacuumed else (*NOT_REMOVED, UNVACUUMED)


def _lines(found: Mapping[str, int]) -> Iterator[str]:
    for table, number in found.items():
        yield f"  {table:24} {number:>12}" + ("  (rows stay, without the user_id)" if table == "deliveries" else "")
    if not found:
        yield "  nothing"
