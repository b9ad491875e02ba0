"""Terra's webhook events: envelopes around the objects, and the headers of every attempt of a delivery."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from random import Random
from uuid import uuid4

import msgspec

from workers.simulator.people import Record
from workers.simulator.terra.data import TerraUser, TerraWorld
from workers.simulator.terra.objects import Kind

VERSION = "2022-03-16"
SCOPES = "activity,sleep,daily,body"
CHUNK = 10  # objects in one delivery of a large request
EXPIRES_SECONDS = 600
PAYLOADS = "/simulate/payloads"
SHARE_OF_UPDATES = 0.3


@dataclass(frozen=True)
class Message:
    """One delivery: the event, and the header values that all its attempts share."""

    event: Record
    ordering_ms: int  # when it was made
    reference: str  # of the request that asked for the data; otherwise its own trace id
    trace_id: str


def first_events(terra: TerraWorld) -> Iterator[Message]:
    """The events of new connections: `auth` and `athlete`. Terra does not announce history."""
    for account in terra.accounts():
        yield from arrival(terra, account)


def live_events(terra: TerraWorld, seed: int = 0, pinged: float = 0.0, base_url: str = "") -> Iterator[Message]:
    """Events about new data of random accounts and types, until no account is open; some correct earlier events.

    Days and bodies are sent again while they last, each time with more data. Each event moves the world's end to the
    present. Events of `TerraWorld.put` are sent first. `pinged` is the share of events with only a URL at `base_url`.
    """
    rng = Random(seed)  # noqa: S311 - repeatable on purpose
    while True:
        terra.world.until = max(terra.world.until, datetime.now(UTC))
        yield from terra.pending()
        accounts = terra.accounts()
        if not accounts:
            return
        account = rng.choice(accounts)
        event = data(terra, account, rng.choice(terra.kinds(account)), updated=rng.random() < SHARE_OF_UPDATES)
        yield by_url(terra, event, base_url) if rng.random() < pinged else event


def message(terra: TerraWorld, event: Record, reference: str = "") -> Message:
    """A new delivery of an event. Its user object has the time of this event, as at Terra."""
    trace, ordering_ms = str(uuid4()), terra.stamp()
    if (user := event.get("user")) and user.get("last_webhook_update"):
        moment = datetime.fromtimestamp(ordering_ms / 1000, UTC).isoformat(timespec="microseconds")
        event = event | {"user": user | {"last_webhook_update": moment}}
    return Message(event, ordering_ms=ordering_ms, reference=reference or trace, trace_id=trace)


def described(terra: TerraWorld, account: TerraUser, *, is_new: bool = False) -> Record:
    """The `user` object of responses and events."""
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
    """The envelope of objects, in an event and in a response."""
    return {"type": name, "user": described(terra, account), "data": objects}


def of_objects(
    terra: TerraWorld, account: TerraUser, kind: Kind, objects: Sequence[Record], reference: str = ""
) -> Message:
    """Objects of one type as an event."""
    return message(terra, {"version": VERSION, **envelope(terra, account, kind.name, objects)}, reference)


def data(terra: TerraWorld, account: TerraUser, kind: Kind, *, updated: bool = False) -> Message:
    """The new data of a type as an event, which is also sent without objects if nothing was measured yet."""
    return of_objects(terra, account, kind, terra.advance(account, kind, updated=updated))


def athlete(terra: TerraWorld, account: TerraUser) -> Message:
    """The user's profile. This event has no array."""
    event = {"type": "athlete", "version": VERSION, "user": described(terra, account)}
    return message(terra, event | {"athlete": terra.athlete(account)})


def auth(terra: TerraWorld, account: TerraUser) -> Message:
    """A user has connected a provider."""
    text = "User has successfully authenticated"
    event = {"type": "auth", "status": "success", "message": text, "flow_id": None, "widget_session_id": None}
    return message(terra, event | {"user": described(terra, account, is_new=True)})


def arrival(terra: TerraWorld, account: TerraUser) -> Iterator[Message]:
    """The events of a new connection."""
    yield auth(terra, account)
    yield athlete(terra, account)


def deauth(terra: TerraWorld, account: TerraUser) -> Iterator[Message]:
    """A user has disconnected a provider: the account is closed."""
    terra.close(account)
    text = "User has deauthenticated"
    yield message(terra, {"type": "deauth", "status": "success", "message": text, "user": described(terra, account)})


def connection_error(terra: TerraWorld, account: TerraUser) -> Iterator[Message]:
    """A provider refuses access to an account."""
    event = {"type": "connection_error", "status": "warning", "message": "User connection degraded"}
    yield message(terra, event | {"user": described(terra, account)})


def reauth(terra: TerraWorld, account: TerraUser) -> Iterator[Message]:
    """A user has connected a provider again: the account gets another id. Terra sends the two events in any order."""
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
    """History requested as webhooks: two notices, then chunks that share the request's reference."""
    about = {"reference": reference, "user": described(terra, account)}
    chunks = [objects[start : start + CHUNK] for start in range(0, len(objects), CHUNK)] or [[]]
    processing = {"type": "large_request_processing", "status": "processing", "message": "Large request is processing"}
    yield message(terra, processing | about, reference)
    sending: Record = {"type": "large_request_sending", "message": "Large request is being sent", **about}
    yield message(terra, sending | {"expected_payloads": len(chunks)}, reference)
    for number, chunk in enumerate(chunks):
        made = of_objects(terra, account, kind, chunk, reference)
        yield replace(made, trace_id=f"{reference}:chunk:{number}")


def by_url(terra: TerraWorld, made: Message, base_url: str) -> Message:
    """An `s3_payload` event in place of an event: it has a URL from which the event can be downloaded."""
    terra.payloads[made.trace_id] = msgspec.json.encode(made.event)
    url = f"{base_url}{PAYLOADS}/{made.trace_id}?X-Amz-Expires={EXPIRES_SECONDS}"
    return replace(made, event={"type": "s3_payload", "status": "success", "url": url, "expires_in": EXPIRES_SECONDS})
