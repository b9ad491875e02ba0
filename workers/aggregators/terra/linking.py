"""Terra's widget sessions: where a person chooses a provider and connects it (POST /auth/generateWidgetSession)."""

import msgspec

from app.errors import Unprocessable
from workers.aggregators.common import decode
from workers.aggregators.linking import Link, one_line, post
from workers.aggregators.requests import Request

USUAL_SECONDS = 900  # the public example's


class _Session(msgspec.Struct):
    url: str
    session_id: str = ""
    expires_in: float = USUAL_SECONDS


class _Refusal(msgspec.Struct):
    title: str = ""
    detail: str | None = None
    message: str = ""  # the form of 2022


def session_request(reference_id: str, providers: tuple[str, ...] = (), redirect_url: str | None = None) -> Request:
    """Asks for a session, in which the person chooses one of these providers, or of all that the account offers."""
    return post(
        "/auth/generateWidgetSession",
        reference_id=reference_id,
        providers=",".join(name.upper() for name in providers),
        auth_success_redirect_url=redirect_url,
        auth_failure_redirect_url=redirect_url,
    )


def read_session(body: bytes) -> Link:
    """The answer to that. Raises Unprocessable."""
    said = decode(body, _Session, "a widget session")
    return Link(said.url, said.session_id, int(said.expires_in))


def read_refusal(body: bytes) -> str:
    """Why something was refused, in Terra's words; '' if it does not say so."""
    try:
        said = decode(body, _Refusal, "a refusal")
    except Unprocessable:
        return ""
    return one_line(said.detail or said.message or said.title)
