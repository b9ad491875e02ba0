"""`headrace priorities`: the order in which sources are trusted."""

from collections.abc import Sequence
from pathlib import Path

import click
from sqlalchemy import Connection, Engine

from app.catalogue import catalogue
from app.errors import NotFound
from workers.aggregators.providers import KNOWN
from workers.cli import options, output
from workers.cli.options import did_you_mean
from workers.cli.persons import person_of
from workers.daily.metrics import derived
from workers.daily.priorities import PriorityList, listed, reset, set_list, stored_sources
from workers.daily.ranks import ANY, SOURCE_TYPES
from workers.store import audit
from workers.store.engine import make_engine, transaction

EVERYONE = "everyone"
user_option = click.option(
    "--user", default=ANY, help="whose list: user_id, client_user_id or former user_id (default: everyone's)"
)


@click.group()
def priorities() -> None:
    """Rank the sources of each day's values.

    They decide what health.daily contains. For each person and resource, the first list that names a source ranks it:
    the person's list of the resource, the person's list of all resources, everyone's list of the resource, everyone's
    list of all resources. Sources without a list follow, in the order of their source types.
    """


@priorities.command("set")
@click.option("--resource", default=ANY, help="steps, sleep, workouts ... (default: every resource)")
@user_option
@options.new_provider_option
@click.argument("sources", nargs=-1, required=True, metavar="PROVIDER/SOURCE_TYPE...")
@options.data_dir_option
def set_(*, resource: str, user: str, new_provider: bool, sources: Sequence[str], data_dir: Path | None) -> None:
    """Replace a list. SOURCES are PROVIDER/SOURCE_TYPE, the best one first; * stands for any."""
    check_resource(resource)
    engine = _engine(data_dir)
    with transaction(engine) as connection:
        names = _checked(connection, sources, new_provider=new_provider)
    person = _person(engine, user)
    with transaction(engine, confirm=True) as connection:
        is_changed = set_list(connection, person, resource, names)
        audit.note(connection, "priorities set", person, {"resource": resource, "sources": names})
    about = f"{resource} of {EVERYONE if person == ANY else person}"
    if is_changed:
        click.echo(f"set the priorities for {about}: {', '.join(names)}. Workers compute the days again")
    else:
        click.echo(f"the priorities for {about} were set to this list before; nothing was changed")


@priorities.command("list")
@click.option("--user", help="only the lists of this user: user_id, client_user_id or former user_id")
@options.data_dir_option
@options.json_option
def list_(*, user: str | None, data_dir: Path | None, as_json: bool) -> None:
    """Show the lists that are set."""
    engine = _engine(data_dir)
    person = _person(engine, user) if user else None
    with transaction(engine) as connection:
        found = listed(connection, person)
    output.print_rows([_row(one, as_json=as_json) for one in found], as_json=as_json)


@priorities.command("reset")
@click.option("--resource", help="only the list of this resource; * is the list of every resource (default: all lists)")
@user_option
@options.data_dir_option
def reset_(*, resource: str | None, user: str, data_dir: Path | None) -> None:
    """Remove lists. The days are computed again."""
    if resource is not None:
        check_resource(resource)
    engine = _engine(data_dir)
    person = _person(engine, user)
    with transaction(engine, confirm=True) as connection:
        gone = reset(connection, person, resource)
        audit.note(connection, "priorities reset", person, {"resources": gone})
    if not gone:
        of = f" for {resource}" if resource else ""
        raise NotFound(f"no priorities{of} are set for {EVERYONE if person == ANY else person}")
    click.echo(f"removed the priorities of {EVERYONE if person == ANY else person} for {', '.join(gone)}")


def check_resource(name: str) -> None:
    """Raises NotFound unless days are computed from the resource, or the name is ANY."""
    if name == ANY or name in derived():
        return
    if name in catalogue():
        raise NotFound(f"no day is computed from {name}; headrace priorities apply to: {', '.join(derived())}")
    near = did_you_mean(name, derived()) or f"; priorities apply to: {', '.join(derived())}"
    raise NotFound(f"unknown resource {name}{near}")


def _checked(connection: Connection, sources: Sequence[str], *, new_provider: bool) -> list[str]:
    """The sources with the provider in lower case. Raises NotFound for one that cannot exist."""
    stored = stored_sources(connection)
    providers = {ANY, *KNOWN, *(provider for provider, _ in stored)}
    terra = {one.terra or one.name.removeprefix("terra_") for one in catalogue().values() if one.holds_terra}
    types = {ANY, *SOURCE_TYPES, *terra, *(source_type for _, source_type in stored)}
    names = []
    for one in sources:
        provider, separator, source_type = one.partition("/")
        if not separator or not source_type or not provider:
            raise NotFound(f"{one} is not a source; write PROVIDER/SOURCE_TYPE, such as oura/ring, garmin/* or */watch")
        (provider,) = options.check_providers([provider], providers, new=new_provider)
        if source_type not in types:
            near = did_you_mean(source_type, types) or f"; known are {', '.join(SOURCE_TYPES)}"
            raise NotFound(f"unknown source type {source_type}{near}")
        names.append(f"{provider}/{source_type}")
    if len(set(names)) < len(names):
        raise click.UsageError("a source is named twice")
    return names


def _person(engine: Engine, user: str) -> str:
    return ANY if user == ANY else person_of(engine, user, may_be_new=True)


def _row(one: PriorityList, *, as_json: bool) -> dict[str, object]:
    user = one.person if one.person != ANY else None
    sources = list(one.sources) if as_json else ", ".join(one.sources)
    return {
        "user": user if as_json else user or EVERYONE,
        "resource": one.resource,
        "sources": sources,
        "set_at": one.set_at,
    }


def _engine(data_dir: Path | None) -> Engine:
    return make_engine(options.attached(data_dir, broker=False), "headrace-priorities")
