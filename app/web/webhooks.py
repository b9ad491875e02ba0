"""The routes: a webhook is verified and enqueued, nothing else. Answers are those of contract 1.5, never another."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from app.config.settings import Settings
from app.delivery import Delivery, seal
from app.errors import InvalidSignature, PublishFailed
from app.observability import metrics, tracing
from app.sealing import Sealer
from app.signatures import VERIFIERS, Verifier
from app.web.batcher import Batcher

RETRY_AFTER_SECONDS = "5"
BATCHER_AWAITED = "headrace.batcher_awaited"  # in the environ, where the server waits for the broker itself
BODY_KEY = (
    "headrace.body"  # in the environ, where the server has read it whole: reading it again is a tenth of the route
)
log = logging.getLogger(__name__)


def make_blueprint(settings: Settings, batcher: Batcher, ready: Callable[[], None]) -> Blueprint:
    """The routes over their parts. `ready` raises PublishFailed when nothing could be enqueued now."""
    routes = Blueprint("headrace", __name__)
    sealer = Sealer(settings.encryption_keys)
    for name, verify in VERIFIERS.items():
        view = _webhook(name, verify, settings, batcher, sealer)
        routes.add_url_rule(f"/webhooks/{name}", name, view, methods=["POST"])

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


class PendingAck(Response):
    """A 202 to be: true once the broker has the delivery."""

    def __init__(self, aggregator: str, delivery: Delivery, began: float, span: tracing.ServerSpan | None) -> None:
        super().__init__(status=202)
        self.aggregator, self.delivery, self.began, self.span = aggregator, delivery, began, span


def _webhook(
    name: str, verify: Verifier, settings: Settings, batcher: Batcher, sealer: Sealer
) -> Callable[[], Response]:
    def webhook() -> Response:
        began, span = time.perf_counter(), tracing.server_span(name)
        try:
            body = _body(settings.max_body_bytes)
            receipt = verify(request.headers, body, settings, datetime.now(UTC))
            ack = PendingAck(name, seal(name, receipt, body, sealer), began, span)
            if BATCHER_AWAITED in request.environ:
                return ack  # the server waits, and holds no thread meanwhile
            batcher.publish(ack.delivery, span)
        except RequestEntityTooLarge:
            return _record_metrics(name, too_large(), began, span)
        except InvalidSignature as refused:
            metrics.REJECTED.labels(name, refused.reason).inc()
            return _record_metrics(name, Response("signature refused\n", 401, mimetype="text/plain"), began, span)
        except PublishFailed:
            return finish(ack, unavailable())
        return finish(ack, ack)

    return webhook


def finish(ack: PendingAck, answer: Response) -> Response:
    """The answer to what was accepted, counted."""
    if log.isEnabledFor(logging.DEBUG):
        ids = {"aggregator": ack.aggregator, "delivery": ack.delivery.message_id}
        ids |= {"trace_id": ack.span.trace_id} if ack.span else {}
        log.debug("answered %d", answer.status_code, extra=ids)
    return _record_metrics(ack.aggregator, answer, ack.began, ack.span, ack.delivery.message_id)


def record_rejection(path: str, answer: Response) -> Response:
    """The answer to a request that no view has seen, counted if it was a webhook."""
    aggregator = path.removeprefix("/webhooks/")
    if aggregator in VERIFIERS:
        metrics.ANSWERS.labels(aggregator, str(answer.status_code)).inc()
        if span := tracing.server_span(aggregator):
            span.answered(answer.status_code)
    return answer


def _record_metrics(
    aggregator: str, answer: Response, began: float, span: tracing.ServerSpan | None, delivery: str = ""
) -> Response:
    if span is not None:
        span.answered(answer.status_code, delivery)
    metrics.ANSWERS.labels(aggregator, str(answer.status_code)).inc()
    metrics.ANSWER_SECONDS.labels(aggregator).observe(time.perf_counter() - began)
    return answer


def _body(max_bytes: int) -> bytes:
    """The raw bytes. Raises RequestEntityTooLarge."""
    body: bytes = request.environ.get(BODY_KEY) or request.get_data(cache=False)
    if len(body) > max_bytes:
        raise RequestEntityTooLarge
    return body


def too_large() -> Response:
    """413, the only fault of the sender's beside a wrong signature."""
    return Response("larger than HEADRACE_MAX_BODY_BYTES\n", 413, mimetype="text/plain")


def unavailable() -> Response:
    """503: the fault is ours, and the sender should try again soon."""
    return Response("try again\n", 503, {"Retry-After": RETRY_AFTER_SECONDS}, mimetype="text/plain")


def on_error(error: Exception) -> Any:
    """The process edge. What nobody foresaw is 503, so that the sender keeps the event; its text may quote a body."""
    if isinstance(error, HTTPException) and (request.method != "POST" or error.code in (404, 405)):
        return error
    log.error("unforeseen %s on %s", type(error).__name__, request.path)
    return record_rejection(request.path, unavailable())
