"""The change feed as a state machine: overlapping transactions, killed sequencers, readers that stop and continue."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule, run_state_machine_as_test
from sqlalchemy import Connection, Engine, create_engine, text

from tests.support.database import EMPTY
from workers.store import feed
from workers.store.feed import Change, Sequencer, announce

READ = text("SELECT position, id FROM health.changes WHERE position > :position ORDER BY position LIMIT :limit")
NUMBERS = strategies.integers(0, 1)


class FeedModel(RuleBasedStateMachine):
    """Two sequencers and two readers of one database, and any number of open transactions."""

    engine: Engine
    writers = Bundle[tuple[Connection, list[str]]]("writers")

    def __init__(self) -> None:
        super().__init__()
        self.sequencers = [Sequencer(self.engine), Sequencer(self.engine)]
        self.committed: list[str] = []
        self.opened: list[Connection] = []
        self.names = 0
        self.read: list[list[tuple[int, str]]] = [[], []]

    @initialize()
    def empty(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(EMPTY))

    @rule(target=writers)
    def begin(self) -> tuple[Connection, list[str]]:
        connection = self.engine.connect()
        self.opened.append(connection)
        return connection, []

    @rule(writer=writers, count=strategies.integers(1, 3))
    def change(self, writer: tuple[Connection, list[str]], count: int) -> None:
        connection, names = writer
        new = [f"r{self.names + n}" for n in range(count)]
        self.names += count
        names += new
        announce(
            connection,
            [Change("put", "u1", "workouts", "garmin", "watch", one, None, None, 1, "webhook") for one in new],
        )

    @rule(writer=consumes(writers))
    def commit(self, writer: tuple[Connection, list[str]]) -> None:
        connection, names = writer
        connection.commit()
        connection.close()
        self.committed += names

    @rule(writer=consumes(writers))
    def roll_back(self, writer: tuple[Connection, list[str]]) -> None:
        writer[0].rollback()
        writer[0].close()

    @rule(which=NUMBERS, everything=strategies.booleans())
    def number(self, which: int, *, everything: bool) -> None:
        self.sequencers[which].run(everything=everything)

    @rule(which=NUMBERS)
    def die(self, which: int) -> None:
        """A sequencer that is killed in the middle of a pass; another process takes its place."""
        with self.engine.connect() as connection:
            newest = connection.scalar(feed.LOCK)
            values = {"seen": feed.NOTHING_SEEN, "newest": newest, "limit": feed.MAX_CHANGES}
            connection.execute(feed.NUMBER, values).one()
            connection.rollback()
        self.sequencers[which] = Sequencer(self.engine)

    @rule(which=NUMBERS, limit=strategies.integers(1, 5))
    def follow(self, which: int, limit: int) -> None:
        seen = self.read[which]
        with self.engine.connect() as connection:
            values = {"position": seen[-1][0] if seen else 0, "limit": limit}
            seen += [(row.position, row.id) for row in connection.execute(READ, values)]

    def teardown(self) -> None:
        for connection in self.opened:
            connection.close()
        self.sequencers[0].run(everything=True)
        for which in (0, 1):
            before = -1
            while len(self.read[which]) > before:
                before = len(self.read[which])
                self.follow(which, 5)
        first, second = self.read
        assert first == second
        assert [position for position, _ in first] == list(range(1, len(first) + 1))
        assert sorted(name for _, name in first) == sorted(self.committed)


@pytest.fixture
def pooled(engine: Engine) -> Iterator[Engine]:
    """An engine with a connection for every writer."""
    many = create_engine(engine.url, pool_size=60)
    yield many
    many.dispose()


def test_every_committed_change_is_read_once(pooled: Engine) -> None:
    """Breaks if an order of transactions, sequencers and readers loses, repeats or reorders a change."""
    chosen = settings(
        max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    bound = type("Bound", (FeedModel,), {"engine": pooled})
    run_state_machine_as_test(bound, settings=chosen)  # type: ignore[no-untyped-call]
