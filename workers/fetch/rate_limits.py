"""What all workers share through Redis: rates per account and provider, and a pause when an account asks for one."""

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
# Whether the account asked for the pause, or refuses our key.
PauseKind = Literal["asked", "key_refused"]


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise TryLater(f"cannot be reached ({type(error).__name__})", setting="REDIS_URL") from None


@dataclass(frozen=True)
class Pause:
    """An account, or a person's part of it, that nobody may ask for anything for so many seconds, and why."""

    account: str
    seconds: float
    reason: str
    kind: PauseKind = "asked"


class _Noted(msgspec.Struct, forbid_unknown_fields=True):
    """What Redis holds of a pause."""

    kind: PauseKind
    reason: str


class Throttle:
    """Asked before every request. Raises TryLater if Redis is away: without it nobody knows what others have sent."""

    def __init__(self, settings: Settings) -> None:
        url = settings.need_redis()
        self._redis = redis_client(url)
        self._rate = limits.parse(settings.request_rate)
        self._rate_of_provider = limits.parse(settings.provider_rate) if settings.provider_rate else None
        self._limiter = MovingWindowRateLimiter(RedisStorage(url, key_prefix="headrace:rate"))

    def wait(self, account: str, provider: str = "") -> float:
        """Takes a place in the rates of the account and of the provider whose data it is about (garmin, oura ...).

        Or says how many seconds to wait before asking again.
        """
        narrow = self._rate_of_provider if provider else None
        with _needed():
            left = self._redis.pttl(_pause_key(account))
            if isinstance(left, int) and left > 0:
                return left / 1000
            # Looked at first: no place of the account may be taken while the provider has none.
            if narrow and not self._limiter.test(narrow, account, provider):
                return self._until_free(narrow, account, provider)
            if not self._limiter.hit(self._rate, account):
                return self._until_free(self._rate, account)
            if narrow and not self._limiter.hit(narrow, account, provider):
                return self._until_free(narrow, account, provider)
            return 0.0

    def wait_for_user(self, account: str, user_id: str, rate: str) -> float:
        """As `wait`, for what is limited by the person whose data it is, at this account."""
        with _needed():
            left = self._redis.pttl(_pause_key(account, user_id))
            if isinstance(left, int) and left > 0:
                return left / 1000
        return self.take(rate, "user", account, user_id)

    def take(self, rate: str, *whose: str) -> float:
        """Takes a place in a rate of its own, such as 8/hour; or says how many seconds until there is one."""
        with _needed():
            item = limits.parse(rate)
            return 0.0 if self._limiter.hit(item, *whose) else self._until_free(item, *whose)

    def _until_free(self, rate: limits.RateLimitItem, *whose: str) -> float:
        return max(0.05, self._limiter.get_window_stats(rate, *whose).reset_time - time.time())

    def pause(self, account: str, seconds: float, reason: str, *, user_id: str = "", kind: PauseKind = "asked") -> None:
        """Nobody asks this account for anything, or for this person's data, until the time is over.

        A longer pause is never cut short.
        """
        with _needed():
            noted = msgspec.json.encode(_Noted(kind, reason))
            self._redis.eval(_MAX_PAUSE, 1, _pause_key(account, user_id), int(seconds * 1000) + 1, noted)


def _pause_key(account: str, user_id: str = "") -> str:
    return f"{PREFIX}{account}{'/' if user_id else ''}{user_id}"


_MAX_PAUSE = """
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1]) end"""


def pauses(settings: Settings) -> list[Pause]:
    """The pauses of this moment, for `headrace status`."""
    found = []
    with _needed(), redis_client(settings.need_redis()) as client:
        for key in client.scan_iter(PREFIX + "*"):
            left, raw = client.pttl(key), client.get(key)
            if isinstance(left, int) and left > 0 and isinstance(raw, bytes):
                noted = _noted(raw)
                found.append(Pause(key.decode().removeprefix(PREFIX), left / 1000, noted.reason, noted.kind))
    return found


def _noted(raw: bytes) -> _Noted:
    """Workers of an older version write the reason alone."""
    try:
        return msgspec.json.decode(raw, type=_Noted)
    except msgspec.DecodeError:
        return _Noted("asked", raw.decode(errors="replace"))
