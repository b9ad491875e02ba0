"""The state that all workers share through Redis: rate limits per account, provider and user, and pauses."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import limits
import msgspec
import redis
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter

from app.config.settings import Settings
from app.errors import TryLater
from workers.broker_admin import redis_client

PREFIX = "headrace:pause:"
PauseKind = Literal["asked", "key_refused"]  # the aggregator asked for the pause, or it refuses our API key
# A longer pause is never shortened.
EXTEND_PAUSE = """
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1]) end"""


@contextlib.contextmanager
def _redis_errors_as_try_later() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise TryLater(f"cannot be reached ({type(error).__name__})", setting="REDIS_URL") from None


@dataclass(frozen=True)
class Pause:
    """No worker sends requests to this account for `seconds`. `account` is ACCOUNT/USER_ID if it is about one user."""

    account: str
    seconds: float
    reason: str
    kind: PauseKind = "asked"


class _StoredPause(msgspec.Struct, forbid_unknown_fields=True):
    kind: PauseKind
    reason: str


class Throttle:
    """The check before every request. Raises TryLater without Redis: the requests of other workers are unknown then."""

    def __init__(self, settings: Settings) -> None:
        url = settings.need_redis()
        self._redis = redis_client(url)
        self._account_rate = limits.parse(settings.request_rate)
        self._provider_rate = limits.parse(settings.provider_rate) if settings.provider_rate else None
        self._limiter = MovingWindowRateLimiter(RedisStorage(url, key_prefix="headrace:rate"))

    def wait(self, account: str, provider: str = "") -> float:
        """Counts one request against the rates of the account and of the provider (garmin, oura ...).

        Returns 0, or the seconds to wait if the account is paused or a rate is used up.
        """
        rate = self._provider_rate if provider else None
        with _redis_errors_as_try_later():
            if seconds := self._pause_left(account):
                return seconds
            # Tested first: a request that the provider's rate refuses must not count against the account's rate.
            if rate and not self._limiter.test(rate, account, provider):
                return self._until_free(rate, account, provider)
            seconds = self._hit(self._account_rate, account)
            return seconds or (self._hit(rate, account, provider) if rate else 0.0)

    def wait_for_user(self, account: str, user_id: str, rate: str) -> float:
        """As `wait`, for a rate that applies to the requests about one user."""
        with _redis_errors_as_try_later():
            return self._pause_left(account, user_id) or self.take(rate, "user", account, user_id)

    def take(self, rate: str, *key: str) -> float:
        """Counts one request against a rate such as 8/hour. Returns 0, or the seconds to wait if it is used up."""
        with _redis_errors_as_try_later():
            return self._hit(limits.parse(rate), *key)

    def pause(self, account: str, seconds: float, reason: str, *, user_id: str = "", kind: PauseKind = "asked") -> None:
        """Stops all requests to this account, or about this user, for `seconds`. Never shortens a pause."""
        stored = msgspec.json.encode(_StoredPause(kind, reason))
        with _redis_errors_as_try_later():
            self._redis.eval(EXTEND_PAUSE, 1, _pause_key(account, user_id), int(seconds * 1000) + 1, stored)

    def _pause_left(self, account: str, user_id: str = "") -> float:
        left = self._redis.pttl(_pause_key(account, user_id))
        return left / 1000 if isinstance(left, int) and left > 0 else 0.0

    def _hit(self, rate: limits.RateLimitItem, *key: str) -> float:
        return 0.0 if self._limiter.hit(rate, *key) else self._until_free(rate, *key)

    def _until_free(self, rate: limits.RateLimitItem, *key: str) -> float:
        return max(0.05, self._limiter.get_window_stats(rate, *key).reset_time - time.time())


def _pause_key(account: str, user_id: str = "") -> str:
    return f"{PREFIX}{account}{'/' if user_id else ''}{user_id}"


def pauses(settings: Settings) -> list[Pause]:
    """The current pauses. Raises TryLater without Redis."""
    found = []
    with _redis_errors_as_try_later(), redis_client(settings.need_redis()) as client:
        for key in client.scan_iter(PREFIX + "*"):
            left, raw = client.pttl(key), client.get(key)
            if isinstance(left, int) and left > 0 and isinstance(raw, bytes):
                stored = _decode(raw)
                found.append(Pause(key.decode().removeprefix(PREFIX), left / 1000, stored.reason, stored.kind))
    return found


def _decode(raw: bytes) -> _StoredPause:
    try:
        return msgspec.json.decode(raw, type=_StoredPause)
    except msgspec.DecodeError:  # written by a worker of an older version, which stores only the reason
        return _StoredPause("asked", raw.decode(errors="replace"))
