"""The routes. A webhook is verified, sealed and published; contract 1.5 lists every answer."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from app.config.settings import Settings
from app.delivery import Delivery, Headers, seal
from app.errors import InvalidSignature, PublishFailed
from app.observability import metrics, tracing
from app.sealing import Sealer
from app.signatures import VERIFIERS
from app.web.batcher import Batcher

RETRY_AFTER_SECONDS = "5"
PATHS = {f"/webhooks/{aggregator}": aggregator for aggregator in VERIFIERS}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A verified delivery that is still to be published."""

    delivery: Delivery
    began: float
    span: "tracing.ServerSpan | None"


Receive = Callable[[Headers, bytes], Accepted | Response]


def canonical(path: str) -> str:
    """The path of a webhook without repeated and trailing slashes; every other path as it is.

    Such slashes come from a base URL that ends with one. Senders do not follow the redirect that Flask would answer.
    """
    plain = "/" + "/".join(filter(None, path.split("/")))
    return plain if plain in PATHS else path


def make_receivers(settings: Settings) -> dict[str, Receive]:
    """The functions that verify and seal webhooks, by path. The caller publishes the delivery and calls `finish`."""
    return {path: _receiver(aggregator, settings) for path, aggregator in PATHS.items()}


def _receiver(aggregator: str, settings: Settings) -> Receive:
    verify, sealer = VERIFIERS[aggregator], Sealer(settings.encryption_keys)

    def receive(headers: Headers, body: bytes) -> Accepted | Response:
        began, span = time.perf_counter(), tracing.server_span(aggregator)
        try:
            receipt = verify(headers, body, settings, datetime.now(UTC))
        except InvalidSignature as error:
            metrics.REJECTED.labels(aggregator, error.reason).inc()
            return _record(Response("signature refused\n", 401, mimetype="text/plain"), aggregator, span, began)
        return Accepted(seal(aggregator, receipt, body, sealer), began, span)

    return receive


def make_blueprint(settings: Settings, batcher: Batcher, ready: Callable[[], None]) -> Blueprint:
    """All routes. `ready` raises PublishFailed while the broker accepts no messages."""
    routes = Blueprint("headrace", __name__)
    for path, receive in make_receivers(settings).items():
        view = _webhook(receive, batcher, settings.max_body_bytes)
        routes.add_url_rule(path, PATHS[path], view, methods=["POST"])

    @routes.get("/livez")
    def livez() -> Response:
        return Response("up\n", mimetype="text/plain")

    @routes.get("/readyz")
    def readyz() -> Response:
        try:
            ready()
        except PublishFailed as reason:
            return Response(f"{reason}\n", 503, mimetype="text/plain")
        return Response("ready\n", mimetype="text/plain")

    @routes.get("/metrics")
    def exposition() -> Response:
        return Response(metrics.exposition(), mimetype="text/plain")

    return routes


def _webhook(receive: Receive, batcher: Batcher, max_bytes: int) -> Callable[[], Response]:
    """The view for a WSGI server, whose thread waits for the broker. `rsgi.Server` calls `receive` and awaits."""

    def webhook() -> Response:
        body = request.get_data(cache=False)
        if len(body) > max_bytes:
            raise RequestEntityTooLarge
        accepted = receive(request.headers, body)
        if isinstance(accepted, Response):
            return accepted
        try:
            batcher.publish(accepted.delivery, accepted.span)
        except PublishFailed:
            return finish(accepted, unavailable())
        return finish(accepted, Response(status=202))

    return webhook


def finish(accepted: Accepted, answer: Response) -> Response:
    """Logs and counts the answer to an accepted delivery, and returns it."""
    delivery, span = accepted.delivery, accepted.span
    if log.isEnabledFor(logging.DEBUG):
        ids = {"aggregator": delivery.aggregator, "delivery": delivery.message_id}
        ids |= {"trace_id": span.trace_id} if span else {}
        log.debug("answered %d", answer.status_code, extra=ids)
    return _record(answer, delivery.aggregator, span, accepted.began, delivery.message_id)


def record_rejection(path: str, answer: Response) -> Response:
    """Counts the answer to a request that reached no receiver, if it was a webhook, and returns it."""
    aggregator = PATHS.get(canonical(path))
    return _record(answer, aggregator, tracing.server_span(aggregator)) if aggregator else answer


def _record(
    answer: Response, aggregator: str, span: "tracing.ServerSpan | None", began: float | None = None, delivery: str = ""
) -> Response:
    if span is not None:
        span.end(answer.status_code, delivery)
    metrics.ANSWERS.labels(aggregator, str(answer.status_code)).inc()
    if began is not None:
        metrics.ANSWER_SECONDS.labels(aggregator).observe(time.perf_counter() - began)
    return answer


def too_large() -> Response:
    """413: besides a wrong signature, the only error of the sender."""
    return Response("larger than HEADRACE_MAX_BODY_BYTES\n", 413, mimetype="text/plain")


def unavailable() -> Response:
    """503: the error is on this side, and the sender retries."""
    return Response("try again\n", 503, {"Retry-After": RETRY_AFTER_SECONDS}, mimetype="text/plain")


def on_error(error: Exception) -> Any:
    """Flask's error handler. An unexpected error is 503, so that the sender keeps the event."""
    if isinstance(error, RequestEntityTooLarge):
        return record_rejection(request.path, too_large())
    if isinstance(error, HTTPException) and (request.method != "POST" or error.code in (404, 405)):
        return error
    # Only the type: the text of an error may quote a body.
    log.error("unexpected %s on %s", type(error).__name__, request.path)
    return record_rejection(request.path, unavailable())
