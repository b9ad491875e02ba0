"""`headrace priorities`, `zone` and `derive`: how the values of days are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from app.catalogue import catalogue
from app.errors import NotFound
from workers.aggregators.providers import KNOWN
from workers.cli import options, output
from workers.cli.deployment import Deployment, deployment_option, query_options
from workers.cli.options import did_you_mean
from workers.daily import derive as deriving
from workers.daily import priorities as store
from workers.daily.metrics import derived
from workers.daily.model import ANY, SOURCE_TYPES
from workers.store import audit

if TYPE_CHECKING:
    from sqlalchemy import Connection

EVERYONE = "everyone"
whose_option = click.option(
    "--user", default=ANY, help="whose list: user_id, client_user_id or former user_id (default: everyone's)"
)


@click.group()
def priorities() -> None:
    """Rank the sources of each day's values.

    Priorities decide what health.daily contains. The first of these lists that names a source ranks it: the person's
    list of the resource, the person's list of all resources, everyone's list of the resource, everyone's list of all
    resources. Sources without a list follow, in the order of their source types.
    """


@priorities.command("set")
@click.option("--resource", default=ANY, help="steps, sleep, workouts ... (default: every resource)")
@whose_option
@options.new_provider_option
@click.argument("sources", nargs=-1, required=True, metavar="PROVIDER/SOURCE_TYPE...")
@deployment_option
def set_(*, resource: str, user: str, new_provider: bool, sources: Sequence[str], deployment: Deployment) -> None:
    """Replace a list. SOURCES are PROVIDER/SOURCE_TYPE, the best one first; * stands for any."""
    check_resource(resource)
    with deployment.transaction() as connection:
        names = _checked(connection, sources, new_provider=new_provider)
    person = ANY if user == ANY else deployment.person(user, may_be_new=lambda _: True)
    with deployment.transaction(confirm=True) as connection:
        is_changed = store.set_list(connection, person, resource, names)
        audit.note(connection, "priorities set", person, {"resource": resource, "sources": names})
    about = f"{resource} of {_whose(person)}"
    if is_changed:
        click.echo(f"set the priorities for {about}: {', '.join(names)}. Workers compute the days again")
    else:
        click.echo(f"the priorities for {about} were set to this list before; nothing was changed")


@priorities.command("list")
@options.user_option("only the lists of this user", required=False)
@query_options
def list_(*, user: str | None, deployment: Deployment) -> None:
    """Show the lists that are set."""
    person = _person_with_lists(deployment, user) if user else None
    with deployment.transaction() as connection:
        found = store.listed(connection, person)
    about = [
        {"user": one.person, "resource": one.resource, "sources": one.sources, "set_at": one.set_at} for one in found
    ]
    plain = [row | {"user": None} if row["user"] == ANY else row for row in about]
    rows = [
        row | {"user": _whose(one.person), "sources": ", ".join(one.sources)}
        for row, one in zip(about, found, strict=True)
    ]
    output.print_rows(rows, plain)


@priorities.command("reset")
@click.option("--resource", help="only the list of this resource; * is the list of every resource (default: all lists)")
@whose_option
@deployment_option
def reset_(*, resource: str | None, user: str, deployment: Deployment) -> None:
    """Remove lists. The days are computed again. `headrace audit` shows how each list was set."""
    if resource is not None:
        check_resource(resource)
    person = _person_with_lists(deployment, user)
    with deployment.transaction(confirm=True) as connection:
        gone = store.reset(connection, person, resource)
        audit.note(connection, "priorities reset", person, {"resources": gone})
    if not gone:
        of = f" for {resource}" if resource else ""
        raise NotFound(f"no priorities{of} are set for {_whose(person)}")
    click.echo(f"removed the priorities of {_whose(person)} for {', '.join(gone)}")


def _whose(person: str) -> str:
    return EVERYONE if person == ANY else person


def check_resource(name: str) -> None:
    """Raises NotFound unless days are computed from the resource, or the name is ANY."""
    if name == ANY or name in derived():
        return
    if name in catalogue():
        raise NotFound(f"no day is computed from {name}; headrace priorities apply to: {', '.join(derived())}")
    near = did_you_mean(name, derived(), f"; priorities apply to: {', '.join(derived())}")
    raise NotFound(f"unknown resource {name}{near}")


def _checked(connection: Connection, sources: Sequence[str], *, new_provider: bool) -> list[str]:
    """The sources with the provider in lower case. Raises NotFound for one that cannot exist."""
    stored = store.stored_sources(connection)
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
            near = did_you_mean(source_type, types, f"; known are {', '.join(SOURCE_TYPES)}")
            raise NotFound(f"unknown source type {source_type}{near}")
        names.append(f"{provider}/{source_type}")
    if len(set(names)) < len(names):
        raise click.UsageError("a source is named twice")
    return names


def _person_with_lists(deployment: Deployment, user: str) -> str:
    """The person; ANY for everyone. Raises NotFound for an unknown name without a list."""
    if user == ANY:
        return ANY
    return deployment.person(user, may_be_new=lambda connection: bool(store.listed(connection, user)))


@click.command()
@options.user_option("whose zone")
@click.argument("name", metavar="[ZONE]", required=False)
@click.option("--reset", is_flag=True, help="remove the zone that was set")
@query_options
def zone(*, user: str, name: str | None, reset: bool, deployment: Deployment) -> None:
    """Show or set the time zone of a user.

    ZONE is a name such as Europe/Paris. It decides the local date of samples and records without an offset, if all data
    of the user lacks one.
    """
    if name and reset:
        raise click.UsageError("give either a zone or --reset")
    person = deployment.person(user, may_be_new=lambda connection: bool(name or store.zone_of(connection, user)))
    if name or reset:
        with deployment.transaction(confirm=True) as connection:
            if name and name not in (names := store.known_zones(connection)):
                near = did_you_mean(name, names, "; write it as Europe/Paris or America/New_York")
                raise NotFound(f"unknown time zone {name}{near}")
            store.set_zone(connection, person, name)
            audit.note(connection, "zone set" if name else "zone reset", person, {"zone": name})
    with deployment.transaction() as connection:
        found = store.zone_of(connection, person)
    zone, set_by = found or (None, None)
    text = f"{zone} (set by the {set_by})" if found else "no zone is set; data without any offset counts by UTC"
    output.show({"user": person, "zone": zone, "set_by": set_by}, f"{person}: {text}")


@click.group()
def derive() -> None:
    """Compute the values of days again.

    The values are in health.daily. Workers of the lane `derive` keep them up to date, so this is only needed if stored
    rows were changed by hand.
    """


@derive.command()
@options.user_option("only the days of this user", required=False)
@query_options
def rebuild(*, user: str | None, deployment: Deployment) -> None:
    """Compute all days from the stored rows. Values that are already correct do not change.

    Days whose samples have expired (HEADRACE_RETENTION) stay as they are. Every use is recorded in headrace.audit.
    """
    engine = deployment.engine
    person = deployment.person(user) if user else None
    with output.progress("rebuilding days") as update:
        written = deriving.Deriver(engine, deployment.settings).rebuild(person, update)
    audit.record(engine, "derive rebuild", person or "*", {"changed": written})
    text = f"rebuilt the days of {person or EVERYONE}: {written:,} values changed"
    output.show({"user": person, "changed": written}, text)
