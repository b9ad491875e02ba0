"""Messages of a broker, and a fake broker that runs in a thread."""

import asyncio
import base64
import contextvars
import json
import threading
from collections.abc import Sequence
from typing import Any

import redis
from fakeredis import TcpFakeServer

from app.broker.redis_publisher import RedisPublisher
from app.config.settings import Settings
from app.delivery import Delivery


class BlockingPublisher:
    """The endpoint's publisher for Redis, for tests without an event loop."""

    def __init__(self, settings: Settings, lane: str = "live") -> None:
        self._settings = settings
        self.publisher, self._runner = RedisPublisher(settings, lane), asyncio.Runner()

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Raises PublishFailed."""
        self._runner.run(self.publisher.publish(deliveries), context=contextvars.copy_context())

    def ping(self) -> None:
        """Raises PublishFailed."""
        RedisPublisher(self._settings).ping()

    def close(self) -> None:
        """The next publish connects anew."""
        self._runner.run(self.publisher.close())
        self._runner.run(asyncio.sleep(0.01))  # asyncio closes the socket in one of its next rounds
        self._runner.close()
        self._runner = asyncio.Runner()


def waiting(url: str, lane: str = "live") -> list[dict[str, Any]]:
    """The Celery messages on a lane, oldest first."""
    with redis.Redis.from_url(url) as client:
        return [json.loads(message) for message in reversed(client.lrange(lane, 0, -1))]


def arguments(message: dict[str, Any]) -> list[Any]:
    """The positional arguments in a task message."""
    return list(json.loads(base64.b64decode(message["body"]))[0])


def fake_server(port: int = 0) -> TcpFakeServer:
    """A fakeredis server in its own thread."""
    server = TcpFakeServer(("127.0.0.1", port), server_type="valkey")
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def stop(server: TcpFakeServer) -> None:
    """Stops the server and closes its connections."""
    server.shutdown()
    server.server_close()
