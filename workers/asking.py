"""Asks a provider for something: within the rates and silences of the account, and with what its answer means."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from app.errors import DeadLetter
from app.providers.request import Request
from workers.http import Answer, Client
from workers.retry import NOT_JSON, Decision, decide
from workers.throttle import Throttle

T = TypeVar("T")


@dataclass(frozen=True)
class Reply(Generic[T]):
    """What was decided, and what was read if the decision is to use it."""

    decision: Decision
    value: T | None = None
    status: int = 0
    body: bytes = b""


@dataclass(frozen=True)
class Account:
    """An account with a provider, shared by all workers through Redis."""

    name: str
    client: Client
    throttle: Throttle

    def ask(self, request: Request, read: Callable[[Answer], T], *, attempts: int = 0, provider: str = "") -> Reply[T]:
        """One request, if one may be made now. A silence that is asked for is everybody's from here on.

        `read` raises DeadLetter for what is cut short or of another form: a later answer may be whole. Raises TryLater.
        """
        if (seconds := self.throttle.wait(self.name, provider)) > 0:
            return Reply(Decision("wait", seconds, counts=False))
        answer, value = self.client.ask(request), None
        status = answer.status
        if status == 200:
            try:
                value = read(answer)
            except DeadLetter:
                status = NOT_JSON
        now = datetime.now(UTC)
        decision = decide(status, answer.headers, attempts=attempts, now=now, has_cursor=request.has_cursor)
        if decision.what == "hush":
            self.throttle.hush(self.name, decision.seconds, decision.reason)
        return Reply(decision, value, status, answer.body)
