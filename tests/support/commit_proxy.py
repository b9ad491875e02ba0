"""A proxy in front of PostgreSQL that cuts one connection at COMMIT, as a lost primary or a network fault does."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

Moment = Literal["before", "after"]
COMMIT = b"Q\x00\x00\x00\x0bCOMMIT\x00"  # the message of a simple query
MAX_READ = 1 << 20


class CommitProxy:
    """Forwards connections to a server. `cut` selects the commit that is interrupted."""

    def __init__(self, database_url: str) -> None:
        where = urlsplit(database_url)
        self._server = where.hostname or "", where.port or 5432
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._commits: Iterator[int] = itertools.count(1)
        self._commit, self._moment = 0, "before"
        self.cuts = 0
        self.is_frozen = threading.Event()  # nothing is forwarded, and nothing is closed
        self.is_last = False  # the cut also ends the server: no later connection is accepted
        port = self._listener.getsockname()[1]
        login = where.netloc.rpartition("@")[0]
        self.url = urlunsplit(where._replace(netloc=f"{login}@127.0.0.1:{port}"))

    def cut(self, commit: int, moment: Moment) -> None:
        """Cuts at the commit with this number, from 1, once: before the server has it, or before its answer arrives."""
        self._commits, self._commit, self._moment, self.cuts = itertools.count(1), commit, moment, 0

    def serve(self) -> None:
        """Accepts connections until the listener is closed."""
        with contextlib.ExitStack() as frozen, contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_frozen.is_set():
                    frozen.enter_context(client)
                    continue
                threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _forward(self, client: socket.socket) -> None:
        is_cut = threading.Event()  # the next answer of the server is dropped
        with client, socket.create_connection(self._server) as server:
            answers = threading.Thread(target=self._copy, args=(server, client, is_cut), daemon=True)
            answers.start()
            with contextlib.suppress(OSError):
                while data := client.recv(MAX_READ):
                    if data.endswith(COMMIT) and next(self._commits) == self._commit:
                        self.cuts += 1
                        if self._moment == "after":
                            is_cut.set()
                            server.sendall(data)
                            answers.join()
                        if self.is_last:
                            self.close()
                        break
                    server.sendall(data)
            for one in (client, server):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            answers.join()

    def _copy(self, server: socket.socket, client: socket.socket, is_cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(MAX_READ):
                if is_cut.is_set():
                    return
                if not self.is_frozen.is_set():
                    client.sendall(data)


@contextmanager
def commit_proxy(database_url: str) -> Iterator[CommitProxy]:
    """A running proxy in front of this server."""
    proxy = CommitProxy(database_url)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
