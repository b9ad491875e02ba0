"""The read API of the simulated provider, made from the catalogue's rows.

Beside the provider's own routes there is, for tests and for looking around:

    GET    /simulate/requests      every request so far: id, method, path, query, status, time
    POST   /simulate/faults        faults to make, with the fields of workers.simulator.faults.Fault
    POST   /simulate/pulls         how pulls of the past stand, with the fields of workers.simulator.conditions.Pull
    POST   /simulate/connections   how connections stand, with the fields of workers.simulator.conditions.State
    GET    /simulate/links/...     what a link token leads to: whoever opens it connects a provider
    GET    /simulate/changes       the events, not yet sent, about what the fault `changing` has revised

What is posted is one object or a list of them; DELETE of the same path ends all of it. These routes need no key, are
not in the log and never fail on purpose.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from flask import Flask, Response, g, request

from app.catalogue import Kind, Resource, catalogue
from workers.simulator.answers import answer, cursor, cursor_at, number, pages, position, refuse, window
from workers.simulator.conditions import Pull, State
from workers.simulator.data import World
from workers.simulator.events import changes
from workers.simulator.faults import Fault, Faults
from workers.simulator.faults import Kind as FaultKind
from workers.simulator.guards import OWN, SIMULATED, Dialect, add_guards, is_made
from workers.simulator.introspection import historical_pulls, resource_statistics
from workers.simulator.links import Links
from workers.simulator.people import User
from workers.simulator.query import Query, Record, Sample, grouped
from workers.simulator.refresh import Refreshes
from workers.simulator.terra.api import NAME as TERRA
from workers.simulator.terra.api import TerraApi
from workers.simulator.terra.data import TerraWorld
from workers.simulator.users import add_users, known

PAGE_SIZE = 500
CHANGED = 10
INTROSPECTION = {"historical_pull": historical_pulls, "resources": resource_statistics}


def create_api(
    world: World, api_key: str, faults: Faults, page_size: int = PAGE_SIZE, terra: TerraWorld | None = None
) -> Flask:
    """The read API of a world. `page_size` is how many samples a page of a timeseries holds at most."""
    app, links = Flask(__name__), Links()
    terra_api = TerraApi(terra or TerraWorld(world), links)
    key = {"X-Vital-API-Key": api_key}
    junction = Dialect(key, _refusal, _possible_faults, _expired, partial(_served, world))
    add_guards(app, faults, {None: junction, TERRA: terra_api.dialect})
    _add_own_routes(app, world, faults)
    readers: dict[Kind, Callable[..., Response]] = {
        "summary": _summary,
        "timeseries": partial(_timeseries, page_size=page_size),
        "stream": _stream,
        "device": _devices,
    }
    for resource in catalogue().of_kind(*readers):
        rule = resource.path.replace("{", "<").replace("}", ">")
        app.add_url_rule(rule, resource.name, partial(readers[resource.kind], world, resource))
    links.add_to(app)
    terra_api.add_to(app)
    add_users(app, world, links)
    app.add_url_rule("/v2/user/refresh/<user_id>", "refresh", Refreshes(world).answer, methods=["POST"])
    for name, describe in INTROSPECTION.items():
        app.add_url_rule(f"/v2/introspect/{name}", name, partial(_introspect, world, describe))
    return app


def _refusal(status: int) -> Response:
    detail: Any = "Invalid token" if status == 401 else SIMULATED
    if status == 422:
        detail = [{"loc": ["query"], "msg": detail, "type": "value_error"}]
    return answer({"detail": detail}, status)


def _expired(fault: Fault) -> Response | None:
    return answer({"detail": "cursor_expired"}, 400) if fault.kind == "expired_cursor" else None


def _served(world: World, _: Response) -> None:
    if is_made("changing") and "query" in g:
        world.change(g.query, CHANGED if g.fault.records is None else g.fault.records)


def _possible_faults() -> set[FaultKind]:
    resource = catalogue().get(request.endpoint or "")
    kind = resource.kind if resource else None
    possible: set[FaultKind] = {"changing"} if kind in ("summary", "timeseries") else set()
    if cursor():
        possible.add("expired_cursor")
    if kind == "timeseries" or request.endpoint in INTROSPECTION:
        possible.add("short_page")
    return possible


def _page_of(size: int) -> int:
    return min(size, g.fault.records or 0) if is_made("short_page") else size


def _add_own_routes(app: Flask, world: World, faults: Faults) -> None:
    log = app.extensions["simulated_requests"]
    conditions = world.conditions
    app.add_url_rule(f"{OWN}requests", "requests", lambda: answer(list(log)))
    app.add_url_rule(f"{OWN}changes", "changes", lambda: answer(changes(world, forget=False)))
    app.add_url_rule(f"{OWN}changes", "forget_changes", partial(_drop, changes, world), methods=["DELETE"])
    knobs: tuple[tuple[str, Any, Callable[[Any], None], Callable[[], None]], ...] = (
        ("faults", Fault, faults.put, faults.clear),
        ("pulls", Pull, conditions.put_pull, conditions.clear_pulls),
        ("connections", State, conditions.put_state, conditions.clear_states),
    )
    for name, kind, put, clear in knobs:
        app.add_url_rule(OWN + name, f"put_{name}", partial(_put, kind, put), methods=["POST"])
        app.add_url_rule(OWN + name, f"clear_{name}", partial(_drop, clear), methods=["DELETE"])


def _put(kind: Any, put: Callable[[Any], None]) -> Response:
    try:
        wanted = msgspec.json.decode(request.get_data(), type=kind | list[kind])
        for each in wanted if isinstance(wanted, list) else [wanted]:
            put(each)
    except ValueError as error:  # as are msgspec's
        return answer({"detail": str(error)}, 422)
    return answer({"ok": True}, 201)


def _drop(clear: Callable[..., object], *of: Any) -> Response:
    clear(*of)
    return answer({"ok": True})


def _query(world: World, resource: Resource, user_id: str) -> Query:
    user = known(world, user_id)
    undated = resource.dates == "none"
    start, end = (world.start, world.until) if undated else window(resource, world.until)
    query = Query(user, resource, start, end, request.args.get("provider"))
    g.query = query
    return query


def _summary(world: World, resource: Resource, user_id: str) -> Response:
    records = world.summaries(_query(world, resource, user_id))
    if resource.rows:
        return answer({resource.rows: records})
    return answer(records[0]) if records else refuse(404, "Not found")


def _timeseries(world: World, resource: Resource, user_id: str, page_size: int) -> Response:
    page: list[Sample] = []
    after = None
    page_size = _page_of(page_size)
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
    return answer(world.devices(known(world, user_id), resource))


def _introspect(world: World, describe: Callable[[World, User, str | None], Record]) -> Response:
    asked = request.args.get("user_id")
    users = world.members if asked is None else [user for user in world.members if user.user_id == asked]
    found, following = pages(users, _page_of(number("user_limit", 50, 1, 500)))
    provider = request.args.get("provider")
    data = [{"user_id": user.user_id, "provider": describe(world, user, provider)} for user in found]
    return answer({"data": data, "next": following, "next_cursor": following})
