"""What both sides share, and the endpoint: `create_app` wires it. Nothing here touches the database or a provider."""

from collections.abc import Callable

from flask import Flask

from app import heap, log, tracing
from app.config import Settings, load
from app.courier import Courier, Publish
from app.queue import Publisher, make_celery, system
from app.server import Server
from app.webhooks import make_blueprint, on_error


def create_app(settings: Settings, courier: Courier, ready: Callable[[], None]) -> Flask:
    """The endpoint, with what takes its deliveries and tells whether it could."""
    flask = Flask("headrace", static_folder=None)
    # One more, because of a body sent in chunks werkzeug reads so much and no further, and says nothing.
    flask.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1
    flask.register_blueprint(make_blueprint(settings, courier, ready))
    flask.register_error_handler(Exception, on_error)
    return flask


def make_courier(settings: Settings, publish: Publish) -> Courier:
    """The courier of one process."""
    return Courier(
        publish,
        deadline=settings.enqueue_deadline_seconds,
        most=settings.message_deliveries,
        most_bytes=settings.message_bytes,
    )


def from_environment() -> Server:
    """What the web server calls in each of its processes."""
    settings = load()
    settings.need_webhook_secret()
    log.configure(settings)
    tracing.start(settings, "web", system(settings))
    publisher = Publisher(make_celery(settings, "publisher"))
    courier = make_courier(settings, publisher.publish)
    server = Server(create_app(settings, courier, publisher.ping), courier, settings)
    heap.keep()
    return server
