"""Flask on granian's event loop: no request holds a thread while its body arrives or while the broker confirms.

Under WSGI each request holds one of the threads: 250 connections that send a byte a second stop the endpoint
(measured); here each costs only its buffer. It is also faster, because passing a request between threads costs more
than verifying it.
"""

import asyncio
import io
import logging
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from flask import Flask, Response, request

from app.config.settings import Settings
from app.errors import PublishFailed
from app.observability import tracing
from app.web.batcher import Batcher
from app.web.webhooks import Accepted, finish, make_receivers, on_error, record_rejection, too_large, unavailable

log = logging.getLogger(__name__)
BODY_SECONDS = 15.0  # to receive a whole body; longer than any sender waits (Junction 15 s, Terra 8 s)
INLINE_BYTES = 256 * 1024  # a larger body takes milliseconds to verify and seal, so a thread does it
SMALL_BYTES = 16 * 1024  # read in one step, which saves 20 us, and outside the budget: thousands of them fit in memory
BUFFERED_BODIES = 8  # memory budget of the bodies that are arriving, in bodies of the maximum size


class Scope(Protocol):
    """Granian's description of a request (RSGI 1.6)."""

    method: str
    path: str
    query_string: str
    http_version: str
    scheme: str
    server: str
    client: str
    headers: Any


class _BodyRejected(Exception):
    """The body exceeds its limit, or the bodies that are arriving exceed their budget."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self.answer = answer


class Server:
    """The RSGI application."""

    def __init__(self, flask: Flask, batcher: Batcher, settings: Settings, body_seconds: float = BODY_SECONDS) -> None:
        self._flask, self._batcher, self._body_seconds = flask, batcher, body_seconds
        self._receivers = make_receivers(settings)
        self._max_bytes = settings.max_body_bytes
        self._buffered, self._max_buffered = 0, BUFFERED_BODIES * max(self._max_bytes, 1024 * 1024)

    async def __rsgi__(self, scope: Scope, protocol: Any) -> None:
        """Answers one request."""
        try:
            answer = await self._answer(scope, protocol)
        except Exception as error:  # noqa: BLE001 - the process edge; a sender that disconnects ends here as well
            log.warning("a request failed: %s", type(error).__name__)
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
        if scope.method != "POST" or len(body) > INLINE_BYTES:
            accepted = await asyncio.to_thread(self._dispatch, scope, body)
        else:
            accepted = self._dispatch(scope, body)
        if isinstance(accepted, Response):
            return accepted
        try:
            await self._batcher.publish_async(accepted.delivery, accepted.span)
        except PublishFailed:
            return finish(accepted, unavailable())
        return finish(accepted, Response(status=202))

    def _dispatch(self, scope: Scope, body: bytes) -> Accepted | Response:
        """Flask routes the request. A webhook goes to its receiver and not to its view, which would hold a thread."""
        with self._flask.request_context(_environ(scope, body)):
            rule = request.url_rule
            receive = self._receivers.get(rule.rule) if rule and scope.method == "POST" else None
            try:
                return receive(request.headers, body) if receive else self._flask.full_dispatch_request()
            except Exception as error:  # noqa: BLE001 - as Flask does around a view
                return self._flask.make_response(on_error(error))

    async def _body(self, scope: Scope, protocol: Any) -> bytes:
        """The raw bytes. Raises _BodyRejected as soon as a limit is exceeded."""
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


def _environ(scope: Scope, body: bytes) -> dict[str, Any]:
    """The WSGI environ of a request (PEP 3333). A repeated header is joined with commas."""
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
    }
    for name, value in scope.headers.items():
        key = "HTTP_" + name.upper().replace("-", "_")
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    environ.pop("HTTP_TRANSFER_ENCODING", None)
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    environ["CONTENT_LENGTH"] = str(len(body))
    return environ
