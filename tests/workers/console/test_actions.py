"""Actions of the console: a dry run first, then one confirmation; by role, and audited with the account's name."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.errors import TryLater
from tests.support import apply, delivery, rows, workout
from tests.support.console import Browser, Clock, subscribe
from workers.console import plans
from workers.console.app import create_app
from workers.console.context import make_console
from workers.console.views.actions import ACTIONS
from workers.reconcile import runs
from workers.simulator.server import API_KEY, Simulator


def audited(engine: Engine) -> list[tuple[str, str, str]]:
    """Actions other than logins and looks."""
    query = "SELECT os_user, action, subject FROM headrace.audit WHERE action NOT LIKE 'console %' ORDER BY id"
    return [tuple(row.values()) for row in rows(engine, query)]


def statuses(engine: Engine) -> list[str]:
    return [row["status"] for row in rows(engine, "SELECT status FROM headrace.backfills ORDER BY id")]


@pytest.fixture
def dead(engine: Engine, settings: Settings) -> list[int]:
    """Two dead letters: the first can be applied by now, the second never."""
    apply(engine, replace(settings, encryption_keys=(bytes(range(1, 33)),)), delivery(workout("u1"), name="msg_1"))
    apply(engine, settings, delivery(b"no json", name="msg_2"))
    return [row["id"] for row in rows(engine, "SELECT id FROM headrace.dead_letters ORDER BY message_id")]


def test_a_viewer_and_an_operator_may_not_do_more_than_their_role(viewer: Browser, operator: Browser) -> None:
    for name, action in ACTIONS.items():
        assert viewer.propose(name, {"id": "1", "user": "u1"}).status_code == 403, name
        is_refused = operator.propose(name, {"id": "1", "user": "u1"}).status_code == 403
        assert is_refused == (action.role == "privacy"), name


def test_a_viewer_sees_no_buttons(viewer: Browser, dead: list[int], person: str) -> None:
    for path in ("/dead", f"/dead/{dead[0]}", "/backfills", "/backfills/1", f"/person?user={person}"):
        assert "/actions/" not in viewer.get(path).text


def test_dead_letters_are_replayed_after_a_dry_run(operator: Browser, engine: Engine, dead: list[int]) -> None:
    page = operator.propose("dead-replay", {"id": [str(number) for number in dead]})
    assert "2 dead letters are applied again" in page.text
    assert len(rows(engine, "SELECT id FROM headrace.dead_letters")) == 2
    assert audited(engine) == []
    done = operator.confirm(page)
    assert "2 applied again: 1 applied, 1 dead" in done.text
    assert [row["id"] for row in rows(engine, "SELECT id FROM headrace.dead_letters")] == [dead[1]]
    assert audited(engine) == [("console:operator-1", "dead replay", "dead letters")]


def test_an_action_is_carried_out_once(operator: Browser, engine: Engine, dead: list[int], clock: Clock) -> None:
    """Breaks if a second click, or an old page, repeats an action."""
    page = operator.propose("dead-drop", {"id": str(dead[0])})
    assert operator.confirm(page).status_code == 200
    assert operator.confirm(page).status_code == 409
    late = operator.propose("dead-drop", {"id": str(dead[1])})
    clock.now += 601
    assert operator.confirm(late).status_code == 409
    assert len(rows(engine, "SELECT id FROM headrace.dead_letters")) == 1


def test_a_plan_belongs_to_its_session(app: Flask, operator: Browser, dead: list[int]) -> None:
    """Breaks if one account can confirm what another has prepared."""
    page = operator.propose("dead-drop", {"id": str(dead[0])})
    assert Browser(app, "operator-1").confirm(page).status_code == 409


def test_dead_letters_are_dropped_by_reason(operator: Browser, engine: Engine, dead: list[int]) -> None:
    done = operator.confirm(operator.propose("dead-drop", {"reason": "JSON"}))
    assert "dropped 1" in done.text
    assert [row["id"] for row in rows(engine, "SELECT id FROM headrace.dead_letters")] == [dead[0]]
    assert operator.propose("dead-drop", {"reason": "JSON"}).status_code == 404
    assert operator.propose("dead-drop", {}).status_code == 400


def test_backfills_are_paused_resumed_and_cancelled(operator: Browser, engine: Engine, person: str) -> None:
    (number,) = (row["id"] for row in rows(engine, "SELECT id FROM headrace.backfills"))
    for action, status in (("pause", "paused"), ("resume", "pending"), ("cancel", "cancelled")):
        page = operator.propose(f"backfill-{action}", {"id": str(number)})
        assert "heartrate" in page.text
        assert f"{action}: 1 of 1 backfills" in operator.confirm(page).text
        assert statuses(engine) == [status]
    assert audited(engine) == [
        ("console:operator-1", f"backfill {one}", person) for one in ("pause", "resume", "cancel")
    ]


def test_history_is_started(operator: Browser, engine: Engine, person: str) -> None:
    form = {"user": person, "since": "2026-01-01", "until": "2026-02-01", "resource": ["sleep", "workouts"]}
    page = operator.propose("backfill-start", form)
    assert "2 backfills are started, with about" in page.text
    assert len(statuses(engine)) == 1
    assert "started 2 backfills" in operator.confirm(page).text
    assert statuses(engine) == ["pending"] * 3
    assert audited(engine) == [("console:operator-1", "backfill start", person)]
    for wrong in ({"user": "nobody"}, {"since": ""}, {"since": "2030-01-01"}, {"provider": "nobody"}):
        assert operator.propose("backfill-start", form | wrong).status_code in {400, 404}, wrong


def test_a_person_is_erased_after_the_id_was_typed(privacy: Browser, engine: Engine, person: str) -> None:
    page = privacy.propose("erase", {"user": person})
    assert "workouts" in page.text
    wrong = privacy.confirm(page, typed="u2")
    assert "The text does not match. Nothing was done." in wrong.text
    assert len(rows(engine, "SELECT id FROM health.workouts")) == 1
    done = privacy.confirm(wrong, typed=person)
    assert f"erased {person}:" in done.text
    assert "Erased" in done.text
    assert rows(engine, "SELECT id FROM health.workouts") == []
    assert audited(engine) == [("console:privacy-1", "erase", person), ("console:privacy-1", "erased", person)]
    assert privacy.propose("erase", {"user": "member-1"}).status_code == 404  # only a user_id in full


def test_a_subscription_is_paused_resumed_and_resent(operator: Browser, engine: Engine) -> None:
    subscribe(engine)
    assert "sesame" not in operator.get("/feed").text + operator.get("/subscription?name=crm").text
    assert "paused crm" in operator.confirm(operator.propose("subscription-pause", {"name": "crm"})).text
    assert rows(engine, "SELECT status FROM headrace.subscriptions") == [{"status": "paused"}]
    assert "resumed crm" in operator.confirm(operator.propose("subscription-resume", {"name": "crm"})).text
    page = operator.propose("subscription-resend", {"name": "crm", "since": "2026-01-01", "dead": "yes"})
    assert "All dead notifications since 2026-01-01 00:00:00 UTC" in page.text
    assert "0 notifications are sent again" in operator.confirm(page).text
    actions = [f"subscriptions {one}" for one in ("pause", "resume", "resend")]
    assert audited(engine) == [("console:operator-1", one, "crm") for one in actions]


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    with Simulator(1, 3) as simulator:
        yield simulator


@pytest.fixture
def connected(app: Flask, simulator: Simulator, engine: Engine, settings: Settings) -> Iterator[Browser]:
    """An operator of a console that reaches the simulated Junction, which has a user."""
    user = simulator.world.members[0].user_id
    apply(engine, settings, delivery(workout(user)))
    known = app.extensions["console"].settings
    given = replace(known, junction_api_key=API_KEY, junction_base_url=simulator.url, resources=("sleep", "workouts"))
    state = make_console(given)
    yield Browser(create_app(state), "operator-1")
    state.close()


@pytest.mark.usefixtures("broker_url")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_person_is_reconciled_and_refreshed(connected: Browser, simulator: Simulator, engine: Engine) -> None:
    user = simulator.world.members[0].user_id
    page = connected.propose("reconcile", {"user": user})
    assert "gaps were found" in page.text, page.text
    assert statuses(engine) == []
    done = connected.confirm(page)
    assert "backfills were opened" in done.text
    assert statuses(engine) != []
    assert simulator.requests
    assert "refreshed," in connected.confirm(connected.propose("refresh", {"user": user})).text
    assert audited(engine)[-2:] == [("console:operator-1", one, user) for one in ("reconcile", "refresh")]
    assert "unknown user" in connected.propose("refresh", {"user": "nobody"}).text


@pytest.mark.usefixtures("broker_url")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_reconciliation_that_ends_early_is_audited(
    connected: Browser, simulator: Simulator, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if backfills are opened without a trace, or entries that could not be read are not named."""
    user = simulator.world.members[0].user_id
    real = runs.next_step

    def unread(*given: Any) -> Any:
        return replace(real(*given), unread=7)

    monkeypatch.setattr(runs, "next_step", unread)
    page = connected.propose("reconcile", {"user": user})
    assert "7 entries of" in page.text

    def paused(*given: Any) -> Any:
        return replace(real(*given), seconds=60.0)

    monkeypatch.setattr(runs, "next_step", paused)
    assert "is slow or paused" in connected.confirm(page).text
    (entry,) = rows(engine, "SELECT detail FROM headrace.audit WHERE action = 'reconcile'")
    assert entry["detail"]["opened"] == len(statuses(engine)) > 0


def test_a_replay_that_ends_early_is_audited(
    operator: Browser, engine: Engine, dead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise TryLater("PostgreSQL is away")

    page = operator.propose("dead-replay", {"id": [str(number) for number in dead]})
    monkeypatch.setattr(plans, "replay_dead_letters", away)
    assert "PostgreSQL is away" in operator.confirm(page).text
    assert audited(engine) == [("console:operator-1", "dead replay", "dead letters")]


def test_every_dry_run_about_people_is_audited(
    privacy: Browser, viewer: Browser, engine: Engine, dead: list[int], person: str
) -> None:
    """Breaks if the rows of a person can be looked at by table, or their aggregator asked, without a trace."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.dead_letters SET user_id = 'u1'"))
        connection.execute(text("DELETE FROM headrace.audit"))
    subscribe(engine)
    (backfill,) = rows(engine, "SELECT id FROM headrace.backfills")
    given = {"user": person, "name": "crm", "since": "2026-01-01"}
    for name in ACTIONS:
        form = given | {"id": str(dead[0] if name.startswith("dead") else backfill["id"])}
        privacy.propose(name, form)
        viewer.propose(name, form)  # refused
    looks = rows(
        engine, "SELECT os_user, action, subject FROM headrace.audit WHERE action <> 'console people' ORDER BY id"
    )
    expected = [f"console proposed {name}" for name in ACTIONS if not name.startswith("subscription")]
    assert [one["action"] for one in looks] == expected
    assert {(one["os_user"], one["subject"]) for one in looks} == {("console:privacy-1", person)}
