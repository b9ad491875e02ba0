"""The examples of deploy/docs/feed.md, as they stand in the page, against a real feed.

The example with psycopg always runs. Those with dlt and dbt need an environment of their own (190 MB), which `--full`
and .ci/run create: `./deploy/setup examples`. Then they take 20 s, otherwise they are skipped.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.deploy.support import DEPLOY
from tests.support import START, apply, delivery, end, heartrate, rows, until, workout
from tests.support.database import run
from tests.support.dbt import dbt, environment
from tests.support.provider import Killed
from workers.store import erase, feed, retention, retractions
from workers.store.engine import transaction
from workers.store.feed import Sequencer
from workers.store.user_merges import merge_user

PAGE = (DEPLOY / "docs" / "feed.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
WORKOUTS = "SELECT user_id, id, provider, time_start, distance, average_hr FROM {} ORDER BY user_id, id"
LATER = datetime.now(UTC) + timedelta(days=2)


class World:
    """Changes of stored data of every kind, in steps. After each, a copy of the workouts must equal the view."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.numbered = Sequencer(engine)

    def store(self, *events: dict[str, Any], at: datetime = START) -> None:
        apply(self.engine, self.settings, *(delivery(one, at) for one in events))
        self.numbered.run()

    def begin(self) -> None:
        """Three people with workouts, of which u1 has more than a page of two."""
        given = [workout("u1", f"w{number}") for number in range(5)]
        self.store(*given, workout("u2", "x1"), workout("u2", "x2"), workout("old", "y1"), workout("former", "v1"))
        self.store(workout("u1", "expired", calendar_date="2025-03-14"))

    def change(self) -> None:
        """Inserts, updates and retracts workouts, and changes another resource."""
        newer = {"updated_at": "2026-03-15T06:30:00+00:00", "average_hr": 99}
        self.store(workout("u1", "w0", **newer), workout("u3", "z1"), heartrate("u1", {0: 60, 1: 61}))
        with transaction(self.engine) as connection:
            retractions.retract(connection, catalogue()["workouts"], "u1", "w1")
        self.numbered.run()

    def reconnect_and_erase(self) -> None:
        """Moves a person to another id, and erases one whose workout has just changed, and one who has just moved."""
        with transaction(self.engine) as connection:
            assert merge_user(connection, "old", "new")
            assert merge_user(connection, "former", "moved")
        newer = {"updated_at": "2026-03-15T06:30:00+00:00", "average_hr": 99}
        self.store(workout("u2", "x1", **newer))
        for user_id in ("u2", "moved"):
            erase.create_tombstone(self.engine, user_id)
            found = dict(erase.remove(self.engine, user_id))
            erase.finish(self.engine, user_id, found)
        self.numbered.run()

    def expire(self) -> None:
        """Deletes the oldest workout by retention."""
        assert dict(retention.remove(self.engine, {"workouts": START - timedelta(days=90)})) == {"workouts": 1}
        self.numbered.run()

    def drop_changes(self) -> None:
        """Drops all changes of the feed, with one that no reader has read."""
        self.store(workout("u5", "late"))
        feed.drop_older(self.engine, LATER)

    def workouts(self) -> list[Any]:
        """The workouts of the view."""
        return [tuple(row.values()) for row in rows(self.engine, WORKOUTS.format("health.workouts"))]


@pytest.fixture
def world(engine: Engine, settings: Settings) -> World:
    return World(engine, settings)


@pytest.fixture
def target_url(settings: Settings, emptier: psycopg.Connection) -> Iterator[str]:
    """An empty database for a copy."""
    emptier.execute("CREATE DATABASE copies")
    yield urlsplit(settings.need_database().replace("+psycopg", ""))._replace(path="/copies").geturl()
    emptier.execute("DROP DATABASE copies WITH (FORCE)")


def test_the_page_has_all_examples() -> None:
    """Breaks if a file of an example is not found in the page, so that its test would run something else."""
    assert list(FILES) == [
        "mirror_workouts.py",
        "load_workouts.py",
        "dbt_project.yml",
        "profiles.yml",
        "models/sources.yml",
        "models/feed_workouts.sql",
        "macros/feed.sql",
        "models/workouts.sql",
    ]


class Mirror:
    """The example with psycopg as a module, with small pages."""

    def __init__(self, source: psycopg.Connection, target: psycopg.Connection) -> None:
        self.source, self.target = source, target
        self.module = ModuleType("mirror_workouts")
        exec(compile(FILES["mirror_workouts.py"], "mirror_workouts.py", "exec"), vars(self.module))  # noqa: S102
        self.module.PAGE = 2
        target.execute(self.module.TABLES)

    def copy_all(self) -> None:
        self.module.copy_all(self.source, self.target)

    def follow(self) -> int:
        """Applies pages until none is left. Returns the number of changes."""
        return sum(iter(lambda: self.module.apply_page(self.source, self.target), 0))

    def workouts(self) -> list[Any]:
        return self.target.execute(WORKOUTS.format("workouts")).fetchall()

    def position(self) -> int:
        ((position,),) = self.target.execute("SELECT position FROM feed_position").fetchall()
        return int(position)


@pytest.fixture
def mirror(source_url: str, target_url: str) -> Iterator[Mirror]:
    with (
        psycopg.connect(source_url, autocommit=True) as source,
        psycopg.connect(target_url, autocommit=True) as target,
    ):
        yield Mirror(source, target)


def newest(world: World) -> int:
    (row,) = rows(world.engine, "SELECT newest_position FROM health.feed")
    return int(row["newest_position"])


def test_psycopg_mirrors_each_change_once(world: World, mirror: Mirror) -> None:
    """Breaks if a change is missing in the copy, applied twice, or a copy and the feed do not join."""
    world.begin()
    mirror.copy_all()
    assert mirror.follow() == 0
    for step in (world.change, world.reconnect_and_erase, world.expire):
        before, at = newest(world), mirror.position()
        step()
        assert mirror.follow() == len(rows(world.engine, "SELECT FROM health.changes WHERE position > :at", at=at))
        assert (mirror.workouts(), mirror.position()) == (world.workouts(), newest(world))
        assert newest(world) > before
    assert [row[:2] for row in mirror.workouts()] == [
        *(("new", "y1"), ("u1", "w0"), ("u1", "w2"), ("u1", "w3"), ("u1", "w4"), ("u3", "z1"))
    ]


def test_psycopg_repeats_nothing_after_a_crash(world: World, mirror: Mirror) -> None:
    """Breaks if the position is committed without its rows, or rows without their position."""
    world.begin()
    mirror.copy_all()
    world.change()
    before = mirror.workouts(), mirror.position()

    def apply_and_crash() -> None:
        with mirror.target.transaction():
            assert mirror.module.apply_page(mirror.source, mirror.target) == 2
            raise Killed

    with pytest.raises(Killed):
        apply_and_crash()
    assert (mirror.workouts(), mirror.position()) == before
    mirror.follow()
    assert mirror.workouts() == world.workouts()


@pytest.mark.parametrize("lost", ["dropped", "restored"])
def test_psycopg_reports_a_lost_position(world: World, mirror: Mirror, lost: str) -> None:
    """Breaks if dropped changes, or a feed that was restored to an earlier state, leave a silent gap in the copy."""
    world.begin()
    mirror.copy_all()
    if lost == "dropped":
        world.drop_changes()
    else:
        world.change()
        run(world.engine, "UPDATE headrace.feed SET newest = 1", "DELETE FROM headrace.changes WHERE position > 1")
    with pytest.raises(mirror.module.PositionLost):
        mirror.follow()
    mirror.copy_all()
    assert mirror.follow() == 0
    assert mirror.workouts() == world.workouts()


def test_psycopg_follows_the_feed(world: World, source_url: str, target_url: str, tmp_path: Path) -> None:
    """Breaks if the program does not start as the page says, or is not woken by a notification."""
    world.begin()
    (tmp_path / "mirror_workouts.py").write_text(FILES["mirror_workouts.py"], encoding="utf-8")
    variables = os.environ | {"SOURCE_URL": source_url, "TARGET_URL": target_url}

    def copied() -> list[Any]:
        with psycopg.connect(target_url) as target:
            try:
                return target.execute(WORKOUTS.format("workouts")).fetchall()
            except psycopg.errors.UndefinedTable:
                return []

    command = [sys.executable, tmp_path / "mirror_workouts.py"]
    with subprocess.Popen(command, env=variables) as process:
        try:
            until(lambda: copied() == world.workouts(), 10)
            world.change()
            until(lambda: copied() == world.workouts(), 4)  # less than the timeout of the program
        finally:
            end(process)


def test_dlt_loads_each_change_once(
    world: World, examples: Path, source_url: str, target_url: str, tmp_path: Path
) -> None:
    """Breaks if the loaded workouts differ from the view after a run, or dropped changes leave a silent gap."""
    program = FILES["load_workouts.py"].replace("PAGE = 1000", "PAGE = 2")  # a run reads several pages
    (tmp_path / "load_workouts.py").write_text(program, encoding="utf-8")

    def load(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = (examples, "load_workouts.py", *arguments)
        variables = environment(tmp_path, SOURCE_URL=source_url, TARGET_URL=target_url)
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=120
        )

    def check(done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stderr
        with psycopg.connect(target_url) as target:
            assert target.execute(WORKOUTS.format("lake.workouts")).fetchall() == world.workouts()

    done = load()  # of nothing
    assert done.returncode == 0, done.stderr
    world.begin()
    check(load())
    world.change()
    world.reconnect_and_erase()
    world.expire()
    check(load())
    world.drop_changes()
    done = load()
    assert done.returncode
    assert "run this program with --refresh" in done.stderr
    check(load("--refresh"))


def test_dbt_builds_each_change_once(
    world: World, examples: Path, source_url: str, emptier: psycopg.Connection, tmp_path: Path
) -> None:
    """Breaks if the model differs from the view after a run, or dropped changes leave a silent gap."""
    for name in list(FILES)[2:]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    with dbt(examples, tmp_path, source_url) as process:
        _check_dbt(world, emptier, lambda *arguments: process.run("run", *arguments))


def _check_dbt(world: World, reader: psycopg.Connection, build: Callable[..., tuple[bool, str]]) -> None:
    def check(result: tuple[bool, str]) -> None:
        assert result[0], result[1]
        assert reader.execute(WORKOUTS.format("analytics.workouts")).fetchall() == world.workouts()

    check(build())  # of nothing
    world.begin()
    check(build())
    world.change()
    world.reconnect_and_erase()
    world.expire()
    check(build())
    world.drop_changes()
    succeeded, output = build()
    assert not succeeded
    assert "run dbt with --full-refresh" in output
    check(build("--full-refresh"))
