"""Options, argument types and error handling that commands share."""

import re
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from app.catalogue import catalogue
from app.errors import CommitUnknown, HeadraceError, NotFound, PositionDropped

Command = Callable[..., Any]
JSON = "headrace.json"  # the key of --json in `Context.meta`
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


def moment(value: str) -> datetime:
    """The type of a day or a time in ISO 8601; UTC without an offset. Raises click.BadParameter."""
    try:
        given = datetime.fromisoformat(value)
    except ValueError:
        text = f"{value!r} is neither a day (2026-03-14) nor a time (2026-03-14T06:30:00Z)"
        raise click.BadParameter(text) from None
    return given if given.tzinfo else given.replace(tzinfo=UTC)


def duration(value: str) -> int:
    """The type of a duration in whole seconds, minutes or hours: 90s, 10m, 2h. Raises click.BadParameter."""
    found = re.fullmatch(r"([1-9]\d{0,5})([smh])", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a duration such as 90s, 10m or 2h")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def resource(value: str) -> str:
    """The type of a name of the catalogue. Raises click.BadParameter, which suggests similar names."""
    if value not in catalogue():
        near = did_you_mean(value, catalogue(), "; did you mean workouts, sleep, heartrate?")
        raise click.BadParameter(f"unknown resource {value!r}{near}")
    return value


def data_dir_option(name: str = "data_dir", **more: Any) -> Callable[[Command], Command]:
    """`--data-dir`; as `deployment`, see `deployment_option`."""
    meaning = "data directory of the running stack (default: HEADRACE_DATA_DIR, then .headrace)"
    return click.option("--data-dir", name, type=click.Path(path_type=Path, file_okay=False), help=meaning, **more)


def user_option(meaning: str, *, required: bool = True) -> Callable[[Command], Command]:
    """`--user`, which the methods of Deployment resolve."""
    return click.option("--user", required=required, help=f"{meaning}: user_id, client_user_id or former user_id")


def since_option(meaning: str, *, required: bool = True) -> Callable[[Command], Command]:
    return click.option("--since", required=required, type=moment, help=meaning)


def until_option(meaning: str) -> Callable[[Command], Command]:
    return click.option("--until", type=moment, help=f"{meaning} (default: now)")


all_option = click.option(
    "--all", "all_users", is_flag=True, help="every user that --user matches, instead of exactly one"
)
new_provider_option = click.option("--new-provider", is_flag=True, help="accept a provider that is not known yet")
yes_option = click.option(
    "--yes", is_flag=True, help="do not ask for confirmation; required without a terminal, unless stated otherwise"
)


def json_option(command: Command) -> Command:
    """`--json`, which the functions of `output` obey."""

    def note(context: click.Context, _parameter: click.Parameter, value: bool) -> None:  # noqa: FBT001 - of click
        context.meta[JSON] = value

    return click.option("--json", is_flag=True, expose_value=False, callback=note, help="print JSON")(command)


def check_period(since: datetime, until: datetime | None) -> datetime:
    """The end of a period; now without `until`. Raises click.ClickException if the period is empty."""
    end = until or datetime.now(UTC)
    if since >= end:
        raise click.ClickException(f"--since {since.isoformat()} is not before --until {end.isoformat()}")
    return end


def check_ids(ids: Collection[int], found: Collection[int], what: str, known: Callable[[], Iterable[int]]) -> None:
    """Raises NotFound for an id that was not found. `known` returns ids that exist, of which similar ones are named."""
    if missing := [number for number in ids if number not in found]:
        command = what.partition(" ")[0]
        near = did_you_mean(str(missing[0]), map(str, known()), f"; headrace {command} list shows all")
        raise NotFound(f"no {what} {missing[0]}{near}")


def check_providers(names: Collection[str], known: Collection[str], *, new: bool | None = None) -> tuple[str, ...]:
    """The names in lower case. Raises NotFound for an unknown one, unless `new` (--new-provider) accepts it.

    `new` is None for commands without that option.
    """
    hint = "" if new is None else " (--new-provider accepts a provider that this version does not know)"
    for name in () if new else names:
        if name.lower() not in known:
            raise NotFound(f"unknown provider {name}{did_you_mean(name, known)}{hint}")
    return tuple(name.lower() for name in names)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint at up to three similar names, in any case of letters; `otherwise` if none is similar."""
    by_lower = {one.lower(): one for one in known}
    near = [by_lower[one] for one in get_close_matches(name.lower(), by_lower, 3)]
    return f"; did you mean {', '.join(near)}?" if near else otherwise
