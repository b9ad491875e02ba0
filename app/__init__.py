"""What both sides share, and the endpoint: `create_app` wires it. Nothing here touches the database or a provider."""

from collections.abc import Callable

from flask import Flask

from app.config import Settings, load
from app.courier import Courier, Publish
from app.queue import Publisher, make_celery
from app.webhooks import make_blueprint, on_error


def create_app(settings: Settings, publish: Publish, ready: Callable[[], None]) -> Flask:
    """The endpoint, with whatever takes its messages and tells whether it could."""
    flask = Flask("headrace", static_folder=None)
    # One more, because of a body sent in chunks werkzeug reads so much and no further, and says nothing.
    flask.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1
    courier = Courier(
        publish,
        deadline=settings.enqueue_deadline_seconds,
        most=settings.message_deliveries,
        most_bytes=settings.message_bytes,
    )
    flask.register_blueprint(make_blueprint(settings, courier, ready))
    flask.register_error_handler(Exception, on_error)
    return flask


def from_environment() -> Flask:
    """What the web server calls in each of its processes."""
    settings = load()
    settings.need_webhook_secret()
    publisher = Publisher(make_celery(settings, "publisher"))
    return create_app(settings, publisher.publish, publisher.ping)
