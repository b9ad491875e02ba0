"""Which users the deliveries of a message name, and the rejection of deliveries about users of another aggregator."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from workers.actions import UserIdChange
from workers.ingest.outcomes import ParsedDelivery
from workers.store.users import Claim, ClientId, User


def claims(opened: Iterable[ParsedDelivery]) -> dict[Claim, ClientId]:
    """The users that the deliveries name, each with the newest client_user_id that its aggregator states."""
    found: dict[Claim, ClientId] = {}
    for one in opened:
        for claim in _named(one):
            found.setdefault(claim, None)
        if one.parsed and one.claim and one.parsed.client_user_id:
            known, at = found[one.claim], one.parsed.occurred_at or one.delivery.received
            if known is None or at > known[1]:
                found[one.claim] = (one.parsed.client_user_id, at)
    return found


def without_other_owners(opened: Sequence[ParsedDelivery], users: Mapping[Claim, User]) -> list[ParsedDelivery]:
    """The deliveries. Those that name a user of another aggregator become dead letters: they write nothing."""
    return [
        replace(one, reason=reason) if not one.reason and (reason := _rejection(one, users)) else one for one in opened
    ]


def merged_ids(opened: Iterable[ParsedDelivery], users: Mapping[Claim, User]) -> dict[str, str]:
    """The present user_id of each former one under which a delivery arrived."""
    found = {}
    for one in opened:
        if claim := one.claim:
            user = users[claim]
            if user.merged_into and not user.other_owner:
                found[claim.user_id] = user.merged_into
    return found


def _named(one: ParsedDelivery) -> Iterator[Claim]:
    """The user of the delivery, and the former user_id of a reconnection."""
    if one.claim:
        yield one.claim
    for action in one.parsed.actions if one.parsed else ():
        if isinstance(action, UserIdChange):
            yield Claim(one.delivery.aggregator, action.old_user_id)


def _rejection(one: ParsedDelivery, users: Mapping[Claim, User]) -> str | None:
    """Without the user_id: `headrace status` groups dead letters by reason, and `dead list` has a column for it."""
    for claim in _named(one):
        if (user := users.get(claim)) and user.other_owner:
            which = "user" if claim == one.claim else "former user_id"
            return f"the {which} belongs to {user.other_owner}, and this delivery came from {claim.aggregator}"
    return None
