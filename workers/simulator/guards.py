"""Hooks around every route of the simulated APIs: authentication, requested faults and the request log."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from hmac import compare_digest
from itertools import count
from math import ceil

from flask import Flask, Response, g, request

from workers.simulator.faults import Fault, Faults
from workers.simulator.faults import Kind as FaultKind
from workers.simulator.query import Record

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
    served: Callable[[Response], None] = lambda _: None  # called after a response

    def is_authenticated(self) -> bool:
        return all(
            compare_digest(request.headers.get(name, "").encode(), key.encode()) for name, key in self.keys.items()
        )


def add_guards(app: Flask, faults: Faults, dialects: Mapping[str | None, Dialect]) -> None:
    """Adds the hooks for all routes outside `/simulate/`. `dialects` are by name of blueprint."""
    log: deque[Record] = deque(maxlen=MAX_LOGGED)
    numbers = count(1)
    app.extensions["simulated_requests"] = log

    @app.before_request
    def guard() -> Response | None:
        if request.path.startswith(OWN):
            return None
        dialect = dialects[request.blueprint]
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
        dialects[request.blueprint].served(response)
        return _truncate(response) if has_fault("truncated") else response


def has_fault(kind: FaultKind) -> bool:
    """Whether the request meets a fault of this kind."""
    return g.fault is not None and g.fault.kind == kind


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
