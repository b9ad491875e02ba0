"""Clients of Redis and Valkey. Behind Sentinel, each new connection is opened to the present primary."""

import logging
import socket
import time
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakSet

import redis
from redis.asyncio import Connection as AsyncConnection
from redis.asyncio import ConnectionPool, SSLConnection
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from app.config import sentinel_url
from app.config.sentinel_url import SentinelUrl

Address = tuple[str, int]
Answer = tuple[int, Address | None]  # the configuration epoch, and the primary's address, None if it is down
Command = tuple[str | int | bytes, ...]
WAITAOF_SINCE = (7, 2)
log = logging.getLogger(__name__)
PUBLISH_SECONDS, CONNECT_SECONDS = 2.0, 1.0  # a publish may include a new connection
WAIT_FOR_REPLICAS_SECONDS = 0.6  # twice per publish, together less than PUBLISH_SECONDS; usually a few ms
# The kernel closes a connection 14 s after the broker's machine is lost, even one that only waits for broadcasts.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
KEEPALIVE = {getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
POLL_SECONDS = 0.5  # the maximum age of an answer, which all connections of a process share
SENTINEL_SECONDS = 0.5  # a sentinel answers from memory, so a slower one is down
SILENT_SECONDS = 5.0  # in which a silent sentinel is not asked again if another one has answered
# A connection that the server has closed is opened again. A timeout is not repeated: it would double the wait.
RECONNECT_ONCE = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))


class NotReplicated(redis.ConnectionError):
    """Too few replicas have confirmed (HEADRACE_BROKER_REPLICAS). As a connection error, it makes clients reconnect."""


class PrimaryFinder(Sentinel):
    """The address of the primary, from a majority of the sentinels.

    redis-py trusts the first sentinel that answers. On the machine of an isolated old primary that clients still reach,
    a sentinel names the old primary until the partition ends. Here the answer with the highest configuration epoch
    counts: sentinels raise the epoch with every failover.
    """

    def __init__(self, url: SentinelUrl) -> None:
        self.url = url
        self._failed_at: dict[int, float] = {}  # by id of the sentinel's client, to ask silent ones last
        self._pools: WeakSet[SentinelConnectionPool] = WeakSet()
        self._found: Address | None = None  # in the last answer
        self._last: Address | None = None  # the last primary that was found
        self._found_at = float("-inf")
        login = {"username": url.sentinel_username, "password": url.sentinel_password, "decode_responses": True}
        timeouts = {"socket_timeout": SENTINEL_SECONDS, "socket_connect_timeout": SENTINEL_SECONDS}
        tls = {} if url.sentinel_tls is None else {"ssl": True, **dict(url.sentinel_tls)}
        super().__init__(  # type: ignore[no-untyped-call]
            url.sentinels, sentinel_kwargs={**login, **timeouts, **tls, "retry": RECONNECT_ONCE, "protocol": 2}
        )

    def discover_master(self, service_name: str) -> Address:
        """redis-py calls this before it connects. Raises MasterNotFoundError."""
        answers: list[Answer] = []
        for client in sorted(self.sentinels, key=self._last_failure):
            is_silent = time.monotonic() - self._last_failure(client) < SILENT_SECONDS
            if _newest(answers) and (is_silent or len(answers) > len(self.sentinels) / 2):
                break
            answers += self._ask(client, service_name)
        newest = _newest(answers)
        self._remember(newest)
        if newest is None:
            raise MasterNotFoundError(
                f"{len(answers)} of {len(self.sentinels)} sentinels know {service_name}, and no primary that is up"
            )
        return newest

    def primary(self, max_age: float) -> Address:
        """As `discover_master`, from an answer that is at most `max_age` seconds old."""
        if time.monotonic() - self._found_at > max_age:
            return self.discover_master(self.url.master)
        if self._found is None:
            raise MasterNotFoundError("no primary is up")
        return self._found

    def is_replaced(self, primary: Address) -> bool:
        """Whether this process knows of another primary by now."""
        return self._last not in (None, primary)

    def pool(self, **options: Any) -> SentinelConnectionPool:
        made = SentinelConnectionPool(self.url.master, self, **options)  # type: ignore[no-untyped-call]
        self._pools.add(made)
        return made

    def _remember(self, primary: Address | None) -> None:
        """Disconnects all pools of the process from a node that was replaced.

        A node that is frozen, or cut off from the others but not from here, does not close connections. By itself, a
        pool would notice that only after timeouts, or never.
        """
        self._found_at, self._found = time.monotonic(), primary
        if primary is None:
            return
        if self._last not in (None, primary):
            log.warning("the primary of the broker is now %s:%d", *primary)
        self._last = primary
        for pool in list(self._pools):
            if pool.master_address not in (None, primary):
                pool.proxy.reset()  # type: ignore[no-untyped-call]
                pool.disconnect()

    def _last_failure(self, client: redis.Redis) -> float:
        return self._failed_at.get(id(client), float("-inf"))

    def _ask(self, client: redis.Redis, name: str) -> list[Answer]:
        """The answer of one sentinel; none if it is silent or does not monitor a primary of this name.

        SENTINEL MASTER names the new primary only after all replicas follow it, GET-MASTER-ADDR-BY-NAME at once.
        """
        try:
            with client.pipeline(transaction=False) as pipeline:
                pipeline.sentinel_master(name)
                pipeline.sentinel_get_master_addr_by_name(name)
                state, address = pipeline.execute()
        except redis.RedisError:  # counted in the message of MasterNotFoundError
            self._failed_at[id(client)] = time.monotonic()
            return []
        is_down = state["is_sdown"] and address == (state["ip"], state["port"])
        return [(state["config-epoch"], None if is_down else address)]


def _newest(answers: list[Answer]) -> Address | None:
    return max(answers, key=lambda one: (one[0], one[1] is not None), default=(0, None))[1]


_finders: dict[str, PrimaryFinder] = {}


def finder(url: SentinelUrl) -> PrimaryFinder:
    """The finder of this process, which remembers silent sentinels from one connection to the next."""
    known = _finders.get(url.name)
    if known is None or known.url != url:
        known = _finders[url.name] = PrimaryFinder(url)
    return known


def finder_named(name: str) -> PrimaryFinder:
    """The finder with this `url.name`. Celery's options hold the name, because Celery and Flower show them."""
    return _finders[name]


def _login(url: SentinelUrl) -> dict[str, Any]:
    return {"username": url.username, "password": url.password, "db": url.database, **dict(url.tls or ())}


def make_client(url: str, node: Address | None = None, *, timeout: float, connect_timeout: float) -> redis.Redis:
    """A client of a redis://, rediss:// or sentinel:// URL: of the primary, or of `node` with the same login.

    The timeouts are in seconds.
    """
    options: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": connect_timeout}
    # By default redis-py reads its version from disk for each client, and opens each connection in four round trips.
    options |= {"retry": RECONNECT_ONCE, "protocol": 2, "driver_info": None}
    if not sentinel_url.is_sentinel(url):
        return redis.Redis.from_url(url if node is None else _with_host(url, node), **options)
    parts = sentinel_url.read(url)
    options |= _login(parts) | ({} if parts.tls is None else {"ssl": True})
    if node is not None:
        return redis.Redis(*node, **options)
    return redis.Redis(connection_pool=finder(parts).pool(**options))


def make_connection(url: str, node: Address | None = None) -> AbstractConnection:
    """A connection of an event loop, not yet open, for a publisher; of a sentinel:// URL to `node`.

    It has no timeout of its own for replies.
    """
    options: dict[str, Any] = {"socket_timeout": None, "socket_connect_timeout": CONNECT_SECONDS, "protocol": 2}
    options |= {"socket_keepalive_options": KEEPALIVE, "driver_info": None}
    if node is None:
        pool: Any = ConnectionPool.from_url(url, **options)
        return cast("AbstractConnection", pool.make_connection())
    parts = sentinel_url.read(url)
    host, port = node
    connection_class = AsyncConnection if parts.tls is None else SSLConnection
    return connection_class(host=host, port=port, **options, **_login(parts))


def wait_commands(replicas: int, version: str) -> tuple[Command, ...]:
    """The commands to send after a write, in the same round trip, to wait until the replicas have it on disk.

    WAIT until the replicas have executed the write, then WAITAOF until it is on their disks. WAITAOF alone took 600 ms
    (median), and 1 to 3 ms after WAIT: a replica that is asked in the same round in which it executes a write reports
    what was on disk before, and reports the rest a second later by itself. Redis before 7.2 lacks WAITAOF:
    `need_durable` then requires replicas with `appendfsync always`, which answer WAIT after their fsync.
    """
    milliseconds = int(WAIT_FOR_REPLICAS_SECONDS * 1000)
    wait: Command = ("WAIT", replicas, milliseconds)
    return (wait, ("WAITAOF", 1, replicas, milliseconds)) if has_waitaof(version) else (wait,)


def need_replicas(answer: Any, replicas: int) -> None:
    """Checks the answer to the last of `wait_commands`. Raises NotReplicated."""
    confirmed = answer[1] if isinstance(answer, list) else answer
    if confirmed < replicas:
        raise NotReplicated(f"{confirmed} of {replicas} replicas have confirmed")


def _with_host(url: str, node: Address) -> str:
    host, port = node
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[:2]
    return urlunsplit(parts._replace(netloc=f"{''.join(login)}{f'[{host}]' if ':' in host else host}:{port}"))


def version_of(info: Any) -> str:
    """`redis_version` in the reply to INFO, which is bytes."""
    lines = (line.partition(b":") for line in info.splitlines())
    return str(next(value.decode() for name, _, value in lines if name == b"redis_version"))


def has_waitaof(version: str) -> bool:
    """Whether a server with this `redis_version` can wait for the disks of its replicas. Valkey reports 7.2.4."""
    return tuple(map(int, version.split(".")[:2])) >= WAITAOF_SINCE
