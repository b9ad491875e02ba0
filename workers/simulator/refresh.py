"""The refresh of a user's newest data, and how often it may be asked for."""

from collections.abc import Iterable

from flask import Response

from workers.simulator.answers import answer, refuse, seconds
from workers.simulator.budget import Budget
from workers.simulator.data import World
from workers.simulator.events import supplied
from workers.simulator.people import Connection
from workers.simulator.query import Record

MAX_REFRESHES, WITHIN = 8, 3600.0
MIN_SECONDS, USUAL, MAX_SECONDS = 5.0, 10.0, 60.0


class Refreshes:
    """Counts each user's refreshes. Nothing is made by one: the world is always as new as it can be."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._budget = Budget(MAX_REFRESHES, WITHIN)

    def answer(self, user_id: str) -> Response:
        """What a refresh is answered: 200, or 400 without a connection, 404, 422, or 429 after eight in an hour."""
        user = self._world.user(user_id) or refuse(404, "Not found")
        seconds("timeout", USUAL, MIN_SECONDS, MAX_SECONDS)
        if wait := self._budget.take(user_id):
            response = answer({"detail": f"at most {MAX_REFRESHES} refreshes of a user in an hour"}, 429)
            response.headers["Retry-After"] = str(wait)
            return response
        conditions = self._world.conditions
        listed = conditions.listed(user)
        told: Record = {"success": bool(listed), "user_id": user_id, "failed_sources": []}
        if not listed:
            return answer(told | {"error": "user has no connected sources"}, 400)
        broken = [connection for connection in listed if conditions.state(connection).status == "error"]
        refreshed = _sources(connection for connection in listed if connection not in broken)
        return answer(
            told | {"refreshed_sources": refreshed, "in_progress_sources": [], "failed_sources": _sources(broken)}
        )


def _sources(connections: Iterable[Connection]) -> list[str]:
    return [f"{each.provider.slug}/{resource.name}" for each in connections for resource in supplied(each)]
