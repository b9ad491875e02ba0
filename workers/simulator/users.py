"""Junction's routes about users: their connections, refreshes, and links that connect a provider."""

import secrets
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import msgspec
from flask import Flask, Response, request

from workers.simulator.answers import answer, invalid, number, refuse, validation_error
from workers.simulator.budget import Budget
from workers.simulator.conditions import State
from workers.simulator.data import World
from workers.simulator.events import availability, supplied, supplies
from workers.simulator.guards import Route, add_routes
from workers.simulator.links import Link, Links
from workers.simulator.people import PROVIDERS, Connection, Provider, Record, User, zone_of

MAX_REFRESHES, REFRESH_WINDOW_SECONDS = 8, 3600.0
MIN_TIMEOUT, DEFAULT_TIMEOUT, MAX_TIMEOUT = 5.0, 10.0, 60.0
LINK_PROVIDERS, OAUTH_LINK = "/v2/link/providers", "/v2/link/provider/oauth/<provider>"
WITHOUT_KEY = frozenset({LINK_PROVIDERS, OAUTH_LINK})  # `security: []` in Junction's API document
CODE_LASTS = timedelta(hours=1)
DEMO = ("apple_health_kit", "fitbit", "freestyle_libre", "oura")


class _NewUser(msgspec.Struct):
    client_user_id: str


class _Changes(msgspec.Struct):
    client_user_id: str | msgspec.UnsetType = msgspec.UNSET
    fallback_time_zone: str | msgspec.UnsetType | None = msgspec.UNSET


class _Token(msgspec.Struct):
    user_id: str
    provider: str | None = None
    filter_on_providers: list[str] = []
    redirect_url: str | None = None


class _Demo(msgspec.Struct):
    user_id: str
    provider: str


def add_users(app: Flask, world: World, links: Links) -> None:
    budget = Budget(MAX_REFRESHES, REFRESH_WINDOW_SECONDS)
    routes: tuple[Route, ...] = (
        ("GET", "/v2/user", partial(_users, world)),
        ("POST", "/v2/user", partial(_make_user, world)),
        ("GET", "/v2/user/<user_id>", partial(_user, world)),
        ("PATCH", "/v2/user/<user_id>", partial(_change, world)),
        ("DELETE", "/v2/user/<user_id>", partial(_delete, world)),
        ("POST", "/v2/user/<user_id>/sign_in_token", partial(_sign_in_token, world)),
        ("DELETE", "/v2/user/<user_id>/<provider>", partial(_deregister, world)),
        ("POST", "/v2/user/undo_delete", partial(_undo_delete, world)),
        ("GET", "/v2/user/resolve/<path:client_user_id>", partial(_resolve, world)),
        ("GET", "/v2/user/providers/<user_id>", partial(_providers, world)),
        ("POST", "/v2/user/refresh/<user_id>", partial(_refresh, world, budget)),
        ("GET", "/v2/providers", _known_providers),
        ("GET", LINK_PROVIDERS, _link_providers),
        ("POST", "/v2/link/token", partial(_token, world, links)),
        ("GET", OAUTH_LINK, partial(_oauth_link, links)),
        ("POST", "/v2/link/code/create", partial(_code, world)),
        ("POST", "/v2/link/connect/demo", partial(_demo, world)),
    )
    add_routes(app, routes)


def known(world: World, user_id: str) -> User:
    """The user with this id; ends the request with 404 if there is none."""
    return world.user(user_id) or refuse(404, "Not found")


def _users(world: World) -> Response:
    offset, limit = number("offset", 0, 0, 10**9), number("limit", 100, 1, 500)
    users = [_described(world, user) for user in world.members[offset : offset + limit]]
    return answer({"users": users, "total": len(world.members), "offset": offset, "limit": limit})


def _user(world: World, user_id: str) -> Response:
    return answer(_described(world, known(world, user_id)))


def _resolve(world: World, client_user_id: str) -> Response:
    return answer(_described(world, world.named(client_user_id) or refuse(404, "Not found")))


def _make_user(world: World) -> Response:
    name = _body(_NewUser).client_user_id
    _refuse_taken(world, world.named(name))
    return answer(_described(world, world.join(name)))


def _refuse_taken(world: World, existing: User | None) -> None:
    if existing:
        conflict = {"error_type": "INVALID_REQUEST", "error_message": "Client user id already exists."}
        refuse(400, {**conflict, "user_id": existing.user_id, "created_on": world.start.isoformat()})


def _change(world: World, user_id: str) -> Response:
    """Changes a user's client_user_id and fallback zone. Other fields of the public API have no effect."""
    user, changes = known(world, user_id), msgspec.to_builtins(_body(_Changes))
    same_name = world.named(changes.get("client_user_id", user.client_user_id))
    _refuse_taken(world, same_name if same_name != user else None)
    world.change_user(user_id, **changes)
    return Response(status=204)


def _sign_in_token(world: World, user_id: str) -> Response:
    """Issues a token for Junction's mobile SDK. Nothing in the simulator accepts it."""
    return answer({"user_id": known(world, user_id).user_id, "sign_in_token": secrets.token_hex(32)})


def _delete(world: World, user_id: str) -> Response:
    world.remove(known(world, user_id).user_id)
    return answer({"success": True})


def _undo_delete(world: World) -> Response:
    """Restores a deleted user, named by one of the two parameters; the connections stay removed."""
    user_id, client_user_id = request.args.get("user_id"), request.args.get("client_user_id")
    if (user_id is None) == (client_user_id is None):
        refuse(422, validation_error(["query"], "exactly one of user_id and client_user_id is required"))
    return answer({"success": True}) if world.restore(user_id, client_user_id) else refuse(404, "Not found")


def _deregister(world: World, user_id: str, provider: str) -> Response:
    listed = world.conditions.listed(known(world, user_id))
    if provider not in {connection.provider.slug for connection in listed}:
        refuse(404, "Not found")
    world.conditions.put_state(State("deregistered", user_id, provider))
    return answer({"success": True})


def _refresh(world: World, budget: Budget, user_id: str) -> Response:
    """Responds with the sources of a user. A refresh adds no data: the world is always up to date."""
    user = known(world, user_id)
    number("timeout", DEFAULT_TIMEOUT, MIN_TIMEOUT, MAX_TIMEOUT)
    if wait := budget.spend(user_id):
        detail = f"at most {MAX_REFRESHES} refreshes of a user in an hour"
        return answer({"detail": detail}, 429, {"Retry-After": str(wait)})
    listed = world.conditions.listed(user)
    body: Record = {"success": bool(listed), "user_id": user_id, "failed_sources": []}
    if not listed:
        return answer(body | {"error": "user has no connected sources"}, 400)
    refreshed, failed = list[str](), list[str]()
    for connection in listed:
        is_broken = world.conditions.state(connection).status == "error"
        names = [f"{connection.provider.slug}/{resource.name}" for resource in supplied(connection)]
        (failed if is_broken else refreshed).extend(names)
    return answer(body | {"refreshed_sources": refreshed, "in_progress_sources": [], "failed_sources": failed})


def _token(world: World, links: Links) -> Response:
    """Issues a link to this server: opening it connects a provider."""
    body = _body(_Token)
    known(world, body.user_id)
    slugs = [body.provider] if body.provider else body.filter_on_providers
    for slug in slugs:
        _check_provider(slug, tuple(PROVIDERS))

    def connect(slug: str) -> None:
        world.connect(body.user_id, PROVIDERS[slug])

    url, token = links.make(Link(tuple(slugs or PROVIDERS), connect, body.redirect_url or ""))
    return answer({"link_token": token, "link_web_url": url})


def _oauth_link(links: Links, provider: str) -> Response:
    """The provider, with the URL that connects it for the user of a link token."""
    _check_provider(provider, tuple(PROVIDERS))
    url = links.url_of(request.headers.get("X-Vital-Link-Token", ""), provider) or refuse(401, "Invalid link token")
    return answer(next(one for one in _numbered() if one["slug"] == provider) | {"oauth_url": url})


def _code(world: World) -> Response:
    """Issues a code for Junction's mobile app. Nothing in the simulator accepts it."""
    known(world, request.args.get("user_id") or invalid("user_id", "field required"))
    try:
        expires_at = datetime.fromisoformat(request.args.get("expires_at") or f"{datetime.now(UTC) + CODE_LASTS}")
    except ValueError:
        invalid("expires_at", "invalid datetime format")
    code = f"skus{secrets.token_hex(4)}"
    body = {"code": code, "exchange_url": f"tryvital://tryvital?code={code}", "expires_at": expires_at.isoformat()}
    return answer(body)


def _known_providers() -> Response:
    """The providers of the simulator, all or those of one source type."""
    source_type = request.args.get("source_type")
    found = [one for one in PROVIDERS.values() if source_type in (None, one.source_type)]
    return answer([_listed(one) | {"supported_resources": [each.name for each in supplies(one)]} for one in found])


def _link_providers() -> Response:
    return answer([one | {"oauth_url": None, "form_components": {}} for one in _numbered()])


def _numbered() -> list[Record]:
    return [_listed(one) | {"id": number} for number, one in enumerate(PROVIDERS.values(), 1)]


def _listed(provider: Provider) -> Record:
    return provider.described() | {"description": f"The simulated {provider.name}", "auth_type": "oauth"}


def _demo(world: World) -> Response:
    body = _body(_Demo)
    known(world, body.user_id)
    _check_provider(body.provider, DEMO)
    world.connect(body.user_id, PROVIDERS[body.provider])
    return answer({"success": True, "detail": f"Connected user {body.user_id} to provider {body.provider}"})


def _check_provider(slug: str, choices: tuple[str, ...]) -> None:
    if slug not in choices:
        message = "Input should be one of " + ", ".join(f"'{one}'" for one in choices)
        refuse(422, validation_error(["body", "provider"], message, "enum"))


def _body(kind: Any) -> Any:
    """The body of the request; ends it with 422 if it has another form."""
    try:
        return msgspec.json.decode(request.get_data(), type=kind)
    except msgspec.DecodeError as error:
        refuse(422, validation_error(["body"], str(error)))


def _described(world: World, user: User) -> Record:
    sources = [
        {"provider": described, "source": described, "created_on": connection.since.isoformat()}
        for connection in world.conditions.listed(user)
        if (described := connection.provider.described())
    ]
    return {
        "user_id": user.user_id,
        "team_id": world.team_id,
        "client_user_id": user.client_user_id,
        "created_on": world.start.isoformat(),
        "connected_sources": sources,
        "fallback_time_zone": _fallback_zone(world, user),
    }


def _fallback_zone(world: World, user: User) -> Record | None:
    """The zone that was set, or one for users whose data has no offset: it does not move that data to another date."""
    if user.fallback_time_zone:
        return {"id": user.fallback_time_zone, "source_slug": "manual", "updated_at": world.until.isoformat()}
    if not user.connections or zone_of(user.number)[0]:
        return None
    slug = user.connections[0].provider.slug
    return {"id": "Europe/Lisbon", "source_slug": slug, "updated_at": world.start.isoformat()}


def _providers(world: World, user_id: str) -> Response:
    listed = world.conditions.listed(known(world, user_id))
    return answer({"providers": [_provider(world, connection) for connection in listed]})


def _provider(world: World, connection: Connection) -> Record:
    state = world.conditions.state(connection)
    error = {name: getattr(state, name) for name in ("error_type", "error_message", "errored_at")}
    return {
        **connection.provider.described(),
        "created_on": connection.since.isoformat(),
        "status": state.status,
        "external_user_id": connection.external_user_id,
        "error_details": error if state.status == "error" else None,
        "resource_availability": availability(connection),
    }
