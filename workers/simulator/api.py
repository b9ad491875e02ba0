"""The simulated Junction API, built from the catalogue.

In addition to Junction's own routes there are routes for tests and for looking around:

    GET    /simulate/requests      all requests so far: id, method, path, query, status, time
    POST   /simulate/faults        adds faults, with the fields of workers.simulator.faults.Fault
    POST   /simulate/pulls         sets the state of history pulls, with the fields of workers.simulator.conditions.Pull
    POST   /simulate/connections   sets the state of connections, with the fields of workers.simulator.conditions.State
    GET    /simulate/links/...     the page of a link token: opening it connects a provider
    GET    /simulate/changes       the unsent events about revisions that the fault `changing` has made

A POST takes one object or a list; DELETE of the same path clears it. These routes need no key, are not logged and have
no faults.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from typing import Any

import msgspec
from flask import Flask, Response, g, request
from werkzeug.exceptions import NotFound

from app.catalogue import Kind, Resource, catalogue
from workers.simulator.answers import answer, cursor, cursor_at, number, position, refuse, validation_error, window
from workers.simulator.conditions import Pull, State
from workers.simulator.data import World
from workers.simulator.events import changes
from workers.simulator.faults import Fault, Faults
from workers.simulator.faults import Kind as FaultKind
from workers.simulator.guards import OWN, Dialect, add_guards, has_fault, reason
from workers.simulator.introspection import pulls, statistics
from workers.simulator.links import Links
from workers.simulator.people import PROVIDERS, Connection, Query, Record, grouped
from workers.simulator.terra.admin import NAME as TERRA_ADMIN
from workers.simulator.terra.admin import AdminApi
from workers.simulator.terra.api import NAME as TERRA
from workers.simulator.terra.api import TerraApi
from workers.simulator.terra.data import TerraWorld
from workers.simulator.users import WITHOUT_KEY, add_users, known

PRIORITY = 1
# Raw summaries: the resource by its name in the path, which is also the name of the array in the response.
RAW = {name: name for name in ("activity", "body", "profile", "sleep", "workouts")} | {"devices": "device"}
CHANGED = 10
INTROSPECTION = {"historical_pull": pulls, "resources": statistics}
# Rules that several resources share: with one rule for each of the 66 resources, werkzeug compiled for 40 ms.
SHARED_RULES: dict[Kind, str] = {
    "summary": "/v2/summary/<name>/<user_id>",
    "timeseries": "/v2/timeseries/<user_id>/<name>/grouped",
}


def create_api(
    world: World, api_key: str, faults: Faults, *, page_size: int, terra: TerraWorld, admin: AdminApi
) -> Flask:
    """The API of a world. A page of a timeseries has at most `page_size` samples."""
    app, links = Flask(__name__), Links()
    terra_api = TerraApi(terra, links)
    junction = Dialect({"X-Vital-API-Key": api_key}, _refusal, _possible_faults, _expired, WITHOUT_KEY)
    add_guards(app, faults, {None: junction, TERRA: terra_api.dialect, TERRA_ADMIN: admin.dialect})
    app.after_request(partial(_change, world))
    _add_own_routes(app, world, faults)
    readers: dict[Kind, Callable[[World, Resource, str], Response]] = {
        "summary": _summary,
        "timeseries": partial(_timeseries, page_size),
        "stream": _stream,
        "device": _devices,
    }
    rules = {SHARED_RULES.get(one.kind, rule): one.kind for rule, one in _resources_by_rule().items()}
    for rule, kind in rules.items():
        app.add_url_rule(rule, rule, partial(_read, world, readers[kind]))
    app.add_url_rule("/v2/summary/<name>/<user_id>/raw", "raw", partial(_read_raw, world))
    app.add_url_rule("/v2/user/<user_id>/device/<device_id>", "one_device", partial(_device, world))
    links.add_to(app)
    terra_api.add_to(app)
    admin.add_to(app)
    add_users(app, world, links)
    for name, describe in INTROSPECTION.items():
        app.add_url_rule(f"/v2/introspect/{name}", name, partial(_introspect, world, describe))
    return app


@cache
def _resources_by_rule() -> dict[str, Resource]:
    resources = catalogue().of_kind("summary", "timeseries", "stream", "device")
    return {resource.path.replace("{", "<").replace("}", ">"): resource for resource in resources}


def _requested_resource() -> Resource | None:
    rule = request.url_rule.rule if request.url_rule else ""
    name: str = (request.view_args or {}).get("name", "")
    return _resources_by_rule().get(rule.replace("<name>", name))


def _refusal(status: int) -> Response:
    detail = "Invalid token" if status == 401 else reason(status)
    return answer({"detail": validation_error(["query"], detail) if status == 422 else detail}, status)


def _expired(fault: Fault) -> Response | None:
    return answer({"detail": "cursor_expired"}, 400) if fault.kind == "expired_cursor" else None


def _change(world: World, response: Response) -> Response:
    if has_fault("changing") and "query" in g:
        world.change(g.query, CHANGED if g.fault.records is None else g.fault.records)
    return response


def _possible_faults() -> set[FaultKind]:
    resource = _requested_resource()
    kind = resource.kind if resource else None
    possible: set[FaultKind] = {"changing"} if kind in ("summary", "timeseries") else set()
    if cursor():
        possible.add("expired_cursor")
    if kind == "timeseries" or request.endpoint in INTROSPECTION:
        possible.add("short_page")
    return possible


def _size(size: int) -> int:
    """The size of a page, unless a fault makes it shorter."""
    return min(size, g.fault.records or 0) if has_fault("short_page") else size


def _add_own_routes(app: Flask, world: World, faults: Faults) -> None:
    log, conditions = app.extensions["simulated_requests"], world.conditions
    app.add_url_rule(f"{OWN}requests", "requests", lambda: answer(list(log)))
    app.add_url_rule(f"{OWN}changes", "changes", lambda: answer(changes(world, forget=False)))
    app.add_url_rule(f"{OWN}changes", "forget_changes", partial(_clear, partial(changes, world)), methods=["DELETE"])
    settings: tuple[tuple[str, Any, Callable[[Any], None], Callable[[], None]], ...] = (
        ("faults", Fault, faults.put, faults.clear),
        ("pulls", Pull, conditions.put_pull, conditions.pulls.clear),
        ("connections", State, conditions.put_state, conditions.states.clear),
    )
    for name, kind, put, clear in settings:
        app.add_url_rule(OWN + name, f"put_{name}", partial(_put, kind, put), methods=["POST"])
        app.add_url_rule(OWN + name, f"clear_{name}", partial(_clear, clear), methods=["DELETE"])


def _put(kind: Any, put: Callable[[Any], None]) -> Response:
    try:
        body = msgspec.json.decode(request.get_data(), type=kind | list[kind])
        for each in body if isinstance(body, list) else [body]:
            put(each)
    except ValueError as error:  # msgspec's errors are ValueErrors
        return answer({"detail": str(error)}, 422)
    return answer({"ok": True}, 201)


def _clear(clear: Callable[[], object]) -> Response:
    clear()
    return answer({"ok": True})


def _read(world: World, reader: Callable[[World, Resource, str], Response], **parts: str) -> Response:
    resource = _requested_resource()
    if resource is None:
        raise NotFound
    (identifier,) = (value for name, value in parts.items() if name != "name")
    return reader(world, resource, identifier)


def _query(world: World, resource: Resource, user_id: str) -> Query:
    user = known(world, user_id)
    start, end = (world.start, world.until) if resource.dates == "none" else window(resource, world.until)
    g.query = query = Query(user, resource, start, end, request.args.get("provider"))
    return query


def _summary(world: World, resource: Resource, user_id: str) -> Response:
    records = world.summaries(_query(world, resource, user_id))
    if resource.rows:
        return answer({resource.rows: records})
    return answer(records[0]) if records else refuse(404, "Not found")


def _timeseries(page_size: int, world: World, resource: Resource, user_id: str) -> Response:
    found = world.samples(_query(world, resource, user_id), position(3))
    page = list(islice(found, _size(page_size)))
    following = next(found, None)
    groups: dict[str, list[Record]] = {}
    for group in grouped(page):
        groups.setdefault(group["source"]["provider"], []).append(group)
    after = cursor_at(*following.position) if following else None
    return answer({"groups": groups, "next": after, "next_cursor": after})


def _stream(world: World, resource: Resource, identifier: str) -> Response:
    return answer(world.stream(resource, identifier) or refuse(404, "Not found"))


def _devices(world: World, resource: Resource, user_id: str) -> Response:
    return answer(world.summaries(Query(known(world, user_id), resource, world.start, world.until)))


def _device(world: World, user_id: str, device_id: str) -> Response:
    devices = world.summaries(Query(known(world, user_id), catalogue()["device"], world.start, world.until))
    return answer(next((one for one in devices if one["id"] == device_id), None) or refuse(404, "Not found"))


def _read_raw(world: World, name: str, user_id: str) -> Response:
    """The raw records of a user. A profile is one object, other resources are arrays."""
    resource = catalogue()[RAW.get(name) or refuse(404, "Not Found")]
    user, is_dated = known(world, user_id), resource.kind == "summary" and resource.dates != "none"
    start, end = window(resource, world.until) if is_dated else (world.start, world.until)
    slots = world.within(Query(user, resource, start, end, request.args.get("provider")))
    found = [_raw(resource, world.record(slot)) for slot in slots]
    if name == "profile":
        return answer({name: found[0] if found else refuse(404, "Not found")})
    return answer({name: found})


def _raw(resource: Resource, record: Record) -> Record:
    """A record in the raw form. The simulated providers have no formats of their own: `data` is the unified record."""
    slug = record["source"]["provider"] if "source" in record else record["provider"]
    raw: Record = {
        "id": record["id"],
        "user_id": record["user_id"],
        "data": record,
        "provider_id": record.get("provider_id") or record["id"],
        "source_id": list(PROVIDERS).index(slug) + 1,
        "source": PROVIDERS[slug].described(),
    }
    if resource.kind == "device":
        return raw
    raw |= {"priority_id": PRIORITY, "created_at": record["created_at"], "updated_at": record["updated_at"]}
    if resource.dates != "none":
        at = record.get("time_start") or record.get("bedtime_start") or record["date"]
        raw |= {"timestamp": at, "source_device_id": record.get("source_device_id")}
    if "sport" in record:
        raw |= {"sport": record["sport"], "sport_id": record["sport"]["id"]}
    return raw


def _introspect(world: World, describe: Callable[[World, Connection], Record]) -> Response:
    asked, provider = request.args.get("user_id"), request.args.get("provider")
    users = [user for user in world.members if asked in (None, user.user_id)]
    (begin,) = position(1)
    end = begin + _size(number("user_limit", 50, 1, 500))
    data = [
        {
            "user_id": user.user_id,
            "provider": {
                one.provider.slug: describe(world, one)
                for one in world.conditions.listed(user)
                if provider in (None, one.provider.slug)
            },
        }
        for user in users[begin:end]
    ]
    after = cursor_at(end) if end < len(users) else None
    return answer({"data": data, "next": after, "next_cursor": after})
