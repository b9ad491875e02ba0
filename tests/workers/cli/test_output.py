"""Tables, JSON, progress, and views that refresh."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import click
import pytest
from rich.console import Console

from workers.cli import output
from workers.cli.options import JSON

ALTERNATE = "\x1b[?1049"  # a terminal's other screen
MOMENT = datetime(2026, 3, 14, 6, 30, tzinfo=UTC)


@dataclass
class Thing:
    at: datetime
    took: timedelta
    inner: "Thing | None" = None


@contextmanager
def with_json() -> Iterator[None]:
    """A running command with --json."""
    with click.Context(click.Command("a-command")) as context:
        context.meta[JSON] = True
        yield


def test_json_of_supported_types(capsys: pytest.CaptureFixture[str]) -> None:
    took = timedelta(minutes=1, milliseconds=250)
    output.print_json([{"at": MOMENT, "took": took, "none": None}, Thing(MOMENT, took, Thing(MOMENT, timedelta(0)))])
    at, seconds = "2026-03-14T06:30:00+00:00", 60.25
    assert json.loads(capsys.readouterr().out) == [
        {"at": at, "took": seconds, "none": None},
        {"at": at, "took": seconds, "inner": {"at": at, "took": 0.0, "inner": None}},
    ]


@pytest.mark.parametrize("value", [{1, 2}, Thing, b"raw", object()])
def test_json_of_other_types_is_an_error(value: Any) -> None:
    with pytest.raises(TypeError):
        output.print_json({"value": value})


ROWS: list[dict[str, Any]] = [{"name": "first", "count": 1, "at": None}, {"name": "second", "count": 20, "at": MOMENT}]


def test_rows_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_rows(ROWS)
    shown = capsys.readouterr().out
    for part in ("name", "count", "at", "first", "second", "20", "2026-03-14 06:30"):
        assert part in shown
    assert "None" not in shown


def test_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    plain = [ROWS[0], ROWS[1] | {"at": MOMENT.isoformat()}]
    with with_json():
        for rows, expected in (((ROWS,), plain), (([],), []), ((ROWS[:1], ROWS), plain)):
            output.print_rows(*rows, empty="no rows")
            assert json.loads(capsys.readouterr().out) == expected
    for empty in ("", "no rows"):
        output.print_rows([], empty=empty)
        assert capsys.readouterr().out.rstrip("\n") == empty


def test_a_table_in_a_file_is_wide(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_rows([{"left": "l" * 80, "right": "r" * 80}])
    shown = capsys.readouterr().out
    assert "l" * 80 in shown
    assert "r" * 80 in shown


def test_no_id_is_cut_on_a_narrow_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the id that the next command needs ends in an ellipsis, or a long value is cut."""
    monkeypatch.setattr(output, "console", lambda: Console(width=40, markup=False, emoji=False))
    output.print_rows([{"id": 123456789, "message": "m" * 60, "reason": "r" * 200, "user": "u" * 36}])
    shown = capsys.readouterr().out
    assert " 123456789 " in shown
    assert "…" not in shown
    assert [shown.count(letter) for letter in ("m", "u")] == [60 + len("m"), 36 + len("u")]


@pytest.mark.parametrize("text", ["[bold] move", "no [/path]", "a :warning: b"])
def test_brackets_in_a_cell_are_no_markup(capsys: pytest.CaptureFixture[str], text: str) -> None:
    output.print_rows([{"why": text}])
    assert text in capsys.readouterr().out


def test_a_view_in_a_pipe_is_repeated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, slept = iter(range(9)), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    output.live_view(lambda: f"picture {next(numbers)}", 1.5)
    assert capsys.readouterr().out.split("\n") == ["picture 0", "picture 1", "picture 2", ""]
    assert slept == [1.5] * 3


def test_a_view_on_a_terminal_is_refreshed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_slow_view_refreshes_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = iter(range(0, 900, 3)), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: float(next(clock))))
    output.live_view(lambda: "picture", 1.0)
    assert slept == [3.0 * output.MAX_REFRESH_SHARE]


def test_progress_on_a_terminal_is_a_bar() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with output.progress("rows", 4, screen=screen) as update:
        update(1)
        update(2, 5, phase="[b]other", detail="half")
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "half" in shown
    assert shown.endswith("\x1b[2K")  # the bar is removed at the end


def test_progress_elsewhere_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    screen = Console(file=io.StringIO(), width=80)
    with output.progress("rows", 4000, screen=screen) as update:
        update(1)
        clock[0] += output.LINE_SECONDS
        update(2000)
        update(2001)
        update(0, 9, phase="settling", detail="[1] left")
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue().splitlines() == ["rows: 2,000/4,000", "settling: [1] left"]


def test_progress_prints_nothing_with_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "LINE_SECONDS", 0)
    for context, shown in ((nullcontext(), "rows: 1\n"), (with_json(), "")):
        with context, output.progress("rows") as update:
            update(1)
        assert capsys.readouterr().err == shown
