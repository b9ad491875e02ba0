"""The read API of the simulated provider, made from the catalogue's rows.

Beside the provider's own routes there is, for tests and for looking around:

    GET    /simulate/requests   every request so far: id, path, query, status, time
    POST   /simulate/faults     one fault to make, or a list of them, with the fields of workers.simulator.faults.Fault
    DELETE /simulate/faults     no more faults

These two need no key, are not in the log and never fail on purpose.
"""

import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from hmac import compare_digest
from itertools import count
from math import ceil

import msgspec
from flask import Flask, Response, g, request

from app.catalogue import Kind, Resource, catalogue
from workers.simulator.answers import answer, cursor_at, number, pages, position, refuse, window
from workers.simulator.data import World
from workers.simulator.faults import Fault, Faults
from workers.simulator.introspection import historical_pulls, resource_statistics
from workers.simulator.people import User
from workers.simulator.query import Query, Record, Sample, grouped

PAGE_SIZE = 500
OWN = "/simulate/"
REMEMBERED = 100_000


def create_api(world: World, api_key: str, faults: Faults, page_size: int = PAGE_SIZE) -> Flask:
    """The read API of a world. `page_size` is how many samples a page of a timeseries holds at most."""
    app = Flask(__name__)
    _add_guards(app, api_key, faults)
    _add_own_routes(app, faults)
    readers: dict[Kind, Callable[..., Response]] = {
        "summary": _summary,
        "timeseries": partial(_timeseries, page_size=page_size),
        "stream": _stream,
        "device": _devices,
    }
    for resource in catalogue().values():
        rule = resource.path.replace("{", "<").replace("}", ">")
        app.add_url_rule(rule, resource.name, partial(readers[resource.kind], world, resource))
    app.add_url_rule("/v2/user", "users", partial(_users, world))
    app.add_url_rule("/v2/user/<user_id>", "user", partial(_user, world))
    app.add_url_rule("/v2/user/providers/<user_id>", "providers", partial(_providers, world))
    for name, describe in (("historical_pull", historical_pulls), ("resources", resource_statistics)):
        app.add_url_rule(f"/v2/introspect/{name}", name, partial(_introspect, world, describe))
    return app


def _add_guards(app: Flask, api_key: str, faults: Faults) -> None:
    log: deque[Record] = deque(maxlen=REMEMBERED)
    numbers = count(1)
    app.extensions["simulated_requests"] = log

    @app.before_request
    def guard() -> Response | None:
        if request.path.startswith(OWN):
            return None
        g.started = time.time()
        g.fault = faults.pick(request.path, has_cursor="next_cursor" in request.args or "cursor" in request.args)
        if g.fault and (failure := _fail(g.fault)):
            return failure
        if not compare_digest(request.headers.get("X-Vital-API-Key", "").encode(), api_key.encode()):
            return answer({"detail": "Invalid token"}, 401)
        return None

    @app.after_request
    def note(response: Response) -> Response:
        if request.path.startswith(OWN):
            return response
        query = request.query_string.decode()
        entry = {"id": next(numbers), "path": request.path, "query": query, "status": response.status_code}
        log.append(entry | {"time": datetime.fromtimestamp(g.started, UTC).isoformat()})
        return _truncate(response) if g.fault and g.fault.kind == "truncated" else response


def _add_own_routes(app: Flask, faults: Faults) -> None:
    log: deque[Record] = app.extensions["simulated_requests"]

    @app.get(f"{OWN}requests")
    def requests() -> Response:
        return answer(list(log))

    @app.post(f"{OWN}faults")
    def add_faults() -> Response:
        try:
            wanted = msgspec.json.decode(request.get_data(), type=Fault | list[Fault])
        except msgspec.MsgspecError as error:
            return answer({"detail": str(error)}, 422)
        for fault in wanted if isinstance(wanted, list) else [wanted]:
            faults.put(fault)
        return answer({"ok": True}, 201)

    @app.delete(f"{OWN}faults")
    def clear_faults() -> Response:
        faults.clear()
        return answer({"ok": True})


def _fail(fault: Fault) -> Response | None:
    if fault.kind == "slow":
        time.sleep(fault.seconds)
    if fault.kind == "expired_cursor":
        return answer({"detail": "cursor_expired"}, 400)
    if not fault.kind.isdecimal():
        return None
    response = answer({"detail": "as asked by a simulated fault"}, int(fault.kind))
    if fault.retry_after is not None:
        seconds = ceil(fault.retry_after)
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        response.headers["Retry-After"] = format_datetime(at, usegmt=True) if fault.as_date else str(seconds)
    return response


def _truncate(response: Response) -> Response:
    body = response.get_data()
    response.set_data(body[: len(body) // 2])
    # The whole length stays announced: only so can a client tell that something is missing.
    response.headers["Content-Length"] = str(len(body))
    return response


def _known(world: World, user_id: str) -> User:
    return world.user(user_id) or refuse(404, "Not found")


def _query(world: World, resource: Resource, user_id: str) -> Query:
    user = _known(world, user_id)
    undated = resource.dates == "none"
    start, end = (world.start, world.until) if undated else window(resource, world.until)
    return Query(user, resource, start, end, request.args.get("provider"))


def _summary(world: World, resource: Resource, user_id: str) -> Response:
    records = world.summaries(_query(world, resource, user_id))
    if resource.rows:
        return answer({resource.rows: records})
    return answer(records[0]) if records else refuse(404, "Not found")


def _timeseries(world: World, resource: Resource, user_id: str, page_size: int) -> Response:
    page: list[Sample] = []
    after = None
    for sample in world.samples(_query(world, resource, user_id), position()):
        if len(page) == page_size:
            after = sample.position
            break
        page.append(sample)
    groups: dict[str, list[Record]] = {}
    for group in grouped(page):
        groups.setdefault(group["source"]["provider"], []).append(group)
    following = cursor_at(after)
    return answer({"groups": groups, "next": following, "next_cursor": following})


def _stream(world: World, resource: Resource, **identifiers: str) -> Response:
    (identifier,) = identifiers.values()
    return answer(world.stream(resource, identifier) or refuse(404, "Not found"))


def _devices(world: World, resource: Resource, user_id: str) -> Response:
    return answer(world.devices(_known(world, user_id), resource))


def _users(world: World) -> Response:
    offset, limit = number("offset", 0, 0, 10**9), number("limit", 100, 1, 500)
    users = [_described(world, user) for user in world.members[offset : offset + limit]]
    return answer({"users": users, "total": len(world.members), "offset": offset, "limit": limit})


def _user(world: World, user_id: str) -> Response:
    return answer(_described(world, _known(world, user_id)))


def _described(world: World, user: User) -> Record:
    sources = [
        {"provider": described, "source": described, "created_on": connection.since.isoformat()}
        for connection in user.connections
        if (described := connection.provider.described())
    ]
    return {
        "user_id": user.user_id,
        "team_id": world.team_id,
        "client_user_id": user.client_user_id,
        "created_on": world.start.isoformat(),
        "connected_sources": sources,
        "fallback_time_zone": None,
    }


def _providers(world: World, user_id: str) -> Response:
    connected: list[Record] = [
        {
            **connection.provider.described(),
            "created_on": connection.since.isoformat(),
            "status": "connected",
            "external_user_id": connection.external_user_id,
            "error_details": None,
            "resource_availability": {},
        }
        for connection in _known(world, user_id).connections
    ]
    return answer({"providers": connected})


def _introspect(world: World, describe: Callable[[World, User, str | None], Record]) -> Response:
    asked = request.args.get("user_id")
    users = world.members if asked is None else [user for user in world.members if user.user_id == asked]
    found, following = pages(users, number("user_limit", 50, 1, 500))
    provider = request.args.get("provider")
    data = [{"user_id": user.user_id, "provider": describe(world, user, provider)} for user in found]
    return answer({"data": data, "next": following, "next_cursor": following})
