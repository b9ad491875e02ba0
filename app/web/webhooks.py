"""The routes. A webhook is verified, sealed and published; contract 1.5 and decision 0058 list every answer."""

import logging
import time
from collections.abc import Callable, Sequence
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
from app.signatures import PRECHECKS, VERIFIERS
from app.signatures.hashing import HashedBody, HmacInput
from app.web.batcher import Batcher

RETRY_AFTER_SECONDS = "5"
ACCEPTED = Response(status=202)  # one for all requests: to make one costs 5 us
FAILURES = {
    400: "the body is shorter than Content-Length\n",
    401: "signature refused\n",
    408: "the body did not arrive in time\n",
    413: "larger than HEADRACE_MAX_BODY_BYTES\n",
    503: "try again\n",
}
PATHS = {f"/webhooks/{aggregator}": aggregator for aggregator in VERIFIERS}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A verified delivery that is still to be published."""

    delivery: Delivery
    began: float
    span: "tracing.ServerSpan | None"


def canonical(path: str) -> str:
    """The path of a webhook without repeated and trailing slashes; other paths unchanged.

    Such slashes come from a base URL that ends with a slash. Senders do not follow the redirect that Flask would
    answer.
    """
    if path in PATHS:
        return path
    plain = "/" + "/".join(filter(None, path.split("/")))
    return plain if plain in PATHS else path


class Receiver:
    """Verifies and seals the webhooks of one aggregator. The caller publishes the delivery and calls `finish`."""

    def __init__(self, aggregator: str, settings: Settings) -> None:
        self._aggregator, self._settings = aggregator, settings
        self._precheck, self._verify = PRECHECKS[aggregator], VERIFIERS[aggregator]
        self._sealer = Sealer(settings.encryption_keys)

    def precheck(self, headers: Headers, *, is_small: bool = False) -> Sequence[HmacInput] | Response:
        """The HMAC inputs for the body, or the 401 if these headers cannot fit any body.

        A small body is verified even if its time is out of tolerance, because only a valid signature shows that a clock
        is wrong.
        """
        try:
            return self._precheck(headers, self._settings, datetime.now(UTC))
        except InvalidSignature as error:
            if error.reason == "stale" and is_small:
                return []
            reason = "signature" if error.reason == "stale" else error.reason
            return self._refused(reason, tracing.server_span(self._aggregator))

    def receive(
        self, headers: Headers, body: bytes, hashed: HashedBody | None = None, *, is_too_large: bool = False
    ) -> Accepted | Response:
        """Verifies and seals a body. One that `is_too_large` is only verified."""
        began, span = time.perf_counter(), tracing.server_span(self._aggregator)
        is_verified = False
        try:
            receipt = self._verify(headers, body, self._settings, datetime.now(UTC), hashed)
            is_verified = True
            if not is_too_large:
                return Accepted(seal(self._aggregator, receipt, body, self._sealer), began, span)
        except InvalidSignature as error:
            return self._refused(error.reason, span, began)
        except Exception as error:  # noqa: BLE001 - 503, so that the sender keeps the event
            # Only the type: the text of an error may quote a body.
            log.error("unexpected %s on /webhooks/%s", type(error).__name__, self._aggregator)  # noqa: TRY400
            if not is_verified:
                return self.unverified(failure(503), span)
            return _record(failure(503), self._aggregator, span, began)
        return close_connection(_record(failure(413), self._aggregator, span, began))

    def unverified(self, answer: Response, span: "tracing.ServerSpan | None" = None) -> Response:
        """Counts the answer to a request whose signature was not checked. Alerts do not use this counter."""
        if span := span or tracing.server_span(self._aggregator):
            span.end(answer.status_code, "")
        metrics.UNVERIFIED.labels(self._aggregator, str(answer.status_code)).inc()
        return close_connection(answer)

    def _refused(self, reason: str, span: "tracing.ServerSpan | None", began: float | None = None) -> Response:
        metrics.REJECTED.labels(self._aggregator, reason).inc()
        return close_connection(_record(failure(401), self._aggregator, span, began))


def make_receivers(settings: Settings) -> dict[str, Receiver]:
    return {path: Receiver(aggregator, settings) for path, aggregator in PATHS.items()}


def make_blueprint(settings: Settings, batcher: Batcher, ready: Callable[[], None]) -> Blueprint:
    """All routes. `ready` raises PublishFailed while the broker does not accept messages, and must not wait for it.

    /metrics is on the operations port only.
    """
    routes = Blueprint("headrace", __name__)
    for path, receiver in make_receivers(settings).items():
        view = _webhook(receiver, batcher, settings.max_body_bytes)
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

    return routes


def _webhook(receiver: Receiver, batcher: Batcher, max_bytes: int) -> Callable[[], Response]:
    """The view for a WSGI server, whose thread waits for the broker. `rsgi.Server` calls the receiver and awaits."""

    def webhook() -> Response:
        body = request.get_data(cache=False)
        if len(body) > max_bytes:
            raise RequestEntityTooLarge
        accepted = receiver.receive(request.headers, body)
        if isinstance(accepted, Response):
            return accepted
        try:
            batcher.publish_from_thread(accepted.delivery, accepted.span)
        except PublishFailed:
            return finish(accepted, failure(503))
        return finish(accepted, ACCEPTED)

    return webhook


def finish(accepted: Accepted, answer: Response) -> Response:
    """Logs and counts the answer to an accepted delivery, and returns it."""
    delivery, span = accepted.delivery, accepted.span
    if log.isEnabledFor(logging.DEBUG):
        ids = {"aggregator": delivery.aggregator, "delivery": delivery.message_id}
        ids |= {"trace_id": span.trace_id} if span else {}
        log.debug("answered %d", answer.status_code, extra=ids)
    return _record(answer, delivery.aggregator, span, accepted.began, delivery.message_id)


def _record(
    answer: Response, aggregator: str, span: "tracing.ServerSpan | None", began: float | None = None, delivery: str = ""
) -> Response:
    if span is not None:
        span.end(answer.status_code, delivery)
    metrics.series(metrics.ANSWERS, aggregator, answer.status_code).inc()
    if began is not None:
        metrics.series(metrics.ANSWER_SECONDS, aggregator).observe(time.perf_counter() - began)
    return answer


def close_connection(answer: Response) -> Response:
    """Makes the server close the connection of an unauthenticated sender, so that it cannot keep others out."""
    answer.headers["Connection"] = "close"
    return answer


def failure(status: int) -> Response:
    """An answer of FAILURES. 503 means that the error is ours, and that the sender retries."""
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if status == 503 else None
    return Response(FAILURES[status], status, headers, mimetype="text/plain")


def on_error(error: Exception) -> Any:
    """Flask's error handler. An unexpected error is 503, so that the sender keeps the event."""
    if isinstance(error, RequestEntityTooLarge):
        return unverified(request.path, failure(413))
    if isinstance(error, HTTPException) and (request.method != "POST" or error.code in (404, 405)):
        return error
    # Only the type: the text of an error may quote a body.
    log.error("unexpected %s on %s", type(error).__name__, request.path)
    return unverified(request.path, failure(503))


def unverified(path: str, answer: Response) -> Response:
    """Counts the answer to a request that reached no receiver, if it was a webhook, and returns it."""
    if aggregator := PATHS.get(canonical(path)):
        metrics.UNVERIFIED.labels(aggregator, str(answer.status_code)).inc()
    return close_connection(answer)
