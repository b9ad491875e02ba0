"""`headrace erase`: removes a user, and prints a receipt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import click

from app.errors import NotFound
from workers.aggregators.common import canonical_id
from workers.cli import options, output
from workers.cli.deployment import Deployment, query_options
from workers.operate import erase as erasing
from workers.store import erase as store

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
@query_options
def erase(
    *,
    user: str,
    all_users: bool,
    unknown: bool,
    vacuum: bool,
    dry_run: bool,
    yes: bool,
    deployment: Deployment,
) -> None:
    """Delete all data of a user permanently. Data that arrives later is blocked. Safe to run again if interrupted.

    Without a terminal, --yes is required unless --user is a known user_id in full.
    """
    found = _resolve(deployment, user, all_users=all_users, unknown=unknown)
    # A user_id in full names exactly one user; any other name may belong to another user.
    is_answered = yes or (found == (canonical_id(user),) and not unknown and not output.can_answer())
    if not dry_run:
        output.require_answer(yes=is_answered)
    engine = deployment.writer()
    eraser = erasing.Eraser(engine, deployment.settings)
    stored = {one: eraser.count(one) for one in found}
    if dry_run:
        output.show(stored if all_users else next(iter(stored.values())), _counted(stored))
        return
    rows = sum(sum(counts.values()) for counts in stored.values())
    output.confirm(f"delete {', '.join(found)} and {rows} rows permanently?", yes=is_answered)
    receipts = []
    for one, counts in stored.items():
        with output.progress(f"rows of {one} removed", sum(counts.values())) as update:
            receipts.append(eraser.erase(one, update))
        if not output.is_json():
            click.echo("\n".join(_printed(receipts[-1])))
    done, skipped = store.vacuum(engine) if vacuum else ([], [])
    left = NOT_REMOVED if vacuum and not skipped else (*NOT_REMOVED, UNVACUUMED)
    more = {"vacuumed": done, "not_vacuumed": skipped, "tombstone": TOMBSTONE, "not_removed": left}
    plain = [asdict(one) | more for one in receipts]
    lines = [f"vacuumed {len(done)} tables"] if done else []
    if skipped:
        lines.append(f"not vacuumed, which needs the owner's login or MAINTAIN: {', '.join(skipped)}")
    output.show(plain if all_users else plain[0], [*lines, "not removed:", *(f"  {one}" for one in left)])


def _resolve(deployment: Deployment, name: str, *, all_users: bool, unknown: bool) -> tuple[str, ...]:
    """The user_ids to erase. Raises NotFound, unless an unknown name is accepted as a user_id (`unknown`)."""
    try:
        return tuple(one.user_id for one in deployment.users(name, all_users=all_users))
    except NotFound as error:
        if unknown:
            return (canonical_id(name),)
        raise NotFound(f"{error} (--unknown blocks a user_id in advance)") from None


def _counted(found: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for user, counts in found.items():
        yield f"rows of {user}:"
        yield from _lines(counts)


def _printed(receipt: erasing.ErasureReceipt) -> Iterator[str]:
    yield f"erased {receipt.user_id}, {receipt.finished_at:%Y-%m-%d %H:%M:%S} UTC"
    if receipt.before == "unknown":
        yield "the user was unknown; a tombstone now blocks any in-flight or future data"
    yield from _lines(receipt.removed)
    yield f"tombstone of {receipt.erased_at:%Y-%m-%d %H:%M:%S} UTC: {TOMBSTONE}"
    if receipt.unread:
        yield f"{receipt.unread} dead letters cannot be decrypted and may hold data of this user: headrace dead list"
    if receipt.others:
        yield f"other users with the same client_user_id, not erased: {', '.join(receipt.others)}"


def _lines(found: Mapping[str, int]) -> Iterator[str]:
    for table, number in found.items():
        yield f"  {table:24} {number:>12}" + ("  (rows stay, without the user_id)" if table == "deliveries" else "")
    if not found:
        yield "  nothing"
