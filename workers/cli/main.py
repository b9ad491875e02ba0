"""The command line. Modules are imported when they are needed: see `Main` and `lazy_imports`.

The libraries of the database, the broker and HTTP take 0.4 to 0.7 s of CPU, too long for a help text or an error.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from typing import Any, NamedTuple

import click

from app.observability import gc
from workers.cli.options import Group, did_you_mean


class Listed(NamedTuple):
    """A command: its place, as `module:name` in this package, and its line in `headrace --help`."""

    place: str
    about: str


# In the order of `headrace --help`. Importing every module to read the descriptions costs 1.0 s of CPU and 107 MB, so
# they are repeated here; a test compares them with the commands.
GROUPS = {
    "Run": {
        "up": Listed("processes:up", "Run everything on this machine, until Ctrl-C."),
        "web": Listed("processes:web", "Run the endpoint."),
        "worker": Listed("worker:worker", "Run one worker process."),
        "beat": Listed("worker:beat", "Run the scheduler."),
        "flower": Listed("processes:flower", "Run Flower, Celery's dashboard."),
        "console": Listed("processes:console", "Run the console, a web page for operators."),
        "etl": Listed("processes:etl", "Consume the queue of Junction's ETL pipeline."),
        "migrate": Listed("migrate:command", "Upgrade the database to the newest schema."),
        "roles": Listed("privacy:roles", "Print SQL that grants two roles their privileges."),
    },
    "Look": {
        "status": Listed("state:status", "Show problems, queue depths, outcomes and backfills."),
        "check": Listed("state:check", "Check the settings and every service."),
        "report": Listed("state:report", "Report on the stored data."),
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
        "priorities": Listed("daily:priorities", "Rank the sources of each day's values."),
        "zone": Listed("daily:zone", "Show or set the time zone of a user."),
        "derive": Listed("daily:derive", "Compute the values of days again."),
    },
    "Test": {
        "simulate": Listed("simulate:simulate", "Run the simulated aggregators alone."),
        "listen": Listed("listen:listen", "Receive notifications on this machine and print them."),
        "drill": Listed("drill:command", "Test a stack under load and faults."),
    },
}
COMMANDS = {name: listed for group in GROUPS.values() for name, listed in group.items()}


class _LazyFinder(MetaPathFinder):
    """Finds a module of Headrace, and lets the first use of one of its attributes execute it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ("app", "workers"):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextmanager
def lazy_imports() -> Iterator[None]:
    """Makes `from package import module` lazy in the block; `from module import name` still executes the module.

    So a command's module imports light modules by name, and the others as modules, whose types its annotations may
    name because they are not evaluated (`from __future__ import annotations`).
    """
    finder = _LazyFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class Main(Group):
    """Lists commands from GROUPS, and imports a command's module when the command is used."""

    def list_commands(self, context: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, context: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            context.fail(f"no such command: {cmd_name}{did_you_mean(cmd_name, COMMANDS)}")
        module, _, name = COMMANDS[cmd_name].place.partition(":")
        with gc.paused(), lazy_imports():
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
