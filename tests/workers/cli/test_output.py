"""What commands print: tables, JSON, and pictures that are kept fresh."""

import io
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from workers.cli import output

ALTERNATE = "\x1b[?1049"  # a terminal's other screen
MOMENT = datetime(2026, 3, 14, 6, 30, tzinfo=UTC)


@dataclass
class Thing:
    """Something with values that JSON has no word for."""

    at: datetime
    took: timedelta
    inner: "Thing | None" = None


def test_json_takes_what_commands_have(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a time, a duration or an object cannot be printed, or is printed as Python sees it."""
    took = timedelta(minutes=1, milliseconds=250)
    output.print_json([{"at": MOMENT, "took": took, "none": None}, Thing(MOMENT, took, Thing(MOMENT, timedelta(0)))])
    at, seconds = "2026-03-14T06:30:00+00:00", 60.25
    assert json.loads(capsys.readouterr().out) == [
        {"at": at, "took": seconds, "none": None},
        {"at": at, "took": seconds, "inner": {"at": at, "took": 0.0, "inner": None}},
    ]


@pytest.mark.parametrize("value", [{1, 2}, Thing, b"raw", object()])
def test_json_takes_nothing_else(value: Any) -> None:
    """Breaks if something that no program can read is printed all the same, or a body's bytes are."""
    with pytest.raises(TypeError):
        output.print_json({"value": value})


ROWS: list[dict[str, Any]] = [{"name": "first", "count": 1, "at": None}, {"name": "second", "count": 20, "at": MOMENT}]


def test_rows_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a column or a row is missing, or what is not there is shown as None."""
    output.print_rows(ROWS, as_json=False)
    shown = capsys.readouterr().out
    for part in ("name", "count", "at", "first", "second", "20", "2026-03-14 06:30:00"):
        assert part in shown
    assert "None" not in shown


def test_rows_are_a_list_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a program gets a table, or no list because there is nothing."""
    output.print_rows(ROWS, as_json=True)
    assert json.loads(capsys.readouterr().out) == [ROWS[0], ROWS[1] | {"at": MOMENT.isoformat()}]
    output.print_rows([], as_json=True)
    assert json.loads(capsys.readouterr().out) == []
    output.print_rows([], as_json=False)
    assert capsys.readouterr().out == ""


def test_a_table_in_a_file_is_wide(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks if a table that goes into a file or a pipe is cut at 80."""
    output.print_rows([{"left": "l" * 80, "right": "r" * 80}], as_json=False)
    shown = capsys.readouterr().out
    assert "l" * 80 in shown
    assert "r" * 80 in shown


@pytest.mark.parametrize("text", ["[bold] move", "no [/path]", "a :warning: b"])
def test_a_cell_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Breaks if brackets in a text from elsewhere vanish, or end the command with a traceback."""
    output.print_rows([{"why": text}], as_json=False)
    assert text in capsys.readouterr().out


def test_a_picture_is_kept_fresh(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if --watch into a pipe shows one picture for ever, or does not wait between two."""
    numbers, slept = iter(range(9)), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    output.live_view(lambda: f"picture {next(numbers)}", 1.5)
    assert capsys.readouterr().out.split("\n") == ["picture 0", "picture 1", "picture 2", ""]
    assert slept == [1.5] * 3


def test_a_picture_on_a_terminal_stays_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if --watch on a terminal scrolls, or leaves the terminal in another state than it was."""
    looks: list[int] = []

    def look() -> str:
        looks.append(1)
        return f"picture {'abc'[len(looks) - 1]}"

    def sleep(_: float) -> None:
        if len(looks) == 3:
            raise KeyboardInterrupt

    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(output, "console", lambda: screen)
    monkeypatch.setattr(output, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    output.live_view(look, 1.0)
    assert len(looks) == 3
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert shown.index(ALTERNATE + "h") < shown.index("picture a") < shown.index(ALTERNATE + "l")
    assert shown.count(ALTERNATE + "l") == 1
    assert shown.endswith(ALTERNATE + "l")


def test_a_look_that_takes_long_is_taken_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if whoever watches a large installation keeps its database busy with watching."""
    clock, slept = iter(range(0, 900, 3)), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: float(next(clock))))
    output.live_view(lambda: "picture", 1.0)
    assert slept == [3.0 * output.MAX_REFRESH_SHARE]
