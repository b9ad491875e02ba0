"""The options and the results of a run, with one class per part, as written to bench.json."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

SAMPLES_PER_EVENT = 1000
GENERATOR, ELSEWHERE = "load generator", "other processes"  # stages outside the stack


@dataclass(frozen=True)
class Plan:
    """The options of a run."""

    seconds: float = 8.0  # per load
    connections: tuple[int, ...] = (1, 8, 32, 128)
    workers: int = 2  # processes per lane
    probes: float = 40.0  # probe events a second during a load
    people: int = 20  # users of the backfill, 50,000 samples each
    rows: int = 50_000_000  # samples stored before the last step of `growth`
    minutes: float = 10.0  # of `soak`
    idle: float = 60.0  # seconds of `idle`


@dataclass(frozen=True)
class Times:
    """Percentiles, in milliseconds."""

    p50: float
    p99: float
    count: int


@dataclass(frozen=True)
class PipelineRun:
    """A load through the whole pipeline, in events a second; a samples event has SAMPLES_PER_EVENT samples."""

    kind: str
    connections: int
    events: int  # accepted events
    accepted: float
    committed: float
    missing: int  # accepted events without a row
    refused: int  # responses other than 202
    answer: Times
    cpu_us: dict[str, float]  # per event, by stage
    per_message: float  # deliveries per message that the endpoint published
    per_batch: float  # deliveries per batch that a worker applied

    @property
    def cost_us(self) -> float:
        """CPU of the whole stack per event, in microseconds."""
        return sum(us for stage, us in self.cpu_us.items() if stage not in (GENERATOR, ELSEWHERE))


@dataclass(frozen=True)
class Pss:
    """The number of processes of a group, and their PSS, which counts a page that several processes share once."""

    processes: int
    mb: float


@dataclass(frozen=True)
class Idle:
    """A stack without load: seconds until it is ready; memory and CPU in percent of a core, by group of processes."""

    ready_seconds: float
    seconds: float
    pss: dict[str, Pss]
    cpu_percent: dict[str, float]


@dataclass(frozen=True)
class Floors:
    """The throughput of each step alone, a second."""

    bare: float
    bare_answer: Times
    verified: float
    verified_answer: Times
    verifying: float
    publishing: dict[int, float]  # by deliveries per message
    applying: dict[int, float]  # likewise
    applying_samples: float
    merging: dict[int, float]  # samples, by processes


@dataclass(frozen=True)
class Live:
    """Workouts: in a closed loop, and at 80 % of the highest committed rate."""

    closed: list[PipelineRun]
    rate: float
    paced: PipelineRun
    to_row: Times
    to_day: Times


@dataclass(frozen=True)
class ConcurrentBackfill:
    """A backfill during live events in samples a second, and the times from 202 to row before and during it."""

    rate: float
    before: Times
    during: Times


@dataclass(frozen=True)
class Backfill:
    """Backfill in samples a second: alone, and during live events without a rate limit and at the default rate."""

    samples: int
    missing: int
    rate: float
    unlimited: ConcurrentBackfill
    as_shipped: ConcurrentBackfill
    floors: dict[str, float]


@dataclass(frozen=True)
class ReplayResult:
    """Archived deliveries of one kind, applied to an empty database and then again to the same one, a second."""

    kind: str
    count: int
    storing: float
    again: float
    bytes_before: int
    bytes_after: int
    is_same: bool  # whether the views are unchanged


@dataclass(frozen=True)
class GrowthStep:
    """Both kinds of events with `rows` samples stored."""

    rows: int
    workouts: PipelineRun
    samples: PipelineRun


@dataclass(frozen=True)
class Soak:
    """Memory of the endpoint, one value per second."""

    rate: float
    seconds: list[float]
    mb: list[float]
    slope: float  # MB a minute, without the first tenth of the time


@dataclass
class Results:
    """All results. Parts that were not run are None."""

    plan: Plan
    cores: int
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    floors: Floors | None = None
    idle: Idle | None = None
    live: Live | None = None
    samples: PipelineRun | None = None
    backfill: Backfill | None = None
    replay: list[ReplayResult] | None = None
    workers: dict[int, PipelineRun] | None = None
    growth: list[GrowthStep] | None = None
    soak: Soak | None = None

    def save(self, folder: Path) -> Path:
        """Writes bench.json to the folder."""
        file = folder / "bench.json"
        file.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        return file


def times(seconds: list[float]) -> Times:
    """Percentiles of times in seconds."""
    if not seconds:
        return Times(float("nan"), float("nan"), 0)
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * share)] * 1000 for share in (0.5, 0.99))
    return Times(p50, p99, len(ordered))
