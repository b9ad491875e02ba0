"""The console's server: Flask on granian's event loop.

A request occupies one of the few threads only after its body has arrived, so slow senders cannot block them.
"""

import asyncio
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flask import Flask
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.rsgi import ProtocolClosed, ProtocolError  # type: ignore[attr-defined] # not declared as exports
from granian.server.embed import Server
from werkzeug.wrappers import Response

from app.config.settings import Settings, load
from app.observability import gc
from app.web.environ import Scope, wsgi_environ
from workers.console.context import THREADS, make_console

HEADER_MILLISECONDS = 5_000
MAX_HEADER_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024  # a form with 500 ids has 10 kB
BODY_SECONDS = 5.0
MAX_WAITING = 64  # requests that wait for a thread; more get a 503
MAX_CONNECTIONS = 256

log = logging.getLogger(__name__)
Answer = tuple[int, list[tuple[str, str]], bytes]


class ConsoleServer:
    def __init__(self, flask: Flask, body_seconds: float = BODY_SECONDS) -> None:
        self._flask, self._body_seconds = flask, body_seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="console")
        self._waiting = 0

    async def __rsgi__(self, scope: Scope, protocol: Any) -> None:
        """Answers one request. `/livez` uses no thread, so that long actions do not look like a process that hangs."""
        if scope.path == "/livez":
            protocol.response_bytes(*_plain(200, "ok\n"))
            return
        try:
            status, headers, body = await self._answer(scope, protocol)
        except Exception as error:  # noqa: BLE001 - the process edge
            log.warning("a request failed: %s", type(error).__name__)
            status, headers, body = _plain(500, "the console failed; its log names the error\n")
        protocol.response_bytes(status, headers, body)

    async def _answer(self, scope: Scope, protocol: Any) -> Answer:
        try:
            async with asyncio.timeout(self._body_seconds):
                body = await _read(protocol)
        except TimeoutError:
            return _plain(408, "the request took too long\n")
        except (ProtocolClosed, ProtocolError):
            return _plain(400, "the request ended early\n")
        if body is None:
            return _plain(413, "the request is too large\n")
        if self._waiting >= MAX_WAITING:
            return _plain(503, "too many requests; try again\n")
        self._waiting += 1
        try:
            # A chunked body had no length.
            environ = wsgi_environ(scope, body) | {"CONTENT_LENGTH": str(len(body))}
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, environ)
        finally:
            self._waiting -= 1

    def _run(self, environ: dict[str, Any]) -> Answer:
        answer = Response.from_app(self._flask, environ, buffered=True)
        return answer.status_code, list(answer.headers), answer.get_data()

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Granian calls this when the process ends."""
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _read(protocol: Any) -> bytes | None:
    """The body; None if it is too large."""
    data = bytearray()
    async for part in protocol:
        data += part
        if len(data) > MAX_BODY_BYTES:
            return None
    return bytes(data)


def _plain(status: int, text: str) -> Answer:
    headers = [("content-type", "text/plain; charset=utf-8"), ("cache-control", "no-store"), ("connection", "close")]
    return status, headers, text.encode()


async def serve(settings: Settings, application: ConsoleServer) -> None:
    """Serves until a signal. In this process: granian's usual server is a parent that waits, with 26 MB of its own."""
    server = Server(
        application,
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        websockets=False,
        address=settings.console_host,
        port=settings.console_port,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_MILLISECONDS, max_buffer_size=MAX_HEADER_BYTES),
        backpressure=MAX_CONNECTIONS,
        log_level=LogLevels.error,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    await server.serve()


def main() -> None:
    """Runs the console. Its argument, if any, is the URL of the endpoint's operations port."""
    settings = load()
    with gc.paused():
        from workers.console.app import create_app  # noqa: PLC0415 - 1 s of CPU

        web = next(iter(sys.argv[1:]), None)
        application = ConsoleServer(create_app(make_console(settings, web)))
    asyncio.run(serve(settings, application))
