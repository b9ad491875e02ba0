"""Terra's widget sessions, in which a person connects a provider (Terra: POST /auth/generateWidgetSession)."""

import msgspec

from app.errors import Unprocessable
from workers.aggregators.common import decode
from workers.aggregators.linking import Link, one_line, post
from workers.aggregators.requests import Request

USUAL_SECONDS = 900  # from the public example


class _Session(msgspec.Struct):
    url: str
    session_id: str = ""
    expires_in: float = USUAL_SECONDS


class _Refusal(msgspec.Struct):
    title: str = ""
    detail: str | None = None
    message: str = ""  # the form of 2022


def session_request(reference_id: str, providers: tuple[str, ...] = (), redirect_url: str | None = None) -> Request:
    """Creates a session with a choice of these providers, or of all that the account offers if empty."""
    return post(
        "/auth/generateWidgetSession",
        reference_id=reference_id,
        providers=",".join(name.upper() for name in providers),
        auth_success_redirect_url=redirect_url,
        auth_failure_redirect_url=redirect_url,
    )


def read_session(body: bytes) -> Link:
    """The answer to `session_request`. Raises Unprocessable."""
    answer = decode(body, _Session, "a widget session")
    return Link(answer.url, answer.session_id, int(answer.expires_in))


def read_refusal(body: bytes) -> str:
    """The reason in an error answer, in Terra's words; '' if the answer gives no reason."""
    try:
        answer = decode(body, _Refusal, "a refusal")
    except Unprocessable:
        return ""
    return one_line(answer.detail or answer.message or answer.title)
