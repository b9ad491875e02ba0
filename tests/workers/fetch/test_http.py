"""The HTTP client: whatever the network and the provider do, an answer comes back."""

import gzip
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tests.support.cases import Failures
from workers.aggregators.requests import Request
from workers.fetch.http import MAX_RESPONSE_BYTES, Client
from workers.fetch.retry import NO_ANSWER

BASE = "https://provider.test"
HEADERS = {"X-Vital-API-Key": "sk_us_tests"}
ASKED = Request("/v2/summary/sleep/u1", (("provider", "oura"), ("start_date", "2026-03-14T00:00:00+00:00")))


def client(handler: Callable[[httpx.Request], httpx.Response], base: str = BASE) -> Client:
    """A client of a provider that answers as it is told."""
    return Client(base, HEADERS, httpx.MockTransport(handler))


def gigabytes() -> Iterator[bytes]:
    """A body without an end that anybody would want to see."""
    for _ in range(MAX_RESPONSE_BYTES // 2**20 + 1):
        yield bytes(2**20)
    raise AssertionError("read on after it was too large")


def test_an_answer_is_handed_back_whatever_its_status() -> None:
    """Breaks if a status raises, or its headers and body are lost on the way to the decision."""
    failures = Failures()
    for status in (200, 204, 400, 401, 404, 413, 422, 429, 500, 503, 504):
        with failures.of(status):
            given = httpx.Response(status, headers={"Retry-After": "7"}, content=b"{}")
            answer = client(lambda _, given=given: given).fetch(ASKED)
            assert (answer.status, answer.body) == (status, b"{}")
            assert answer.headers.get("retry-after") == "7"
    assert failures == {}


def test_whatever_the_network_does_is_no_answer() -> None:
    """Breaks if a cut line ends a worker's turn with an exception and the lease still held."""
    failures = Failures()
    for error in (
        httpx.ConnectError,
        httpx.ConnectTimeout,
        httpx.WriteTimeout,
        httpx.PoolTimeout,
        httpx.ReadError,
        httpx.WriteError,
        httpx.CloseError,
        httpx.RemoteProtocolError,
        httpx.LocalProtocolError,
        httpx.ProxyError,
        httpx.UnsupportedProtocol,
        httpx.DecodingError,
        httpx.TooManyRedirects,
    ):
        with failures.of(error):

            def fail(_: httpx.Request, error: type[Exception] = error) -> httpx.Response:
                raise error("as asked")

            assert client(fail).fetch(ASKED).status == NO_ANSWER
    assert failures == {}


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.RemoteProtocolError])
def test_an_answer_that_breaks_off_is_none(error: type[Exception]) -> None:
    """Breaks if half a page counts as a page."""

    def half() -> Iterator[bytes]:
        yield b'{"sleep":['
        raise error("as asked")

    answer = client(lambda _: httpx.Response(200, content=half())).fetch(ASKED)
    assert (answer.status, answer.body) == (NO_ANSWER, b"")


@pytest.mark.parametrize("amid", [False, True])
def test_an_answer_that_takes_too_long_is_504(*, amid: bool) -> None:
    """Breaks if a slice that is too slow is asked for again in full, until it has failed for good."""

    def slow() -> Iterator[bytes]:
        yield b'{"sleep":['
        raise httpx.ReadTimeout("as asked")

    def answer(request: httpx.Request) -> httpx.Response:
        if amid:
            return httpx.Response(200, content=slow())
        raise httpx.ReadTimeout("as asked")

    assert client(answer).fetch(ASKED).status == 504


def test_a_body_that_cannot_be_unpacked_is_no_answer() -> None:
    """Breaks if a broken content encoding raises."""
    packed = {"Content-Encoding": "gzip"}
    answer = client(lambda _: httpx.Response(200, headers=packed, stream=httpx.ByteStream(b"no gzip"))).fetch(ASKED)
    assert answer.status == NO_ANSWER


def test_a_packed_body_is_unpacked() -> None:
    """Breaks if the provider's compression reaches the reader of the page."""
    packed = httpx.ByteStream(gzip.compress(b'{"sleep":[]}'))
    answer = client(lambda _: httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=packed)).fetch(ASKED)
    assert (answer.status, answer.body) == (200, b'{"sleep":[]}')


def test_an_answer_that_is_too_large_is_413() -> None:
    """Breaks if a huge answer fills a worker's memory instead of halving the slice."""
    answer = client(lambda _: httpx.Response(200, content=gigabytes())).fetch(ASKED)
    assert (answer.status, answer.body) == (413, b"")


def test_redirects_are_not_followed() -> None:
    """Breaks if the key goes where somebody else points."""
    failures = Failures()
    for status in (301, 302, 303, 307, 308):
        for where in ("https://elsewhere.test/", "/v2/elsewhere", "http://[broken", "file:///etc/passwd"):
            with failures.of(status, where):
                asked: list[httpx.Request] = []
                given = httpx.Response(status, headers={"Location": where})
                redirect = client(lambda request, asked=asked, given=given: asked.append(request) or given)
                assert redirect.fetch(ASKED).status in (status, NO_ANSWER)
                assert len(asked) == 1
    assert failures == {}


@pytest.mark.parametrize("base", [BASE, BASE + "/", BASE + "/proxy", BASE + "/proxy/"])
def test_the_key_and_the_query_go_along(base: str) -> None:
    """Breaks if a request lacks the key, loses its window, or misses the base URL's path."""
    seen: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    client(note, base).fetch(ASKED)
    (request,) = seen
    assert request.method == "GET"
    assert request.headers["X-Vital-API-Key"] == "sk_us_tests"
    assert request.url.path == ("/proxy" if "proxy" in base else "") + "/v2/summary/sleep/u1"
    assert dict(request.url.params) == dict(ASKED.query)


def test_the_version_of_a_page_is_from_before_it_was_asked_for() -> None:
    """Breaks if what changed while an answer was on its way is taken for older than the answer."""
    during: list[datetime] = []

    def note(request: httpx.Request) -> httpx.Response:
        during.append(datetime.now(UTC))
        return httpx.Response(200)

    before = datetime.now(UTC)
    answer = client(note).fetch(ASKED)
    assert before <= answer.asked_at <= during[0]


@pytest.mark.parametrize("error", [httpx.ReadTimeout, None])
def test_a_closed_client_leaves_nothing_open(error: Any) -> None:
    """Breaks if connections outlive the client, which Python warns of."""

    def respond(request: httpx.Request) -> httpx.Response:
        if error:
            raise error("as asked")
        return httpx.Response(200)

    one = client(respond)
    one.fetch(ASKED)
    one.close()
    with pytest.raises(RuntimeError):
        one.fetch(ASKED)


def test_a_body_goes_along_as_json() -> None:
    """Breaks if what is posted arrives as nothing, or as something that the provider does not read."""
    seen: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    with_body, without = (Request("/v2/user", method="POST", body=body) for body in (b'{"a":1}', None))
    one = client(note)
    one.fetch(with_body)
    one.fetch(without)
    assert [request.content for request in seen] == [b'{"a":1}', b""]
    assert [request.headers.get("Content-Type") for request in seen] == ["application/json", None]
    assert seen[0].headers["X-Vital-API-Key"] == "sk_us_tests"
