"""The client of an aggregator's API: requests within the shared rate limits, and a decision about each response."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from app.config.settings import Settings
from app.errors import NotYet, TryLater, Unprocessable
from app.observability import metrics, tracing
from workers.aggregators.registry import AGGREGATORS
from workers.aggregators.requests import Request
from workers.fetch.backoff import backoff
from workers.fetch.http import Client, HttpResponse
from workers.fetch.rate_limits import PauseKind, Throttle
from workers.fetch.retry import (
    FIRST_PAUSE,
    MAX_ATTEMPTS,
    MAX_PAUSE,
    UNREADABLE,
    Decision,
    FetchAction,
    decide,
    describe,
    is_unavailable,
)

T = TypeVar("T")


@dataclass(frozen=True)
class FetchResult(Generic[T]):
    """The decision about a request, and the parsed response if the decision is `use`."""

    decision: Decision
    value: T | None = None
    status: int = 0
    body: bytes = b""
    not_ready: str = ""  # NotYet.what, if the aggregator answered without data


@dataclass(frozen=True)
class AggregatorClient:
    """An API account with an aggregator. All workers share its rate limits and pauses through Redis."""

    name: str
    client: Client
    throttle: Throttle

    def fetch(
        self,
        request: Request,
        read: Callable[[HttpResponse], T],
        *,
        attempts: int = 0,
        provider: str = "",
        user_id: str = "",
    ) -> FetchResult[T]:
        """Sends one request, if the rate limits permit it now. Raises TryLater without Redis.

        `read` parses a response of status 200. If it raises Unprocessable (the body is truncated or malformed), the
        request is retried, because the next body may be whole. A pause that the response asks for stops all workers.
        """
        limits = AGGREGATORS[self.name].API_LIMITS
        seconds = self.throttle.wait(self.name, provider)
        if seconds <= 0 and limits.user_rate and user_id:
            seconds = self.throttle.wait_for_user(self.name, user_id, limits.user_rate)
        if seconds > 0:
            metrics.THROTTLED.labels(self.name).inc()
            return FetchResult(Decision(FetchAction.WAIT, seconds, counts=False))
        attributes: dict[str, str | int] = {"aggregator": self.name, "provider": provider, "attempt": attempts + 1}
        with metrics.REQUEST_SECONDS.labels(self.name).time(), tracing.client_span(request.method, **attributes):
            response, value = self.client.fetch(request), None
            tracing.set_status(response.status)
        status, headers, fault = response.status, response.headers, ""
        metrics.REQUESTS.labels(self.name, metrics.status_class(status)).inc()
        self._record_answer(status)
        if status == 200:
            try:
                value = read(response)
            except NotYet as reason:
                return FetchResult(_wait_for_data(reason, attempts), status=status, not_ready=reason.what)
            except Unprocessable as reason:
                status, fault = UNREADABLE, str(reason)
        now, has_cursor = datetime.now(UTC), request.has_cursor
        decision = decide(
            status, headers, attempts=attempts, now=now, has_cursor=has_cursor, fault=fault, limits=limits
        )
        if decision.action == FetchAction.PAUSE:
            paused_user = user_id if status == 429 and limits.limited(headers) == "user" else ""
            kind: PauseKind = "key_refused" if decision.key_refused else "asked"
            self.throttle.pause(self.name, decision.seconds, decision.reason, user_id=paused_user, kind=kind)
        return FetchResult(decision, value, status, response.body)

    def _record_answer(self, status: int) -> None:
        """Records for `headrace status` whether the API answers."""
        with contextlib.suppress(TryLater):  # without Redis no further request is sent, and that error names Redis
            if is_unavailable(status):
                self.throttle.count_failure(self.name, describe(status))
            else:
                self.throttle.clear_failures(self.name)


def _wait_for_data(reason: NotYet, attempts: int) -> Decision:
    seconds = max(reason.seconds, backoff(attempts, base=FIRST_PAUSE, limit=MAX_PAUSE))
    is_last = attempts + 1 >= MAX_ATTEMPTS
    return Decision(FetchAction.FAIL if is_last else FetchAction.RETRY, seconds, str(reason))


def make_client(name: str, settings: Settings, throttle: Throttle | None = None) -> AggregatorClient:
    """The client of the aggregator `name`. Raises Misconfigured without an API key."""
    base_url, headers = AGGREGATORS[name].connect(settings)
    return AggregatorClient(name, Client(base_url, headers), throttle or Throttle(settings))


def make_clients(settings: Settings) -> list[AggregatorClient]:
    """A client for each aggregator with an API key. Raises Misconfigured."""
    throttle = Throttle(settings)
    return [make_client(name, settings, throttle) for name in settings.readable if name in AGGREGATORS]
