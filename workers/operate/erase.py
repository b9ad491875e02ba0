"""Erases a user: creates a tombstone, deletes their rows and dead letters, and returns a receipt."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import msgspec
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import Unprocessable
from app.sealing import Sealer
from workers.aggregators.json import storable, with_nulls
from workers.ingest.apply import Applier
from workers.ingest.parse import UNKNOWN, extract_deliveries
from workers.ingest.replay import replay_dead_letters
from workers.store import backfill_admin, dead_letters
from workers.store import erase as store
from workers.store.backfill_admin import Filter
from workers.store.engine import transaction
from workers.store.users import Person, person

EVERY = 1_000_000


@dataclass(frozen=True)
class ErasureReceipt:
    user_id: str
    before: Literal["unknown", "known", "erased"]
    erased_at: datetime  # events received after this are ignored
    finished_at: datetime
    removed: dict[str, int]  # rows, by table
    unread: int  # dead letters that cannot be opened, and may hold data of the user
    others: tuple[str, ...]  # other user_ids with the same client_user_id, which still exist


class Eraser:
    """Erases users, one at a time. Safe to kill at any moment and to run again."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._sealer = Sealer(settings.encryption_keys)
        self._applier = Applier(engine, settings)

    def count(self, user_id: str) -> dict[str, int]:
        """The rows that `erase` would remove, by table."""
        entries = Counter(is_theirs for _, is_theirs in self._dead_letters(user_id, self._person(user_id)))
        found = store.count(self._engine, user_id)
        return found | ({"dead_letters": entries[True]} if entries[True] else {})

    def erase(self, user_id: str, on_progress: Callable[[int], None]) -> ErasureReceipt:
        """`on_progress` gets the number of rows removed so far. Raises TryLater."""
        known, erased_at = self._person(user_id), store.create_tombstone(self._engine, user_id)
        removed, unread = Counter[str](), 0
        for entry, is_theirs in self._dead_letters(user_id, known):
            unread += is_theirs is None
            if is_theirs:
                self._drop(entry)
                removed["dead_letters"] += 1
                on_progress(removed.total())
        for table, number in store.remove(self._engine, user_id):
            removed[table] += number
            on_progress(removed.total())
        found = {table: number for table, number in sorted(removed.items()) if number}
        store.finish(self._engine, user_id, found)
        return ErasureReceipt(
            user_id=user_id,
            before=known.state,
            erased_at=erased_at,
            finished_at=datetime.now(UTC),
            removed=found,
            unread=unread,
            others=tuple(known.others),
        )

    def _person(self, user_id: str) -> Person:
        with transaction(self._engine) as connection:
            return person(connection, user_id)

    def _dead_letters(self, user_id: str, known: Person) -> Iterator[tuple[dead_letters.SealedDeadLetter, bool | None]]:
        """Every dead letter, and whether it is about the user; None if that cannot be determined.

        The client_user_id counts only if no other user has the same one.
        """
        backfills = {one.id for one in backfill_admin.listed(self._engine, Filter(user_ids=(user_id,)), EVERY)}
        users = (user_id, *known.former)
        names = _names(users, None if known.others else known.client_user_id)
        for entry in dead_letters.read(self._engine):
            if entry.user_id or dead_letters.backfill_of(entry.delivery.message_id) in backfills:
                yield entry, entry.user_id in (None, *users)
            else:
                yield entry, self._mentions(entry.delivery, names)

    def _mentions(self, delivery: Delivery, names: re.Pattern[bytes]) -> bool | None:
        """Whether an unparsable delivery, or any delivery inside a quarantined message, contains one of the names."""
        try:
            body = delivery.open(self._sealer)
        except Unprocessable:
            return None
        if names.search(body) or names.search(_unescaped(body)):
            return True
        if delivery.aggregator != UNKNOWN:
            return False
        try:
            answers = {self._mentions(one, names) for one in extract_deliveries(body)}
        except Unprocessable:
            return None
        return True if True in answers else None if None in answers else False

    def _drop(self, entry: dead_letters.SealedDeadLetter) -> None:
        """Deletes a dead letter, after applying the deliveries of other users in its message."""
        if entry.delivery.aggregator == UNKNOWN:
            replay_dead_letters(self._engine, self._applier, dead_letters.listed(self._engine, [entry.id]))
        dead_letters.drop(self._engine, dead_letters.listed(self._engine, [entry.id]))


def _names(users: Sequence[str], client_user_id: str | None) -> re.Pattern[bytes]:
    """Matches a user_id as a word. A client_user_id, which may be a short number, must be a whole JSON string."""
    ids = b"|".join(re.escape(msgspec.json.encode(user_id)[1:-1]) for user_id in users)
    word = rb"(?<![\w-])(?:" + ids + rb")(?![\w-])"
    return re.compile(word + (b"|" + re.escape(msgspec.json.encode(client_user_id)) if client_user_id else b""))


def _unescaped(body: bytes) -> bytes:
    """The JSON without optional escapes: a sender may escape any character of a string. b"" if it is not JSON."""
    try:
        return msgspec.json.encode(msgspec.json.decode(with_nulls(storable(body)[0])))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return b""
