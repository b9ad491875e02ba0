"""The endpoint's application: `create_app` makes the routes, the web server calls `from_environment`."""

from collections.abc import Callable
from typing import Any

from flask import Flask

from app.broker.lanes import messaging_system
from app.config.settings import Settings, load
from app.observability import gc, logs, tracing
from app.web import limits
from app.web.batcher import Batcher
from app.web.publishing import make_publisher
from app.web.readiness import start_readiness
from app.web.rsgi import Server
from app.web.webhooks import canonical, make_blueprint, on_error


class _Application(Flask):
    """Ignores additional slashes in a webhook's path. WSGI and RSGI servers both use this request context."""

    def request_context(self, environ: dict[str, Any]) -> Any:
        environ["PATH_INFO"] = canonical(environ["PATH_INFO"])
        return super().request_context(environ)


def create_app(settings: Settings, batcher: Batcher, ready: Callable[[], None]) -> Flask:
    """The Flask application. `ready` raises PublishFailed while the broker refuses messages, and must not block."""
    flask = _Application("headrace", static_folder=None)
    # One byte more than the limit: werkzeug silently truncates a chunked body to this length.
    flask.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1
    flask.register_blueprint(make_blueprint(settings, batcher, ready))
    flask.register_error_handler(Exception, on_error)
    return flask


def from_environment() -> Server:
    """The application of one web process."""
    settings = load()
    settings.need_webhook_secret()
    logs.configure(settings)
    tracing.start(settings, "web", messaging_system(settings))
    publish, ping = make_publisher(settings)
    readiness = start_readiness(settings, ping)
    batcher = Batcher(settings, readiness.observed(publish))
    server = Server(create_app(settings, batcher, readiness.check), batcher, settings)
    limits.return_large_buffers()
    gc.freeze()
    return server
