"""Terra's events: what stands around the objects, and the headers that every attempt of a delivery carries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

import msgspec

from workers.simulator.query import Record
from workers.simulator.terra.data import TerraWorld
from workers.simulator.terra.objects import Kind
from workers.simulator.terra.people import TerraUser

VERSION = "2022-03-16"
SCOPES = "activity,sleep,daily,body"
CHUNK = 10  # objects in one delivery of a large request
EXPIRES_SECONDS = 600
PAYLOADS = "/simulate/payloads"


@dataclass(frozen=True)
class Message:
    """One delivery: the event, and what its headers say, the same over all attempts."""

    event: Record
    ordering_ms: int  # when it was made
    reference: str  # of the request that it answers; of its own if nobody asked
    trace_id: str


def message(terra: TerraWorld, event: Record, reference: str = "") -> Message:
    """An event that is made now."""
    trace = str(uuid4())
    return Message(event, terra.stamp(), reference or trace, trace)


def described(terra: TerraWorld, account: TerraUser, *, is_new: bool = False) -> Record:
    """The account as answers and events describe it."""
    return {
        "user_id": account.user_id,
        "provider": account.provider.slug,
        "created_at": account.since.isoformat(),
        "last_webhook_update": None if is_new else terra.world.until.isoformat(),
        "scopes": SCOPES,
        "reference_id": account.person.client_user_id,
        "active": terra.account(account.user_id) is not None,
    }


def envelope(terra: TerraWorld, account: TerraUser, name: str, objects: Sequence[Record]) -> Record:
    """What stands around objects, in an event and in an answer."""
    return {"type": name, "user": described(terra, account), "data": objects}


def told(terra: TerraWorld, account: TerraUser, kind: Kind, objects: Sequence[Record], reference: str = "") -> Message:
    """Objects as an event."""
    return message(terra, {"version": VERSION, **envelope(terra, account, kind.name, objects)}, reference)


def data(terra: TerraWorld, account: TerraUser, kind: Kind, *, updated: bool = False) -> Message:
    """What there is to tell of a type; nothing of it, if it was not measured yet, is an event too."""
    return told(terra, account, kind, terra.tell(account, kind, updated=updated))


def athlete(terra: TerraWorld, account: TerraUser) -> Message:
    """Who the person is. This one has no array."""
    about = {"type": "athlete", "version": VERSION, "user": described(terra, account)}
    return message(terra, about | {"athlete": terra.athlete(account)})


def auth(terra: TerraWorld, account: TerraUser) -> Message:
    """A person has connected a provider."""
    about = {"message": "User has successfully authenticated", "flow_id": None, "widget_session_id": None}
    user = described(terra, account, is_new=True)
    return message(terra, {"type": "auth", "status": "success", **about, "user": user})


def arrival(terra: TerraWorld, account: TerraUser) -> Iterator[Message]:
    """What comes when a person connects."""
    yield auth(terra, account)
    yield athlete(terra, account)


def deauth(terra: TerraWorld, account: TerraUser) -> Message:
    """A person has disconnected a provider: the account is closed."""
    terra.close(account)
    text = "User has deauthenticated"
    return message(terra, {"type": "deauth", "status": "success", "message": text, "user": described(terra, account)})


def connection_error(terra: TerraWorld, account: TerraUser) -> Message:
    """A provider no longer lets an account be read."""
    user = described(terra, account)
    event = {"type": "connection_error", "status": "warning", "message": "User connection degraded", "user": user}
    return message(terra, event)


def reauth(terra: TerraWorld, account: TerraUser) -> Iterator[Message]:
    """A person has connected again what was connected: it goes by another id. The two events come in either order."""
    renewed = terra.renew(account)
    event = {
        "type": "user_reauth",
        "status": "warning",
        "message": "User has reauthenticated and old ID has been deleted",
        "version": VERSION,
        "old_user": described(terra, account),
        "new_user": described(terra, renewed),
    }
    yield message(terra, event)
    yield auth(terra, renewed)


def large_request(
    terra: TerraWorld, account: TerraUser, kind: Kind, objects: Sequence[Record], reference: str
) -> Iterator[Message]:
    """History that was asked for as webhooks: two notices, then chunks that share its reference."""
    user = described(terra, account)
    about = {"reference": reference, "user": user}
    chunks = [objects[start : start + CHUNK] for start in range(0, len(objects), CHUNK)] or [[]]
    text = "Large request is processing"
    processing = {"type": "large_request_processing", "status": "processing", "message": text, **about}
    yield message(terra, processing, reference)
    text = "Large request is being sent"
    sending = {"type": "large_request_sending", "message": text, "expected_payloads": len(chunks), **about}
    yield message(terra, sending, reference)
    for number, chunk in enumerate(chunks):
        made = told(terra, account, kind, chunk, reference)
        yield replace(made, trace_id=f"{reference}:chunk:{number}")


def elsewhere(terra: TerraWorld, made: Message, base_url: str) -> Message:
    """A ping in place of an event: the event is kept at an address, and for a short time."""
    terra.payloads[made.trace_id] = msgspec.json.encode(made.event)
    url = f"{base_url}{PAYLOADS}/{made.trace_id}?X-Amz-Expires={EXPIRES_SECONDS}"
    return replace(made, event={"type": "s3_payload", "status": "success", "url": url, "expires_in": EXPIRES_SECONDS})
