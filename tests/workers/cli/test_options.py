"""What commands share: errors as one line, and the settings of a stack or of the environment."""

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from app.errors import HeadraceError, Misconfigured, TryLater
from workers.cli import options


def group(error: BaseException) -> click.Group:
    """A group with a command that fails, and one that prints before it does."""

    @click.group(cls=options.Group)
    @click.option("--debug", is_flag=True)
    def main(*, debug: bool) -> None:
        """Fails."""

    @main.command()
    def fail() -> None:
        raise error

    return main


@pytest.mark.parametrize("error", [Misconfigured("X: not set"), TryLater("away"), HeadraceError("that")])
def test_an_error_of_ours_is_one_line(error: HeadraceError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if an operator has to find the reason in a traceback."""
    monkeypatch.setattr(sys, "argv", ["headrace", "fail"])
    done = CliRunner().invoke(group(error), ["fail"])
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"headrace: {error}\n")


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if the place of an error cannot be found out: by the option, whatever words the process was started with.

    Also in a group within a group.
    """
    error, outer = TryLater("away"), group(TryLater("other"))
    outer.add_command(group(error), "inner")
    assert CliRunner().invoke(group(error), ["--debug", "fail"]).exception is error
    assert CliRunner().invoke(outer, ["--debug", "inner", "fail"]).exception is error
    monkeypatch.setattr(sys, "argv", ["another program", "--debug"])
    assert CliRunner().invoke(group(error), ["fail"]).exit_code == 1
    assert "away" in CliRunner().invoke(group(error), ["fail"]).stderr


def test_an_error_of_somebody_else_is_not_hidden() -> None:
    """Breaks if a mistake of ours looks like a wrong setting."""
    error = ZeroDivisionError()
    assert CliRunner().invoke(group(error), ["fail"]).exception is error


def test_what_click_says_stays_as_it_is() -> None:
    """Breaks if a wrong word is told in two ways."""
    done = CliRunner().invoke(group(click.ClickException("no such thing")), ["fail"])
    assert (done.exit_code, done.stderr) == (1, "Error: no such thing\n")


def test_the_settings_go_before_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a command looks for a stack that it does not need, or looks in another folder than it was told."""
    monkeypatch.delenv("BROKER_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@h/d")
    assert options.attached(tmp_path, broker=False).database_url == "postgresql+psycopg://u:p@h/d"
    with pytest.raises(Misconfigured, match=f"no stack runs in {tmp_path}"):
        options.attached(tmp_path)
    monkeypatch.setenv("HEADRACE_DATA_DIR", str(tmp_path / "other"))
    with pytest.raises(Misconfigured, match=f"no stack runs in {tmp_path / 'other'}"):
        options.attached(None)
    monkeypatch.setenv("BROKER_URL", "redis://h")
    assert options.attached(None).broker_url == "redis://h"
