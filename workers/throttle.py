"""What all workers share through Redis: a rate per account, and a silence when the provider asks for one."""

import time
from dataclasses import dataclass

import limits
import redis
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter

from app.config import Settings
from app.errors import TryLater
from workers.broker import redis_client

PREFIX = "headrace:hush:"


@dataclass(frozen=True)
class Hush:
    """An account that nobody may ask for anything, for so many seconds, and why."""

    account: str
    seconds: float
    reason: str


class Throttle:
    """Asked before every request. Raises TryLater if Redis is away: without it nobody knows what others have sent."""

    def __init__(self, settings: Settings) -> None:
        url = settings.redis_url or settings.need_broker()
        self._redis = redis_client(url)
        self._rate = limits.parse(settings.request_rate)
        self._limiter = MovingWindowRateLimiter(RedisStorage(url, key_prefix="headrace:rate"))

    def wait(self, account: str) -> float:
        """Takes a place in the account's rate, or says how many seconds to wait before asking again."""
        try:
            left = self._redis.pttl(PREFIX + account)
            if isinstance(left, int) and left > 0:
                return left / 1000
            if self._limiter.hit(self._rate, account):
                return 0.0
            stats = self._limiter.get_window_stats(self._rate, account)
        except redis.RedisError as error:
            raise TryLater(f"REDIS_URL: cannot be reached ({type(error).__name__})") from None
        return max(0.05, stats.reset_time - time.time())

    def hush(self, account: str, seconds: float, reason: str) -> None:
        """Nobody asks this account for anything until the time is over. A longer silence is never cut short."""
        try:
            self._redis.eval(_LONGEST, 1, PREFIX + account, int(seconds * 1000) + 1, reason)
        except redis.RedisError as error:
            raise TryLater(f"REDIS_URL: cannot be reached ({type(error).__name__})") from None


_LONGEST = """
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1]) end"""


def hushes(settings: Settings) -> list[Hush]:
    """The silences of this moment, for `headrace status`."""
    found = []
    with redis_client(settings.redis_url or settings.need_broker()) as client:
        for key in client.scan_iter(PREFIX + "*"):
            left, reason = client.pttl(key), client.get(key)
            if isinstance(left, int) and left > 0 and isinstance(reason, bytes):
                found.append(Hush(key.decode().removeprefix(PREFIX), left / 1000, reason.decode()))
    return found
