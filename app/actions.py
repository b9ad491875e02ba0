"""Actions: what a delivery or a fetched page means, in the same words for every aggregator. Plain typed values."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

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
    """A user's connection with a provider came up or broke."""

    user_id: str
    provider: str
    status: Literal["connected", "error"]
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


Action = Record | Samples | Connection | Notice


@dataclass(frozen=True, slots=True)
class Parsed:
    """A delivery, understood."""

    event_type: str
    user_id: str | None = None
    client_user_id: str | None = None
    actions: tuple[Action, ...] = ()
    ignored: str | None = None  # why nothing is done with it
    told_at: datetime | None = None  # when the aggregator made the event, if it says
    collapsed: int = 0  # samples that shared a key with another of the same delivery but not its content
