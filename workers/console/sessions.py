"""Sessions of the console, in the memory of its process: a restart or a logout ends them."""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from app.accounts import Account

IDLE_SECONDS, MAX_SECONDS = 30 * 60.0, 12 * 3600.0
MAX_SESSIONS, MAX_PLANS = 500, 20  # a further one replaces the oldest
PLAN_SECONDS = 600.0


@dataclass(frozen=True)
class Plan:
    """An action that was shown and can be confirmed once.

    `run` returns a sentence about the result. `typed` is a text that the operator must type to confirm.
    """

    title: str
    lines: Sequence[str]
    run: Callable[[], str]
    back: str  # the page to return to
    button: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    typed: str = ""


@dataclass
class Session:
    account: Account
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    started: float = 0.0
    seen: float = 0.0
    plans: dict[str, tuple[float, Plan]] = field(default_factory=dict)
    messages: list[tuple[Literal["done", "failed"], str]] = field(default_factory=list)  # for the next page

    def propose(self, plan: Plan, now: float) -> str:
        """Keeps a plan for some minutes, and returns the token that confirms it."""
        token = secrets.token_urlsafe(32)
        while len(self.plans) >= MAX_PLANS:
            self.plans.pop(next(iter(self.plans)))
        self.plans[token] = now, plan
        return token

    def confirm(self, token: str, now: float) -> Plan | None:
        """The plan of a token, once; None if it is unknown, used or too old."""
        at, plan = self.plans.pop(token, (0.0, None))
        return plan if now - at < PLAN_SECONDS else None


class Sessions:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self._lock = clock, threading.Lock()
        self._sessions: dict[bytes, Session] = {}

    def start(self, account: Account) -> str:
        """A new session. Returns its token."""
        token, now = secrets.token_urlsafe(32), self.clock()
        with self._lock:
            while len(self._sessions) >= MAX_SESSIONS:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[_digest(token)] = Session(account, started=now, seen=now)
        return token

    def find(self, token: str) -> Session | None:
        """The session of a token, unless it has ended. Counts as activity."""
        key, now = _digest(token), self.clock()
        with self._lock:
            found = self._sessions.get(key)
            if found is None:
                return None
            if now - found.seen > IDLE_SECONDS or now - found.started > MAX_SECONDS:
                del self._sessions[key]
                return None
            found.seen = now
            return found

    def end(self, token: str) -> None:
        with self._lock:
            self._sessions.pop(_digest(token), None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
