"""Junction's users and links: a person to connect, and where to do it (tags `user` and `link` of its API document)."""

from urllib.parse import quote

import msgspec

from app.errors import Unprocessable
from workers.aggregators.common import decode
from workers.aggregators.linking import Link, one_line, post
from workers.aggregators.requests import Request

LINK_SECONDS = 600  # and it can be used once (Junction: POST /v2/link/token)
PRODUCTION = "pk_"  # how the keys of production begin; only the sandbox has people who do not exist


class _User(msgspec.Struct):
    user_id: str


class _Token(msgspec.Struct):
    link_token: str
    link_web_url: str


class _Demo(msgspec.Struct):
    success: bool
    detail: str = ""


class _Problem(msgspec.Struct):
    loc: list[str | int] = []
    msg: str = ""


class _Conflict(msgspec.Struct):
    error_message: str = ""


class _Refusal(msgspec.Struct):
    detail: str | list[_Problem] | _Conflict = ""


def user_request(client_user_id: str) -> Request:
    """Makes a user; 400 if there is one of that name already, or no more may be made."""
    return post("/v2/user", client_user_id=client_user_id)


def resolve_request(client_user_id: str) -> Request:
    """Asks for the user of that name."""
    return Request(f"/v2/user/resolve/{quote(client_user_id, safe='')}")


def read_user(body: bytes) -> str:
    """The user_id, of either answer. Raises Unprocessable."""
    return str(decode(body, _User, "a user").user_id)


def token_request(user_id: str, providers: tuple[str, ...] = (), redirect_url: str | None = None) -> Request:
    """Asks for a link. One provider is gone to directly, of several the person chooses, of none among all."""
    names = tuple(name.lower() for name in providers)
    which = {"provider": names[0]} if len(names) == 1 else {"filter_on_providers": names}
    return post("/v2/link/token", user_id=user_id, redirect_url=redirect_url, **which)


def read_token(body: bytes) -> Link:
    """The answer to that. Raises Unprocessable."""
    said = decode(body, _Token, "a link")
    return Link(said.link_web_url, said.link_token, LINK_SECONDS)


def demo_request(user_id: str, provider: str) -> Request:
    """Connects a user of the sandbox with a device that does not exist, whose data begins to flow."""
    return post("/v2/link/connect/demo", user_id=user_id, provider=provider.lower())


def read_demo(body: bytes) -> None:
    """Whether that was done. Raises Unprocessable, with the reason, if it was not."""
    said = decode(body, _Demo, "a demo connection")
    if not said.success:
        raise Unprocessable(one_line(said.detail) or "the demo connection was not made")


def read_refusal(body: bytes) -> str:
    """Why something was refused, in Junction's words; '' if it does not say so."""
    try:
        detail = decode(body, _Refusal, "a refusal").detail
    except Unprocessable:
        return ""
    if isinstance(detail, _Conflict):
        detail = detail.error_message
    if isinstance(detail, list):
        detail = "; ".join(f"{'.'.join(map(str, one.loc[1:]))}: {one.msg}" for one in detail)
    return one_line(detail)
