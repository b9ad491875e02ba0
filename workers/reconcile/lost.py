"""The reconciliation of users with a lost delivery, one user after the other."""

import logging
from datetime import UTC, datetime

from sqlalchemy import Engine

from app.errors import Unprocessable
from workers.reconcile import reconciler, runs
from workers.reconcile.reconciler import AGGREGATOR, ReconcilePosition, Reconciler
from workers.store import lost_deliveries

JOB = "reconcile-lost"

log = logging.getLogger(__name__)


class LostPosition(runs.Position, frozen=True):
    """The position of a run: users are compared in the order of their ids."""

    user_id: str = ""
    at: ReconcilePosition | None = None  # None: this user is finished


class LostDeliveryReconciler:
    """The comparison with Junction, limited to these users."""

    aggregator, name, listing, account = AGGREGATOR, "Junction", reconciler.LISTING, AGGREGATOR
    job, is_exclusive, start = JOB, False, LostPosition()

    def __init__(self, engine: Engine, of_all: Reconciler) -> None:
        self._engine, self._of_all = engine, of_all

    def since(self, done_at: datetime | None) -> datetime:
        """The start of the time for which webhook data is compared, whenever the last run was."""
        del done_at
        return self._of_all.since(datetime.now(UTC))

    def step(self, at: LostPosition, since: datetime, user_id: str | None = None) -> runs.Step[LostPosition]:
        """Sends one request about the current user. An error for one user does not stop the run. Raises TryLater."""
        del user_id
        user, position = at.user_id, at.at
        if position is None:
            found = lost_deliveries.next_user(self._engine, AGGREGATOR, at.user_id)
            if found is None:
                return runs.Step(None)
            user, position = found, self._of_all.start
        try:
            step = self._of_all.step(position, since, user)
        except Unprocessable as reason:
            log.warning("a user with a lost delivery could not be compared: %s", reason)
            return runs.Step(LostPosition(user))
        return runs.Step(LostPosition(user, step.to), step.seconds, reason=step.reason)

    def skip(self, at: LostPosition) -> LostPosition:
        """The position after the current user."""
        user = at.user_id if at.at else lost_deliveries.next_user(self._engine, AGGREGATOR, at.user_id)
        return LostPosition(user or at.user_id, skipped=at.skipped + 1)
