"""`headrace simulate`: the simulated aggregators alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from app.config.settings import load
from workers import simulator
from workers.cli.deployment import Deployment, deployment_option


@click.command("simulate")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="port of the simulated API (default: a free one)"
)
@click.option("--users", type=click.IntRange(1), default=3, show_default=True, help="number of users")
@click.option("--days", type=click.IntRange(1), default=30, show_default=True, help="days of history per user")
@click.option("--seed", type=int, default=1, show_default=True, help="the same seed generates the same users and data")
@click.option("--to", help="also send signed webhooks to this endpoint, e.g. http://127.0.0.1:8000/webhooks/junction")
@click.option("--terra-to", help="also send Terra's webhooks here, e.g. http://127.0.0.1:8000/webhooks/terra")
@click.option("--rate", type=click.FloatRange(0.01), default=5.0, show_default=True, help="live events per second")
@click.option("--duplicates", type=click.FloatRange(0, 1), default=0.0, help="share of events sent twice")
@click.option("--reordering", type=click.FloatRange(0, 1), default=0.0, help="share of events sent slightly late")
@click.option("--late", type=click.FloatRange(0, 1), default=0.0, help="share of events sent very late")
@click.option("--pinged", type=click.FloatRange(0, 1), default=0.0, help="share of Terra events sent as a URL to fetch")
@partial(deployment_option, needs_broker=True)
def simulate(*, to: str | None, terra_to: str | None, deployment: Deployment, **given: Any) -> None:
    """Run the simulated aggregators alone. Meant for your own tests; Ctrl-C stops them.

    Events for --to and --terra-to are signed with JUNCTION_WEBHOOK_SECRET and TERRA_SIGNING_SECRET, or with the
    secrets of the stack in --data-dir.
    """
    settings = load()
    if (to and not settings.junction_webhook_secrets) or (terra_to and not settings.terra_signing_secrets):
        settings = deployment.settings
    secret = next(iter(settings.junction_webhook_secrets), None)
    terra_secret = next(iter(settings.terra_signing_secrets), None)
    simulator.run(to=to, secret=secret, terra_to=terra_to, terra_secret=terra_secret, **given)
