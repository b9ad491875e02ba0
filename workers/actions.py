"""Actions: what a delivery or a fetched page means, in the same words for every aggregator. Plain typed values."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

INFERRED = datetime(1970, 1, 1, tzinfo=UTC)  # the version of what nobody told: whatever was told goes before it
Origin = Literal["webhook", "backfill", "replay", "reconcile"]


class Sample(NamedTuple):
    """One measured value. A tuple, because there are tens of thousands of them per person and day."""

    ts: datetime
    ts_end: datetime | None
    value: float | None
    unit: str
    timezone_offset: int | None  # seconds east of UTC
    extra: bytes | None  # a JSON object: what has no column


@dataclass(frozen=True, slots=True)
class Record:
    """An object that has an id, replaced as a whole: a workout, a night, a profile, a device."""

    resource: str
    user_id: str
    id: str
    provider: str
    source_type: str
    payload: bytes  # JSON, as received
    version: datetime
    columns: bytes | None = None  # JSON of the typed columns, where the payload does not have them under their names
    is_deleted: bool = False  # the aggregator takes it back: a version like any other, and a newer one revives it


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of one series: one user, resource, provider, source type and subtype. No moment occurs twice."""

    resource: str
    user_id: str
    provider: str
    source_type: str
    subtype: str  # what tells samples of one moment apart, '' if nothing does
    rows: list[Sample]
    version: datetime

    @property
    def series(self) -> tuple[str, str, str, str, str]:
        """The key of the series."""
        return (self.user_id, self.resource, self.provider, self.source_type, self.subtype)


@dataclass(frozen=True, slots=True)
class Connection:
    """A user's connection with a provider came up, broke or ended; INFERRED, where there is only data that says so."""

    user_id: str
    provider: str
    status: Literal["connected", "error", "disconnected"]
    error: str | None
    version: datetime


@dataclass(frozen=True, slots=True)
class Notice:
    """History is ready to be fetched: one chunk of it, the last one if `is_final`; or only what belongs to `item`."""

    user_id: str
    provider: str
    resource: str
    window_start: datetime | None  # None: the aggregator did not say; the default range is meant
    window_end: datetime | None
    is_final: bool
    item: str = ""  # the id of the record whose stream is meant, instead of a window


@dataclass(frozen=True, slots=True)
class UserIdChange:
    """A user reconnected and goes by another id now: what came, or still comes, under the old one is theirs."""

    old_user_id: str
    user_id: str


@dataclass(frozen=True, slots=True)
class Download:
    """The event is not here: it waits at a URL, and is gone from there soon."""

    url: str
    expires_in: float  # seconds, from when this was sent


@dataclass(frozen=True, slots=True)
class LargeRequest:
    """History that somebody asked for elsewhere is on its way, in deliveries that carry its reference."""

    reference: str
    user_id: str
    provider: str
    expected: int | None  # deliveries; None: not said yet


Action = Record | Samples | Connection | Notice | UserIdChange | Download | LargeRequest


@dataclass(frozen=True, slots=True)
class Parsed:
    """A delivery, understood."""

    event_type: str
    user_id: str | None = None
    client_user_id: str | None = None
    actions: tuple[Action, ...] = ()
    ignored: str | None = None  # why nothing is done with it
    occurred_at: datetime | None = None  # when the aggregator made the event, if it says
    duplicate_samples: int = 0  # samples that shared a key with another of the same delivery but not its content
    samples_without_timestamp: int = 0  # values left out because nothing says when they were measured
