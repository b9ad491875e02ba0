"""Downloads from announced URLs: listed hosts only, and no address of our own network."""

import contextlib
import socket
import ssl
import threading
import time

import httpx
import pytest

from app.errors import Unprocessable
from tests.support.addresses import MAPPED, PRIVATE, PUBLIC
from tests.support.cases import Failures
from workers.fetch.http import Files, addresses, download_client, is_public
from workers.fetch.retry import NO_ANSWER

HOSTS = ("*.amazonaws.com", "files.test")


def files(handler: httpx.MockTransport, *, found: list[str] | None = None, limit: int = 1000) -> Files:
    """Files with a fixed name resolution over a mocked network."""
    client = httpx.Client(transport=handler)
    return Files(HOSTS, limit, resolve=lambda _: [PUBLIC] if found is None else found, client=client)


def never(_: httpx.Request) -> httpx.Response:
    """A network that must not be used."""
    raise AssertionError("asked, although it should not have been")


def test_a_url_that_leads_elsewhere_is_not_followed() -> None:
    """Breaks if the sender of an event can make a worker send a request to any server."""
    failures = Failures()
    for url in (
        "http://bucket.s3.amazonaws.com/a",
        "ftp://files.test/a",
        "file:///etc/passwd",
        "https://files.test.evil.example/a",
        "https://evilamazonaws.com/a",
        "https://amazonaws.com.evil.example/a",
        "https://user:password@files.test/a",
        "https://files.test@evil.example/a",
        "https://127.0.0.1/a",
        "https://[::1]/a",
        "https://169.254.169.254/latest/meta-data",
        "https://2130706433/a",
        "//files.test/a",
        "files.test/a",
        "",
        "https://",
        "https://files.test:99999999/a",
        "https://files.test:8443/a",
        "https://files.test:22/a",
        "https://files.test:80/a",
        "https://files.test:0/a",
        "https://files\x00.test/a",
    ):
        with failures.of(url):
            with pytest.raises(Unprocessable) as refused:
                files(httpx.MockTransport(never)).fetch(url)
            assert "files" not in str(refused.value)
            assert "evil" not in str(refused.value)
    assert failures == {}


def test_an_address_of_our_own_network_is_not_reached() -> None:
    """Breaks if a listed host with a private address, alone or among others, is connected to."""
    failures = Failures()
    for address in (
        "::1",
        "::",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        *MAPPED.split(),
        *PRIVATE.split(),
    ):
        for beside in ([], [PUBLIC]):
            with failures.of(address, beside):
                assert not is_public(address)
                with pytest.raises(Unprocessable, match="not public"):
                    files(httpx.MockTransport(never), found=[*beside, address]).fetch("https://files.test/a")
    assert failures == {}


@pytest.mark.parametrize("address", [PUBLIC, "52.95.149.1", "2600:1f18::1"])
def test_a_public_address_is_reached_by_number_and_asked_by_name(address: str) -> None:
    """Breaks if the name is resolved a second time, or the server does not receive the host name."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=b"{}")

    url = "https://Bucket.s3.eu-west-2.amazonaws.com/a/b.json?X-Amz-Signature=00%2F1"
    assert files(httpx.MockTransport(answer), found=[address]).fetch(url).body == b"{}"
    assert asked[0].url.host == address
    assert asked[0].url.raw_path == b"/a/b.json?X-Amz-Signature=00%2F1"
    assert asked[0].headers["host"] == "bucket.s3.eu-west-2.amazonaws.com"
    assert asked[0].extensions["sni_hostname"] == "bucket.s3.eu-west-2.amazonaws.com"


def test_a_redirect_is_not_followed() -> None:
    """Breaks if a listed server can redirect a worker to another one."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(302, headers={"Location": "https://169.254.169.254/"})

    assert files(httpx.MockTransport(answer)).fetch("https://files.test/a").status == 302
    assert len(asked) == 1


def test_a_body_that_is_too_large_is_refused() -> None:
    """Breaks if an endless body fills a worker's memory."""
    answer = files(httpx.MockTransport(lambda _: httpx.Response(200, content=bytes(1001)))).fetch(
        "https://files.test/a"
    )
    assert (answer.status, answer.body) == (413, b"")


def test_a_name_is_resolved_once_and_that_address_is_reached() -> None:
    """Breaks if a resolver that returns a private address at its second answer can move a request (DNS rebinding)."""
    answers = [[PUBLIC], ["169.254.169.254"]]
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(200)

    client = httpx.Client(transport=httpx.MockTransport(answer))
    ours = Files(HOSTS, 1000, resolve=lambda _: answers.pop(0), client=client)
    assert ours.fetch("https://files.test/a").status == 200
    assert asked == [PUBLIC]
    with pytest.raises(Unprocessable, match="not public"):
        ours.fetch("https://files.test/a")
    assert len(asked) == 1


@pytest.mark.parametrize("drips", ["headers", "body"])
def test_a_response_that_arrives_byte_by_byte_ends(drips: str) -> None:
    """Breaks if a server that sends a byte at a time occupies the download worker for longer than the limit."""
    ended = threading.Event()

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            if drips == "body":
                connection.sendall(b"Content-Length: 1000000\r\n\r\n")
            while True:
                connection.sendall(b"x")
                time.sleep(0.02)
        ended.set()

    class Plain(httpx.HTTPTransport):
        """Sends the https request in plain text to the server of this test."""

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=port)
            return super().handle_request(request)

    with socket.create_server(("127.0.0.1", 0)) as server, httpx.Client(transport=Plain()) as client:
        port = server.getsockname()[1]
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        began = time.monotonic()
        ours = Files(HOSTS, 10**7, resolve=lambda _: [PUBLIC], client=client, max_seconds=0.5)
        assert ours.fetch("https://files.test/a").status == 504
        assert time.monotonic() - began < 5
        assert ended.wait(5)  # the connection is closed
        thread.join()


def test_a_name_that_leads_nowhere_is_no_answer() -> None:
    """Breaks if a failing resolver makes a dead letter of a delivery that could be downloaded a moment later."""
    assert files(httpx.MockTransport(never), found=[]).fetch("https://files.test/a").status == NO_ANSWER
    assert addresses("no-such-host.invalid") == []
    assert addresses("a" * 300) == []


def test_the_certificate_is_checked_against_the_name(tls: tuple[int, ssl.SSLContext]) -> None:
    """Breaks if a connection by address accepts another name's certificate, or refuses the right one.

    A connection that is kept for a second name at the same address would also accept it.
    """
    port, trusting = tls
    with download_client(trusting) as client:
        ours = Files(
            HOSTS, 1000, resolve=lambda _: ["127.0.0.1"], may_reach=lambda _: True, ports=(port,), client=client
        )
        assert ours.fetch(f"https://files.test:{port}/a?b").body == f"files.test:{port} /a?b".encode()
        assert ours.fetch(f"https://bucket.amazonaws.com:{port}/a").status == NO_ANSWER
    with httpx.Client(trust_env=False) as client:
        strangers = Files(
            HOSTS, 1000, resolve=lambda _: ["127.0.0.1"], may_reach=lambda _: True, ports=(port,), client=client
        )
        assert strangers.fetch(f"https://files.test:{port}/a").status == NO_ANSWER
