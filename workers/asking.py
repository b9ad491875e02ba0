"""Asks an aggregator for something: within the rates and silences of the account, and with what its answer means."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from app import metrics, tracing
from app.config import Settings
from app.errors import DeadLetter, NotYet
from app.providers import PROVIDERS, Provider
from app.providers.request import Request
from workers.http import Answer, Client
from workers.retry import MOST_ATTEMPTS, NOT_JSON, Decision, backoff, decide
from workers.throttle import Throttle

T = TypeVar("T")


@dataclass(frozen=True)
class Reply(Generic[T]):
    """What was decided, and what was read if the decision is to use it."""

    decision: Decision
    value: T | None = None
    status: int = 0
    body: bytes = b""
    not_yet: str = ""  # what the provider said instead of giving data


@dataclass(frozen=True)
class Account:
    """An account with an aggregator, shared by all workers through Redis."""

    name: str
    client: Client
    throttle: Throttle

    @property
    def reader(self) -> Provider:
        """What is known of its API."""
        return PROVIDERS[self.name]

    def ask(
        self, request: Request, read: Callable[[Answer], T], *, attempts: int = 0, provider: str = "", user_id: str = ""
    ) -> Reply[T]:
        """One request, if one may be made now. A silence that is asked for is everybody's from here on.

        `read` raises DeadLetter for what is cut short or of another form: a later answer may be whole. Raises TryLater.
        """
        terms = self.reader.TERMS
        seconds = self.throttle.wait(self.name, provider)
        if seconds <= 0 and terms.user_rate and user_id:
            seconds = self.throttle.wait_for_user(self.name, user_id, terms.user_rate)
        if seconds > 0:
            metrics.THROTTLED.labels(self.name).inc()
            return Reply(Decision("wait", seconds, counts=False))
        about: dict[str, str | int] = {"aggregator": self.name, "provider": provider, "attempt": attempts + 1}
        with metrics.REQUEST_SECONDS.labels(self.name).time(), tracing.asking(request.method, **about):
            answer, value = self.client.ask(request), None
            tracing.answered(answer.status)
        status = answer.status
        metrics.REQUESTS.labels(self.name, metrics.status_class(status)).inc()
        if status == 200:
            try:
                value = read(answer)
            except NotYet as reason:
                gives_up = attempts + 1 >= MOST_ATTEMPTS
                pause = max(reason.seconds, backoff(attempts))
                decision = Decision("fail" if gives_up else "again", pause, str(reason))
                return Reply(decision, status=status, not_yet=reason.what)
            except DeadLetter:
                status = NOT_JSON
        now = datetime.now(UTC)
        decision = decide(
            status, answer.headers, attempts=attempts, now=now, has_cursor=request.has_cursor, terms=terms
        )
        if decision.what == "hush":
            whose = user_id if status == 429 and terms.limited(answer.headers) == "user" else ""
            self.throttle.hush(self.name, decision.seconds, decision.reason, user_id=whose)
        return Reply(decision, value, status, answer.body)

    def close(self) -> None:
        """Ends its connections."""
        self.client.close()


def account(name: str, settings: Settings, throttle: Throttle | None = None) -> Account:
    """The account that a key is configured for. Raises Misconfigured."""
    return Account(name, Client(*PROVIDERS[name].connect(settings)), throttle or Throttle(settings))


def accounts(settings: Settings) -> list[Account]:
    """Every account that a key is configured for. Raises Misconfigured."""
    throttle = Throttle(settings)
    return [account(name, settings, throttle) for name in settings.readable if name in PROVIDERS]
