"""The routes about users: who there is, what they are connected with, and how one more comes to be connected."""

from functools import partial
from typing import Any

import msgspec
from flask import Flask, Response, request

from workers.simulator.answers import answer, number, refuse
from workers.simulator.data import World
from workers.simulator.events import availability
from workers.simulator.links import Links, Wish
from workers.simulator.people import PROVIDERS, Connection, User
from workers.simulator.query import Record

DEMO = ("apple_health_kit", "fitbit", "freestyle_libre", "oura")


class _NewUser(msgspec.Struct):
    client_user_id: str


class _Token(msgspec.Struct):
    user_id: str
    provider: str | None = None
    filter_on_providers: list[str] = []
    redirect_url: str | None = None


class _Demo(msgspec.Struct):
    user_id: str
    provider: str


def add_users(app: Flask, world: World, links: Links) -> None:
    """Adds these routes to the read API."""
    app.add_url_rule("/v2/user", "users", partial(_users, world))
    app.add_url_rule("/v2/user", "make_user", partial(_make_user, world), methods=["POST"])
    app.add_url_rule("/v2/user/<user_id>", "user", partial(_user, world))
    app.add_url_rule("/v2/user/resolve/<path:client_user_id>", "resolve", partial(_resolve, world))
    app.add_url_rule("/v2/user/providers/<user_id>", "providers", partial(_providers, world))
    app.add_url_rule("/v2/link/token", "link_token", partial(_token, world, links), methods=["POST"])
    app.add_url_rule("/v2/link/connect/demo", "connect_demo", partial(_demo, world), methods=["POST"])


def known(world: World, user_id: str) -> User:
    """The user of this id; ends the request with 404 if there is none."""
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
    name = _given(_NewUser).client_user_id
    if there := world.named(name):
        conflict = {"error_type": "INVALID_REQUEST", "error_message": "Client user id already exists."}
        refuse(400, {**conflict, "user_id": there.user_id, "created_on": world.start.isoformat()})
    return answer(_described(world, world.join(name)))


def _token(world: World, links: Links) -> Response:
    """The link is one to this very server: who opens it is connected."""
    given = _given(_Token)
    known(world, given.user_id)
    slugs = [given.provider] if given.provider else given.filter_on_providers
    for slug in slugs:
        _known_provider(slug, tuple(PROVIDERS))
    chosen = tuple(slugs or PROVIDERS)
    url, token = links.make(
        Wish(chosen, lambda slug: world.connect(given.user_id, PROVIDERS[slug]), given.redirect_url or "")
    )
    return answer({"link_token": token, "link_web_url": url})


def _demo(world: World) -> Response:
    given = _given(_Demo)
    known(world, given.user_id)
    world.connect(given.user_id, PROVIDERS[_known_provider(given.provider, DEMO)])
    return answer({"success": True, "detail": f"Connected user {given.user_id} to provider {given.provider}"})


def _known_provider(slug: str, among: tuple[str, ...]) -> str:
    if slug not in among:
        told = ", ".join(f"'{one}'" for one in among)
        refuse(422, [{"loc": ["body", "provider"], "msg": f"Input should be one of {told}", "type": "enum"}])
    return slug


def _given(kind: Any) -> Any:
    """The body of the request; ends it with 422 if that is of another form."""
    try:
        return msgspec.json.decode(request.get_data(), type=kind)
    except msgspec.DecodeError as error:
        refuse(422, [{"loc": ["body"], "msg": str(error), "type": "value_error"}])


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
        "fallback_time_zone": None,
    }


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
