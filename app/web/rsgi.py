"""Flask on granian's event loop: a request does not hold a thread while its body arrives or the broker confirms.

Under WSGI each request holds a thread: 250 connections that send a byte a second stop the endpoint (measured). Here
each costs only its buffer. It is also faster, because passing a request between threads costs more than verifying it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from flask import Flask, Response
from granian.rsgi import ProtocolClosed, ProtocolError  # type: ignore[attr-defined] # not declared as exports

from app.config.settings import Settings
from app.delivery import Headers
from app.errors import PublishFailed
from app.observability import tracing
from app.signatures.hashing import HashedBody, HmacInput
from app.web.batcher import Batcher
from app.web.environ import RsgiHeaders, Scope, decoded_path, wsgi_environ
from app.web.limits import BodyBudget, BudgetExceeded
from app.web.webhooks import (
    ACCEPTED,
    Accepted,
    Receiver,
    canonical,
    close_connection,
    failure,
    finish,
    make_receivers,
    on_error,
    unverified,
)

log = logging.getLogger(__name__)
BODY_SECONDS = 15.0  # to receive a whole body; longer than any sender waits (Junction 15 s, Terra 8 s)
SMALL_BODY_SECONDS = 5.0  # to receive a small body, or the first SMALL_BYTES of a larger one
REFUSED_SECONDS = 1.0  # to receive a small body if its headers cannot be valid
INLINE_BYTES = 256 * 1024  # a larger body takes milliseconds to seal, so a thread does it, and is hashed as it arrives
SMALL_BYTES = 16 * 1024  # read in one step, which saves 20 us, and not counted in the budget: thousands fit in memory
ACCEPTED_HEADERS = list(ACCEPTED.headers.items())
OVERSIZE = 2  # bodies up to twice the limit are hashed, not kept: a 413 counts for alerts only if the signature fits


class _Unread(Exception):
    """The body did not arrive as a whole, so its signature cannot be checked."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self.answer = answer


class _Body:
    """An arriving body: its bytes unless it is too large, and its hash if it may be large."""

    def __init__(self, inputs: Sequence[HmacInput], max_bytes: int, declared: int) -> None:
        self.declared, self._max_bytes = declared, max_bytes
        self.hashed = None if 0 <= declared <= min(INLINE_BYTES, max_bytes) else HashedBody(inputs)
        # One buffer that grows in place, because joining parts would need twice as much memory.
        self.data = bytearray()
        self.size = 0

    @property
    def is_too_large(self) -> bool:
        return self.size > self._max_bytes

    def add(self, part: bytes, hold: Callable[[int], None]) -> None:
        """Adds a part, for which `hold` takes memory. Raises _Unread if the body exceeds every limit."""
        self.size += len(part)
        if self.size > OVERSIZE * self._max_bytes:
            raise _Unread(failure(413))
        if self.hashed:
            self.hashed.update(part)
        if not self.is_too_large:
            hold(len(part))
            self.data += part
        elif self.data:
            self.data = bytearray()


class Server:
    def __init__(self, flask: Flask, batcher: Batcher, settings: Settings) -> None:
        self._flask, self._batcher = flask, batcher
        self._receivers = make_receivers(settings)
        self._max_bytes = settings.max_body_bytes
        self.budget = BodyBudget(settings)
        # Sealing needs several times the size of a body, so a process seals one large body at a time.
        self._sealing_large = asyncio.Semaphore(1)

    async def __rsgi__(self, scope: Scope, protocol: Any) -> None:
        try:
            answer = await self._answer(scope, protocol)
        except Exception as error:  # noqa: BLE001 - the process edge; a sender that disconnects ends here as well
            log.warning("a request failed: %s", type(error).__name__)
            answer = unverified(scope.path, failure(503))
        if answer is ACCEPTED:
            protocol.response_empty(202, ACCEPTED_HEADERS)
        else:
            protocol.response_bytes(answer.status_code, list(answer.headers.items()), answer.get_data())

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Granian calls this when the process ends."""
        tracing.stop()

    async def _answer(self, scope: Scope, protocol: Any) -> Response:
        """The answer: a webhook goes directly to its receiver, every other request through Flask.

        Flask dispatches a request only within a request context. A signed webhook does not need one, and costs 38 us
        less without it (of 73 us of Python). Flask's view would also hold a thread.
        """
        receiver = self._receivers.get(canonical(decoded_path(scope))) if scope.method == "POST" else None
        if receiver is None:
            return self._other_route(wsgi_environ(scope))
        headers = RsgiHeaders(scope)
        # Hyper has checked the length, and accepts a repeated one if all are equal. -1: a chunked body.
        declared = int((headers.get("content-length") or "-1").partition(",")[0])
        if 0 <= declared <= SMALL_BYTES:
            return await self._small(receiver, headers, protocol)
        return await self._large(receiver, headers, protocol, declared)

    def _other_route(self, environ: dict[str, Any]) -> Response:
        """The answer of a view, which must not block. The body of such a request is not read."""
        with self._flask.request_context(environ):
            try:
                answer = self._flask.full_dispatch_request()
            except Exception as error:  # noqa: BLE001 - as Flask does around a view
                answer = self._flask.make_response(on_error(error))
        return close_connection(answer) if answer.status_code >= 400 else answer

    async def _small(self, receiver: Receiver, headers: Headers, protocol: Any) -> Response:
        """Answers a webhook with a small body. If the body is slow, the headers are checked before it has arrived.

        Checking them twice for every webhook would cost 8 % of the route. An answer before the end of the body could be
        lost, because the connection is reset.
        """
        refused: list[Response] = []
        try:
            async with asyncio.timeout(None) as limit:
                loop = asyncio.get_running_loop()
                until = loop.time() + SMALL_BODY_SECONDS

                def check_headers() -> None:
                    """Limits the wait for the body, and ends it at once if the headers cannot be valid."""
                    answer = receiver.precheck(headers, is_small=True)
                    if isinstance(answer, Response):
                        refused.append(answer)
                    limit.reschedule(0.0 if refused else until)

                timer = loop.call_later(REFUSED_SECONDS, check_headers)
                try:
                    body = bytes(await protocol())
                finally:
                    timer.cancel()
        except TimeoutError:
            return refused[0] if refused else receiver.unverified(failure(408))
        except (ProtocolClosed, ProtocolError):
            return receiver.unverified(failure(400))
        accepted = receiver.receive(headers, body, is_too_large=len(body) > self._max_bytes)
        return accepted if isinstance(accepted, Response) else await self._publish(accepted)

    async def _large(self, receiver: Receiver, headers: Headers, protocol: Any, declared: int) -> Response:
        """Answers a webhook with a larger body, whose headers are checked first."""
        inputs = receiver.precheck(headers)
        if isinstance(inputs, Response):
            return inputs
        if declared > OVERSIZE * self._max_bytes:
            return receiver.unverified(failure(413))
        with self.budget.hold() as hold:
            body = _Body(inputs, self._max_bytes, declared)
            try:
                await self._read(body, protocol, hold)
            except _Unread as reason:
                return receiver.unverified(reason.answer)
            accepted = await self._receive(receiver, headers, body)
            del body  # the delivery holds the sealed body
            return accepted if isinstance(accepted, Response) else await self._publish(accepted)

    async def _receive(self, receiver: Receiver, headers: Headers, body: _Body) -> Accepted | Response:
        data, hashed = cast("bytes", body.data), body.hashed  # HMAC, zlib and AES-GCM read any buffer without a copy
        if len(data) <= INLINE_BYTES:
            return receiver.receive(headers, bytes(data), hashed, is_too_large=body.is_too_large)
        async with self._sealing_large:
            return await asyncio.to_thread(receiver.receive, headers, data, hashed, is_too_large=body.is_too_large)

    async def _publish(self, accepted: Accepted) -> Response:
        try:
            await self._batcher.publish(accepted.delivery, accepted.span)
        except PublishFailed:
            return finish(accepted, failure(503))
        return finish(accepted, ACCEPTED)

    async def _read(self, body: _Body, protocol: Any, hold: Callable[[int], None]) -> None:
        """Reads a body part by part. Raises _Unread as soon as a limit is exceeded.

        Granian reports a cut body like a whole one, so only the declared length shows the difference. If no length is
        declared (chunked), the signature of a cut body does not fit.
        """
        try:
            async with asyncio.timeout(SMALL_BODY_SECONDS) as limit:
                latest = asyncio.get_running_loop().time() + BODY_SECONDS
                async for part in protocol:
                    body.add(part, hold)
                    if body.size >= SMALL_BYTES and limit.when() != latest:
                        limit.reschedule(latest)
        except TimeoutError:
            raise _Unread(failure(413) if body.is_too_large else failure(408)) from None
        except BudgetExceeded:
            raise _Unread(failure(503)) from None
        except (ProtocolClosed, ProtocolError):
            raise _Unread(failure(400)) from None
        if body.declared not in (-1, body.size):
            raise _Unread(failure(400))
