"""The console's Flask application: checks of every request, login, and error pages."""

import logging
import secrets
from contextlib import ExitStack
from typing import Any

from flask import Flask, Response, g, redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as BaseResponse

from app.accounts import hash_password, is_password
from app.errors import (
    HeadraceError,
    Misconfigured,
    NotFound,
    RetryAlone,
    TryLater,
    Unprocessable,
    UserErased,
    describe,
)
from workers.console import formats, guards
from workers.console.context import Console, console
from workers.console.guards import PUBLIC
from workers.console.views import actions, backfills, dead, deliveries, feed, overview, people
from workers.store import audit

BLUEPRINTS = (overview.pages, deliveries.pages, dead.pages, backfills.pages, people.pages, feed.pages, actions.pages)
STATUS: dict[type[HeadraceError], int] = {
    NotFound: 404,
    Unprocessable: 400,
    Misconfigured: 409,
    UserErased: 409,
    TryLater: 503,
}
UNKNOWN_ACCOUNT = hash_password(secrets.token_urlsafe(16))  # compared with the password of an unknown name
LOGIN_SECONDS = 3600.0  # of the login page
SLOW = "PostgreSQL did not answer in time; narrow the search, for example to a shorter time"

log = logging.getLogger(__name__)


def create_app(state: Console) -> Flask:
    """The application. Raises Misconfigured without an account."""
    state.settings.need_console_users()
    app = Flask("workers.console", static_url_path="/static")
    app.extensions["console"] = state
    app.config |= {"MAX_CONTENT_LENGTH": 64 * 1024, "MAX_FORM_MEMORY_SIZE": 64 * 1024, "SEND_FILE_MAX_AGE_DEFAULT": 300}
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters |= formats.FILTERS
    app.before_request(guards.check_request)
    app.before_request(_act_as_account)
    app.teardown_request(_stop_acting)
    app.after_request(guards.add_headers)
    app.context_processor(_shared)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(HeadraceError, _headrace_error)
    app.register_error_handler(Exception, _unexpected)
    app.add_url_rule("/login", "login", _login_page)
    app.add_url_rule("/login", "log_in", _log_in, methods=["POST"])
    app.add_url_rule("/logout", "log_out", _log_out, methods=["POST"])
    for blueprint in BLUEPRINTS:
        app.register_blueprint(blueprint)
    assert app.view_functions.keys() >= PUBLIC
    return app


def _act_as_account() -> None:
    g.acting = ExitStack()
    if g.session is not None:
        g.acting.enter_context(audit.acting_as(g.session.account.name))


def _stop_acting(_error: BaseException | None) -> None:
    if acting := g.pop("acting", None):
        acting.close()


def _shared() -> dict[str, Any]:
    """The variables of every template."""
    session = g.get("session")
    messages = session.messages[:] if session else []
    if session:
        session.messages.clear()
    return {"session": session, "messages": messages, "may": guards.may}


def _login_page() -> BaseResponse:
    return redirect(url_for("overview.page")) if g.session else _login_form()


def _login_form(failed: str = "", status: int = 200) -> Response:
    token = guards.login_token()
    answer = Response(render_template("login.html", failed=failed, csrf=token), status)
    guards.set_cookie(answer, token, LOGIN_SECONDS, guards.LOGIN)
    return answer


def _log_in() -> BaseResponse:
    """Checks a password, in the same time for unknown names. Failures are logged without the name that was typed."""
    name, password = request.form.get("name", ""), request.form.get("password", "")
    address, lockout = request.remote_addr or "", console().lockout
    if seconds := lockout.seconds_left(name, address):
        return _login_form(f"Too many failed logins. Try again in {seconds:.0f} seconds.", 429)
    known = {one.name: one for one in console().settings.console_users}
    account = known.get(name)
    is_right = is_password(password, account.hash if account else UNKNOWN_ACCOUNT)
    if account is None or not is_right:
        lockout.fail(name, address)
        log.warning("a login failed, from %s, of %s", address, name if name in known else "an unknown name")
        return _login_form("The name or the password is wrong.", 401)
    lockout.succeed(name)
    with audit.acting_as(account.name):
        audit.record(console().writer, "console login", "console", {"role": account.role})
    console().sessions.end(guards.session_token())
    answer = redirect(url_for("overview.page"), 303)
    guards.set_cookie(answer, console().sessions.start(account))
    return answer


def _log_out() -> BaseResponse:
    console().sessions.end(guards.session_token())
    answer = redirect(url_for("login"), 303)
    guards.set_cookie(answer, "", 0)
    return answer


def _error_page(status: int, text: str) -> tuple[str, int]:
    return render_template("error.html", status=status, text=text), status


def _http_error(error: HTTPException) -> tuple[str, int] | BaseResponse:
    if error.response is not None:
        return error.get_response()
    return _error_page(error.code or 500, error.description or "")


def _headrace_error(error: HeadraceError) -> tuple[str, int]:
    """Messages of Headrace's errors contain ids and no values."""
    if isinstance(error, RetryAlone):
        return _error_page(503, SLOW)
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    return _error_page(status, str(error))


def _unexpected(error: Exception) -> tuple[str, int]:
    log.error("%s %s failed: %s", request.method, request.path, describe(error))
    return _error_page(500, "The console failed; its log names the error.")
