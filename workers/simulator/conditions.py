"""States other than success that tests have set for history pulls and connections."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec

from app.catalogue import catalogue
from workers.simulator.people import Connection, User

PullStatus = Literal["success", "failure", "in_progress", "scheduled", "retrying", "not_pulled"]
ERROR_DETAILS = {"retrying": "provider_rate_limit_exceeded", "failure": "non_retriable_error"}


class Pull(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The state of some history pulls: the body of `POST /simulate/pulls`. Their data is served all the same.

    status         a status of Junction's, or not_pulled: the resource is listed under `not_pulled`
    user_id, provider, resource   which pulls; default: any
    error_details  default: by status, see ERROR_DETAILS
    """

    status: PullStatus
    user_id: str | None = None
    provider: str | None = None
    resource: str | None = None
    error_details: str | None = None

    @property
    def details(self) -> str | None:
        """The error in the response, if any."""
        return self.error_details or ERROR_DETAILS.get(self.status)


class State(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The state of some connections: the body of `POST /simulate/connections`. Their data is served all the same.

    status                 connected; error; deregistered: no longer listed
    user_id, provider      which connections; default: any
    error_type, error_message, errored_at   the details of an error
    """

    status: Literal["connected", "error", "deregistered"]
    user_id: str | None = None
    provider: str | None = None
    error_type: str = "token_refresh_failed"
    error_message: str = "the refresh token was rejected"
    errored_at: Annotated[datetime, msgspec.Meta(tz=True)] = msgspec.field(default_factory=lambda: datetime.now(UTC))


SUCCESS, CONNECTED = Pull("success"), State("connected")


class Conditions:
    """The states that were set for pulls and connections of a world."""

    def __init__(self, members: Callable[[], tuple[User, ...]]) -> None:
        self._members = members
        self.pulls: dict[tuple[Connection, str], Pull] = {}
        self.states: dict[Connection, State] = {}

    def put_pull(self, pull: Pull) -> None:
        """Sets the state of the named pulls. Raises ValueError if there is none."""
        pulls = [
            (connection, resource.name)
            for connection in self._named(pull.user_id, pull.provider)
            for resource in catalogue().values()
            if resource.is_junctions and pull.resource in (None, resource.name) and connection.provider.has(resource)
        ]
        if not pulls:
            raise ValueError("no user has such a pull; check user_id, provider and resource")
        self.pulls |= dict.fromkeys(pulls, pull)

    def put_state(self, state: State) -> None:
        """Sets the state of the named connections. Raises ValueError if there is none."""
        connections = self._named(state.user_id, state.provider)
        if not connections:
            raise ValueError("no user has such a connection; check user_id and provider")
        self.states |= dict.fromkeys(connections, state)

    def pull(self, connection: Connection, resource: str) -> Pull:
        """The state of a resource's history pull."""
        return self.pulls.get((connection, resource), SUCCESS)

    def state(self, connection: Connection) -> State:
        return self.states.get(connection, CONNECTED)

    def reconnect(self, connection: Connection) -> bool:
        """Ends the state of a deregistered connection. False if the connection is not deregistered."""
        if self.state(connection).status != "deregistered":
            return False
        self.states.pop(connection, None)
        return True

    def listed(self, user: User) -> list[Connection]:
        """The user's connections that are not deregistered; those in error are included."""
        return [each for each in user.connections if self.state(each).status != "deregistered"]

    def _named(self, user_id: str | None, provider: str | None) -> list[Connection]:
        users = [user for user in self._members() if user_id in (None, user.user_id)]
        return [each for user in users for each in user.connections if provider in (None, each.provider.slug)]
