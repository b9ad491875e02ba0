"""The simulated provider as a server on the loopback interface."""

from collections.abc import Callable
from datetime import UTC, datetime
from threading import Thread
from types import TracebackType
from typing import Any, Self

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from workers.simulator.api import PAGE_SIZE, create_api
from workers.simulator.conditions import Conditions
from workers.simulator.data import World
from workers.simulator.events import Event, changes
from workers.simulator.faults import Fault, Faults
from workers.simulator.query import Record
from workers.simulator.terra.api import API_KEY as TERRA_API_KEY
from workers.simulator.terra.api import DEV_ID, PREFIX
from workers.simulator.terra.data import TerraWorld

HOST = "127.0.0.1"
API_KEY = "sk_us_simulated"


class _Quiet(WSGIRequestHandler):
    """Prints no line for each request: GET /simulate/requests tells them all."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass

    def log_error(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's own name
        pass


class Simulator:
    """A simulated provider that serves while it is entered, on a free port unless one is given.

    `at_terra` of its users are connected through Terra as well, by default all. `on_fault` is told of each fault that
    it makes, in the thread of the request.
    """

    def __init__(
        self,
        users: int = 3,
        days: int = 30,
        seed: int = 1,
        *,
        until: datetime | None = None,
        port: int = 0,
        api_key: str = API_KEY,
        page_size: int = PAGE_SIZE,
        at_terra: int | None = None,
        on_fault: Callable[[Fault], None] | None = None,
    ) -> None:
        self.world = World(seed, users, until or datetime.now(UTC), days)
        self.faults = Faults(seed, on_fault)
        self.api_key = api_key
        self._port = port
        self.terra = TerraWorld(self.world, at_terra)
        self._app = create_api(self.world, api_key, self.faults, page_size, self.terra)
        self._server: BaseWSGIServer | None = None
        self._thread: Thread | None = None

    @property
    def url(self) -> str:
        """Where it can be read; only while it serves."""
        if self._server is None:
            raise RuntimeError("the simulator is not serving")
        return f"http://{HOST}:{self._server.port}"

    @property
    def terra_url(self) -> str:
        """Where its other half can be read; only while it serves."""
        return self.url + PREFIX

    @property
    def environment(self) -> dict[str, str]:
        """What whoever reads it has to be told."""
        return {
            "JUNCTION_BASE_URL": self.url,
            "JUNCTION_API_KEY": self.api_key,
            "TERRA_BASE_URL": self.terra_url,
            "TERRA_API_KEY": TERRA_API_KEY,
            "TERRA_DEV_ID": DEV_ID,
        }

    @property
    def requests(self) -> list[Record]:
        """Every request so far."""
        return list(self._app.extensions["simulated_requests"])

    @property
    def conditions(self) -> Conditions:
        """How pulls and connections stand; what is put here is told from now on."""
        return self.world.conditions

    def changes(self) -> list[Event]:
        """The events about what the fault `changing` has revised, each only once: whoever takes them sends them."""
        return changes(self.world)

    def __enter__(self) -> Self:
        self._server = make_server(HOST, self._port, self._app, threaded=True, request_handler=_Quiet)
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), name="simulator", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = None
