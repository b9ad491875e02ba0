"""The conversion of yearly partitions to monthly ones: rows, concurrent writers and readers, and interruptions."""

import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text

from app.commands import own
from app.config.settings import Settings
from app.errors import Misconfigured
from tests.support import rows, until
from tests.support.cli import invoke
from tests.support.database import run
from tests.support.yearly import COLUMNS, DIFFERENCES, TABLES, YEARS, create_years, fill_both, writers
from workers.cli import migrate as migrate_command
from workers.operate import check
from workers.store.conversion import convert, unconverted
from workers.store.engine import make_engine
from workers.store.migrate import migrate
from workers.store.partitions import create_ahead

SERIES, ROWS = 200, 1_000  # 200,000 rows in 24 months
STRAY = """INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, origin, unit)
VALUES ('2009-05-01', 1, now(), now(), 1, 'backfill', 'bpm')"""
LEFT_OVERS = "SELECT relname FROM pg_class WHERE relname ~ '^samples_(20[0-9]{2}$|converting|deleted|position|.*new)'"


@pytest.fixture
def yearly(empty_settings: Settings) -> Iterator[Engine]:
    """A database with yearly partitions, as version 0.2 created them."""
    engine = make_engine(empty_settings)
    migrate(engine)
    create_years(engine)
    yield engine
    engine.dispose()


def convert_all(engine: Engine) -> list[int]:
    """Converts every partition; returns the sizes of the batches."""
    batches: list[int] = []
    for one in unconverted(engine):
        convert(engine, one, batches.append)
    return batches


def partitions(engine: Engine) -> list[str]:
    found = rows(engine, "SELECT name FROM headrace.partitions WHERE parent = 'samples' AND last < now() ORDER BY 1")
    return [row["name"] for row in found]


def months(*years: int) -> list[str]:
    return [f"samples_{year}{month:02}" for year in years for month in range(1, 13)]


def plain(settings: Settings) -> str:
    return settings.need_database().replace("+psycopg", "")


def test_rows_are_equal_and_in_months(yearly: Engine) -> None:
    """Breaks if the conversion loses, doubles or changes a row, or leaves a table behind."""
    fill_both(yearly, 20, ROWS)
    batches = convert_all(yearly)
    assert rows(yearly, DIFFERENCES) == [{"n": 0}]
    assert sum(batches) == 20 * ROWS
    assert partitions(yearly) == months(*YEARS)
    assert rows(yearly, LEFT_OVERS) == []
    assert unconverted(yearly) == []
    constraints = "SELECT conname FROM pg_constraint WHERE conname = 'converting'"
    assert rows(yearly, constraints) == []


def test_writers_and_readers_do_not_notice_it(yearly: Engine, empty_settings: Settings) -> None:
    """Breaks if a row that is written, revised or deleted during the conversion differs afterwards, also after a kill.

    The command is killed in the middle of the copy, and run again. Readers compare with a table that is not converted.
    """
    fill_both(yearly, SERIES, ROWS)
    url = plain(empty_settings)
    environment = {"DATABASE_URL": url, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [*own("workers.cli", "migrate"), "--convert"]
    with writers(url, SERIES, ROWS) as at_work:
        for minimum in (1, 100):  # series up to which rows are copied when the command is killed
            first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            until(lambda least=minimum, process=first: position(yearly) > least or process.poll() is not None, 30)
            first.send_signal(signal.SIGKILL)
            first.communicate()
            assert rows(yearly, DIFFERENCES) == [{"n": 0}]
        last = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while last.poll() is None:
            assert rows(yearly, DIFFERENCES) == [{"n": 0}]
        _, errors = last.communicate()
        assert (last.returncode, errors) == (0, b"")
    assert [one.error for one in at_work] == [None] * 3
    assert min(one.written for one in at_work) > 100
    assert min(one.deleted for one in at_work) > 100
    assert rows(yearly, DIFFERENCES) == [{"n": 0}]
    assert partitions(yearly) == months(*YEARS)
    assert rows(yearly, LEFT_OVERS) == []


class Interrupted(Exception):
    """Ends a conversion after its first batch."""


def interrupt(_: int) -> None:
    raise Interrupted


def test_a_row_that_is_deleted_while_it_is_copied_stays_deleted(yearly: Engine) -> None:
    """Breaks if a row comes back whose deletion is committed after the batch that copies it has read it."""
    fill_both(yearly, 3, ROWS)
    (source, *_) = unconverted(yearly)
    with pytest.raises(Interrupted):
        convert(yearly, source, interrupt)
    with yearly.connect() as worker, ThreadPoolExecutor(1) as pool:
        for table in TABLES:
            worker.execute(text(f"DELETE FROM {table} WHERE series_id = 3"))
        converted = pool.submit(convert, yearly, source, lambda _: None)
        until(lambda: position(yearly) == 3, 30)
        worker.commit()
        converted.result(60)
    assert rows(yearly, DIFFERENCES) == [{"n": 0}]
    assert rows(yearly, "SELECT count(*) AS n FROM headrace.samples WHERE series_id = 3") == [{"n": 0}]


def test_a_change_after_the_copy_is_repeated(yearly: Engine) -> None:
    """Breaks if an insert, update or delete of a row that was copied before is lost, also if it is of the key."""
    fill_both(yearly, 3, ROWS)
    (source, *_) = unconverted(yearly)
    with pytest.raises(Interrupted):
        convert(yearly, source, interrupt)
    for table in TABLES:
        run(
            yearly,
            f"UPDATE {table} SET value = -1 WHERE series_id = 1 AND value < 5",
            f"DELETE FROM {table} WHERE series_id = 1 AND value = 6",
            f"UPDATE {table} SET ts = ts + interval '1 s' WHERE series_id = 1 AND value = 7",
            f"INSERT INTO {table} ({COLUMNS}) SELECT ts + interval '2 s', {COLUMNS[4:]} FROM {table} WHERE value = 8",
        )
    convert_all(yearly)
    assert rows(yearly, DIFFERENCES) == [{"n": 0}]


def test_only_one_conversion_runs(yearly: Engine) -> None:
    """Breaks if two conversions fill the same tables, or another partition is begun before one is complete."""
    fill_both(yearly, 3, ROWS)
    first, second = unconverted(yearly)

    def again(_: int) -> None:
        with pytest.raises(Misconfigured, match="is running"):
            convert(yearly, first, lambda _: None)
        raise Interrupted

    with pytest.raises(Interrupted):
        convert(yearly, first, again)
    with pytest.raises(Misconfigured, match="samples_2024 was interrupted"):
        convert(yearly, second, lambda _: None)
    run(yearly, STRAY)
    assert [one.name for one in unconverted(yearly)] == ["samples_2024", "samples_other", "samples_2025"]
    convert_all(yearly)
    assert partitions(yearly) == ["samples_200905", *months(*YEARS)]


def test_the_default_partition_is_converted(yearly: Engine, empty_settings: Settings) -> None:
    """Breaks if the rows of a month in the default partition are so many that its partition can never be created."""
    many = 50_001
    run(
        yearly,
        f"""INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, origin, unit)
        SELECT '2009-05-01'::timestamptz + n * interval '10 s', n, now(), now(), 1, 'backfill', 'bpm'
        FROM generate_series(1, {many}) n""",
        """INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, origin, unit)
        VALUES ('1970-01-01', 1, now(), now(), 1, 'backfill', 'bpm'),
               ('2105-01-01', 1, now(), now(), 1, 'backfill', 'bpm')""",
    )
    create_ahead(yearly)
    assert "samples_200905" not in partitions(yearly)
    (found,) = (one.text for one in check.findings(empty_settings) if one.what == "database")
    assert "samples_2025, samples_other into months" in found
    convert_all(yearly)
    assert "samples_200905" in partitions(yearly)
    where = """SELECT relname, count(*) AS n FROM headrace.samples s JOIN pg_class c ON c.oid = s.tableoid
    GROUP BY 1 ORDER BY 1"""
    assert [tuple(row.values()) for row in rows(yearly, where)] == [
        ("samples_200905", many),
        ("samples_other", 2),
    ]
    assert rows(yearly, LEFT_OVERS) == []


def position(engine: Engine) -> int:
    """The series up to which rows are copied."""
    if not rows(engine, "SELECT 1 FROM pg_class WHERE relname = 'samples_position'"):
        return -1
    return max(
        (row["series_id"] for row in rows(engine, "SELECT series_id FROM headrace.samples_position")), default=-1
    )


def test_commands_name_the_years_that_are_left(yearly: Engine, empty_settings: Settings) -> None:
    """Breaks if an operator does not see that years are not split, or `migrate` converts before a deployment starts."""
    fill_both(yearly, 3, ROWS)
    url = plain(empty_settings)
    assert "not split into months yet: samples_2024, samples_2025" in invoke("migrate", DATABASE_URL=url).output
    (found,) = (one.text for one in check.findings(empty_settings) if one.what == "database")
    assert found.endswith("; run `headrace migrate --convert` to split samples_2024, samples_2025 into months")
    converted = invoke("migrate", "--convert", DATABASE_URL=url)
    assert "samples_2025: about" in converted.output
    assert converted.exit_code == 0
    assert partitions(yearly) == months(*YEARS)


def test_a_full_disk_is_noticed_before(
    yearly: Engine, empty_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a conversion begins that must fill the disk of the database."""
    fill_both(yearly, 3, ROWS)
    monkeypatch.setattr(migrate_command, "free_bytes", lambda _: 1000)
    refused = invoke("migrate", "--convert", DATABASE_URL=plain(empty_settings))
    assert refused.exit_code == 1
    assert "only 0.0 GB are free" in refused.output
    assert unconverted(yearly) != []
    assert position(yearly) == -1
