"""Flask on granian's event loop: a request holds no thread while its body arrives or its message becomes durable.

Under WSGI each request holds one of the threads, and 250 connections that send a byte a second stop the endpoint
(measured); here they cost their buffers. It is also faster, because handing a request from thread to thread and back
costs more than verifying it.
"""

import asyncio
import io
import logging
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from flask import Flask, Response

from app.config.settings import Settings
from app.errors import PublishFailed
from app.observability import tracing
from app.web.batcher import Batcher
from app.web.webhooks import BATCHER_AWAITED, BODY_KEY, PendingAck, finish, record_rejection, too_large, unavailable

log = logging.getLogger(__name__)
BODY_SECONDS = 15.0  # for a whole body: after that no sender waits any more (Junction 15 s, Terra 8 s)
INLINE_BYTES = 256 * 1024  # a larger body takes milliseconds to verify and seal, and is worked on beside the loop
SMALL_BYTES = 16 * 1024  # are read in one step, which costs 20 us less, and not counted: thousands of them are nothing
BUFFERED_BODIES = 8  # of the largest size: so much may be in memory of bodies that are still arriving


class Scope(Protocol):
    """What granian tells of a request (RSGI 1.6)."""

    method: str
    path: str
    query_string: str
    http_version: str
    scheme: str
    server: str
    client: str
    headers: Any


class _BodyRejected(Exception):
    """More than is taken: of this body, or of all that are arriving."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self.answer = answer


class Server:
    """The RSGI application."""

    def __init__(self, flask: Flask, batcher: Batcher, settings: Settings, body_seconds: float = BODY_SECONDS) -> None:
        self._flask, self._batcher, self._body_seconds = flask, batcher, body_seconds
        self._max_bytes = settings.max_body_bytes
        self._buffered, self._max_buffered = 0, BUFFERED_BODIES * max(self._max_bytes, 1024 * 1024)

    async def __rsgi__(self, scope: Scope, protocol: Any) -> None:
        """Answers one request."""
        try:
            answer = await self._answer(scope, protocol)
        except Exception as error:  # noqa: BLE001 - the process edge, where a sender that has hung up ends as well
            log.warning("a request ended with %s", type(error).__name__)
            answer = record_rejection(scope.path, unavailable())
        protocol.response_bytes(answer.status_code, list(answer.headers.items()), answer.get_data())

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Granian calls this when the process ends."""
        tracing.stop()

    async def _answer(self, scope: Scope, protocol: Any) -> Response:
        try:
            async with asyncio.timeout(self._body_seconds):
                body = await self._body(scope, protocol)
        except _BodyRejected as rejected:
            return record_rejection(scope.path, rejected.answer)
        except TimeoutError:
            return record_rejection(scope.path, unavailable())
        environ = _environ(scope, body)
        if scope.method != "POST" or len(body) > INLINE_BYTES:
            answer = await asyncio.to_thread(self._dispatch, environ)
        else:
            answer = self._dispatch(environ)
        return await self._finish(answer) if isinstance(answer, PendingAck) else answer

    async def _finish(self, ack: PendingAck) -> Response:
        """Waits until the broker has it. The 202 was a promise of this."""
        try:
            await self._batcher.publish_async(ack.delivery, ack.span)
        except PublishFailed:
            return finish(ack, unavailable())
        return finish(ack, ack)

    async def _body(self, scope: Scope, protocol: Any) -> bytes:
        """The raw bytes. Raises _BodyRejected, before it has read more than it may."""
        declared_length = int(scope.headers.get("content-length") or -1)
        if declared_length > self._max_bytes:
            raise _BodyRejected(too_large())
        if 0 <= declared_length <= SMALL_BYTES:
            body = bytes(await protocol())
            if len(body) > self._max_bytes:
                raise _BodyRejected(too_large())
            return body
        parts: list[bytes] = []
        size = 0
        try:
            async for part in protocol:
                size += len(part)
                self._buffered += len(part)
                parts.append(part)
                if size > self._max_bytes:
                    raise _BodyRejected(too_large())
                if self._buffered > self._max_buffered:
                    raise _BodyRejected(unavailable())
        finally:
            self._buffered -= size
        return b"".join(parts)

    def _dispatch(self, environ: dict[str, Any]) -> Response:
        with self._flask.request_context(environ):
            return self._flask.full_dispatch_request()


def _environ(scope: Scope, body: bytes) -> dict[str, Any]:
    """The request as WSGI has it (PEP 3333)."""
    host, _, port = scope.server.rpartition(":")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(scope.path).decode("latin-1"),
        "QUERY_STRING": scope.query_string,
        "SERVER_NAME": host,
        "SERVER_PORT": port,
        "SERVER_PROTOCOL": f"HTTP/{scope.http_version}",
        "REMOTE_ADDR": scope.client.rpartition(":")[0],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.scheme,
        "wsgi.input": io.BytesIO(body),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        BATCHER_AWAITED: True,
        BODY_KEY: body,
    }
    for name, value in scope.headers.items():
        key = "HTTP_" + name.upper().replace("-", "_")
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    environ.pop("HTTP_TRANSFER_ENCODING", None)
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    environ["CONTENT_LENGTH"] = str(len(body))
    return environ
