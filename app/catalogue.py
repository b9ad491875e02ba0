"""The catalogue of resources: names, keys, fields and fetch paths. Loads and validates catalogue.toml."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

Kind = Literal["summary", "stream", "device", "timeseries", "terra", "terra_timeseries"]
FieldType = Literal["text", "integer", "number", "boolean", "date", "datetime"]
Dates = Literal["moment", "day", "none"]
Day = Literal["counter", "gauge", "last"]

KINDS: tuple[Kind, ...] = get_args(Kind)
TERRA_PREFIX = "terra_"  # of the names and kinds of resources that only Terra has
KEY_PARTS = frozenset({"type", "intensity", "source.workout_id", "source.sport"})
RESERVED = {
    *("user_id", "client_user_id", "provider", "source_type", "id", "payload", "version", "origin", "stored_at"),
    *("deleted", "event_at", "deleted_version"),
}
NAME = re.compile(r"[a-z][a-z0-9_]*")
DAY_FIELDS = ("calendar_date", "session_start", "period_start", "timestamp")
OTHER_EVENTS = frozenset({"connection", "device", "query", "lab", "order"})
DATA_EVENT = re.compile(r"(daily|historical)\.(?:data|timeseries)\.([a-z0-9_]+)\.(created|updated)")


@dataclass(frozen=True, slots=True)
class Field:
    """A scalar field of a public schema: a typed column of the resource's view."""

    name: str
    type: FieldType

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name in RESERVED:
            raise ValueError(f"{self.name!r} cannot be a column")
        if self.type not in get_args(FieldType):
            raise ValueError(f"{self.name}: {self.type!r} is not a field type")


@dataclass(frozen=True, slots=True, eq=False)
class Resource:
    """One row of the catalogue. The constructor rejects contradictions. Resources are compared by identity."""

    name: str
    kind: Kind
    path: str = ""  # of Junction's API
    rows: str | None = None
    dates: Dates = "moment"
    fields: tuple[Field, ...] = ()
    identifier: str = "id"
    key: tuple[str, ...] = ()
    unit: str | None = None
    interval: bool = False
    day: Day | None = None  # of timeseries: what health.daily shows of a day
    legacy: bool = False
    of: str | None = None  # of a stream: the resource of its records
    terra: str | None = None  # the Terra type that is stored here; also its name in Terra's API

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not a resource name")
        is_path = self.path.startswith("/v2/") and "{" in self.path
        is_terra = self.terra is None or (self.kind == "summary" and NAME.fullmatch(self.terra))
        unknown = sorted(set(self.key) - KEY_PARTS)
        for is_wrong, text in (
            (self.is_junctions and not is_path, f"{self.path!r} is not a fetch path"),
            (self.path and not self.is_junctions, "Junction does not have it"),
            (not is_terra, "terra is the type of a summary's objects"),
            (self.dates not in get_args(Dates), f"dates cannot be {self.dates!r}"),
            (
                not self.is_series and (self.key or self.unit or self.interval or self.day),
                "key, unit, interval and day belong to timeseries",
            ),
            (self.day is not None and self.day not in get_args(Day), f"day cannot be {self.day!r}"),
            (unknown, f"no such key part: {', '.join(unknown)}"),
            (len({field.name for field in self.fields}) != len(self.fields), "a field is named twice"),
        ):
            if is_wrong:
                raise ValueError(f"{self.name}: {text}")

    @property
    def is_series(self) -> bool:
        """Whether the resource consists of samples rather than records."""
        return self.kind in ("timeseries", "terra_timeseries")

    @property
    def is_junctions(self) -> bool:
        """Whether Junction has this resource; the others exist only at Terra."""
        return not self.kind.startswith("terra")

    @property
    def has_history(self) -> bool:
        """Whether Junction announces and serves history of the resource."""
        return self.is_junctions and not self.legacy and self.kind != "device"

    @property
    def holds_terra(self) -> bool:
        """Whether objects of a Terra type are stored here."""
        return self.terra is not None or self.kind == "terra"

    @property
    def day_field(self) -> str | None:
        """The field with the day of a record; samples have a timestamp."""
        names = {field.name for field in self.fields}
        return next((name for name in DAY_FIELDS if name in names), None) if self.kind == "summary" else None

    @property
    def has_days(self) -> bool:
        """Whether stored rows show on which days the resource has data."""
        return self.is_series or self.day_field is not None

    @property
    def has_version(self) -> bool:
        """Whether a record contains the time of its last change."""
        return any(field.name == "updated_at" for field in self.fields)


@dataclass(frozen=True, slots=True)
class EventType:
    """The meaning of an event's name: the action, and its resource if there is one."""

    name: str
    does: Literal["data", "historical", "connection", "device", "query", "lab", "order", "unknown"]
    resource: Resource | None = None


class Catalogue(Mapping[str, Resource]):
    """All resources by name, in the order of the file, and all event types."""

    def __init__(self, resources: list[Resource], other_events: dict[str, str]) -> None:
        self._resources = {resource.name: resource for resource in resources}
        if len(self._resources) != len(resources):
            twice = [name for name, count in Counter(one.name for one in resources).items() if count > 1]
            raise ValueError(f"twice in the catalogue: {', '.join(twice)}")
        self._of_terra = {one.terra or one.name.removeprefix(TERRA_PREFIX): one for one in resources if one.holds_terra}
        self._events: dict[str, EventType] = {}
        for resource in resources:
            if resource.kind in ("summary", "stream", "timeseries"):
                for suffix in ("created", "updated"):
                    self._add(f"daily.data.{resource.name}.{suffix}", "data", resource)
                self._add(f"historical.data.{resource.name}.created", "historical", resource)
        for name, does in other_events.items():
            if does not in OTHER_EVENTS:
                raise ValueError(f"events: {name}: {does!r} is not an action")
            self._add(name, does, self._resources["device"] if does == "device" else None)

    def _add(self, name: str, does: Any, resource: Resource | None) -> None:
        self._events[name] = EventType(name, does, resource)

    def __getitem__(self, name: str) -> Resource:
        return self._resources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._resources)

    def __len__(self) -> int:
        return len(self._resources)

    def of_kind(self, *kinds: Kind) -> list[Resource]:
        """The resources of these kinds, in the order of the file."""
        return [resource for resource in self.values() if resource.kind in kinds]

    def of_terra(self, name: str) -> Resource:
        """The resource that stores the objects of a Terra type. Raises KeyError if there is none."""
        return self._of_terra[name]

    @property
    def event_names(self) -> list[str]:
        """The event types of Junction's OpenAPI document, which has none about orders. Legacy types are left out."""
        documented = ((name, event) for name, event in self._events.items() if event.does != "order")
        return [name for name, event in documented if not (event.resource and event.resource.legacy)]

    def event(self, name: str) -> EventType:
        """The event type of a name, also in the old spelling `daily.timeseries.NAME`."""
        if known := self._events.get(name):
            return known
        if match := DATA_EVENT.fullmatch(name):
            era, resource, suffix = match.groups()
            if known := self._events.get(f"{era}.data.{resource}.{suffix}"):
                return EventType(name, known.does, known.resource)
        return EventType(name, "unknown")


def parse(text: str) -> Catalogue:
    """Parses a catalogue. Raises ValueError, which names the row, if one contradicts itself."""
    document = tomllib.loads(text)
    resources = [_resource(kind, name, row) for kind in KINDS for name, row in document.get(kind, {}).items()]
    return Catalogue(resources, document.get("events", {}))


def _resource(kind: Kind, name: str, row: Mapping[str, Any]) -> Resource:
    rest = dict(row)
    full_name = TERRA_PREFIX + name if kind.startswith("terra") else name
    derived: dict[str, Any] = {}
    try:
        if kind == "timeseries":
            segment = rest.pop("segment", name)
            derived = {"path": f"/v2/timeseries/{{user_id}}/{segment}/grouped", "rows": "groups"}
        texts = rest.pop("values" if kind == "timeseries" else "fields", [])
        derived["fields"] = tuple(map(_field, texts))
        return Resource(name=full_name, kind=kind, key=tuple(rest.pop("key", ())), **derived, **rest)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{kind}.{name}: {error}") from error


def _field(text: str) -> Field:
    name, kind = text.split()
    return Field(name=name, type=kind)  # type: ignore[arg-type] # which Field checks


@cache
def catalogue() -> Catalogue:
    return parse(files("app").joinpath("catalogue.toml").read_text(encoding="utf-8"))
