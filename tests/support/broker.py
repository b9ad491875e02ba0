"""Messages of a broker, and a fake broker that runs in a thread."""

import base64
import json
import threading
from typing import Any

import redis
from fakeredis import TcpFakeServer


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
