"""Pages that were read and are not committed yet."""

import time
from dataclasses import dataclass, field

from workers.actions import Action, Samples
from workers.aggregators.requests import Page
from workers.store.backfills import ChunkPosition


@dataclass(frozen=True)
class CommitLimits:
    """What is committed together: so many pages and rows, or what came within so many seconds.

    A page by itself costs eight round trips and a flush to disk beside its rows: of eight together, half as many again
    are stored in a second. A worker that is killed costs the requests of one commit.
    """

    pages: int = 8
    rows: int = 10_000
    seconds: float = 1.0


COMMIT_LIMITS = CommitLimits()
ONE_PAGE = CommitLimits(pages=1)


@dataclass
class PendingPages:
    """Pages that were read and are not committed: the position before them and after them, and what they hold."""

    work: ChunkPosition
    then: ChunkPosition | None
    actions: list[Action] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pages: int = 0
    records: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, page: Page, then: ChunkPosition | None) -> None:
        """Takes in the page that follows."""
        self.then = then
        self.actions += page.actions
        self.refused += page.refused
        self.pages += 1
        self.records += page.records

    def should_commit(self, limits: CommitLimits) -> bool:
        """Whether they are to be committed now; at the end of a chunk they always are."""
        rows = sum(len(one.rows) if isinstance(one, Samples) else 1 for one in self.actions)
        is_late = time.monotonic() > self.since + limits.seconds
        return self.then is None or self.pages >= limits.pages or rows >= limits.rows or is_late
