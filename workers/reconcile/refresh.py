"""Asks the providers of a user for new data, through Junction."""

from app.config.settings import Settings
from app.errors import TryLater
from workers.aggregators.junction import introspection
from workers.aggregators.junction.introspection import Refreshed
from workers.fetch import client
from workers.reconcile.reconciler import AGGREGATOR

REFRESHES = "8/hour"  # per user (Junction: POST /v2/user/refresh)


class NotRefreshed(TryLater):
    """Junction is paused, was asked too often, or does not answer."""


def refresh_user(settings: Settings, user_id: str) -> Refreshed:
    """Junction's answer. Raises Misconfigured, NotRefreshed, and TryLater without Redis."""
    account = client.make_client(AGGREGATOR, settings)
    if (seconds := account.throttle.wait(AGGREGATOR)) > 0:
        raise NotRefreshed(f"Junction is paused for {seconds:.0f} s; headrace status shows why")
    if (seconds := account.throttle.take(REFRESHES, "refresh", AGGREGATOR, user_id)) > 0:
        times = REFRESHES.replace("/", " times this ")
        raise NotRefreshed(f"{user_id} was refreshed {times}; try again in {seconds:.0f} s")
    try:
        answer = account.client.fetch(introspection.refresh_request(user_id))
    finally:
        account.client.close()
    if not answer.status:
        raise NotRefreshed("Junction cannot be reached; check the network and JUNCTION_BASE_URL")
    if answer.status not in (200, 202, 400):
        raise NotRefreshed(f"Junction answers with status {answer.status}")
    return introspection.read_refresh(answer.body)
