"""Tables of routes, and hooks around every route of the simulated APIs: keys, requested faults and the request log."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hmac import compare_digest
from http import HTTPStatus
from itertools import count
from math import ceil

from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from workers.simulator.faults import Fault, Faults
from workers.simulator.faults import Kind as FaultKind
from workers.simulator.people import Record

Route = tuple[str, str, Callable[..., Response]]  # method, path and view
OWN = "/simulate/"
MAX_LOGGED = 100_000
SIMULATED = "as asked by a simulated fault"


@dataclass(frozen=True)
class Dialect:
    """How one aggregator's API authenticates requests and forms errors."""

    keys: Mapping[str, str]  # the headers that a request must carry
    refusal: Callable[[int], Response]  # by status
    possible: Callable[[], set[FaultKind]]  # which of the faults in LIMITED the request can meet
    failed: Callable[[Fault], Response | None] = lambda _: None  # the response to such a fault, if it has its own
    public: frozenset[str] = frozenset()  # rules that need no key

    def is_authenticated(self) -> bool:
        if request.url_rule and request.url_rule.rule in self.public:
            return True
        return all(
            compare_digest(request.headers.get(name, "").encode(), key.encode()) for name, key in self.keys.items()
        )


def add_routes(app: Flask | Blueprint, routes: Iterable[Route]) -> None:
    for method, path, view in routes:
        app.add_url_rule(path, f"{method} {path}", view, methods=[method])


def add_guards(app: Flask, faults: Faults, dialects: Mapping[str | None, Dialect]) -> None:
    """Adds the hooks for all routes outside `/simulate/`, and errors in JSON for all paths.

    `dialects` are by name of blueprint. A path without a route belongs to the aggregator whose key the request carries.
    """
    log: deque[Record] = deque(maxlen=MAX_LOGGED)
    numbers = count(1)
    app.extensions["simulated_requests"] = log

    def dialect_of_request() -> Dialect:
        if request.url_rule:
            return dialects[request.blueprint]
        carried = (one for one in dialects.values() if any(name in request.headers for name in one.keys))
        return next(carried, dialects[None])

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> Response:
        response = dialect_of_request().refusal(error.code or 500)
        if isinstance(error, MethodNotAllowed):
            response.headers["Allow"] = ", ".join(error.valid_methods or ())
        return response

    @app.before_request
    def guard() -> Response | None:
        if request.path.startswith(OWN):
            return None
        dialect = dialect_of_request()
        g.started = time.time()
        g.fault = faults.pick(request.full_path, dialect.possible())
        if g.fault and (failure := _fail(g.fault, dialect)):
            return failure
        return None if dialect.is_authenticated() else dialect.refusal(401)

    @app.after_request
    def note(response: Response) -> Response:
        if request.path.startswith(OWN):
            return response
        asked = {"method": request.method, "path": request.path, "query": request.query_string.decode()}
        at = datetime.fromtimestamp(g.started, UTC).isoformat()
        log.append({"id": next(numbers), **asked, "status": response.status_code, "time": at})
        return _truncate(response) if has_fault("truncated") else response


def has_fault(kind: str) -> bool:
    """Whether the request meets a fault of this kind."""
    fault = g.get("fault")  # absent under /simulate/
    return fault is not None and fault.kind == kind


def reason(status: int) -> str:
    """The text of a refusal that is not a route's own."""
    return SIMULATED if has_fault(str(status)) else HTTPStatus(status).phrase


def _fail(fault: Fault, dialect: Dialect) -> Response | None:
    if fault.kind == "slow":
        time.sleep(fault.seconds)
    if not fault.kind.isdecimal():
        return dialect.failed(fault)
    response = dialect.refusal(int(fault.kind))
    if fault.retry_after is not None:
        seconds = ceil(fault.retry_after)
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        response.headers["Retry-After"] = format_datetime(at, usegmt=True) if fault.as_date else str(seconds)
    return response


def _truncate(response: Response) -> Response:
    body = response.get_data()
    response.set_data(body[: len(body) // 2])
    # Content-Length keeps the full length: otherwise a client could not detect the truncation.
    response.headers["Content-Length"] = str(len(body))
    return response
