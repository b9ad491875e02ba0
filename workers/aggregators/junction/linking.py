"""Junction's users and links (Junction: API reference, tags `user` and `link`)."""

import msgspec

from app.errors import Unprocessable
from workers.aggregators.common import decode
from workers.aggregators.linking import Link, one_line, post
from workers.aggregators.requests import Request, segment

LINK_SECONDS = 600  # a link also works only once (Junction: POST /v2/link/token)
PRODUCTION = "pk_"  # the prefix of production keys; only the sandbox has demo users


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
    """Creates a user. The answer is 400 if the name is taken or the account has no users left."""
    return post("/v2/user", client_user_id=client_user_id)


def resolve_request(client_user_id: str) -> Request:
    """Finds the user with this name."""
    return Request(f"/v2/user/resolve/{segment(client_user_id)}")


def read_user(body: bytes) -> str:
    """The user_id in the answer to `user_request` or `resolve_request`. Raises Unprocessable."""
    return str(decode(body, _User, "a user").user_id)


def token_request(user_id: str, providers: tuple[str, ...] = (), redirect_url: str | None = None) -> Request:
    """Creates a link: straight to a single provider, otherwise to a choice of these providers, or of all if empty."""
    names = tuple(name.lower() for name in providers)
    which = {"provider": names[0]} if len(names) == 1 else {"filter_on_providers": names}
    return post("/v2/link/token", user_id=user_id, redirect_url=redirect_url, **which)


def read_token(body: bytes) -> Link:
    """The answer to `token_request`. Raises Unprocessable."""
    answer = decode(body, _Token, "a link")
    return Link(answer.link_web_url, answer.link_token, LINK_SECONDS)


def demo_request(user_id: str, provider: str) -> Request:
    """Connects a sandbox user with a simulated device, which begins to send data."""
    return post("/v2/link/connect/demo", user_id=user_id, provider=provider.lower())


def read_demo(body: bytes) -> None:
    """The answer to `demo_request`. Raises Unprocessable with the reason if the connection was not made."""
    answer = decode(body, _Demo, "a demo connection")
    if not answer.success:
        raise Unprocessable(one_line(answer.detail) or "the demo connection was not made")


def read_refusal(body: bytes) -> str:
    """The reason in an error answer, in Junction's words; '' if the answer gives no reason."""
    try:
        detail = decode(body, _Refusal, "a refusal").detail
    except Unprocessable:
        return ""
    if isinstance(detail, _Conflict):
        detail = detail.error_message
    if isinstance(detail, list):
        detail = "; ".join(f"{'.'.join(map(str, one.loc[1:]))}: {one.msg}" for one in detail)
    return one_line(detail)
