"""What a run was asked for, and what came of it: plain figures, a class for each part, as they stand in bench.json."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

SAMPLES_AN_EVENT = 1000
GENERATOR, ELSEWHERE = "load generator", "not of this run"  # stages that are not of the stack


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    seconds: float = 8.0  # of each load
    connections: tuple[int, ...] = (1, 8, 32, 128)
    workers: int = 2  # processes per lane
    probes: float = 40.0  # events a second whose rows are waited for, beside a load
    people: int = 20  # whose history is fetched, 50,000 samples each
    rows: int = 50_000_000  # samples that are stored before the last measurement of `growth`
    minutes: float = 10.0  # of `soak`


@dataclass(frozen=True)
class Times:
    """Percentiles, in milliseconds."""

    p50: float
    p99: float
    count: int


@dataclass(frozen=True)
class Passage:
    """A load through the whole way, in events a second; a samples event holds SAMPLES_AN_EVENT."""

    kind: str
    connections: int
    events: int  # that were accepted
    accepted: float
    committed: float
    missing: int  # were accepted and have no row
    refused: int  # were answered anything but 202
    answer: Times
    cpu_us: dict[str, float]  # an event, by stage

    @property
    def cost_us(self) -> float:
        """CPU of the whole stack for an event."""
        return sum(us for stage, us in self.cpu_us.items() if stage not in (GENERATOR, ELSEWHERE))


@dataclass(frozen=True)
class Memory:
    """Of the processes of one group: the largest one's, and what all of them have together, shared pages once."""

    processes: int
    largest_mb: float
    together_mb: float


@dataclass(frozen=True)
class Floors:
    """What each part of the way does alone, a second."""

    bare: float
    bare_answer: Times
    verified: float
    verified_answer: Times
    verifying: float
    publishing: dict[int, float]  # by deliveries to a message
    applying: dict[int, float]  # likewise
    applying_samples: float
    merging: dict[int, float]  # samples, by processes


@dataclass(frozen=True)
class Live:
    """Workouts: as fast as they are answered, and at 80 % of the highest rate that was committed."""

    closed: list[Passage]
    rate: float
    paced: Passage
    to_row: Times
    memory: dict[str, Memory]


@dataclass(frozen=True)
class Beside:
    """History beside live events, in samples a second; and those, from 202 to row, before and beside it."""

    rate: float
    before: Times
    during: Times


@dataclass(frozen=True)
class Backfill:
    """History in samples a second, alone, and beside live events as fast as it goes and at the rate of the defaults."""

    samples: int
    missing: int
    rate: float
    unlimited: Beside
    as_shipped: Beside
    floors: dict[str, float]


@dataclass(frozen=True)
class Replayed:
    """Kept deliveries of one kind, applied to an empty database and again to the same one, a second."""

    kind: str
    count: int
    storing: float
    again: float
    bytes_before: int
    bytes_after: int
    is_same: bool  # whatever the views say


@dataclass(frozen=True)
class Grown:
    """What both kinds of events come to with so many samples stored."""

    rows: int
    workouts: Passage
    samples: Passage


@dataclass(frozen=True)
class Soak:
    """Memory of the endpoint, second by second."""

    rate: float
    seconds: list[float]
    mb: list[float]
    slope: float  # MB a minute, without the first tenth of the time


@dataclass
class Results:
    """All of it. What was not asked for is None."""

    plan: Plan
    cores: int
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    floors: Floors | None = None
    live: Live | None = None
    samples: Passage | None = None
    backfill: Backfill | None = None
    replay: list[Replayed] | None = None
    workers: dict[int, Passage] | None = None
    growth: list[Grown] | None = None
    soak: Soak | None = None

    def save(self, folder: Path) -> Path:
        """Writes them down."""
        file = folder / "bench.json"
        file.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        return file


def times(seconds: list[float]) -> Times:
    """Percentiles of times that were measured in seconds."""
    if not seconds:
        return Times(float("nan"), float("nan"), 0)
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * share)] * 1000 for share in (0.5, 0.99))
    return Times(p50, p99, len(ordered))
