"""The snippets for nginx and Caddy in the documentation, run by the real servers in front of a real endpoint."""

import base64
import concurrent.futures
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from app.config.settings import Settings
from tests.deploy.support import DEPLOY
from tests.support import ENCRYPTION_KEY, JUNCTION_SECRET, program, signed, until, workout
from workers.local.ports import free_port

DOCUMENT = DEPLOY / "docs" / "install.md"
MAX_BODY = 64 * 1024 * 1024
MAX_CONNECTIONS = 5  # of one address, in place of the snippet's 200: each costs a TLS handshake
PROXIES = ("nginx", "caddy")


def snippet(heading: str) -> str:
    """The indented block below a line of the documentation."""
    lines = DOCUMENT.read_text().splitlines()
    block = []
    for line in lines[next(n for n, one in enumerate(lines) if one.startswith(heading)) + 1 :]:
        if line and not line.startswith("    "):
            if block:
                break
            continue  # the rest of the heading's paragraph
        block.append(line[4:])
    return "\n".join(block)


def configured(text: str, **changes: str) -> str:
    """The text with other addresses. Each must occur."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, upstream: int) -> list[str]:
    """The command of nginx with the snippet, in a configuration that has only what the snippet leaves out."""
    changes = {
        "127.0.0.1:8000": f"127.0.0.1:{upstream}",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;\n    ssl_certificate cert.pem; ssl_certificate_key key.pem;",
        "YOUR-HOST": "localhost",
        "limit_conn webhooks 200;": f"limit_conn webhooks {MAX_CONNECTIONS};",
    }
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; pid {folder}/pid; error_log stderr; events {{ worker_connections 1024; }}\n"
        f"http {{\naccess_log off;\n{temporary}{configured(snippet('For nginx:'), **changes)}\n}}\n"
    )
    return [binary("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, port: int, upstream: int) -> list[str]:
    """The command of Caddy with the snippet, without its certificates from the network and its port for changes."""
    site = f"https://localhost:{port} {{\n    bind 127.0.0.1\n    tls {folder}/cert.pem {folder}/key.pem"
    changes = {"127.0.0.1:8000": f"127.0.0.1:{upstream}", "YOUR-HOST {": site}
    text = configured(snippet("For Caddy"), **changes)
    (folder / "Caddyfile").write_text(text.replace("{", "{\n    admin off\n    auto_https disable_redirects", 1))
    return [binary("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


def binary(name: str) -> str:
    """The server's path. Skips the test if it is not installed."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed: the snippet of install.md is not tested")
    return found


@pytest.fixture
def upstream(settings: Settings, broker_url: str, tmp_path: Path) -> Iterator[int]:
    """The port of a ready `headrace web`."""
    del settings
    port, log = free_port(), tmp_path / "web.log"
    environment = {
        "BROKER_URL": broker_url,
        "JUNCTION_WEBHOOK_SECRET": JUNCTION_SECRET,
        "HEADRACE_ENCRYPTION_KEY": base64.b64encode(ENCRYPTION_KEY).decode(),
        "HEADRACE_PORT": str(port),
        "HEADRACE_OPERATIONS_PORT": "0",
        "HEADRACE_WEB_PROCESSES": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
    }
    with program("workers.cli", "web", log=log, **environment) as process:
        until(lambda: process.poll() is not None or is_open(port))
        assert process.poll() is None, log.read_text()
        yield port


@pytest.fixture(params=PROXIES)
def proxy(request: pytest.FixtureRequest, upstream: int, tmp_path: Path) -> Iterator[int]:
    """The port of a proxy in front of the endpoint."""
    folder, port = tmp_path / "proxy", free_port()
    folder.mkdir()
    certificate = ("-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-nodes", "-subj", "/CN=localhost")
    openssl = [binary("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *certificate]
    subprocess.run(openssl, cwd=folder, check=True, capture_output=True)
    command = {"nginx": nginx, "caddy": caddy}[request.param](folder, port, upstream)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "log").open("wb") as log, subprocess.Popen(command, env=environment, stderr=log) as process:
        try:
            until(lambda: process.poll() is not None or is_open(port))
            assert process.poll() is None, (folder / "log").read_text()
            yield port
        finally:
            process.terminate()
            process.wait(20)


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def connected(port: int) -> ssl.SSLSocket:
    """A TLS connection to the proxy."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port), timeout=30)
    return context.wrap_socket(plain, server_hostname="localhost")


def request(path: str, length: int, **headers: str) -> bytes:
    """The head of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def status(connection: ssl.SSLSocket) -> int:
    """The status of the answer; 0 if the connection is closed without one."""
    try:
        line = connection.recv(4096).split(b" ")
    except ConnectionResetError:
        return 0
    return int(line[1]) if len(line) > 1 else 0


def seconds_until_cut(port: int, *parts: bytes, every: float = 1.0) -> float:
    """Sends the parts, then one byte per interval, until the proxy answers or closes the connection."""
    began = time.monotonic()
    with connected(port) as connection:
        for part in parts:
            connection.sendall(part)
        connection.settimeout(every)
        while time.monotonic() < began + 40:
            try:
                status(connection)
            except TimeoutError:
                with contextlib.suppress(OSError):
                    connection.sendall(b"x")
                    continue
            break
    return time.monotonic() - began


def test_a_signed_event_passes(proxy: int) -> None:
    """Breaks if a proxy set up as documented loses a header, a path or a byte that the signature covers."""
    body = msgspec.json.encode(workout("u1"))
    for path, headers, expected in (
        ("/webhooks/junction", signed(body), 202),
        ("/webhooks/junction", signed(body + b" "), 401),
        ("/metrics", {}, 404),
        ("/", signed(body), 404),
    ):
        with connected(proxy) as connection:
            connection.sendall(request(path, len(body), **headers) + body)
            assert status(connection) == expected, path


def test_a_body_over_the_limit_is_refused(proxy: int) -> None:
    """Breaks if the proxy forwards bodies that the endpoint refuses, or refuses those that it accepts."""
    with connected(proxy) as connection:
        connection.sendall(request("/webhooks/junction", MAX_BODY + 1, **signed(b"{}")))
        with contextlib.suppress(OSError):
            connection.sendall(bytes(MAX_BODY + 1))
        # Caddy answers 502 if the endpoint, which answers 413, closes the connection while Caddy still sends.
        assert status(connection) in {413, 502}


def test_slow_senders_are_cut(proxy: int) -> None:
    """Breaks if a sender that never completes its headers or its body keeps a connection for longer than documented."""
    head = request("/webhooks/junction", 1000)
    slow = {
        "headers": ((head[:-2],), 5),
        "body": ((head,), 15),  # a byte per second
        "silent body": ((head, b"x"), 15),
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = {
            name: pool.submit(seconds_until_cut, proxy, *parts, every=30 if name == "silent body" else 1)
            for name, (parts, _) in slow.items()
        }
    for name, (_, limit) in slow.items():
        assert found[name].result() < limit + 3, name


@pytest.mark.parametrize("proxy", ["nginx"], indirect=True)
def test_nginx_limits_the_connections_of_an_address(proxy: int) -> None:
    """Breaks if one address can take every connection of the endpoint."""
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(connected(proxy)).sendall(request("/webhooks/junction", 10))
        time.sleep(0.5)
        last = stack.enter_context(connected(proxy))
        last.sendall(request("/webhooks/junction", 10))
        assert status(last) == 503
