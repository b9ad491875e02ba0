"""Connections that break at COMMIT: the work is repeated, or its outcome is looked up, and has exactly one effect."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import pytest
from sqlalchemy import URL, Engine, make_url, text

from app.config.settings import Settings
from app.delivery import Receipt, pack, seal
from app.errors import CommitUnknown, TryLater, Unprocessable
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, START, delivery, heartrate, message_id, rows, workout
from tests.support.backfills import announce, make_due, notice, status
from tests.support.commit_proxy import CommitProxy, Moment, commit_proxy
from tests.support.provider import Provider, heartrates, hourly
from workers.ingest.apply import Applier
from workers.ingest.parse import UNKNOWN
from workers.ingest.replay import replay_dead_letters
from workers.operate.erase import Eraser
from workers.store import dead_letters, erase
from workers.store import engine as engine_module
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import make_writer, transaction

MOMENTS: tuple[Moment, ...] = get_args(Moment)
MAX_COMMITS = 200


@pytest.fixture
def proxy(settings: Settings, database_url: str) -> Iterator[CommitProxy]:
    """A proxy in front of the test's empty database."""
    del settings  # empties it
    with commit_proxy(database_url) as one:
        yield one


@pytest.fixture
def proxied(settings: Settings, proxy: CommitProxy) -> Settings:
    """A deployment that reaches PostgreSQL through the proxy only, without a rate limit."""
    url = proxy.url.replace("postgresql", "postgresql+psycopg", 1)
    return replace(settings, database_url=url, junction_api_key="sk_us_tests", request_rate="1000000/second")


@pytest.fixture
def cut(proxied: Settings) -> Iterator[Engine]:
    """A writer's engine whose connections the proxy cuts."""
    engine = make_writer(proxied, "headrace-worker")
    insert(engine, "first", confirm=False)  # a new connection of a writer commits its temporary table
    yield engine
    engine.dispose()


def each_cut(proxy: CommitProxy, moment: Moment, work: Callable[[int], None], *, least: int, step: int = 1) -> None:
    """Does the work once for each of its commits, which is cut, until a run has no such commit; at least `least`."""
    for commit in range(1, MAX_COMMITS, step):
        proxy.cut(commit, moment)
        work(commit)
        if not proxy.cuts:
            assert commit > least
            return
    raise AssertionError("the work never ends without a cut")


INSERT = "INSERT INTO headrace.users (user_id) VALUES (:user)"


def insert(engine: Engine, user: str, *, confirm: bool) -> None:
    with transaction(engine, confirm=confirm) as connection:
        connection.execute(text(INSERT), {"user": user})


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_unknown_outcome_is_an_error_of_its_own(
    engine: Engine, cut: Engine, proxy: CommitProxy, moment: Moment
) -> None:
    """Breaks if a transaction that may be committed is reported like one that is not."""
    proxy.cut(1, moment)
    with pytest.raises(CommitUnknown, match="during COMMIT"):
        insert(cut, "lost", confirm=False)
    stored = rows(engine, "SELECT 1 FROM headrace.users WHERE user_id = 'lost'")
    assert len(stored) == (moment == "after")


def test_a_confirmed_transaction_has_a_known_outcome(engine: Engine, cut: Engine, proxy: CommitProxy) -> None:
    """Breaks if a command fails although its change is stored, or ends well although it is not."""
    proxy.cut(1, "after")
    insert(cut, "after", confirm=True)
    insert(cut, "connected", confirm=True)
    proxy.cut(1, "before")
    with pytest.raises(TryLater, match="rolled back") as caught:
        insert(cut, "before", confirm=True)
    assert not isinstance(caught.value, CommitUnknown)
    assert rows(engine, "SELECT user_id FROM headrace.users WHERE user_id IN ('after', 'before')") == [
        {"user_id": "after"}
    ]


def test_an_outcome_that_cannot_be_looked_up_stays_unknown(
    cut: Engine, proxy: CommitProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a command waits without end for a server that does not come back."""
    monkeypatch.setattr(engine_module, "CONFIRM_SECONDS", 1.0)
    proxy.cut(1, "after")
    proxy.is_last = True
    with pytest.raises(CommitUnknown):
        insert(cut, "lost", confirm=True)


def test_a_frozen_server_is_left(cut: Engine, proxy: CommitProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a worker waits without end for a stopped server whose kernel acknowledges its packets."""
    monkeypatch.setattr(engine_module, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(engine_module, "PING_SECONDS", 2)
    with transaction(cut) as connection:  # a slow statement of a server that works is not given up
        connection.execute(text("SELECT pg_sleep(1.5)"))
    proxy.is_frozen.set()
    with pytest.raises(TryLater, match="ConnectionTimeout"):
        insert(cut, "frozen", confirm=False)
    proxy.is_frozen.clear()
    insert(cut, "thawed", confirm=False)


def test_a_server_that_cannot_end_is_left(cut: Engine, proxy: CommitProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a worker waits for ever for a replaced primary, which refuses connections and waits for a replica."""
    monkeypatch.setattr(engine_module, "SILENT_SECONDS", 0.5)
    proxy.is_frozen.set()
    proxy.close()
    with pytest.raises(TryLater):
        insert(cut, "refused", confirm=False)


def test_another_server_does_not_answer_for_a_frozen_one(
    proxied: Settings, proxy: CommitProxy, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a worker waits without end for a frozen primary because the new primary accepts connections."""
    monkeypatch.setattr(engine_module, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(engine_module, "PING_SECONDS", 2)
    first = make_url(proxied.need_database())
    hosts = [f"{one.host}:{one.port}" for one in (first, make_url(database_url))]
    url = URL.create(
        first.drivername, first.username, first.password, database=first.database, query={"host": hosts}
    ).render_as_string(hide_password=False)
    several = make_writer(replace(proxied, database_url=url))
    insert(several, "first host", confirm=False)
    proxy.is_frozen.set()
    with pytest.raises(TryLater, match="ConnectionTimeout"):
        insert(several, "frozen", confirm=False)
    insert(several, "second host", confirm=False)
    several.dispose()


def test_a_rejected_commit_is_not_unknown(cut: Engine) -> None:
    """Breaks if an error that PostgreSQL reports at COMMIT, such as a deferred constraint's, counts as unknown."""
    query = """CREATE TEMPORARY TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO once VALUES (1), (1)"""
    with pytest.raises(Unprocessable), transaction(cut, confirm=True) as connection:
        connection.execute(text(query))


@pytest.mark.parametrize(("moment", "redelivered"), [*itertools.product(MOMENTS, (False, True))])
def test_a_message_is_applied_once(  # noqa: PLR0917 - fixtures
    engine: Engine, cut: Engine, proxied: Settings, proxy: CommitProxy, moment: Moment, redelivered: bool
) -> None:
    """Breaks if a message whose commit was interrupted is lost, or its retry stores or counts anything twice."""
    applier = Applier(cut, proxied)

    def apply(commit: int) -> None:
        user = f"u{commit}"
        packed = pack([delivery(workout(user)), delivery(heartrate(user, {0: 60, 1: 61})), notice(user)])
        for _ in range(2 + redelivered):
            try:
                applier.apply(packed, redelivered=redelivered)
            except CommitUnknown:
                continue
            break
        assert [
            row["outcome"] for row in rows(engine, "SELECT outcome FROM headrace.deliveries WHERE user_id = :u", u=user)
        ] == ["applied"] * 3
        assert len(rows(engine, "SELECT 1 FROM health.workouts WHERE user_id = :u", u=user)) == 1
        assert len(rows(engine, "SELECT 1 FROM health.heartrate WHERE user_id = :u", u=user)) == 2
        assert status(engine, user) == [("pending", 0, 1)]
        assert rows(engine, "SELECT name FROM headrace.crash_counts") == []

    each_cut(proxy, moment, apply, least=2)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_page_is_committed_with_its_cursor(
    engine: Engine, cut: Engine, proxied: Settings, proxy: CommitProxy, moment: Moment
) -> None:
    """Breaks if an interrupted commit skips a page, or stores one without its position, so that it counts twice."""

    def fetch(commit: int) -> None:
        user, provider = f"u{commit}", Provider(heartrates(hourly(6), 24))
        (one,) = announce(engine, proxied, notice(user, days=(0, 6)))
        fetcher = provider.fetcher(cut, proxied, pages=1)
        for _ in range(20):
            make_due(engine, leases=True)
            try:
                fetcher.run(one)
            except TryLater:
                continue
            if status(engine, user)[0][0] == "complete":
                break
        assert status(engine, user) == [("complete", 1, 1)]
        found = rows(engine, "SELECT records FROM headrace.backfills WHERE user_id = :u", u=user)
        assert found == expected.setdefault(0, found), commit
        assert rows(engine, "SELECT count(*) AS n FROM health.heartrate WHERE user_id = :u", u=user) == [{"n": 144}]

    expected: dict[int, list[dict[str, object]]] = {}
    each_cut(proxy, moment, fetch, least=6)


def dead(engine: Engine, user: str) -> None:
    """Stores two dead letters of a user: a delivery, and a raw message with another one."""
    with transaction(engine) as connection:
        add_dead_letter(connection, delivery(workout(user, "w1")), "why")
        raw = pack([delivery(workout(user, "w2"))]).encode()
        add_dead_letter(connection, seal(UNKNOWN, Receipt(message_id(START)), raw, Sealer([ENCRYPTION_KEY])), "why")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_dead_letter_is_replayed_once(
    engine: Engine, cut: Engine, proxied: Settings, proxy: CommitProxy, moment: Moment
) -> None:
    """Breaks if an interrupted replay loses a dead letter or leaves one that is applied."""

    def replay(commit: int) -> None:
        user = f"u{commit}"
        dead(engine, user)
        for _ in range(2):
            try:
                replay_dead_letters(cut, Applier(cut, proxied), dead_letters.listed(cut))
            except TryLater:
                continue
            break
        assert dead_letters.listed(engine) == []
        found = rows(engine, "SELECT id FROM health.workouts WHERE user_id = :u ORDER BY 1", u=user)
        assert found == [{"id": "w1"}, {"id": "w2"}]

    each_cut(proxy, moment, replay, least=5)


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_erasure_is_completed(
    engine: Engine, cut: Engine, proxied: Settings, proxy: CommitProxy, moment: Moment
) -> None:
    """Breaks if an erasure whose commit was interrupted leaves data that the next run does not find."""

    def interrupted(commit: int) -> None:
        user = f"u{commit}"
        announce(engine, proxied, notice(user), delivery(workout(user)), delivery(heartrate(user, {0: 60})))
        for _ in range(2):
            try:
                Eraser(cut, proxied).erase(user, lambda _: None)
            except TryLater:
                continue
            break
        for view in ("workouts", "heartrate", "backfills"):
            assert rows(engine, f"SELECT 1 FROM health.{view} WHERE user_id = :u", u=user) == []

    each_cut(proxy, moment, interrupted, least=50, step=9)


def test_an_erasure_is_recorded_once(engine: Engine, cut: Engine, proxy: CommitProxy) -> None:
    """Breaks if an erasure fails after its tombstone was committed, so that a second run records it again."""
    proxy.cut(1, "after")
    erase.create_tombstone(cut, "u1")
    insert(cut, "connected", confirm=False)
    proxy.cut(1, "after")
    erase.finish(cut, "u1", {"workouts": 1})
    assert [row["action"] for row in rows(engine, "SELECT action FROM headrace.audit ORDER BY id")] == [
        "erase",
        "erased",
    ]
