"""Users: their owners (aggregators), client_user_ids, merges and tombstones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, text

from workers.store.sql import RowParameters

GIVEN = RowParameters("user_id text, aggregator text, client_user_id text, named_at timestamptz")
# The lock makes an erasure wait for transactions that write data of the user (workers/store/erase.py). FOR KEY SHARE is
# the weakest lock: workers that write for one user, or update the client_user_id, do not wait for each other. With FOR
# SHARE, two workers that update the same user's client_user_id deadlock.
KNOWN_USERS = text(f"""
SELECT given.aggregator, user_id, known.merged_into,
       CASE WHEN known.aggregator <> given.aggregator THEN known.aggregator END AS other_owner,
       known.aggregator IS NULL AND given.aggregator IS NOT NULL
       OR given.client_user_id <> coalesce(known.client_user_id, '') AND given.named_at > known.named_at AS is_changed
FROM {GIVEN} JOIN headrace.users AS known USING (user_id)
WHERE known.erased_at IS NULL ORDER BY user_id FOR KEY SHARE OF known""")
# A concurrent transaction may insert the user between the two statements. The conditions after ON CONFLICT are
# evaluated on its committed row, so the first aggregator to commit owns the user, and only that one names the client.
INSERT_USERS = text(f"""
INSERT INTO headrace.users AS stored (user_id, aggregator, client_user_id, named_at)
SELECT user_id, given.aggregator, given.client_user_id, coalesce(given.named_at, '-infinity')
FROM {GIVEN} LEFT JOIN headrace.users AS known USING (user_id)
WHERE known.erased_at IS NULL
ORDER BY user_id
ON CONFLICT (user_id) DO UPDATE SET aggregator = excluded.aggregator,
    client_user_id = CASE WHEN excluded.named_at > stored.named_at THEN excluded.client_user_id
                     ELSE stored.client_user_id END,
    named_at = greatest(excluded.named_at, stored.named_at)
WHERE coalesce(stored.aggregator, excluded.aggregator) = excluded.aggregator
  AND (stored.aggregator IS NULL OR excluded.named_at > stored.named_at) AND stored.erased_at IS NULL""")
PERSON = text("""
SELECT true AS is_known, client_user_id, erased_at,
       ARRAY(SELECT user_id FROM headrace.users WHERE merged_into = :user ORDER BY 1) AS former, ARRAY(
    SELECT other.user_id FROM headrace.users other WHERE other.client_user_id = person.client_user_id
       AND other.user_id <> person.user_id AND other.erased_at IS NULL AND other.merged_into IS NULL
       ORDER BY 1) AS others
FROM headrace.users person WHERE user_id = :user""")
ERASED_USERS = text("SELECT user_id FROM headrace.users WHERE user_id = ANY(:users) AND erased_at IS NOT NULL")
ClientId = tuple[str, datetime] | None  # a client_user_id, and the time of the event that named it


class Claim(NamedTuple):
    """A user, and the aggregator that names them; None for an operator, who may name every user."""

    aggregator: str | None
    user_id: str


@dataclass(frozen=True, slots=True)
class User:
    """A user's state, as the writer of a claim needs it."""

    is_erased: bool = False
    merged_into: str | None = None  # the user_id since the last reconnection
    other_owner: str | None = None  # the aggregator that owns the user, if it is not the one of the claim

    @property
    def is_read_only(self) -> bool:
        """Whether the claim may not write data under this id."""
        return self.is_erased or self.merged_into is not None or self.other_owner is not None


ERASED = User(is_erased=True)


@dataclass(frozen=True)
class Person:
    """A user, with former ids and with the other users (not erased, not merged) of the same client_user_id."""

    is_known: bool = False
    client_user_id: str | None = None
    erased_at: datetime | None = None
    former: Sequence[str] = ()  # user_ids before reconnections
    others: Sequence[str] = ()

    @property
    def state(self) -> Literal["unknown", "known", "erased"]:
        return "erased" if self.erased_at else "known" if self.is_known else "unknown"


class _Known(NamedTuple):
    user: User
    is_changed: bool  # the claim makes the aggregator the owner, or has a newer client_user_id


def upsert_users(connection: Connection, claims: Mapping[Claim, ClientId]) -> dict[Claim, User]:
    """Inserts unknown users, updates each client_user_id to the newest, and returns every claim's user.

    An unknown user belongs to the aggregator of the first claim. Claims of other aggregators do not change the user;
    their result has `other_owner`.

    Must be the first write of a transaction that writes data of users: an erasure of one of them then waits for the
    transaction's end. One query if nothing is new. A user that is still missing after the insert was erased.
    """
    known = _known_users(connection, claims)
    news: dict[str, Claim] = {}
    for claim in claims:
        if (found := known.get(claim)) is None or (found.is_changed and not found.user.other_owner):
            news.setdefault(claim.user_id, claim)
    if news:
        connection.execute(INSERT_USERS, _rows({claim: claims[claim] for claim in news.values()}))
        known |= _known_users(connection, {claim: claims[claim] for claim in claims if claim.user_id in news})
    return {claim: known[claim].user if claim in known else ERASED for claim in claims}


def claim_user(connection: Connection, user_id: str, aggregator: str | None = None) -> User:
    """The user, whom this inserts if unknown. `aggregator` is the source of the data; None for an operator's command.

    An erasure or a merge of the user waits for the transaction's end, and includes the rows it writes.
    """
    claim = Claim(aggregator, user_id)
    return upsert_users(connection, {claim: None})[claim]


def is_read_only(connection: Connection, user_id: str, aggregator: str | None = None) -> bool:
    """Whether no data of this aggregator may be written under this id. See `claim_user`."""
    return claim_user(connection, user_id, aggregator).is_read_only


def person(connection: Connection, user_id: str) -> Person:
    row = connection.execute(PERSON, {"user": user_id}).mappings().first()
    return Person(**row) if row else Person()


def erased_users(connection: Connection, users: Iterable[str]) -> set[str]:
    return set(connection.scalars(ERASED_USERS, {"users": list(users)}))


def _known_users(connection: Connection, claims: Mapping[Claim, ClientId]) -> dict[Claim, _Known]:
    """The users of the claims that exist and are not erased."""
    if not claims:
        return {}
    known = connection.execute(KNOWN_USERS, _rows(claims)).all()
    return {
        Claim(aggregator, user_id): _Known(User(merged_into=merged_into, other_owner=other_owner), is_changed)
        for aggregator, user_id, merged_into, other_owner, is_changed in known
    }


def _rows(claims: Mapping[Claim, ClientId]) -> dict[str, list[Any]]:
    return GIVEN.values(
        (claim.user_id, claim.aggregator, *(client or (None, None))) for claim, client in claims.items()
    )
