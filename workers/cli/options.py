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
    """Prints a HeadraceError as one line, and its traceback only with --debug.

    `lazy` maps command names to `module:name` within this package; a module is imported when its command is used.
    """

    def __init__(self, *given: Any, lazy: Mapping[str, str] = MappingProxyType({}), **named: Any) -> None:
        super().__init__(*given, **named)
        self._lazy = lazy

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *self._lazy})

    def get_command(self, context: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return super().get_command(context, cmd_name)
        module, _, name = self._lazy[cmd_name].partition(":")
        with gc.paused():
            command: click.Command = getattr(import_module(f"workers.cli.{module}"), name)
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except HeadraceError as error:
            if context.find_root().params.get("debug"):
                raise
            click.echo(f"headrace: {error}", err=True)
            context.exit(1)


def user_option(meaning: str, *, required: bool = True) -> Callable[[Command], Command]:
    """`--user`, which `users.resolve_user` resolves."""
    return click.option("--user", required=required, help=f"{meaning}: user_id, client_user_id or former user_id")


data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="data directory of the running stack (default: HEADRACE_DATA_DIR, then .headrace)",
)
json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")


def attached(data_dir: Path | None, *, broker: bool = True) -> Settings:
    """The settings; DATABASE_URL and BROKER_URL default to the stack that runs in the data directory."""
    settings = load()
    return attach.attach(settings, data_dir or Path(settings.data_dir), broker=broker)


class Moment(click.ParamType[datetime]):
    """A day or a time in ISO 8601; UTC without an offset."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> datetime:
        """Raises click.BadParameter."""
        if isinstance(value, datetime):
            return value
        try:
            given = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is neither a day (2026-03-14) nor a time (2026-03-14T06:30:00Z)", param, context)
        return given if given.tzinfo else given.replace(tzinfo=UTC)


class ResourceName(click.ParamType[str]):
    name = "resource"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        """Raises click.BadParameter, which suggests similar names."""
        if value not in catalogue():
            near = get_close_matches(value, catalogue(), 3) or ["workouts", "sleep", "heartrate"]
            self.fail(f"unknown resource {value!r}; did you mean {', '.join(near)}?", param, context)
        return str(value)
