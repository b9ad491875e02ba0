"""Checks of every request, the session's cookie, and the headers of every answer."""

import re
import secrets
from urllib.parse import SplitResult, urlsplit

from flask import abort, g, redirect, request, url_for
from werkzeug.wrappers import Response

from app.accounts import Role
from app.config.types import is_loopback
from workers.console.context import console
from workers.console.sessions import MAX_SECONDS, Session

COOKIE, SECURE_COOKIE = "headrace_console", "__Host-headrace_console"
LOGIN = "_login"  # the suffix of the login page's cookie
PUBLIC = {"login", "log_in", "static"}  # endpoints without a session
MAX_VALUE = 500  # characters of a parameter
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
NOT_TEXT = re.compile(r"[\x00-\x1f\x7f]")
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send the origin of a form as null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def check_request() -> Response | None:
    """Checks the host, the session, the CSRF token and the parameters. Sends a browser without a session to the login.

    A page of another site whose name resolves to this machine (DNS rebinding) has another host.
    """
    g.session = None
    if not _is_own_host(request.host):
        abort(421, "This host is not the console's; set HEADRACE_CONSOLE_URL to the URL that operators use.")
    g.session = console().sessions.find(session_token())
    _check_parameters()
    if request.method not in {"GET", "HEAD", "OPTIONS"}:
        _check_csrf()
    if g.session is None and request.endpoint not in PUBLIC:
        return redirect(url_for("login"), 303)
    return None


def _is_own_host(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return is_loopback(name) or name == (_own_url().hostname or "")


def _own_url() -> SplitResult:
    return urlsplit(console().settings.console_url or "")


def _is_behind_tls() -> bool:
    """Whether the browser reached the console through HEADRACE_CONSOLE_URL, with TLS."""
    return _own_url().scheme == "https" and urlsplit(f"//{request.host}").hostname == _own_url().hostname


def _check_parameters() -> None:
    """Refuses control characters, which PostgreSQL or a log could not take, and long values."""
    for name, values in (*request.args.lists(), *request.form.lists()):
        if name == "password":
            continue
        if NOT_TEXT.search(name) or any(len(value) > MAX_VALUE or NOT_TEXT.search(value) for value in values):
            abort(400, "A field has control characters or more than 500 characters.")


def _check_csrf() -> None:
    """The form must have the session's token, or, before there is a session, that of the login page's cookie."""
    origin, host = request.headers.get("Origin"), request.host
    if origin is not None and urlsplit(origin).netloc != host:
        abort(403, "The form came from another site.")
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        abort(403, "The form came from another site.")
    expected = g.session.csrf if g.session else request.cookies.get(_cookie(LOGIN), "")
    if not expected or not secrets.compare_digest(request.form.get("csrf", "").encode(), expected.encode()):
        abort(403, "The form is too old, or came from another site. Load the page again.")


def add_headers(answer: Response) -> Response:
    answer.headers.extend(SECURITY)
    if request.endpoint != "static":
        answer.headers["Cache-Control"] = "no-store"
    if g.get("session") is not None and _is_behind_tls():
        answer.headers["Strict-Transport-Security"] = "max-age=31536000"
    return answer


def may(role: Role) -> bool:
    """Whether the account of this request has the role."""
    found: Session | None = g.session
    return found is not None and found.account.may(role)


def require(role: Role) -> None:
    if not may(role):
        abort(403, f"Your account lacks the role {role}.")


def session_token() -> str:
    """The token in the cookie of the session; '' without one."""
    return request.cookies.get(_cookie(), "")


def login_token() -> str:
    """The CSRF token of the login page: that of the browser's cookie, or a new one."""
    known = request.cookies.get(_cookie(LOGIN), "")
    return known if TOKEN.fullmatch(known) else secrets.token_urlsafe(32)


def set_cookie(answer: Response, token: str, seconds: float = MAX_SECONDS, suffix: str = "") -> None:
    """Sets the cookie of the session, or with the suffix LOGIN that of the login page. No seconds delete it."""
    name, is_secure = _cookie(suffix), _is_behind_tls()
    answer.set_cookie(name, token, max_age=int(seconds), path="/", secure=is_secure, httponly=True, samesite="Strict")


def _cookie(suffix: str = "") -> str:
    return (SECURE_COOKIE if _is_behind_tls() else COOKIE) + suffix
