"""The HTTP client: it returns a response for any status and any network error."""

import gzip
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
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
    """A client of a mocked API."""
    return Client(base, HEADERS, httpx.MockTransport(handler))


def recording(seen: list[httpx.Request]) -> Callable[[httpx.Request], httpx.Response]:
    """An API that records its requests."""
    return lambda request: seen.append(request) or httpx.Response(200)


def gigabytes() -> Iterator[bytes]:
    """An endless body."""
    for _ in range(MAX_RESPONSE_BYTES // 2**20 + 1):
        yield bytes(2**20)
    raise AssertionError("read on after it was too large")


def test_an_answer_is_handed_back_whatever_its_status() -> None:
    """Breaks if a status raises, or its headers and body are lost."""
    failures = Failures()
    for status in (200, 204, 400, 401, 404, 413, 422, 429, 500, 503, 504):
        with failures.of(status):
            given = httpx.Response(status, headers={"Retry-After": "7"}, content=b"{}")
            answer = client(lambda _, given=given: given).fetch(ASKED)
            assert (answer.status, answer.body) == (status, b"{}")
            assert answer.headers.get("retry-after") == "7"
    assert failures == {}


def test_a_network_error_is_no_answer() -> None:
    """Breaks if a network error ends a run with an exception while the lease is held."""
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
    """Breaks if a slice that is too slow is requested again in full until its backfill fails."""

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
    """Breaks if a compressed body reaches the parser."""
    packed = httpx.ByteStream(gzip.compress(b'{"sleep":[]}'))
    answer = client(lambda _: httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=packed)).fetch(ASKED)
    assert (answer.status, answer.body) == (200, b'{"sleep":[]}')


def test_an_answer_that_is_too_large_is_413() -> None:
    """Breaks if a huge response fills a worker's memory instead of halving the slice."""
    answer = client(lambda _: httpx.Response(200, content=gigabytes())).fetch(ASKED)
    assert (answer.status, answer.body) == (413, b"")


def test_redirects_are_not_followed() -> None:
    """Breaks if a redirect leaks the API key."""
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
    """Breaks if a request lacks the key or its window, or misses the path of the base URL."""
    seen: list[httpx.Request] = []
    client(recording(seen), base).fetch(ASKED)
    (request,) = seen
    assert request.method == "GET"
    assert request.headers["X-Vital-API-Key"] == "sk_us_tests"
    assert request.url.path == ("/proxy" if "proxy" in base else "") + "/v2/summary/sleep/u1"
    assert dict(request.url.params) == dict(ASKED.query)


def test_the_version_of_a_page_is_from_before_it_was_asked_for() -> None:
    """Breaks if data that changed during a request counts as older than the response."""
    during: list[datetime] = []

    def note(request: httpx.Request) -> httpx.Response:
        during.append(datetime.now(UTC))
        return httpx.Response(200)

    before = datetime.now(UTC)
    answer = client(note).fetch(ASKED)
    assert before <= answer.asked_at <= during[0]


@pytest.mark.parametrize("error", [httpx.ReadTimeout, None])
def test_a_closed_client_leaves_nothing_open(error: Any) -> None:
    """Breaks if connections outlive the client; Python warns of that."""

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
    """Breaks if a posted body is lost, or has another content type."""
    seen: list[httpx.Request] = []
    with_body, without = (Request("/v2/user", method="POST", body=body) for body in (b'{"a":1}', None))
    one = client(recording(seen))
    one.fetch(with_body)
    one.fetch(without)
    assert [request.content for request in seen] == [b'{"a":1}', b""]
    assert [request.headers.get("Content-Type") for request in seen] == ["application/json", None]
    assert seen[0].headers["X-Vital-API-Key"] == "sk_us_tests"


@pytest.mark.parametrize("days", [-400, -3, 0, 0.5])
def test_a_page_has_the_clock_of_the_server(days: float) -> None:
    """Breaks if our clock, when it is wrong, makes a page newer or older than the events of the same server."""
    now = datetime.now(UTC) + timedelta(days=days)
    answer = client(lambda _: httpx.Response(200, headers={"Date": format_datetime(now, usegmt=True)})).fetch(ASKED)
    assert abs(answer.asked_at - now) < timedelta(seconds=6)


def test_two_requests_of_one_second_are_in_order() -> None:
    """Breaks if the later of two pages seems older, because both have the same `Date` and it took longer."""

    def answer(request: httpx.Request) -> httpx.Response:
        time.sleep(0.05 if request.url.path == "/slow" else 0)
        return httpx.Response(200, headers={"Date": format_datetime(datetime.now(UTC), usegmt=True)})

    api = client(answer)
    for _ in range(3):
        assert api.fetch(ASKED).asked_at < api.fetch(Request("/slow")).asked_at


@pytest.mark.parametrize("date", ["", "soon", "Sat, 01 Jan 2105 00:00:00 GMT", "Fri, 32 Dec 2025 00:00:00 GMT"])
def test_without_a_usable_date_a_page_has_our_clock(date: str) -> None:
    """Breaks if a page without a clock cannot be stored, or one of the far future wins over all later versions."""
    before = datetime.now(UTC)
    answer = client(lambda _: httpx.Response(200, headers={"Date": date})).fetch(ASKED)
    assert before <= answer.asked_at <= datetime.now(UTC)
