"""Searches in the ledger: by key, by outcome, type and time, and of users in the archive and before it."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain

import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from tests.support import apply, delivery, workout
from tests.support.console import LEDGER
from workers.console import ledger
from workers.console.ledger import Rates, Search
from workers.store.engine import transaction


@pytest.fixture
def deliveries(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(LEDGER, {"count": 5000})


@pytest.mark.usefixtures("deliveries")
def test_pages_follow_each_other_by_key(engine: Engine) -> None:
    """Breaks if a page repeats or skips a delivery, also among equal times."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.deliveries SET received_at = date_trunc('minute', received_at)"))
    seen: list[str] = []
    search = Search()
    with transaction(engine) as connection:
        while True:
            found = ledger.find(connection, search, 700)
            seen += [row["message_id"] for row in found.rows]
            if found.next is None:
                break
            search = Search(before=found.next)
    assert len(seen) == len(set(seen)) == 5000


@pytest.mark.usefixtures("deliveries")
def test_deliveries_are_selected_by_outcome_type_and_time(engine: Engine) -> None:
    now = datetime.now(UTC)
    with transaction(engine) as connection:
        assert len(ledger.find(connection, Search(outcome="dead"), 100).rows) == 5
        assert len(ledger.find(connection, Search(event_type="*.sleep.*"), 100).rows) == 50
        assert ledger.find(connection, Search(event_type="%"), 100).rows == []
        some = ledger.find(connection, Search(since=now - timedelta(seconds=100), until=now - timedelta(seconds=50)))
        assert 45 <= len(some.rows) <= 51


@pytest.mark.usefixtures("deliveries")
def test_a_search_that_takes_too_long_is_continued(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a rare outcome in a large ledger holds a thread, or a search cannot go on where it stopped."""
    monkeypatch.setattr(ledger, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(ledger, "FIRST_PERIOD", timedelta(minutes=30))
    seen, search, pages = [], Search(outcome="dead"), 0
    while search and pages < 200:
        with transaction(engine) as connection:
            monkeypatch.setattr(ledger, "MAX_SECONDS", 0.0005 * (pages + 1))
            found = ledger.find(connection, search)
        seen += [row["message_id"] for row in found.rows]
        pages += 1
        if found.next is None:
            break
        search = Search(outcome="dead", before=found.next)
    assert sorted(seen) == [f"msg_{number}000" for number in range(1, 6)]


@pytest.mark.usefixtures("deliveries")
def test_rates_read_each_minute_once(engine: Engine) -> None:
    rates, now = Rates(10), datetime.now(UTC)
    with transaction(engine) as connection:
        first = rates.read(connection, now)
        assert [one["received"] for one in first[:-1]] == [60] * 9
        connection.execute(text("DELETE FROM headrace.deliveries"))
        again = rates.read(connection, now)
    assert again[:8] == first[:8]
    assert again[-1]["received"] == 0


COPIES = """
INSERT INTO headrace.archive (received_at, aggregator, message_id, event_type, user_id, ordering_ms, reference, sealed)
SELECT received_at - n * interval '1 second', aggregator, 'copy_' || n, event_type, user_id, ordering_ms, reference,
       sealed FROM headrace.archive, generate_series(1, :count) AS n;
INSERT INTO headrace.deliveries
    (aggregator, message_id, event_type, user_id, received_at, applied_at, outcome, attempts, month)
SELECT aggregator, 'copy_' || n, event_type, user_id, received_at - n * interval '1 second', applied_at,
       CASE n WHEN :count THEN 'stale' ELSE outcome END, 1, month
FROM headrace.deliveries, generate_series(1, :count) AS n"""


def copy_deliveries(engine: Engine, settings: Settings, count: int) -> None:
    """A user's delivery, and older copies, the oldest with the outcome stale."""
    apply(engine, settings, delivery(workout("u9"), name="msg_1"))
    with engine.begin() as connection:
        for query in COPIES.split(";"):
            connection.execute(text(query), {"count": count})


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that a busy machine does not cut."""
    monkeypatch.setattr(ledger, "MAX_SECONDS", 60.0)
    monkeypatch.setattr(ledger, "OLDER_SECONDS", 60.0)


def pages(engine: Engine, **search: object) -> Iterator[list[str]]:
    """The ids on each page of a search."""
    before = None
    while True:
        with transaction(engine) as connection:
            found = ledger.find(connection, Search(before=before, **search))  # type: ignore[arg-type]
        yield [row["message_id"] for row in found.rows]
        if (before := found.next) is None:
            return


@pytest.mark.usefixtures("patient")
def test_a_users_rare_outcome_is_found_behind_hundreds_of_others(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if only the newest deliveries of a user are searched, and the page says that no other matches."""
    copy_deliveries(engine, settings, 1200)
    assert list(pages(engine, users=("u9",), outcome="stale")) == [["copy_1200"]]
    found = list(pages(engine, users=("u9",)))
    assert {len(page) for page in found[:-1]} == {ledger.PAGE_ROWS}
    assert list(chain(*found)) == ["msg_1", *(f"copy_{n}" for n in range(1, 1201))]
    monkeypatch.setattr(ledger, "MAX_SECONDS", 0.0)
    with transaction(engine) as connection:
        page = ledger.find(connection, Search(users=("u9",), outcome="stale"))
    assert (page.rows, page.is_cut, page.next is not None) == ([], True, True)
    with transaction(engine) as connection:
        following = ledger.find(connection, Search(users=("u9",), before=page.next))
    assert following.rows[0]["message_id"] == "copy_500"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("count", [49, 50, 99, 120])
def test_a_users_deliveries_from_before_the_archive_are_found(engine: Engine, settings: Settings, count: int) -> None:
    """Breaks if HEADRACE_KEEP_DAYS limits which deliveries of a person are found, or the page at its edge skips one."""
    copy_deliveries(engine, settings, count)
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.users SET first_seen = first_seen - interval '1 day'"))
        connection.execute(
            text("DELETE FROM headrace.archive WHERE received_at < ("
                 "SELECT received_at FROM headrace.deliveries WHERE message_id = 'copy_49')")
        )  # fmt: skip
    assert list(chain(*pages(engine, users=("u9",)))) == ["msg_1", *(f"copy_{n}" for n in range(1, count + 1))]
    assert list(pages(engine, users=("u9",), outcome="stale")) == [[f"copy_{count}"]]
    assert list(pages(engine, users=("u8",))) == [[]]


@pytest.mark.usefixtures("deliveries")
def test_an_id_and_other_fields_select_together(engine: Engine) -> None:
    """Breaks if an id silently overrides the other fields of the search."""
    now = datetime.now(UTC)
    assert list(pages(engine, id="msg_1000")) == list(pages(engine, id="msg_1000", outcome="dead")) == [["msg_1000"]]
    for other in ({"outcome": "applied"}, {"event_type": "*.steps.*"}, {"users": ("u1",)}, {"since": now}):
        assert list(pages(engine, id="msg_1000", **other)) == [[]], other


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("edge", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59.999999+00:00"])
@pytest.mark.parametrize("name", ["since", "until"])
@pytest.mark.parametrize("users", [(), ("u9",)])
def test_the_first_and_the_last_time_of_the_calendar_are_searched(
    engine: Engine, edge: str, name: str, users: tuple[str, ...]
) -> None:
    """Breaks if a period that begins before the calendar is an error."""
    assert list(pages(engine, users=users, **{name: datetime.fromisoformat(edge)})) == [[]]
