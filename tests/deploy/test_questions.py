"""The queries of deploy/docs/questions.md, as they stand in the page, on simulated people.

The expected results are computed in Python from the world of the simulator. The watch of each person has data of the
whole day and ranks before phones and rings, so the values per day must be those of the watch.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.deploy.support import DEPLOY
from tests.support import apply, delivery, event
from tests.support.database import emptied, run
from workers.daily.derive import Deriver
from workers.simulator import World
from workers.simulator.events import connected, historical
from workers.simulator.people import PHONE, Connection, Query, User
from workers.store.feed import Sequencer

PAGE = (DEPLOY / "docs" / "questions.md").read_text(encoding="utf-8")
QUESTIONS = dict(re.findall(r"^## ([^\n]+)\n\n```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
DAYS = 16
RESOURCES = ("activity", "sleep", "workouts", "meal", "steps", "glucose")
DATED = ("activity", "sleep", "workouts", "meal")
SILENCE = timedelta(days=5)  # of the phone
Row = tuple[Any, ...]
Answer = Callable[["People", datetime], list[Row]]


class People:
    """Three people and what they have sent, by connection and resource."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        # Noon: everyone's night is over. At six, a ring may have stored the night, and the watch not yet.
        noon = (datetime.now(UTC) - timedelta(hours=12)).replace(hour=12, minute=0, second=0, microsecond=0)
        self.world = World(5, 3, noon, DAYS)
        self.records: dict[tuple[Connection, str], list[dict[str, Any]]] = {}
        self.samples: dict[tuple[Connection, str], list[dict[str, Any]]] = {}
        self.doubled: dict[str, Any] = {}
        self._deriver, self._sequencer = Deriver(engine, settings), Sequencer(engine)
        self._deriver.run(lambda: False)

    def load(self) -> None:
        """Stores everything two days ago, as far as the feed is concerned, and a correction and new samples today."""
        for user in self.world.members:
            for connection in user.connections:
                self._store(connected(self.world, connection), *self._events(user, connection))
        self._request_history()
        self._measure_in_other_units()
        self._derive()
        run(self.engine, "UPDATE headrace.changes SET changed_at = changed_at - interval '2 days'")
        self._correct()
        self._derive()

    def connections(self) -> Iterator[tuple[User, Connection]]:
        yield from ((user, connection) for user in self.world.members for connection in user.connections)

    def watches(self) -> Iterator[tuple[User, Connection]]:
        yield from ((user, user.connections[0]) for user in self.world.members)

    def _events(self, user: User, connection: Connection) -> Iterator[dict[str, Any]]:
        end = self.world.until - SILENCE if connection.provider is PHONE else self.world.until
        for resource in (catalogue()[name] for name in RESOURCES if connection.provider.has(catalogue()[name])):
            key = connection, resource.name
            query = Query(user, resource, self.world.start, end, connection.provider.slug)
            if resource.is_series:
                data: list[Any] = self.world.groups(query)
                self.samples[key] = [sample for group in data for sample in group["data"]]
            else:
                self.records[key] = data = self.world.summaries(query)
            if key == (self.world.members[1].connections[0], "activity"):
                self.doubled = data[-3]
                self.doubled["steps"] *= 2
            for one in data:
                yield event(f"daily.data.{resource.name}.created", user.user_id, one, user.client_user_id)

    def _request_history(self) -> None:
        user = self.world.members[0]
        for name in ("workouts", "sleep"):
            self._store(historical(self.world, user.connections[0], catalogue()[name]))
        run(self.engine, "UPDATE headrace.backfills SET status = 'complete' WHERE resource = 'sleep'")

    def _measure_in_other_units(self) -> None:
        user, values = self.world.members[0], (70.0, 71.0, 180.0, 181.0)  # in mg/dl: 3.9 to 10 mmol/L is 70.3 to 180.2
        moments = [self.world.until - timedelta(minutes=minute, seconds=7) for minute in range(len(values))]
        data = [
            {"timestamp": at.isoformat(), "value": value, "unit": "mg/dL"}
            for at, value in zip(moments, values, strict=True)
        ]
        group = {"source": {"provider": user.connections[0].provider.slug, "type": "watch"}, "data": data}
        self._store(event("daily.data.glucose.created", user.user_id, group, user.client_user_id))
        self.samples[user.connections[0], "glucose"] += [one | {"value": one["value"] / 18.0182} for one in data]

    def _correct(self) -> None:
        user = self.world.members[0]
        last = self.records[user.connections[0], "workouts"][-1]
        last |= {"title": "Corrected", "updated_at": self.world.until.isoformat()}
        moments = [self.world.until - timedelta(minutes=minute) for minute in range(3)]
        rates = [{"timestamp": moment.isoformat(), "value": 60, "unit": "bpm"} for moment in moments]
        group = {"source": {"provider": user.connections[0].provider.slug, "type": "watch"}, "data": rates}
        self._store(
            event("daily.data.workouts.updated", user.user_id, last, user.client_user_id),
            event("daily.data.heartrate.created", user.user_id, group, user.client_user_id),
        )
        self.samples[user.connections[0], "heartrate"] = rates

    def _store(self, *events: dict[str, Any]) -> None:
        outcomes = apply(self.engine, self.settings, *(delivery(one, datetime.now(UTC)) for one in events))
        assert outcomes == {"applied": len(events)}

    def _derive(self) -> None:
        self._sequencer.run(everything=True)
        while self._deriver.run(lambda: False):
            pass


def moment(value: str) -> datetime:
    return datetime.fromisoformat(value)


def rounded(value: float | Decimal) -> Decimal:
    """With one digit, as PostgreSQL rounds numeric."""
    return (value if isinstance(value, Decimal) else Decimal(f"{value:.15g}")).quantize(Decimal("0.1"), ROUND_HALF_UP)


def local_date(at: datetime, offset: int | None) -> date:
    return (at + timedelta(seconds=offset or 0)).date()


def nights(people: People, connection: Connection) -> dict[date, dict[str, Any]]:
    """The nights of a watch by the local date of their end."""
    found = people.records[connection, "sleep"]
    return {local_date(moment(one["bedtime_stop"]), one["timezone_offset"]): one for one in found}


def resting(people: People, _now: datetime) -> list[Row]:
    rates: dict[tuple[str, date], list[int]] = defaultdict(list)
    for user, watch in people.watches():
        for day, night in nights(people, watch).items():
            rates[user.client_user_id, day - timedelta(days=day.weekday())].append(night["hr_resting"])
    return [(*key, rounded(Decimal(sum(found)) / len(found)), len(found)) for key, found in sorted(rates.items())]


def short_nights(people: People, now: datetime) -> list[Row]:
    found = []
    for user, watch in people.watches():
        all_nights = [one for day, one in nights(people, watch).items() if day >= now.date() - timedelta(days=30)]
        short = sum(one["light"] + one["rem"] + one["deep"] < 21600 for one in all_nights)
        found.append((user.client_user_id, short, len(all_nights)))
    return sorted(found, key=lambda row: (-row[1], row[0]))


def steps_of(people: People, watch: Connection) -> dict[date, float]:
    found: dict[date, float] = defaultdict(float)
    for one in people.samples[watch, "steps"]:
        found[local_date(moment(one["timestamp"]), one["timezone_offset"])] += one["value"]
    return found


def steps(people: People, now: datetime) -> list[Row]:
    return [
        (user.client_user_id, day, value, watch.provider.slug, "watch")
        for user, watch in people.watches()
        for day, value in sorted(steps_of(people, watch).items())
        if day >= now.date() - timedelta(days=7)
    ]


def glucose(people: People, now: datetime) -> list[Row]:
    found = []
    for user, connection in people.connections():
        given = people.samples.get((connection, "glucose"), [])
        values = [one["value"] for one in given if moment(one["timestamp"]) >= now - timedelta(days=14)]
        if values:
            share = Decimal(100 * sum(3.9 <= value <= 10 for value in values)) / len(values)
            found.append((user.client_user_id, connection.provider.slug, len(values), rounded(share)))
    return sorted(found, key=lambda row: row[:2])


def newest(people: People, connection: Connection) -> datetime | None:
    moments = [moment(one["timestamp"]) for key, all_ in people.samples.items() if key[0] == connection for one in all_]
    for name in DATED:
        records = people.records.get((connection, name), [])
        moments += [moment(one["calendar_date"]).replace(tzinfo=UTC) for one in records]
    return max(moments, default=None)


def stopped(people: People, now: datetime) -> list[Row]:
    found = [
        (user.client_user_id, connection.provider.slug, "connected", newest(people, connection))
        for user, connection in people.connections()
    ]
    late = [row for row in found if row[3] is None or row[3] < now - timedelta(days=3)]
    assert ("member-0001", "apple_health_kit") in [row[:2] for row in late]
    return sorted(late, key=lambda row: (row[3] is not None, row[3] or now, *row[:2]))


def changed(_people: People, _now: datetime) -> list[Row]:
    return [("member-0001", "heartrate", "put", 3), ("member-0001", "workouts", "put", 1)]


def last_workouts(people: People, _now: datetime) -> list[Row]:
    found: dict[str, Row] = {}
    for user, connection in people.connections():
        for one in people.records.get((connection, "workouts"), []):
            name, start = user.client_user_id, moment(one["time_start"])
            if name not in found or start > found[name][1]:
                found[name] = name, start, one["sport"]["slug"], connection.provider.slug, one["distance"]
    return [found[name] for name in sorted(found)]


def timeline(people: People, now: datetime) -> list[Row]:
    """Without the connections, which are as new as the test."""
    user, watch = next(people.watches())
    given: list[Row] = []
    for night in nights(people, watch).values():
        hours = rounded((night["light"] + night["rem"] + night["deep"]) / 3600)
        given.append((moment(night["bedtime_stop"]), "woke up", f"{hours} h asleep"))
    for connection in user.connections:
        workouts = people.records.get((connection, "workouts"), [])
        given += [(moment(one["time_start"]), "workout", one["sport"]["slug"]) for one in workouts]
        meals = people.records.get((connection, "meal"), [])
        given += [(moment(one["timestamp"]), "meal", one["name"]) for one in meals]
    recent = [row for row in given if row[0] >= now - timedelta(days=3)]
    return sorted(recent, key=lambda row: row[0], reverse=True)


def running(people: People, _now: datetime) -> list[Row]:
    watch = people.world.members[0].connections[0]
    return [("member-0001", watch.provider.slug, "workouts", "pending", 0, 1, 0, None)]


def disagreeing(people: People, _now: datetime) -> list[Row]:
    user, watch = people.world.members[1], people.world.members[1].connections[0]
    day = date.fromisoformat(people.doubled["calendar_date"])
    counted = steps_of(people, watch)[day]
    return [(user.client_user_id, day, "steps", watch.provider.slug, counted, 2 * counted, -50)]


# The expected rows and the columns that are compared; the others depend on the run.
ANSWERS: dict[str, tuple[Answer, slice]] = {
    "Resting heart rate by week": (resting, slice(None)),
    "Nights under six hours": (short_nights, slice(None)),
    "Steps per day": (steps, slice(5)),
    "Glucose: time in range": (glucose, slice(None)),
    "Who has stopped syncing?": (stopped, slice(None)),
    "What has changed since yesterday?": (changed, slice(4)),
    "The last workout of each person": (last_workouts, slice(None)),
    "A person's timeline": (timeline, slice(None)),
    "Which history is still running?": (running, slice(1, None)),
    "Where do sources disagree with their own summaries?": (disagreeing, slice(None)),
}


@pytest.fixture(scope="module")
def people(deployment: Settings, writer: Engine) -> Iterator[People]:
    """Three people with sixteen days of data, and their derived days."""
    with emptied(writer):
        found = People(writer, deployment)
        found.load()
        yield found


def test_the_page_has_ten_questions_and_no_other_query() -> None:
    """Breaks if a query of the page is not run."""
    assert list(QUESTIONS) == list(ANSWERS)
    assert PAGE.count("```sql") == len(QUESTIONS) == 10


@pytest.mark.parametrize("question", list(ANSWERS))
def test_the_query_of_the_page_has_the_expected_result(people: People, question: str) -> None:
    """Breaks if a view, or the query in the page, gives an analyst wrong numbers."""
    answer, compared = ANSWERS[question]
    with people.engine.begin() as connection:
        connection.execute(text("SET LOCAL timezone = 'UTC'"))
        now = connection.scalar(text("SELECT now()"))
        found = [tuple(row) for row in connection.exec_driver_sql(QUESTIONS[question])]
    expected = answer(people, now)
    assert expected
    if question == "A person's timeline":
        since_now = [row for row in found if row[1] == "connection connected"]
        assert {row[2] for row in since_now} == {one.provider.slug for one in people.world.members[0].connections}
        found = [row for row in found if row not in since_now]
    assert [row[compared] for row in found] == expected
