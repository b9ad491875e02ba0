"""`headrace zone`: the time zone of a person whose data has no offsets."""

from pathlib import Path

import click

from app.errors import NotFound
from workers.cli import options, output
from workers.cli.options import did_you_mean
from workers.cli.persons import person_of
from workers.daily.priorities import known_zones, set_zone, zone_of
from workers.store import audit
from workers.store.engine import make_engine, transaction


@click.command()
@options.user_option("whose zone")
@click.argument("name", metavar="[ZONE]", required=False)
@click.option("--reset", is_flag=True, help="remove the zone that was set")
@options.data_dir_option
@options.json_option
def zone(*, user: str, name: str | None, reset: bool, data_dir: Path | None, as_json: bool) -> None:
    """Show or set the time zone of a user.

    ZONE is a name such as Europe/Paris. It decides the local date of samples and records without an offset, if all data
    of the user lacks one.
    """
    if name and reset:
        raise click.UsageError("give either a zone or --reset")
    engine = make_engine(options.attached(data_dir, broker=False), "headrace-zone")
    person = person_of(engine, user, may_be_new=True)
    if name or reset:
        with transaction(engine, confirm=True) as connection:
            if name and name not in (names := known_zones(connection)):
                near = did_you_mean(name, names) or "; write it as Europe/Paris or America/New_York"
                raise NotFound(f"unknown time zone {name}{near}")
            set_zone(connection, person, name)
            audit.note(connection, "zone set" if name else "zone reset", person, {"zone": name})
    with transaction(engine) as connection:
        found = zone_of(connection, person)
    if as_json:
        output.print_json({"user": person, "zone": found and found[0], "set_by": found and found[1]})
    elif found:
        click.echo(f"{person}: {found[0]} (set by the {found[1]})")
    else:
        click.echo(f"{person}: no zone is set; data without any offset counts by UTC")
