"""Publishes messages of deliveries to Redis or Valkey on an event loop: one round trip, without a thread or kombu."""

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence

import redis
from redis.asyncio.connection import AbstractConnection

from app.broker.lanes import APPLY
from app.broker.sentinel import (
    POLL_SECONDS,
    PUBLISH_SECONDS,
    Address,
    Command,
    finder,
    make_connection,
    need_replicas,
    version_of,
    wait_commands,
)
from app.broker.task_message import task_message
from app.config import sentinel_url
from app.config.settings import Settings
from app.delivery import Delivery, pack
from app.errors import PublishFailed
from app.observability import tracing

PROBE = "headrace:replicated"  # a key that is written to test whether the replicas confirm
LARGE_BYTES = 256 * 1024  # a larger message takes milliseconds to build, so a thread does it: 60 MB take 0.6 s


class RedisPublisher:
    """Publishes over one connection; for one event loop, and one message at a time."""

    def __init__(self, settings: Settings, lane: str = "live") -> None:
        self._url, self._replicas = settings.need_broker(), settings.broker_replicas
        self._lane = lane
        self._sentinels = finder(sentinel_url.read(self._url)) if sentinel_url.is_sentinel(self._url) else None
        self._connection: AbstractConnection | None = None
        self._primary: Address | None = None  # behind Sentinel: the node of the connection
        self._waits: Sequence[Command] = ()  # for the replicas

    async def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Returns once the broker and the required replicas have the message on disk.

        Raises PublishFailed if that is not certain. If the broker has closed the connection of earlier messages, the
        message is published over a new one. Publishing it twice would change nothing.
        """
        is_large = sum(len(one.sealed) for one in deliveries) > LARGE_BYTES
        message = await asyncio.to_thread(self._message, deliveries) if is_large else self._message(deliveries)
        await self._within_limits(self._push(message), "the broker did not confirm")

    def _message(self, deliveries: Sequence[Delivery]) -> bytes:
        count = f"({len(deliveries)} deliveries)"  # shown by Flower and in logs
        return task_message(APPLY, pack(deliveries), self._lane, count, tracing.inject())

    def ping(self) -> None:
        """Raises PublishFailed if the broker does not accept messages.

        For a thread without an event loop. Closes the connection, which other threads must not use.
        """
        asyncio.run(self._check())

    async def _check(self) -> None:
        try:
            await self._within_limits(self._connect(), "the broker cannot be reached or accepts no messages")
            await self.close()
        finally:
            await asyncio.sleep(0)  # asyncio closes the socket in its next round

    async def close(self) -> None:
        """Closes the connection; the next publish opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _within_limits(self, work: Coroutine[None, None, None], what: str) -> None:
        """Limits the time, and reports every error as PublishFailed.

        Any error ends the connection: a reply may still arrive, or the node may have been replaced.
        """
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await work
        except (redis.RedisError, OSError) as error:  # TimeoutError is an OSError
            await self.close()
            raise PublishFailed(f"{what} ({type(error).__name__})") from error
        except BaseException:
            await self.close()
            raise

    async def _push(self, message: bytes) -> None:
        if self._is_connected():
            with contextlib.suppress(redis.ConnectionError):
                await self._execute("LPUSH", self._lane, message)
                return
        await self._connect()
        await self._execute("LPUSH", self._lane, message)

    def _is_connected(self) -> bool:
        is_replaced = self._sentinels and self._primary and self._sentinels.is_replaced(self._primary)
        return self._connection is not None and not is_replaced

    async def _connect(self) -> None:
        """Raises NotReplicated if the replicas do not confirm a write.

        Otherwise each repeated webhook would put another copy of its message into the lane before it is refused.
        """
        await self.close()
        if self._sentinels:
            self._primary = await asyncio.to_thread(self._sentinels.primary, POLL_SECONDS)
        self._connection = connection = make_connection(self._url, self._primary)
        self._waits = ()
        await connection.connect()  # type: ignore[no-untyped-call]
        await self._execute("PING")  # a frozen broker accepts connections
        if self._replicas:
            self._waits = wait_commands(self._replicas, version_of(await self._execute("INFO", "server")))
            await self._execute("SET", PROBE, 1, "PX", 60_000)

    async def _execute(self, *command: str | int | bytes) -> object:
        """The reply. Raises RedisError, and NotReplicated if the required replicas have not confirmed in time."""
        connection = self._connection
        if connection is None:
            raise redis.ConnectionError("not connected")
        await connection.send_packed_command(connection.pack_commands((command, *self._waits)), check_health=False)
        reply = await connection.read_response()
        answers = [await connection.read_response() for _ in self._waits]
        if answers:
            need_replicas(answers[-1], self._replicas)
        return reply
