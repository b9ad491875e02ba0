"""Junction (formerly Vital): how its webhooks are signed and what its events mean. Pure; opens no socket."""

import importlib.util
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from types import ModuleType
from typing import Annotated, Any

import msgspec

from app.actions import Action, Connection, Notice, Parsed, Record, Sample, Samples
from app.catalogue import EventType, Field, Resource, catalogue
from app.config import Settings
from app.delivery import Delivery, Headers, Receipt
from app.errors import DeadLetter, Refused
from app.providers import ksuid


def _svix_webhooks() -> ModuleType:
    """The module `svix.webhooks` without its package's `__init__`, which brings Svix's API client along.

    That client is an HTTP client, 0.7 s and 49 MB in every process of the endpoint, which has no use for it.
    """
    package = importlib.util.find_spec("svix")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("svix")
    path = f"{package.submodule_search_locations[0]}/webhooks.py"
    spec = importlib.util.spec_from_file_location("app.providers._svix_webhooks", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("svix.webhooks")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_svix = _svix_webhooks()

LONGEST_HEADER = 8192
LONGEST_ID = 256
# These give local time and call it UTC (Junction: "floating time"); it is kept as it came and marked.
FLOATING_TIME = frozenset({"freestyle_libre", "abbott_libreview"})
SAMPLE_COLUMNS = frozenset({"timestamp", "start", "end", "unit", "timezone_offset", "id"})

DateText = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d")]  # PostgreSQL reads the rest, strictly
_TYPES: dict[str, Any] = {
    "text": str | None,
    "integer": int | float | None,
    "number": int | float | None,
    "boolean": bool | None,
    "date": DateText | None,
    "datetime": DateText | None,
}


class _Envelope(msgspec.Struct):
    event_type: str | None = None
    type: str | None = None  # Svix's own operational events have this instead
    user_id: str | None = None
    client_user_id: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Source(msgspec.Struct):
    """Where data came from, in every shape since 2022. An empty string counts as absent."""

    provider: str | None = None
    slug: str | None = None
    source_slug: str | None = None
    type: str | None = None
    app_id: str | None = None
    device_id: str | None = None
    sport: str | None = None
    workout_id: str | None = None

    @property
    def slug_of_provider(self) -> str:
        return (self.provider or self.slug or self.source_slug or "").lower()

    @property
    def kind(self) -> str:
        return self.type or "unknown"


class _Owner(msgspec.Struct):
    user_id: str | None = None


class _Group(msgspec.Struct):
    """Samples of one source: an event's `data`, or one group of a page."""

    source: _Source | None = None
    data: list[dict[str, Any]] = []


class _Connected(msgspec.Struct):
    provider: _Source | str | None = None
    source: _Source | None = None
    error_type: str | None = None
    error_details: str | None = None


class _Historical(msgspec.Struct):
    start_date: str | None = None
    end_date: str | None = None
    is_final: bool | None = None
    provider: _Source | str | None = None


def verify(headers: Headers, body: bytes, settings: Settings, now: datetime) -> Receipt:  # noqa: ARG001
    """Checks the Svix signature over the raw bytes with each secret in turn. Raises Refused.

    The tolerance of five minutes, both ways, is the library's, and so is its clock: `now` is for providers that let
    us set it. Whatever else the library raises on hostile headers (ValueError, binascii.Error, UnicodeDecodeError:
    all of them ValueErrors; OverflowError) refuses as well.
    """
    given = {name: headers.get(f"Svix-{name}") or headers.get(f"Webhook-{name}") or "" for name in _HEADERS}
    if not all(given.values()):
        raise Refused("missing")
    message_id = given["Id"]
    if len(message_id) > LONGEST_ID or not (message_id.isascii() and message_id.isprintable()):
        raise Refused("signature")
    if any(len(value) > LONGEST_HEADER for value in given.values()):
        raise Refused("signature")
    named = {f"svix-{name.lower()}": value for name, value in given.items()}
    reason = "missing"
    for secret in settings.junction_webhook_secrets:
        try:
            _verifier(secret).verify(body, named)
        except _svix.WebhookVerificationError as error:
            reason = "stale" if "timestamp" in str(error) else "signature"
        except (ValueError, OverflowError, OSError):
            reason = "signature"
        else:
            return Receipt(message_id)
    raise Refused(reason)


_HEADERS = ("Id", "Timestamp", "Signature")


@cache
def _verifier(secret: str) -> Any:
    return _svix.Webhook(secret)


def parse(delivery: Delivery, body: bytes, settings: Settings) -> Parsed:
    """What an event means. Raises DeadLetter, without a value of the body, if it cannot be used."""
    envelope = _decode(body, _Envelope, "not a Junction event")
    name = envelope.event_type or envelope.type
    if not name:
        raise DeadLetter("not a Junction event: it has no event_type")
    event = catalogue().event(name)
    if event.does in ("unknown", "query", "lab"):
        reason = "an unknown event type" if event.does == "unknown" else "not data of a wearable"
        return Parsed(name, envelope.user_id, envelope.client_user_id, ignored=reason)
    user_id = envelope.user_id or _owner(envelope.data)
    if not user_id:
        raise DeadLetter("no user: neither user_id nor data.user_id")
    version = ksuid.created_at(delivery.message_id) or delivery.received
    collapsed: list[int] = []
    found = list(_actions(event, user_id, bytes(envelope.data), version, collapsed))
    kept = tuple(action for action in found if settings.keeps(event_resource(event, action), action.provider))
    ignored = "left out by HEADRACE_RESOURCES or HEADRACE_PROVIDERS" if found and not kept else None
    return Parsed(name, user_id, envelope.client_user_id, kept, ignored, sum(collapsed))


def event_resource(event: EventType, action: Action) -> str:
    """The resource that the operator's choice is about; a connection belongs to none and is always kept."""
    return "" if isinstance(action, Connection) or event.resource is None else event.resource.name


def _actions(event: EventType, user_id: str, data: bytes, version: datetime, collapsed: list[int]) -> Iterator[Action]:
    resource = event.resource
    if event.does == "connection":
        yield _connection(event.name, user_id, data, version)
    elif event.does == "historical" and resource:
        yield _notice(resource, user_id, data)
    elif resource and resource.kind == "timeseries":
        group = _decode(data, _Group, f"{resource.name}: data is not a group of samples")
        yield from samples(resource, user_id, group, version, collapsed)
    elif resource:
        yield record(resource, user_id, data, version)


def record(resource: Resource, user_id: str, data: bytes, version: datetime) -> Record:
    """One object of a summary, a stream's notice or a device. Its own `updated_at` goes before `version`."""
    known = _decode(data, _record_type(resource), resource.name)
    source = known.source or _Source()
    provider = (source.slug_of_provider or known.source_provider or known.provider or "").lower()
    kind = source.type or known.source_type or "unknown"
    updated_at = getattr(known, "updated_at", None)
    version = _moment(updated_at, "updated_at") if updated_at else version
    return Record(resource.name, user_id, getattr(known, resource.identifier), provider, kind, data, version)


@cache
def _record_type(resource: Resource) -> Any:
    """A type that checks every scalar of the public schema while it is decoded, and passes over the rest."""
    fixed: dict[str, Any] = {
        "source": _Source | None,
        "source_provider": str | None,
        "source_type": str | None,
        "provider": str | None,
    }
    scalars = {field.name: _TYPES[field.type] for field in resource.fields}
    fields = [(resource.identifier, Annotated[str, msgspec.Meta(min_length=1, max_length=256)])]
    fields += [(name, kind, None) for name, kind in (fixed | scalars).items()]  # type: ignore[misc]
    return msgspec.defstruct(resource.name, fields)


def samples(
    resource: Resource, user_id: str, group: _Group, version: datetime, collapsed: list[int]
) -> Iterator[Samples]:
    """The samples of a group, by series. Where a key stands twice in one group the last one wins; that is counted."""
    source = group.source or _Source()
    provider = source.slug_of_provider
    attributes = _attributes(source, floating=provider in FLOATING_TIME)
    series: dict[str, dict[datetime, Sample]] = {}
    for item in group.data:
        subtype = "/".join(_discriminator(part, item, source) for part in resource.key)
        sample = _sample(resource, item, attributes)
        rows = series.setdefault(subtype, {})
        if (other := rows.get(sample.ts)) and other != sample:
            collapsed.append(1)
        rows[sample.ts] = sample
    for subtype, rows in series.items():
        yield Samples(resource.name, user_id, provider, source.kind, subtype, list(rows.values()), version)


def _attributes(source: _Source, *, floating: bool) -> dict[str, Any]:
    """What is true of every sample of a source but no part of its key: devices come and go for the same data."""
    found: dict[str, Any] = {}
    if source.app_id:
        found["app_id"] = source.app_id
    if source.device_id:
        found["device_id"] = source.device_id
    if floating:
        found["is_floating"] = True
    return found


def _discriminator(part: str, item: dict[str, Any], source: _Source) -> str:
    owner, _, name = part.rpartition(".")
    value = getattr(source, name) if owner else item.get(name)
    if value is not None and not isinstance(value, str):
        raise DeadLetter(f"{part}: expected text")
    return value or ""


def _sample(resource: Resource, item: dict[str, Any], attributes: dict[str, Any]) -> Sample:
    moment = item.get("timestamp") or item.get("start")  # interval samples often have no timestamp
    if not moment:
        raise DeadLetter(f"{resource.name}: a sample has neither timestamp nor start")
    end = item.get("end")
    offset = item.get("timezone_offset")
    if offset is not None and (type(offset) is not int or abs(offset) > 86_400):
        raise DeadLetter(f"{resource.name}: timezone_offset: expected seconds")
    unit = item.get("unit") or ""
    if not isinstance(unit, str):
        raise DeadLetter(f"{resource.name}: unit: expected text")
    value = None if resource.fields else _number(item.get("value"), resource.name)
    return Sample(
        _moment(moment, "timestamp"),
        _moment(end, "end") if end else None,
        value,
        unit,
        offset,
        _extra(resource, item, attributes),
    )


def _extra(resource: Resource, item: dict[str, Any], attributes: dict[str, Any]) -> bytes | None:
    extra = dict(attributes)
    if resource.fields:
        extra |= {field.name: _own_value(resource, field, item) for field in resource.fields}
        known = SAMPLE_COLUMNS | {"value"}
    else:
        known = _PLAIN_COLUMNS
    for name, value in item.items():
        if value is not None and name not in known and name not in resource.key:
            extra.setdefault(name, value)
    return msgspec.json.encode(extra) if extra else None


_PLAIN_COLUMNS = SAMPLE_COLUMNS | {"value"}


def _own_value(resource: Resource, field: Field, item: dict[str, Any]) -> float | str:
    """A value that has a column of its own: systolic and diastolic, or a note's text, which stands under `value`."""
    if field.type == "number":
        return _number(item.get(field.name), f"{resource.name}: {field.name}")
    value = item.get("value")
    if not isinstance(value, str):
        raise DeadLetter(f"{resource.name}: value: expected text")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) is float:
        return value
    if type(value) is not int:
        raise DeadLetter(f"{what}: expected a number")
    return float(value)


def _moment(text: Any, what: str) -> datetime:
    """An instant; without an offset it is taken as UTC, which is what Junction means."""
    try:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, TypeError):
        raise DeadLetter(f"{what}: expected an ISO 8601 date and time") from None


def _connection(name: str, user_id: str, data: bytes, version: datetime) -> Connection:
    """Four shapes: provider or source, as an object (`slug`, or `source_slug` in the oldest), or provider as text."""
    known = _decode(data, _Connected, "connection")
    provider = _slug(known.provider) or _slug(known.source)
    if not provider:
        raise DeadLetter("connection: neither provider nor source has a slug")
    if not name.endswith(".error"):
        return Connection(user_id, provider, "connected", None, version)
    error = ": ".join(part for part in (known.error_type, known.error_details) if part)
    return Connection(user_id, provider, "error", error or "unknown", version)


def _slug(given: _Source | str | None) -> str:
    return given.lower() if isinstance(given, str) else given.slug_of_provider if given else ""


def _notice(resource: Resource, user_id: str, data: bytes) -> Notice:
    """A chunk of history. An absent `is_final` means final; an inverted window is turned round."""
    known = _decode(data, _Historical, f"{resource.name}: history")
    edges = [_moment(text, name) for name, text in (("start", known.start_date), ("end", known.end_date)) if text]
    start, end = sorted(edges) if len(edges) == 2 else (None, None)
    return Notice(user_id, _slug(known.provider), resource.name, start, end, known.is_final is not False)


def _owner(data: msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(data, type=_Owner).user_id
    except msgspec.ValidationError:
        return None


def _decode(body: bytes, kind: Any, what: str) -> Any:
    """Raises DeadLetter; msgspec's text names the field and the types, never the value."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DeadLetter(f"{what}: {error}") from None
    except RecursionError:
        raise DeadLetter(f"{what}: nested too deep") from None
