"""Terra's widget sessions: where a person chooses a provider and connects it (POST /auth/generateWidgetSession)."""

from collections.abc import Mapping

import msgspec

from app.config import Settings
from app.errors import DeadLetter, Misconfigured
from app.providers.junction.shapes import decode
from app.providers.linking import Link, one_line, post
from app.providers.request import Request

USUAL_SECONDS = 900  # the public example's


class _Session(msgspec.Struct):
    url: str
    session_id: str = ""
    expires_in: float = USUAL_SECONDS


class _Refusal(msgspec.Struct):
    title: str = ""
    detail: str | None = None
    message: str = ""  # the form of 2022


def connect(settings: Settings) -> tuple[str, Mapping[str, str]]:
    """The base URL and the headers that every request carries. Raises Misconfigured."""
    if not (settings.terra_api_key and settings.terra_dev_id):
        missing = "TERRA_DEV_ID" if settings.terra_api_key else "TERRA_API_KEY"
        raise Misconfigured(f"{missing}: not set; set it to your account's, as Terra's dashboard shows it")
    return settings.terra_base_url.rstrip("/"), {"dev-id": settings.terra_dev_id, "x-api-key": settings.terra_api_key}


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
    """The answer to that. Raises DeadLetter."""
    said = decode(body, _Session, "a widget session")
    return Link(said.url, said.session_id, int(said.expires_in))


def read_refusal(body: bytes) -> str:
    """Why something was refused, in Terra's words; '' if it does not say so."""
    try:
        said = decode(body, _Refusal, "a refusal")
    except DeadLetter:
        return ""
    return one_line(said.detail or said.message or said.title)
