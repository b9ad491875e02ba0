"""Pages of the console: what each shows, that it shows no value, and that every look is audited."""

import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from flask import Flask
from sqlalchemy import Engine, text

from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, rows, workout
from tests.support.console import CANARY, LEDGER, Browser, statements, subscribe
from workers.console import people
from workers.store import audit
from workers.store.engine import make_engine, transaction

VALUE = "INSERT INTO headrace.days VALUES ('member-1', 'steps', :day, 1, 'u1', 'steps', :value, NULL, 60, 9, now(), "
VALUE += "'count', 'garmin', 'watch', 'samples', 'utc')"
BACKFILLS = """
INSERT INTO headrace.backfills (aggregator, user_id, provider, resource, requested_by, status)
SELECT 'junction', 'u1', 'garmin', 'r' || n, 'operator', 'complete' FROM generate_series(1, 60) AS n"""
PAGES = ("/", "/deliveries", "/deliveries?id=msg_workout", "/deliveries?user=u1", "/people", "/people?name=u1")
PAGES += ("/delivery?aggregator=junction&id=msg_workout", "/delivery?aggregator=junction&id=msg_heartrate", "/dead")
PAGES += ("/dead?reason=a", "/backfills", "/backfills?user=u1", "/person?user=u1", "/person?user=u1&until=2026-03-20")
PAGES += ("/explain?user=u1&resource=workouts&id=w1", "/feed")
PAGES += ("/explain?user=u1&resource=heartrate&at=2026-03-14T06:30:00Z",)


def numbers(page: str) -> str:
    """The text of a page without the separators of digits."""
    return re.sub(r"[\s\u00a0,]", "", page)


@pytest.fixture
def steps(engine: Engine, person: str) -> None:
    """A canary in health.daily, for each of the last days."""
    today = datetime.now(UTC).date()
    with engine.begin() as connection:
        for number in range(3):
            connection.execute(text(VALUE), {"day": today - timedelta(days=number), "value": CANARY})
        connection.execute(
            text("INSERT INTO headrace.backfills (aggregator, user_id, provider, resource, requested_by, status) "
                 "VALUES ('junction', 'u1', 'garmin', 'steps', 'operator', 'pending')")
        )  # fmt: skip
        connection.execute(
            text("INSERT INTO headrace.chunks (backfill_id, message_id, window_start, window_end, slice_end, is_final) "
                 "SELECT id, 'm', now() - interval '2 days', now(), now(), true FROM headrace.backfills "
                 "WHERE resource = 'steps'")
        )  # fmt: skip


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("role", ["viewer", "operator"])
def test_no_page_shows_a_value_to_a_viewer_or_an_operator(role: str, request: pytest.FixtureRequest) -> None:
    """Breaks if health data can be read in the console without the role privacy."""
    browser: Browser = request.getfixturevalue(role)
    for path in PAGES:
        answer = browser.get(path)
        assert answer.status_code == 200, (path, answer.text)
        assert str(CANARY) not in numbers(answer.text), path
    assert browser.get("/values?user=u1").status_code == 403


@pytest.mark.usefixtures("steps")
def test_privacy_sees_values_on_hover_in_a_table_and_in_explain(privacy: Browser) -> None:
    """Breaks if the test above passes because nothing would show the canaries."""
    for path in ("/person?user=u1", "/values?user=u1", "/explain?user=u1&resource=workouts&id=w1"):
        assert str(CANARY) in numbers(privacy.get(path).text) or "7.71313e+06" in privacy.get(path).text, path


@pytest.mark.usefixtures("person")
def test_a_delivery_leads_to_its_rows_and_its_person(viewer: Browser) -> None:
    found = viewer.get("/deliveries", id="msg_workout").text
    assert "/delivery?aggregator=junction&amp;id=msg_workout" in found
    page = viewer.get("/delivery?aggregator=junction&id=msg_workout").text
    for words in (
        "Applied at",
        "in the archive",
        "workouts",
        ">w1<",
        ">stored<",
        "/person?user=u1",
        "/explain?user=u1",
    ):
        assert words in page, words
    why = viewer.get("/explain?user=u1&resource=workouts&id=w1").text
    assert "is stored because delivery msg_workout contained it" in why
    assert "won" in why
    assert viewer.get("/delivery?aggregator=terra&id=msg_workout").status_code == 404


def test_an_older_version_is_named(viewer: Browser, engine: Engine, settings: Settings) -> None:
    """Breaks if the page of a delivery claims that its rows are stored although a newer one has replaced them."""
    old = delivery(workout("u1", updated_at="2026-03-14T06:30:00+00:00"), name="msg_old")
    new = delivery(workout("u1", updated_at="2026-03-15T06:30:00+00:00", distance=1.5), name="msg_new")
    apply(engine, settings, old, new)
    assert "a newer version is stored" in viewer.get("/delivery?aggregator=junction&id=msg_old").text
    assert "a newer version" not in viewer.get("/delivery?aggregator=junction&id=msg_new").text


@pytest.mark.usefixtures("person")
def test_the_map_shows_stored_and_fetched_days(viewer: Browser, engine: Engine) -> None:
    page = viewer.get("/person?user=u1&until=2026-03-20").text
    assert re.search(r'class="stored"[^>]*><title>2026-03-14: stored</title>', page)
    assert 'aria-label="workouts: 1 days stored' in page
    assert "fetching</title>" in viewer.get("/person?user=u1&until=2026-02-01").text or "fetching" in page
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO headrace.gaps (user_id, provider, resource, part, whose, reason, is_pulling, "
                 "window_start, window_end) VALUES ('u1', 'garmin', 'workouts', 'p', 'ours', 'never fetched', false, "
                 "'2026-03-16', '2026-03-17')")
        )  # fmt: skip
    page = viewer.get("/person?user=u1&until=2026-03-20").text
    assert "2026-03-16: gap" in page
    assert "never fetched" in page
    assert "2026-03-19: empty" in page


def test_the_map_shows_a_gap_of_one_provider_beside_the_data_of_another(
    viewer: Browser, engine: Engine, settings: Settings
) -> None:
    """Breaks if a day without data of the watch looks complete because the ring stored some."""
    ring = {"provider": "oura", "type": "ring"}
    apply(engine, settings, delivery(workout("u1", source=ring)), delivery(heartrate("u1", {0: 61}, **ring)))
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO headrace.gaps (user_id, provider, resource, part, whose, reason, is_pulling, "
                 "window_start, window_end) VALUES ('u1', 'garmin', 'workouts', 'p', 'ours', 'never fetched', false, "
                 "'2026-03-14', '2026-03-14'), "
                 "('u1', 'garmin', 'connection', 'p', 'ours', 'unknown', false, NULL, NULL)")
        )  # fmt: skip
    page = viewer.get("/person?user=u1&until=2026-03-20").text
    assert 'aria-label="connection: ' not in page
    assert re.search(r'class="gap"[^>]*><title>2026-03-14: gap \(garmin\), stored \(oura\)</title>', page)


@pytest.mark.usefixtures("person")
def test_deliveries_of_a_person_include_those_of_former_ids(
    viewer: Browser, engine: Engine, settings: Settings
) -> None:
    """Breaks if the page of a person shows deliveries that "All deliveries" does not."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.users SET merged_into = 'u2' WHERE user_id = 'u1'"))
    apply(engine, settings, delivery(workout("u2"), name="msg_new"))
    for path in ("/person?user=u2", "/deliveries?user=u2", "/deliveries?user=u1"):
        assert "id=msg_workout" in (page := viewer.get(path).text), path
        assert "id=msg_new" in page, path


@pytest.mark.usefixtures("person", "broker_url")
def test_every_look_at_a_person_is_audited(
    viewer: Browser, privacy: Browser, engine: Engine, settings: Settings
) -> None:
    """Breaks if somebody can look at a person without a trace, or the trace does not name the account."""
    apply(engine, replace(settings, encryption_keys=(bytes(range(1, 33)),)), delivery(workout("u1"), name="msg_dead"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.dead_letters SET user_id = 'u1'"))
        connection.execute(text("DELETE FROM headrace.audit"))
    subscribe(engine)

    def number(table: str) -> int:
        return int(rows(engine, f"SELECT min(id) AS id FROM headrace.{table}")[0]["id"])

    looks = {
        "/person?user=u1": "console person",
        "/deliveries?user=u1": "console deliveries",
        "/deliveries?id=msg_workout": "console deliveries",
        "/deliveries": "console deliveries",
        "/delivery?aggregator=junction&id=msg_workout": "console delivery",
        "/backfills?user=u1": "console backfills",
        "/backfills": "console backfills",
        f"/backfills/{number('backfills')}": "console backfill",
        "/dead": "console dead letters",
        f"/dead/{number('dead_letters')}": "console dead letter",
        "/subscription?name=crm": "console subscription",
        "/people?name=u1": "console people",
        "/": "console overview",
        "/explain?user=u1&resource=workouts&id=w1": "explain",
    }
    for path in looks:
        assert "u1" in viewer.get(path).text, path
    privacy.get("/values?user=u1")
    for path in ("/feed", "/dead?reason=nothing", "/deliveries?id=unknown", "/people?name=unknown"):
        viewer.get(path)  # these show nobody
    found = rows(engine, "SELECT os_user, action, subject, detail FROM headrace.audit ORDER BY id")
    expected = [("console:viewer-1", action, "u1") for action in looks.values()]
    expected += [("console:privacy-1", "console values", "u1")]
    assert [(one["os_user"], one["action"], one["subject"]) for one in found] == expected
    assert str(CANARY) not in str(found)


def test_a_look_at_several_people_is_audited_once_with_all_of_them(
    viewer: Browser, engine: Engine, settings: Settings
) -> None:
    """Breaks if a list shows people without a trace, or `headrace audit --subject` does not find the look."""
    apply(engine, settings, delivery(workout("u1")), delivery(workout("u2")))
    viewer.get("/deliveries")
    with transaction(engine) as connection:
        (look,) = audit.listed(connection, datetime.now(UTC) - timedelta(hours=1), ["u2"])
        assert audit.listed(connection, datetime.now(UTC) - timedelta(hours=1), ["u3"]) == []
    assert (look["action"], look["subject"], look["detail"]) == (
        "console deliveries",
        "people",
        {"users": ["u1", "u2"]},
    )


def test_people_are_found_by_each_of_their_names_and_by_a_part(
    viewer: Browser, engine: Engine, settings: Settings
) -> None:
    apply(engine, settings, *(delivery(workout(f"user-{number:03}", f"w{number}")) for number in range(60)))
    assert viewer.get("/people", name="member-1").text.count("/person?user=user-") == 50
    assert viewer.get("/people", name="member-1", after="user-049").text.count("/person?user=user-") == 10
    assert viewer.get("/people", name="SER-00").text.count("/person?user=") == 10
    first = viewer.get("/people").text
    assert first.count("/person?user=") == 50
    assert "after=user-049" in first
    assert viewer.get("/people", after="user-049").text.count("/person?user=") == 10
    assert "No person matches" in viewer.get("/people", name="nobody").text


def test_the_overview_says_what_is_wrong_and_what_to_do(
    viewer: Browser, engine: Engine, settings: Settings, broker_url: str
) -> None:
    assert "<strong>Healthy</strong>" in viewer.get("/").text
    snapshot = viewer.client.application.extensions["console"].snapshot
    snapshot._read_at = time.monotonic() - 3600
    apply(engine, settings, delivery(b"no json"))
    page = viewer.get("/").text
    assert "1 dead letters in the last hour" in page
    assert "<code>headrace dead list</code>" in page
    assert page.count('class="plot"') == 3


@pytest.mark.usefixtures("person", "broker_url")
def test_pages_need_a_bounded_number_of_statements_that_read_few_rows(
    app: Flask, viewer: Browser, engine: Engine, settings: Settings
) -> None:
    """Breaks if a page executes a statement for each row that it shows, or counts a table that grows without limit."""
    paths = [path for path in PAGES if not path.startswith("/explain")]
    viewer.get("/")  # reads the rates and the status, which are kept

    def counts() -> dict[str, int]:
        found = {}
        for path in paths:
            with statements(app) as executed:
                assert viewer.get(path).status_code == 200, path
            found[path] = len(executed)
            reads = [one for one in executed if "headrace.backfills" in one or "headrace.dead_letters" in one]
            assert all("LIMIT" in one or "= ANY(" in one or "user_id = %" in one for one in reads), (path, reads)
        return found

    few = counts()
    assert max(few.values()) <= 100, few
    with engine.begin() as connection:
        connection.execute(LEDGER, {"count": 300})
        connection.execute(text(BACKFILLS))
    apply(engine, settings, *(delivery(workout("u1", f"w{n}"), name=f"msg_{n}") for n in range(60)))
    apply(engine, settings, *(delivery(f"no json {n}".encode()) for n in range(60)))
    assert {path: count for path, count in counts().items() if count > few[path] + 2} == {}


def test_a_database_that_is_away_is_an_error_page(viewer: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the console ends, or shows a traceback."""
    nowhere = make_engine(Settings(database_url="postgresql+psycopg://u:p@127.0.0.1:1/d"))
    known = viewer.client.application.extensions["console"]
    monkeypatch.setitem(viewer.client.application.extensions, "console", replace(known, reader=nowhere))
    answer = viewer.get("/people")
    assert answer.status_code == 503
    assert "PostgreSQL: OperationalError" in answer.text


def test_a_page_after_a_restart_of_postgresql_is_served(viewer: Browser, engine: Engine) -> None:
    """Breaks if each connection of the pool shows one operator an error after a restart or a failover."""
    assert viewer.get("/people").status_code == 200
    with engine.begin() as connection:
        connection.execute(
            text("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                 "WHERE application_name = 'headrace-console' AND datname = current_database()")
        )  # fmt: skip
    assert viewer.get("/people").status_code == 200


@pytest.mark.usefixtures("person")
def test_a_person_with_too_many_deliveries_is_explained_by_the_command_only(
    viewer: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if one page holds a thread for minutes, because it opens all deliveries of a person."""
    monkeypatch.setattr(people, "MAX_EXPLAINED", 1)
    answer = viewer.get("/explain?user=u1&resource=workouts&id=w1")
    assert answer.status_code == 409
    assert "headrace explain --user u1" in answer.text
