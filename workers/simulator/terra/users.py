"""Terra's routes about accounts: connecting and disconnecting them, and reading them alone or as a list."""

import secrets
from functools import partial

import msgspec
from flask import Response, request

from workers.simulator.answers import answer
from workers.simulator.guards import Route
from workers.simulator.links import Link, Links
from workers.simulator.people import Record
from workers.simulator.terra import events
from workers.simulator.terra.answers import body_of, refuse
from workers.simulator.terra.data import PROVIDERS, TerraWorld
from workers.simulator.terra.events import described
from workers.simulator.terra.objects import KINDS

SESSION_SECONDS, TOKEN_SECONDS = 900, 180
USERS_PER_PAGE = 500
TYPES = ("activity", "body", "nutrition", "daily", "sleep", "menstruation")


class _Session(msgspec.Struct):
    reference_id: str = ""
    providers: str = ""
    auth_success_redirect_url: str = ""


class _Changes(msgspec.Struct):
    reference_id: str | None = None
    active: bool | None = None


def routes_of(terra: TerraWorld, links: Links) -> tuple[Route, ...]:
    return (
        ("POST", "/auth/authenticateUser", partial(_authenticate, terra, links)),
        ("POST", "/auth/generateWidgetSession", partial(_session, terra, links)),
        ("POST", "/auth/generateAuthToken", _auth_token),
        ("DELETE", "/auth/deauthenticateUser", partial(_deauthenticate, terra)),
        ("PATCH", "/users/<user_id>", partial(_change, terra)),
        ("GET", "/userInfo", partial(_user_info, terra)),
        ("POST", "/bulkUserInfo", partial(_bulk_user_info, terra)),
        ("GET", "/subscriptions", partial(_subscriptions, terra)),
        ("GET", "/integrations", _integrations),
        ("GET", "/integrations/detailed", _detailed_integrations),
    )


def _authenticate(terra: TerraWorld, links: Links) -> Response:
    """Issues a link that connects one provider. Also returns the id that the account will have."""
    body = body_of(_Session) if request.get_data() else _Session()
    slug = request.args.get("resource") or refuse(400, "missing resource")
    _check_provider(slug)
    user_id = terra.user_id(body.reference_id, slug)
    url, _ = links.make(Link((slug,), partial(_connect, terra, body.reference_id), body.auth_success_redirect_url))
    return answer({"status": "success", "user_id": user_id, "auth_url": url})


def _session(terra: TerraWorld, links: Links) -> Response:
    """Issues a link to this server: opening it connects a provider."""
    body = body_of(_Session)
    chosen = tuple(name.strip() for name in body.providers.split(",") if name.strip()) or tuple(PROVIDERS)
    for slug in chosen:
        _check_provider(slug)
    url, token = links.make(Link(chosen, partial(_connect, terra, body.reference_id), body.auth_success_redirect_url))
    return answer({"status": "success", "session_id": token, "url": url, "expires_in": SESSION_SECONDS})


def _check_provider(slug: str) -> None:
    if slug not in PROVIDERS:
        refuse(400, f"unknown provider {slug}; known are {', '.join(PROVIDERS)}")


def _connect(terra: TerraWorld, reference_id: str, slug: str) -> None:
    terra.put(*events.arrival(terra, terra.connect(reference_id, slug)))


def _auth_token() -> Response:
    return answer({"status": "success", "token": secrets.token_hex(32), "expires_in": TOKEN_SECONDS})


def _deauthenticate(terra: TerraWorld) -> Response:
    """Closes an account, whose `deauth` event is sent next."""
    user_id = request.args.get("user_id") or refuse(400, "missing user_id")
    terra.put(*events.deauth(terra, terra.account(user_id) or refuse(404, "user not found")))
    return answer({"status": "success"})


def _change(terra: TerraWorld, user_id: str) -> Response:
    """Changes an account's reference id, or closes it if `active` is false."""
    account, body = terra.account(user_id) or refuse(404, "user not found"), body_of(_Changes)
    if body.reference_id is not None:
        account = terra.rename(account, body.reference_id)
    if body.active is False:
        terra.close(account)
    return answer({"status": "success", "user": described(terra, account)})


def _user_info(terra: TerraWorld) -> Response:
    """One account by its id, or a bare array of all accounts of a reference id."""
    user_id, reference_id = request.args.get("user_id"), request.args.get("reference_id")
    if user_id:
        account = terra.account(user_id) or refuse(404, "user not found")
        newest = terra.newest(account)
        read = {"last_polled_at": terra.world.until.isoformat(), "most_recent_data_at": newest and newest.isoformat()}
        return answer({"status": "success", "is_authenticated": True, "user": described(terra, account) | read})
    if not reference_id:
        refuse(400, "missing user_id or reference_id")
    found = [one for one in terra.accounts() if one.person.client_user_id == reference_id]
    return answer([described(terra, one) for one in found] or refuse(404, "user not found"))


def _bulk_user_info(terra: TerraWorld) -> Response:
    found = filter(None, map(terra.account, body_of(list[str])))
    return answer([described(terra, one) for one in found] or refuse(404, "user not found"))


def _subscriptions(terra: TerraWorld) -> Response:
    """All accounts, or a page of them. Pages count from 0."""
    users = [described(terra, account) for account in terra.accounts()]
    if "page" not in request.args:
        return answer({"users": users})
    page, size = _number("page", 0), _number("per_page", USERS_PER_PAGE, low=1)
    last = max(0, -(-len(users) // size) - 1)
    results = users[page * size : (page + 1) * size]
    return answer({"data": {"next": page + 1 if page < last else None, "max_page": last, "results": results}})


def _number(name: str, default: int, low: int = 0) -> int:
    text = request.args.get(name, str(default))
    return int(text) if text.isdecimal() and int(text) >= low else refuse(400, f"invalid {name}")


def _integrations() -> Response:
    return answer({"status": "success", "providers": list(PROVIDERS), "sdk_providers": []})


def _detailed_integrations() -> Response:
    providers: list[Record] = [
        {
            "provider": provider.slug,
            "name": provider.name,
            "icon": provider.described()["logo"],
            "setup": "API_KEYS_MANAGED",
            "enabled": True,
            "types": {name: name in (provider.supplies or KINDS) for name in TYPES},
        }
        for provider in PROVIDERS.values()
    ]
    return answer({"status": "success", "providers": providers})
