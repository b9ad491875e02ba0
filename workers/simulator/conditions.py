"""What the simulated provider is to tell of its pulls and connections, where that is not that all went well."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from threading import Lock
from typing import Annotated, Literal

import msgspec

from app.catalogue import catalogue
from workers.simulator.people import Connection, User

PullStatus = Literal["success", "failure", "in_progress", "scheduled", "retrying", "not_pulled"]
ERROR_DETAILS = {"retrying": "provider_rate_limit_exceeded", "failure": "non_retriable_error"}


class Pull(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How some pulls of the past stand, as `POST /simulate/pulls` takes it. What is served stays the same.

    status         one that the provider has, or not_pulled: named among what was never asked for
    user_id, provider, resource   which pulls; what is absent does not matter
    error_details  absent: provider_rate_limit_exceeded for retrying, non_retriable_error for failure, else none
    """

    status: PullStatus
    user_id: str | None = None
    provider: str | None = None
    resource: str | None = None
    error_details: str | None = None

    @property
    def details(self) -> str | None:
        """The error that the answer names, if any."""
        return self.error_details or ERROR_DETAILS.get(self.status)


class State(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How some connections stand, as `POST /simulate/connections` takes it. Their data is served all the same.

    status                 connected; error; deregistered: no longer listed anywhere
    user_id, provider      which connections; what is absent does not matter
    error_type, error_message, errored_at   what is told with an error
    """

    status: Literal["connected", "error", "deregistered"]
    user_id: str | None = None
    provider: str | None = None
    error_type: str = "token_refresh_failed"
    error_message: str = "the refresh token was rejected"
    errored_at: Annotated[datetime, msgspec.Meta(tz=True)] = msgspec.field(default_factory=lambda: datetime.now(UTC))


WELL, CONNECTED = Pull("success"), State("connected")


class Conditions:
    """The pulls and connections of a world that are not as they should be. Safe to use from several threads."""

    def __init__(self, members: Callable[[], tuple[User, ...]]) -> None:
        self._members = members
        self._pulls: dict[tuple[Connection, str], Pull] = {}
        self._states: dict[Connection, State] = {}
        self._lock = Lock()

    def put_pull(self, pull: Pull) -> None:
        """Puts it in place of what these pulls were told to be. Raises ValueError if there is no such pull."""
        resources = [each for each in catalogue().values() if each.is_junctions and pull.resource in (None, each.name)]
        pulls = [
            (connection, resource.name)
            for connection in self._named(pull.user_id, pull.provider)
            for resource in resources
            if connection.provider.has(resource)
        ]
        if not pulls:
            raise ValueError("nobody has such a pull")
        with self._lock:
            self._pulls |= dict.fromkeys(pulls, pull)

    def put_state(self, state: State) -> None:
        """Puts it in place of what these connections were. Raises ValueError if there is no such connection."""
        connections = list(self._named(state.user_id, state.provider))
        if not connections:
            raise ValueError("nobody has such a connection")
        with self._lock:
            self._states |= dict.fromkeys(connections, state)

    def clear_pulls(self) -> None:
        """All pulls went well."""
        with self._lock:
            self._pulls = {}

    def clear_states(self) -> None:
        """All connections are well."""
        with self._lock:
            self._states = {}

    def pull(self, connection: Connection, resource: str) -> Pull:
        """How the pull of a resource's past stands."""
        return self._pulls.get((connection, resource), WELL)

    def state(self, connection: Connection) -> State:
        """How a connection stands."""
        return self._states.get(connection, CONNECTED)

    def listed(self, user: User) -> list[Connection]:
        """The connections that a user still has, broken ones among them."""
        return [each for each in user.connections if self.state(each).status != "deregistered"]

    def _named(self, user_id: str | None, provider: str | None) -> Iterator[Connection]:
        for user in self._members():
            if user_id in (None, user.user_id):
                yield from (each for each in user.connections if provider in (None, each.provider.slug))
