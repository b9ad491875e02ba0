"""Requests of granian (RSGI) as WSGI environs."""

import io
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes


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


class RsgiHeaders(dict[str, str]):
    """The headers of a request by name in lower case. A repeated header is joined with commas."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        for name, value in scope.headers.items():
            self[name] = f"{self[name]},{value}" if name in self else value

    def get(self, name: str, default: Any = None, /) -> Any:
        return super().get(name.lower(), default)


def decoded_path(scope: Scope) -> str:
    """The decoded path as in WSGI (PEP 3333): each byte is a character."""
    path = scope.path
    return unquote_to_bytes(path).decode("latin-1") if "%" in path or not path.isascii() else path


def wsgi_environ(scope: Scope, body: bytes = b"") -> dict[str, Any]:
    """The WSGI environ of a request (PEP 3333). A repeated header is joined with commas."""
    host, _, port = scope.server.rpartition(":")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": scope.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": decoded_path(scope),
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
    environ |= {"HTTP_" + name.upper().replace("-", "_"): value for name, value in RsgiHeaders(scope).items()}
    environ.pop("HTTP_TRANSFER_ENCODING", None)
    environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
    environ["CONTENT_LENGTH"] = environ.pop("HTTP_CONTENT_LENGTH", "")
    return environ
