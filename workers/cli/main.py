"""The command line. A command's module is imported only when the command or its help is used."""

import logging
from importlib import import_module
from typing import NamedTuple

import click

from app.observability import gc
from workers.cli.options import Group


class Listed(NamedTuple):
    """A command: its place, as `module:name` in this package, and its line in `headrace --help`."""

    place: str
    about: str


# In the order of `headrace --help`. Importing every module to read the descriptions costs 1.0 s of CPU and 107 MB, so
# they are repeated here; a test compares them with the commands.
GROUPS = {
    "Run": {
        "up": Listed("up:command", "Run everything on this machine, until Ctrl-C."),
        "web": Listed("web:web", "Run the endpoint."),
        "worker": Listed("worker:worker", "Run one worker process."),
        "beat": Listed("worker:beat", "Run the scheduler."),
        "flower": Listed("web:flower", "Run Flower, Celery's dashboard."),
        "console": Listed("console:console", "Run the console, a web page for operators."),
        "etl": Listed("etl:command", "Consume the queue of Junction's ETL pipeline."),
        "migrate": Listed("migrate:command", "Upgrade the database to the newest schema."),
        "roles": Listed("privacy:roles", "Print SQL that grants two roles their privileges."),
    },
    "Look": {
        "status": Listed("status:command", "Show problems, queue depths, outcomes and backfills."),
        "check": Listed("check:command", "Check the settings and every service."),
        "report": Listed("report:report", "Report on the stored data."),
        "explain": Listed("explain:explain", "Show where a stored value came from."),
        "audit": Listed("privacy:audit", "List the actions of operators."),
        "feed": Listed("feed:feed", "Read the change feed."),
    },
    "Act": {
        "link": Listed("link:link", "Create the URL at which a user connects a provider."),
        "backfill": Listed("backfill:backfill", "Fetch history from the aggregator."),
        "reconcile": Listed("reconcile:reconcile", "Find and fetch missing data."),
        "refresh": Listed("reconcile:refresh", "Make a user's providers send new data now."),
        "subscriptions": Listed("subscriptions:subscriptions", "Send signed webhooks about new data to your programs."),
        "dead": Listed("dead:dead", "Show, replay and drop dead letters."),
        "replay": Listed("dead:replay", "Apply archived deliveries again."),
        "retract": Listed("retract:retract", "Hide one record permanently."),
        "erase": Listed("erase:erase", "Delete all data of a user permanently."),
        "retention": Listed("privacy:retention", "Delete expired rows."),
        "priorities": Listed("priorities:priorities", "Rank the sources of each day's values."),
        "zone": Listed("zone:zone", "Show or set the time zone of a user."),
        "derive": Listed("derive:derive", "Compute the values of days again."),
    },
    "Test": {
        "simulate": Listed("simulate:simulate", "Run the simulated aggregators alone."),
        "listen": Listed("listen:listen", "Receive notifications on this machine and print them."),
        "drill": Listed("drill:command", "Test a stack under load and faults."),
    },
}
COMMANDS = {name: listed for group in GROUPS.values() for name, listed in group.items()}


class Main(Group):
    """Lists commands from GROUPS, and imports a command's module when the command is used."""

    def list_commands(self, context: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, context: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].place.partition(":")
        with gc.paused():
            command: click.Command = getattr(import_module(f"workers.cli.{module}"), name)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        width = max(map(len, COMMANDS))
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), listed.about) for name, listed in group.items()])


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace")
@click.option("--debug", is_flag=True, help="show tracebacks")
def main(*, debug: bool) -> None:
    """Headrace stores wearable-health webhooks in your PostgreSQL: each object once, in its newest version."""
    logging.basicConfig(level="DEBUG" if debug else "WARNING", format="%(levelname)s %(name)s %(message)s")
