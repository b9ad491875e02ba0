"""Options, argument types and error handling that commands share."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from app.catalogue import catalogue
from app.config.settings import Settings, load
from app.errors import HeadraceError
from app.observability import gc
from workers.local import attach

Command = Callable[..., Any]


class Group(click.Group):
    """Prints an error of ours as one line, and its traceback only with --debug.

    `lazy` names commands that are imported when they are used, as `module:name` within this package.
    """

    def __init__(self, *given: Any, lazy: Mapping[str, str] = MappingProxyType({}), **named: Any) -> None:
        super().__init__(*given, **named)
        self._lazy = lazy

    def list_commands(self, context: click.Context) -> list[str]:
        """Every name, without importing any."""
        return sorted({*super().list_commands(context), *self._lazy})

    def get_command(self, context: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command, if it is a lazy one."""
        if cmd_name not in self._lazy:
            return super().get_command(context, cmd_name)
        module, _, name = self._lazy[cmd_name].partition(":")
        with gc.paused():
            command: click.Command = getattr(import_module(f"workers.cli.{module}"), name)
        return command

    def invoke(self, context: click.Context) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(context)
        except HeadraceError as error:
            if context.find_root().params.get("debug"):
                raise
            click.echo(f"headrace: {error}", err=True)
            context.exit(1)


def data_dir_option(command: Command) -> Command:
    """The stack that a command works against where DATABASE_URL and BROKER_URL are not set."""
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="the folder of the stack to work with (default: HEADRACE_DATA_DIR, then .headrace)",
    )(command)


def json_option(command: Command) -> Command:
    """For programs that read."""
    return click.option("--json", "as_json", is_flag=True, help="print JSON")(command)


def attached(data_dir: Path | None, *, broker: bool = True) -> Settings:
    """The settings, completed by the stack that runs in the data directory, where the command needs more."""
    settings = load()
    return attach.attach(settings, data_dir or Path(settings.data_dir), broker=broker)


class Moment(click.ParamType[datetime]):
    """A day or a moment in ISO 8601; without an offset it is taken as UTC."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> datetime:
        """Raises click.BadParameter."""
        if isinstance(value, datetime):
            return value
        try:
            given = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is neither a day (2026-03-14) nor a moment (2026-03-14T06:30:00Z)", param, context)
        return given if given.tzinfo else given.replace(tzinfo=UTC)


class ResourceName(click.ParamType[str]):
    """A resource of the catalogue."""

    name = "resource"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        """Raises click.BadParameter, with the names that are near."""
        if value not in catalogue():
            near = get_close_matches(value, catalogue(), 3) or ["workouts", "sleep", "heartrate"]
            self.fail(f"{value!r} is no resource; did you mean {', '.join(near)}?", param, context)
        return str(value)
