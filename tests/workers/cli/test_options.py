"""Error handling and settings that commands share."""

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from app.config.settings import Settings
from app.errors import HeadraceError, Misconfigured, TryLater
from workers.cli import options
from workers.cli.deployment import Deployment


def group(error: BaseException) -> click.Group:
    """A group whose command raises this error."""

    @click.group(cls=options.Group)
    @click.option("--debug", is_flag=True)
    def main(*, debug: bool) -> None:
        """Fails."""

    @main.command()
    def fail() -> None:
        raise error

    return main


@pytest.mark.parametrize("error", [Misconfigured("X: not set"), TryLater("away"), HeadraceError("that")])
def test_a_headrace_error_is_one_line(error: HeadraceError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["headrace", "fail"])
    done = CliRunner().invoke(group(error), ["fail"])
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"headrace: {error}\n")


def test_debug_raises_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a nested group, and independently of sys.argv."""
    error, outer = TryLater("away"), group(TryLater("other"))
    outer.add_command(group(error), "inner")
    assert CliRunner().invoke(group(error), ["--debug", "fail"]).exception is error
    assert CliRunner().invoke(outer, ["--debug", "inner", "fail"]).exception is error
    monkeypatch.setattr(sys, "argv", ["another program", "--debug"])
    assert CliRunner().invoke(group(error), ["fail"]).exit_code == 1
    assert "away" in CliRunner().invoke(group(error), ["fail"]).stderr


def test_other_errors_are_raised() -> None:
    error = ZeroDivisionError()
    assert CliRunner().invoke(group(error), ["fail"]).exception is error


def test_errors_of_click_are_unchanged() -> None:
    done = CliRunner().invoke(group(click.ClickException("no such thing")), ["fail"])
    assert (done.exit_code, done.stderr) == (1, "Error: no such thing\n")


def test_settings_win_over_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(data_dir: Path | None, *, needs_broker: bool = True) -> Settings:
        return Deployment(click.Context(group(ValueError())), data_dir, needs_broker=needs_broker).settings

    monkeypatch.delenv("BROKER_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@h/d")
    assert settings(tmp_path, needs_broker=False).database_url == "postgresql+psycopg://u:p@h/d"
    with pytest.raises(Misconfigured, match=f"no stack runs in {tmp_path}"):
        settings(tmp_path)
    monkeypatch.setenv("HEADRACE_DATA_DIR", str(tmp_path / "other"))
    with pytest.raises(Misconfigured, match=f"no stack runs in {tmp_path / 'other'}"):
        settings(None)
    monkeypatch.setenv("BROKER_URL", "redis://h")
    assert settings(None).broker_url == "redis://h"
