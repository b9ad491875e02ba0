"""The guard of notifications: which URLs and addresses a subscriber may have."""

import asyncio
import ssl
import time

import pytest

from app.errors import Unprocessable
from tests.support.addresses import MAPPED, PRIVATE, PUBLIC
from tests.support.receivers import endpoint
from workers.fetch.retry import NO_ANSWER
from workers.fetch.webhooks import REFUSED_ADDRESS, Poster, PostResult, check_url, may_reach

HOST = "app.test"


def post(url: str, *found: str, allow_private: bool = False, **more: float) -> PostResult:
    """Posts to a URL whose host resolves to these addresses, one list per lookup."""
    answers = [one.split() for one in found]

    async def send() -> PostResult:
        def resolve(host: str) -> list[str]:
            return answers.pop(0) if answers else [host]

        async with Poster(resolve=resolve, **more) as poster:
            return await poster.post(url, {"webhook-id": "msg_1"}, b"{}", allow_private=allow_private)

    return asyncio.run(send())


@pytest.mark.parametrize(
    "url",
    [
        "http://app.test/hook",
        "http://10.0.0.1/",
        "http://127.0.0.1.app.test/",
        "http://localhost.app.test/",
        "ftp://app.test/",
        "file:///etc/passwd",
        "app.test/hook",
        "https://user:secret@app.test/",
        "https://app.test/#part",
        "https://",
        "https://app.test:port/",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    """Breaks if a notification could be sent without TLS, to something that is no web server, or with a password."""
    with pytest.raises(Unprocessable) as refused:
        check_url(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["https://app.test:8443/a?b=c", "http://localhost:1/", "http://127.0.0.1/", "http://[::1]/"]
)
def test_urls_that_are_accepted(url: str) -> None:
    assert str(check_url(url)) == url


@pytest.mark.parametrize("address", [*PRIVATE.split(), *MAPPED.split()])
def test_no_private_address_is_reached(address: str) -> None:
    """Breaks if a subscriber's name can point into our own network."""
    assert not may_reach(HOST, address, allow_private=False)
    assert post(f"https://{HOST}/", f"{PUBLIC} {address}") == PostResult(NO_ANSWER, REFUSED_ADDRESS)


def test_allow_private_does_not_allow_everything() -> None:
    """Breaks if --allow-private reaches the metadata service of a cloud, or no private network."""
    allowed = ("10.1.2.3", "192.168.1.1", "172.16.0.9", "100.64.0.1", "fd00::1", "127.0.0.1", "::1", PUBLIC)
    refused = ("169.254.169.254", "0.0.0.0", "224.0.0.1", "fe80::1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe")  # noqa: S104 - an address to refuse
    assert [one for one in allowed if not may_reach(HOST, one, allow_private=True)] == []
    assert [one for one in refused if may_reach(HOST, one, allow_private=True)] == []


def test_a_loopback_host_reaches_loopback_addresses_only() -> None:
    """Breaks if http to `localhost` can leave the machine."""
    assert may_reach("localhost", "127.0.0.1", allow_private=False)
    assert not may_reach("localhost", PUBLIC, allow_private=True)
    assert post("http://localhost:1/", PUBLIC) == PostResult(NO_ANSWER, REFUSED_ADDRESS)


def test_a_name_is_looked_up_once() -> None:
    """Breaks if a second lookup can return another address than the one that was checked (DNS rebinding)."""
    with endpoint() as app:
        port = app.url.split(":")[2].split("/")[0]
        # The first answer is public and not reachable from here; the second one would be the receiver.
        result = post(f"https://{HOST}:{port}/", "203.0.114.1", "127.0.0.1", max_seconds=0.5)
        assert result.error in ("timeout", "ConnectError")
        assert app.received == []


def test_the_certificate_is_checked_against_the_name(tls: tuple[int, ssl.SSLContext]) -> None:
    """Breaks if a connection by address accepts another name's certificate, or refuses the right one."""
    port, trusting = tls

    async def send(host: str, trusted: ssl.SSLContext | None) -> PostResult:
        async with Poster(resolve=lambda _: ["127.0.0.1"], trusted=trusted) as poster:
            return await poster.post(f"https://{host}:{port}/a", {}, b"{}", allow_private=True)

    assert asyncio.run(send("files.test", trusting)) == PostResult(200)
    assert asyncio.run(send("other.test", trusting)).error == "ConnectError"
    assert asyncio.run(send("files.test", None)).error == "ConnectError"


def test_a_host_without_an_address() -> None:
    assert post(f"https://{HOST}/", "") == PostResult(NO_ANSWER, "the host name cannot be resolved")


def test_a_name_that_hangs_has_a_deadline() -> None:
    """Breaks if a name server that does not answer delays a run."""

    async def send() -> PostResult:
        async with Poster(resolve=lambda _: time.sleep(2) or [], max_seconds=0.2) as poster:  # type: ignore[func-returns-value]
            return await poster.post(f"https://{HOST}/", {}, b"{}", allow_private=False)

    began = time.monotonic()
    assert asyncio.run(send()) == PostResult(NO_ANSWER, "timeout")
    assert time.monotonic() - began < 1.5


def test_the_body_of_an_answer_is_not_read() -> None:
    """Breaks if an endless answer holds a request, or its text is stored."""
    with endpoint(lambda _: 500, **{"Content-Length": "1000000000"}) as app:
        began = time.monotonic()
        assert post(app.url, "127.0.0.1") == PostResult(500, "status 500")
        assert time.monotonic() - began < 2


def test_retry_after_is_read() -> None:
    with endpoint(lambda _: 429, **{"Retry-After": "7"}) as app:
        found = post(app.url, "127.0.0.1")
        assert (found.status, round(found.retry_after or 0)) == (429, 7)
