"""The console in a real browser: the work of each role, without JavaScript; accessibility and narrow windows."""

from dataclasses import replace

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.browser.pages import Console, Keys
from tests.support import apply, delivery, rows, workout
from tests.support.backfills import announce, notice
from tests.support.console import PASSWORD, subscribe

pytestmark = pytest.mark.processes
PAGES = ("/", "/deliveries", "/delivery?aggregator=junction&id=msg_workout", "/dead", "/dead/{letter}", "/backfills")
PAGES += ("/backfills/{number}", "/people", "/person?user=u1&until=2026-03-20", "/feed", "/values?user=u1")
PAGES += ("/explain?user=u1&resource=workouts&id=w1", "/subscription?name=crm", "/nothing")


@pytest.fixture
def person(engine: Engine, settings: Settings) -> str:
    """A user with a workout, an announced history, and a dead letter that can be applied by now."""
    apply(engine, settings, delivery(workout("u1"), name="msg_workout"))
    apply(
        engine, replace(settings, encryption_keys=(bytes(range(1, 33)),)), delivery(workout("u1", "w2"), name="msg_2")
    )
    announce(engine, settings, notice("u1"))
    return "u1"


@pytest.mark.usefixtures("person")
def test_a_viewer_follows_a_delivery_to_its_person_and_can_change_nothing(console: Console) -> None:
    console.log_in("viewer")
    assert console.heading == "Overview"
    console.follow("Deliveries")
    console.fill("id", "msg_workout")
    console.press("Search")
    console.follow("msg_workout")
    assert "Applied at" in console.text
    console.follow("explain workouts")
    assert "is stored because delivery msg_workout contained it" in console.text
    console.follow("u1")
    assert console.heading == "Person u1"
    assert "garmin" in console.text
    assert not any(map(console.has, ("Start backfills", "Reconcile", "Erase this person")))
    console.open("/values?user=u1")
    assert "Your account lacks the role privacy." in console.text


@pytest.mark.usefixtures("person")
def test_an_operator_replays_a_dead_letter(console: Console, engine: Engine) -> None:
    (number,) = (row["id"] for row in rows(engine, "SELECT id FROM headrace.dead_letters"))
    console.log_in("operator")
    console.follow("Dead letters")
    console.tick(f"select dead letter {number}")
    console.press("Replay selected")
    assert "Nothing was changed yet." in console.text
    console.press("Replay")
    assert "1 applied again: 1 applied" in console.text
    assert "No dead letters." in console.text
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY id")] == ["w1", "w2"]


def test_an_operator_starts_and_cancels_a_backfill(console: Console, engine: Engine, person: str) -> None:
    console.log_in("operator")
    console.open(f"/person?user={person}")
    console.fill("since", "2026-01-01")
    console.choose("resource", "sleep")
    console.press("Start backfills")
    console.press("Start")
    assert "started 1 backfills" in console.text
    query = "SELECT id, status FROM headrace.backfills WHERE resource = 'sleep'"
    (started,) = rows(engine, query)
    assert started["status"] == "pending"
    console.follow("Backfills")
    console.tick(f"select backfill {started['id']}")
    console.press("Cancel selected")
    console.press("Cancel")
    assert "cancel: 1 of 1 backfills" in console.text
    assert rows(engine, query)[0]["status"] == "cancelled"
    assert not console.has("Erase this person")


def test_privacy_erases_a_person(console: Console, engine: Engine, person: str) -> None:
    console.log_in("privacy")
    console.open(f"/person?user={person}")
    console.press("Erase this person")
    console.fill("typed", "u2")
    console.press("Erase permanently")
    assert "Nothing was done." in console.text
    console.fill("typed", person)
    console.press("Erase permanently")
    assert f"erased {person}:" in console.text
    assert rows(engine, "SELECT id FROM health.workouts") == []
    console.press("Log out")
    console.open(f"/person?user={person}")
    assert console.heading == "Headrace console"


@pytest.mark.usefixtures("person")
def test_every_page_is_accessible_in_both_colour_schemes_and_fits_a_phone(
    console: Console, axe: str, engine: Engine
) -> None:
    """Breaks if a field has no label, a text too little contrast, or a page is wider than a phone."""
    subscribe(engine)
    (number,) = (row["id"] for row in rows(engine, "SELECT id FROM headrace.backfills"))
    (letter,) = (row["id"] for row in rows(engine, "SELECT id FROM headrace.dead_letters"))

    def check(page: str) -> None:
        for scheme in ("light", "dark"):
            assert console.violations(axe, scheme) == [], (page, scheme)
        console.driver.set_window_size(390, 844)
        assert console.overflow() <= 0, page
        console.driver.set_window_size(1200, 900)

    console.open("/login")
    console.fill("name", "privacy-1")
    console.fill("password", "wrong")
    console.press("Log in")
    assert "is wrong" in console.text
    check("the login")
    console.log_in("privacy")
    for path in PAGES:
        console.open(path.format(number=number, letter=letter))
        assert console.heading.startswith("Error") == (path == "/nothing"), (path, console.text)
        check(path)
    console.open("/person?user=u1")
    console.press("Erase this person")
    console.fill("typed", "u2")
    console.press("Erase permanently")
    assert "Nothing was done." in console.text
    check("the confirmation")


@pytest.mark.usefixtures("person")
def test_a_dead_letter_is_replayed_with_the_keyboard_alone(console: Console, engine: Engine) -> None:
    """Breaks if a link, field or button cannot be reached or pressed with a key, or its focus is not visible."""
    (letter,) = (row["id"] for row in rows(engine, "SELECT id FROM headrace.dead_letters"))
    console.open("/login")
    assert console.focused.accessible_name == "Name"
    console.keys("operator-1")
    console.tab_to("Password")
    console.keys(PASSWORD)
    console.submit()
    console.keys(Keys.TAB)
    assert console.focused.text == "Skip to the content"
    console.tab_to("Dead letters")
    console.submit()
    console.tab_to(f"select dead letter {letter}")
    console.keys(Keys.SPACE)
    console.tab_to("Replay selected")
    console.submit()
    console.tab_to("Replay")
    console.submit()
    assert "1 applied again: 1 applied" in console.text
