"""`headrace check`: faults of the configuration, and how to fix them."""

import logging
import sys
from pathlib import Path

import click

from app.config.settings import load
from app.errors import Misconfigured
from workers.cli.options import attached, data_dir_option, json_option
from workers.cli.output import print_json, print_rows
from workers.operate import check


@click.command("check")
@data_dir_option
@json_option
@click.option("--explain", is_flag=True, help="list every setting with its default")
def command(*, data_dir: Path | None, as_json: bool, explain: bool) -> None:
    """Check the settings and every service. Each fault is printed with its fix."""
    if explain:
        print_rows(check.explain(), as_json=as_json)
        return
    settings = load()
    try:
        settings = attached(data_dir)
    except Misconfigured:
        logging.getLogger(__name__).debug("no stack runs in the data directory; checks report missing settings")
    found = []
    for one in check.findings(settings):
        found.append(one)
        if not as_json:
            label = "WARN " if one.is_warning else "ok   " if one.fine else "FAULT"
            click.echo(f"{label} {one.what}: {one.text}", err=not one.fine)
    if as_json:
        print_json(found)
    sys.exit(0 if all(one.fine for one in found) else 1)
