"""The state that all workers share through Redis: rate limits per account, provider and user, and pauses."""

# ruff: noqa: PLC0415 - importing limits and redis costs 0.1 s of CPU; commands that read no pause do not import them
import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from app.config.settings import Settings
from app.errors import TryLater
from workers.redis_durability import redis_client

if TYPE_CHECKING:
    import redis
    from limits import RateLimitItem

PREFIX = "headrace:pause:"
FAILURES = "headrace:failures:"
FAILURES_SECONDS = 1200  # longer than the longest delay before a retry
CLEAR_SECONDS = 1.0  # minimum time between two removals of an account's failures: each costs a request to Redis
PauseKind = Literal["asked", "key_refused"]  # the aggregator asked for the pause, or it refuses our API key
# A longer pause is never shortened.
EXTEND_PAUSE = """
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1]) end"""


@contextlib.contextmanager
def _redis_errors_as_try_later() -> Iterator[None]:
    import redis

    try:
        yield
    except redis.RedisError as error:
        raise TryLater(f"cannot be reached ({type(error).__name__})", setting="REDIS_URL") from None


@dataclass(frozen=True)
class Pause:
    """No process with this API key sends requests to the account for `seconds`.

    `account` is ACCOUNT/USER_ID if it is about one user. `key` is the id of the API key, '' if there is none. `is_own`
    is whether the reader's settings have that key, None without a key on either side.
    """

    account: str
    seconds: float
    reason: str
    kind: PauseKind = "asked"
    key: str = ""
    is_own: bool | None = None


@dataclass(frozen=True)
class Failures:
    """Requests to an account that failed since its last answer: no connection, no answer in time, or a 5xx."""

    account: str
    count: int
    reason: str  # of the last one
    key: str = ""
    is_own: bool | None = None


class _StoredPause(msgspec.Struct, forbid_unknown_fields=True):
    kind: PauseKind
    reason: str


class Throttle:
    """The check before every request. Raises TryLater without Redis: the requests of other workers are unknown then."""

    def __init__(self, settings: Settings) -> None:
        from limits import parse
        from limits.storage import RedisStorage
        from limits.strategies import MovingWindowRateLimiter

        self._redis = redis_client(settings.need_redis())
        self._parse = parse
        self._account_rate = parse(settings.request_rate)
        self._provider_rate = parse(settings.provider_rate) if settings.provider_rate else None
        pool = self._redis.connection_pool  # has short timeouts, and follows Sentinel
        self._limiter = MovingWindowRateLimiter(
            RedisStorage("redis://", connection_pool=pool, key_prefix="headrace:rate")
        )
        self._keys = key_ids(settings)
        self._clear_due: dict[str, float] = {}

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
            return self._hit(self._parse(rate), *key)

    def pause(self, account: str, seconds: float, reason: str, *, user_id: str = "", kind: PauseKind = "asked") -> None:
        """Stops all requests to this account, or about this user, for `seconds`. Never shortens a pause."""
        stored = msgspec.json.encode(_StoredPause(kind, reason))
        with _redis_errors_as_try_later():
            self._redis.eval(EXTEND_PAUSE, 1, self._pause_key(account, user_id), int(seconds * 1000) + 1, stored)

    def count_failure(self, account: str, reason: str) -> None:
        """Counts a request without a usable answer, for `headrace status`."""
        name = FAILURES + self._named(account)
        with _redis_errors_as_try_later(), self._redis.pipeline() as pipeline:
            pipeline.hincrby(name, "count", 1)
            pipeline.hset(name, "reason", reason)
            pipeline.expire(name, FAILURES_SECONDS)
            pipeline.execute()

    def clear_failures(self, account: str) -> None:
        """Called after each answer; sends at most one request per second to Redis."""
        now = time.monotonic()
        if now >= self._clear_due.get(account, 0.0):
            self._clear_due[account] = now + CLEAR_SECONDS
            with _redis_errors_as_try_later():
                self._redis.delete(FAILURES + self._named(account))

    def _pause_left(self, account: str, user_id: str = "") -> float:
        left = self._redis.pttl(self._pause_key(account, user_id))
        return left / 1000 if isinstance(left, int) and left > 0 else 0.0

    def _pause_key(self, account: str, user_id: str = "") -> str:
        return f"{PREFIX}{self._named(account)}{'/' if user_id else ''}{user_id}"

    def _named(self, account: str) -> str:
        """The account with its key: another key, for example a wrong one in an operator's shell, pauses only itself."""
        return f"{account}:{self._keys[account]}" if account in self._keys else account

    def _hit(self, rate: "RateLimitItem", *key: str) -> float:
        return 0.0 if self._limiter.hit(rate, *key) else self._until_free(rate, *key)

    def _until_free(self, rate: "RateLimitItem", *key: str) -> float:
        return max(0.05, self._limiter.get_window_stats(rate, *key).reset_time - time.time())


def key_ids(settings: Settings) -> dict[str, str]:
    """The `key_id` of the API key of each account in the settings."""
    terra = settings.terra_api_key and f"{settings.terra_dev_id} {settings.terra_api_key}"  # Terra checks both
    keys = {"junction": settings.junction_api_key, "terra": terra}
    return {name: key_id(f"{name} {key}") for name, key in keys.items() if key}


def key_id(text: str) -> str:
    """A short id of a key, which tells two keys apart.

    It does not reveal the key: it has 32 bits of a hash, and a key has 128 bits or more.
    """
    return hashlib.blake2b(text.encode(), digest_size=4, person=b"headrace.pause").hexdigest()


def pauses(settings: Settings) -> list[Pause]:
    """The current pauses, of every API key. Raises TryLater without Redis."""
    found = []
    with _redis_errors_as_try_later(), redis_client(settings.need_redis()) as client:
        for name, of in _stored(client, settings, PREFIX):
            left, raw = client.pttl(name), client.get(name)
            if isinstance(left, int) and left > 0 and isinstance(raw, bytes):
                stored = _decode(raw)
                found.append(Pause(seconds=left / 1000, reason=stored.reason, kind=stored.kind, **of))
    return found


def failures(settings: Settings) -> list[Failures]:
    """The accounts whose last requests failed, of every API key. Raises TryLater without Redis."""
    found = []
    with _redis_errors_as_try_later(), redis_client(settings.need_redis()) as client:
        for name, of in _stored(client, settings, FAILURES):
            if fields := client.hgetall(name):  # else it has expired since
                found.append(Failures(count=int(fields[b"count"]), reason=fields[b"reason"].decode(), **of))
    return found


def _stored(client: "redis.Redis", settings: Settings, prefix: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The names in Redis with this prefix, and their `account`, `key` and `is_own`. See `Throttle._named`."""
    own = key_ids(settings)
    for name in client.scan_iter(prefix + "*", count=1000):
        head, slash, user = name.decode().removeprefix(prefix).partition("/")
        account, _, key = head.partition(":")  # a worker of an older version writes no key
        is_own = own[account] == key if key and account in own else None
        yield name, {"account": account + slash + user, "key": key, "is_own": is_own}


def _decode(raw: bytes) -> _StoredPause:
    try:
        return msgspec.json.decode(raw, type=_StoredPause)
    except msgspec.DecodeError:  # written by a worker of an older version, which stores only the reason
        return _StoredPause("asked", raw.decode(errors="replace"))
