"""The routes: a webhook is verified and enqueued, nothing else. Answers are those of contract 1.5, never another."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from app import metrics
from app.config import Settings
from app.courier import Courier
from app.delivery import seal
from app.errors import NotTaken, Refused
from app.providers import PROVIDERS, Provider
from app.sealing import Sealer

RETRY_AFTER_SECONDS = "5"
log = logging.getLogger(__name__)


def make_blueprint(settings: Settings, courier: Courier, ready: Callable[[], None]) -> Blueprint:
    """The routes over their parts. `ready` raises NotTaken when nothing could be enqueued now."""
    routes = Blueprint("headrace", __name__)
    sealer = Sealer(settings.encryption_keys)
    for name, provider in PROVIDERS.items():
        view = _webhook(name, provider, settings, courier, sealer)
        routes.add_url_rule(f"/webhooks/{name}", name, view, methods=["POST"])

    @routes.get("/livez")
    def livez() -> Response:
        return Response("up\n", mimetype="text/plain")

    @routes.get("/readyz")
    def readyz() -> Response:
        try:
            ready()
        except NotTaken as reason:
            return Response(f"{reason}\n", 503, mimetype="text/plain")
        return Response("ready\n", mimetype="text/plain")

    @routes.get("/metrics")
    def exposition() -> Response:
        return Response(metrics.exposition(), mimetype="text/plain")

    return routes


def _webhook(
    name: str, provider: Provider, settings: Settings, courier: Courier, sealer: Sealer
) -> Callable[[], Response]:
    answer_seconds = metrics.ANSWER_SECONDS.labels(name)

    def webhook() -> Response:
        began = time.perf_counter()
        try:
            body = _body(settings.max_body_bytes)
            receipt = provider.verify(request.headers, body, settings, datetime.now(UTC))
            courier.take(seal(name, receipt, body, sealer))
            answer = Response(status=202)
        except RequestEntityTooLarge:
            answer = Response("larger than HEADRACE_MAX_BODY_BYTES\n", 413, mimetype="text/plain")
        except Refused as refused:
            metrics.REFUSED.labels(name, refused.reason).inc()
            answer = Response("signature refused\n", 401, mimetype="text/plain")
        except NotTaken:
            answer = unavailable()
        metrics.ANSWERS.labels(name, str(answer.status_code)).inc()
        answer_seconds.observe(time.perf_counter() - began)
        return answer

    return webhook


def _body(most: int) -> bytes:
    """The raw bytes. Raises RequestEntityTooLarge."""
    body = request.get_data(cache=False)
    if len(body) > most:
        raise RequestEntityTooLarge
    return body


def unavailable() -> Response:
    """503: the fault is ours, and the sender should try again soon."""
    return Response("try again\n", 503, {"Retry-After": RETRY_AFTER_SECONDS}, mimetype="text/plain")


def on_error(error: Exception) -> Any:
    """The process edge. What nobody foresaw is 503, so that the sender keeps the event; its text may quote a body."""
    if isinstance(error, HTTPException) and (request.method != "POST" or error.code in (404, 405)):
        return error
    log.error("unforeseen %s on %s", type(error).__name__, request.path)
    return unavailable()
