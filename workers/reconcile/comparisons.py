"""Creates the reconciliations: with Junction, and with Terra if the token of its Admin API is set."""

from typing import Any

from sqlalchemy import Engine

from app.config.settings import Settings
from workers.aggregators.terra import admin
from workers.fetch.client import make_client
from workers.fetch.http import Client
from workers.fetch.rate_limits import Throttle
from workers.reconcile import reconciler, terra
from workers.reconcile.reconciler import LostDeliveryReconciler, Reconciler
from workers.reconcile.runs import Comparison
from workers.reconcile.terra import TerraReconciler
from workers.store import lost_deliveries

JOBS = {reconciler.AGGREGATOR: (reconciler.JOB, reconciler.LOST_JOB), terra.AGGREGATOR: (terra.JOB,)}


def make_comparisons(
    engine: Engine, settings: Settings, *, dry_run: bool = False, is_command: bool = True
) -> list[Comparison[Any]]:
    """One for each aggregator that can be compared, at least one. Raises Misconfigured.

    The settings of a command may have another token than the workers.
    """
    throttle = Throttle(settings)
    found: list[Comparison[Any]] = []
    if "junction" in settings.reconcilable or not settings.reconcilable:
        client = make_client(reconciler.AGGREGATOR, settings, throttle)
        found.append(Reconciler(engine, settings, client, dry_run=dry_run))
    if "terra" in settings.reconcilable:
        base_url, headers = admin.connect(settings)
        http = Client(base_url, headers)
        found.append(TerraReconciler(engine, settings, http, throttle, dry_run=dry_run, is_command=is_command))
    return found


def make_scheduled(engine: Engine, settings: Settings) -> list[Comparison[Any]]:
    """The comparisons of the scheduled task, including that of users with a lost delivery. Raises Misconfigured."""
    found = make_comparisons(engine, settings, is_command=False)
    return found + [LostDeliveryReconciler(engine, one) for one in found if isinstance(one, Reconciler)]


def start_after_losses(engine: Engine, settings: Settings) -> None:
    """Makes a reconciliation due for new reports of lost deliveries: of their users, or of all if one names no user."""
    if reconciler.AGGREGATOR in settings.reconcilable:
        lost_deliveries.start_reconciliation(engine, reconciler.AGGREGATOR, reconciler.LOST_JOB, of_users=True)
        lost_deliveries.start_reconciliation(engine, reconciler.AGGREGATOR, reconciler.JOB, of_users=False)
