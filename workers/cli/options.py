"""Options, argument types and error handling that commands share."""

import re
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from app.catalogue import catalogue
from app.config.settings import Settings, load
from app.errors import CommitUnknown, HeadraceError, NotFound, PositionDropped
from workers.local import attach

Command = Callable[..., Any]
# Exit statuses: a named object does not exist; changes were dropped before a consumer read them.
EXIT_STATUS: dict[type[HeadraceError], int] = {NotFound: 4, PositionDropped: 3}


class Group(click.Group):
    """Prints a HeadraceError as one line, and its traceback only with --debug."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except HeadraceError as error:
            if context.find_root().params.get("debug"):
                raise
            hint = "; check its effect before you run the command again" if isinstance(error, CommitUnknown) else ""
            click.echo(f"headrace: {error}{hint}", err=True)
            context.exit(EXIT_STATUS.get(type(error), 1))


def user_option(meaning: str, *, required: bool = True) -> Callable[[Command], Command]:
    """`--user`, which `users.resolve_user` resolves."""
    return click.option("--user", required=required, help=f"{meaning}: user_id, client_user_id or former user_id")


all_option = click.option(
    "--all", "all_users", is_flag=True, help="every user that --user matches, instead of exactly one"
)
new_provider_option = click.option("--new-provider", is_flag=True, help="accept a provider that is not known yet")
yes_option = click.option("--yes", is_flag=True, help="do not ask for confirmation; required without a terminal")
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


class Seconds(click.ParamType[int]):
    """A duration in whole seconds, minutes or hours: 90s, 10m, 2h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        """Raises click.BadParameter."""
        found = re.fullmatch(r"([1-9]\d{0,5})([smh])", str(value))
        if found is None:
            self.fail(f"{value!r} is not a duration such as 90s, 10m or 2h", param, context)
        return int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


class ResourceName(click.ParamType[str]):
    name = "resource"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        """Raises click.BadParameter, which suggests similar names."""
        if value not in catalogue():
            near = did_you_mean(value, catalogue()) or "; did you mean workouts, sleep, heartrate?"
            self.fail(f"unknown resource {value!r}{near}", param, context)
        return str(value)


def check_providers(names: Collection[str], known: Collection[str], *, new: bool | None = None) -> tuple[str, ...]:
    """The names in lower case. Raises NotFound for an unknown one, unless `new` (--new-provider) accepts it.

    `new` is None for commands without that option.
    """
    hint = "" if new is None else " (--new-provider accepts a provider that this version does not know)"
    for name in () if new else names:
        if name.lower() not in known:
            raise NotFound(f"unknown provider {name}{did_you_mean(name, known)}{hint}")
    return tuple(name.lower() for name in names)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at up to three similar names, in any case of letters; empty if none is similar."""
    by_lower = {one.lower(): one for one in known}
    near = [by_lower[one] for one in get_close_matches(name.lower(), by_lower, 3)]
    return f"; did you mean {', '.join(near)}?" if near else ""
