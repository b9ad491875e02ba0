"""The simulated aggregators as a server, by default on the loopback interface."""

from collections.abc import Callable
from datetime import UTC, datetime
from threading import Thread
from typing import Any, Self

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from workers.simulator.api import create_api
from workers.simulator.data import World
from workers.simulator.events import Event, changes
from workers.simulator.faults import Fault, Faults
from workers.simulator.people import Record
from workers.simulator.terra import admin
from workers.simulator.terra.admin import AdminApi
from workers.simulator.terra.api import API_KEY as TERRA_API_KEY
from workers.simulator.terra.api import DEV_ID, PREFIX
from workers.simulator.terra.data import TerraWorld

HOST = "127.0.0.1"
API_KEY = "sk_us_simulated"


class _SilentHandler(WSGIRequestHandler):
    """Does not log requests: GET /simulate/requests lists them."""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 - werkzeug's name
        pass


class Simulator:
    """The simulated aggregators, which serve inside a `with`, on a free port unless one is given.

    `at_terra` of the users are also connected through Terra (default: all). `on_fault` is called with each fault that
    is produced, in the thread of the request.
    """

    def __init__(
        self,
        users: int = 3,
        days: int = 30,
        seed: int = 1,
        *,
        until: datetime | None = None,
        host: str = HOST,
        port: int = 0,
        page_size: int = 500,
        at_terra: int | None = None,
        on_fault: Callable[[Fault], None] | None = None,
    ) -> None:
        self.world = World(seed, users, until or datetime.now(UTC), days)
        self.conditions = self.world.conditions
        self.faults = Faults(seed, on_fault)
        self.terra = TerraWorld(self.world, at_terra)
        self.terra_admin = AdminApi(self.terra)
        self.app = create_api(
            self.world, API_KEY, self.faults, page_size=page_size, terra=self.terra, admin=self.terra_admin
        )
        self._host, self._port = host, port
        self._server: BaseWSGIServer | None = None

    @property
    def url(self) -> str:
        """The base URL of the Junction API. Raises RuntimeError if the simulator is not serving."""
        if self._server is None:
            raise RuntimeError("the simulator is not serving; use it in a `with`")
        return f"http://{self._host}:{self._server.port}"

    @property
    def terra_url(self) -> str:
        return self.url + PREFIX

    @property
    def environment(self) -> dict[str, str]:
        return {
            "JUNCTION_BASE_URL": self.url,
            "JUNCTION_API_KEY": API_KEY,
            "TERRA_BASE_URL": self.terra_url,
            "TERRA_API_KEY": TERRA_API_KEY,
            "TERRA_DEV_ID": DEV_ID,
            "TERRA_ADMIN_BASE_URL": self.url + admin.PREFIX,
            "TERRA_ADMIN_TOKEN": admin.TOKEN,
        }

    @property
    def requests(self) -> list[Record]:
        return list(self.app.extensions["simulated_requests"])

    def changes(self) -> list[Event]:
        """The unsent events about revisions that the fault `changing` has made; each is returned once."""
        return changes(self.world)

    def __enter__(self) -> Self:
        self._server = make_server(self._host, self._port, self.app, threaded=True, request_handler=_SilentHandler)
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), name="simulator", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = None
