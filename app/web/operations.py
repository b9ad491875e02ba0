"""`python -P -m app.web.operations`: /metrics, /readyz and /livez on a port of their own, in a process of its own.

The web processes stay free of this work: an exposition of all processes' metrics takes tens of milliseconds.
"""

import logging
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from app.config.settings import load
from app.errors import PublishFailed
from app.observability import logs, metrics
from app.web.publishing import make_publisher
from app.web.readiness import Readiness, start_readiness

CONCURRENT = 16  # more requests at once are closed without an answer
REQUEST_SECONDS = 5.0
BIND_SECONDS = 5.0  # between two attempts to bind a port that is in use
PARENT_SECONDS = 1.0  # between two checks whether the parent still runs
log = logging.getLogger(__name__)


class OperationsServer(ThreadingHTTPServer):
    """Answers a limited number of requests at once, each in a thread."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, readiness: Readiness) -> None:
        """Binds the port. Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.readiness = readiness
        self._free = threading.BoundedSemaphore(CONCURRENT)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Binds the port without the name look-up of HTTPServer, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: "socket.socket | tuple[bytes, socket.socket]", client_address: object) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(
        self, request: "socket.socket | tuple[bytes, socket.socket]", client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Handler(BaseHTTPRequestHandler):
    server: OperationsServer
    timeout = REQUEST_SECONDS
    server_version, sys_version = "headrace", ""

    def do_GET(self) -> None:
        if self.path == "/livez":
            self._send(200, b"up\n")
        elif self.path == "/readyz":
            try:
                self.server.readiness.check()
            except PublishFailed as reason:
                self._send(503, f"{reason}\n".encode())
            else:
                self._send(200, b"ready\n")
        elif self.path.partition("?")[0] == "/metrics":
            self._send(200, metrics.exposition())
        else:
            self._send(404, b"/metrics, /readyz or /livez\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Does nothing: probes are not logged."""


def _bound(host: str, port: int, readiness: Readiness) -> OperationsServer:
    """The server. Waits for the port while it is in use."""
    is_logged = False
    while True:
        try:
            return OperationsServer(host, port, readiness)
        except OSError as error:
            if not is_logged:
                log.warning(
                    "HEADRACE_OPERATIONS_PORT: %d on %s cannot be used (%s); webhooks are received without /metrics",
                    port,
                    host,
                    error.strerror,
                )
            is_logged = True
            time.sleep(BIND_SECONDS)


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, even by SIGKILL."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(0)


def main() -> None:
    """Serves the operations port of the parent process until that ends."""
    parent = os.getppid()
    settings = load()
    logs.configure(settings)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _, ping = make_publisher(settings)
    readiness = start_readiness(settings, ping)
    _bound(settings.operations_host, settings.operations_port, readiness).serve_forever()


if __name__ == "__main__":
    main()
