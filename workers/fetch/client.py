"""Asks an aggregator for something: within the rates and pauses of the account, and with what its answer means."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from app.config.settings import Settings
from app.errors import NotYet, Unprocessable
from app.observability import metrics, tracing
from workers.aggregators import AGGREGATORS, Aggregator
from workers.aggregators.requests import Request
from workers.fetch.http import Client, HttpResponse
from workers.fetch.rate_limits import PauseKind, Throttle
from workers.fetch.retry import MAX_ATTEMPTS, NOT_JSON, Decision, FetchAction, backoff, decide

T = TypeVar("T")


@dataclass(frozen=True)
class FetchResult(Generic[T]):
    """What was decided, and what was read if the decision is to use it."""

    decision: Decision
    value: T | None = None
    status: int = 0
    body: bytes = b""
    not_ready: str = ""  # what the aggregator said instead of giving data


@dataclass(frozen=True)
class AggregatorClient:
    """An account with an aggregator, shared by all workers through Redis."""

    name: str
    client: Client
    throttle: Throttle

    @property
    def reader(self) -> Aggregator:
        """What is known of its API."""
        return AGGREGATORS[self.name]

    def fetch(
        self,
        request: Request,
        read: Callable[[HttpResponse], T],
        *,
        attempts: int = 0,
        provider: str = "",
        user_id: str = "",
    ) -> FetchResult[T]:
        """One request, if one may be made now. A pause that is asked for is everybody's from here on.

        `read` raises Unprocessable for what is cut short or of another form: a later one may be whole. Raises TryLater.
        """
        terms = self.reader.API_LIMITS
        seconds = self.throttle.wait(self.name, provider)
        if seconds <= 0 and terms.user_rate and user_id:
            seconds = self.throttle.wait_for_user(self.name, user_id, terms.user_rate)
        if seconds > 0:
            metrics.THROTTLED.labels(self.name).inc()
            return FetchResult(Decision(FetchAction.WAIT, seconds, counts=False))
        about: dict[str, str | int] = {"aggregator": self.name, "provider": provider, "attempt": attempts + 1}
        with metrics.REQUEST_SECONDS.labels(self.name).time(), tracing.client_span(request.method, **about):
            answer, value = self.client.fetch(request), None
            tracing.set_status(answer.status)
        status = answer.status
        metrics.REQUESTS.labels(self.name, metrics.status_class(status)).inc()
        if status == 200:
            try:
                value = read(answer)
            except NotYet as reason:
                gives_up = attempts + 1 >= MAX_ATTEMPTS
                pause = max(reason.seconds, backoff(attempts))
                decision = Decision(FetchAction.FAIL if gives_up else FetchAction.RETRY, pause, str(reason))
                return FetchResult(decision, status=status, not_ready=reason.what)
            except Unprocessable:
                status = NOT_JSON
        now = datetime.now(UTC)
        decision = decide(
            status, answer.headers, attempts=attempts, now=now, has_cursor=request.has_cursor, terms=terms
        )
        if decision.action == FetchAction.PAUSE:
            whose = user_id if status == 429 and terms.limited(answer.headers) == "user" else ""
            kind: PauseKind = "key_refused" if decision.key_refused else "asked"
            self.throttle.pause(self.name, decision.seconds, decision.reason, user_id=whose, kind=kind)
        return FetchResult(decision, value, status, answer.body)

    def close(self) -> None:
        """Ends its connections."""
        self.client.close()


def make_client(name: str, settings: Settings, throttle: Throttle | None = None) -> AggregatorClient:
    """The account that a key is configured for. Raises Misconfigured."""
    return AggregatorClient(name, Client(*AGGREGATORS[name].connect(settings)), throttle or Throttle(settings))


def make_clients(settings: Settings) -> list[AggregatorClient]:
    """Every account that a key is configured for. Raises Misconfigured."""
    throttle = Throttle(settings)
    return [make_client(name, settings, throttle) for name in settings.readable if name in AGGREGATORS]
