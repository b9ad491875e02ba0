"""The command line. A command's module is imported only when the command is used."""

import logging

import click

from workers.cli.options import Group

# Command -> module:name. Importing every module costs a process 1.2 s of CPU and 107 MB, that of `headrace up` alone
# 0.5 s and 48 MB.
COMMANDS = {
    "audit": "privacy:audit",
    "backfill": "backfill:backfill",
    "beat": "worker:beat",
    "check": "check:command",
    "dead": "dead:dead",
    "drill": "drill:command",
    "erase": "erase:erase",
    "etl": "etl:command",
    "explain": "explain:explain",
    "flower": "web:flower",
    "link": "link:link",
    "migrate": "migrate:command",
    "reconcile": "reconcile:reconcile",
    "refresh": "reconcile:refresh",
    "replay": "dead:replay",
    "report": "report:report",
    "retention": "privacy:retention",
    "roles": "privacy:roles",
    "simulate": "simulate:simulate",
    "status": "status:command",
    "up": "up:command",
    "web": "web:web",
    "worker": "worker:worker",
}


@click.group(cls=Group, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace")
@click.option("--debug", is_flag=True, help="show tracebacks")
def main(*, debug: bool) -> None:
    """Headrace stores wearable-health webhooks in your PostgreSQL: each object once, in its newest version."""
    logging.basicConfig(level="DEBUG" if debug else "WARNING", format="%(levelname)s %(name)s %(message)s")
