"""The only HTTP clients: one for aggregator APIs, one for downloads from announced URLs."""

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import ip_address

import httpx

from app.errors import Unprocessable
from workers.aggregators.requests import Request
from workers.fetch.retry import NO_ANSWER

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
MAX_AHEAD = timedelta(days=1)  # of a server's clock
RESOLUTION = timedelta(seconds=1)  # of `Date`
MAX_RESPONSE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class HttpResponse:
    """A response. `asked_at`, the time before the request, is the version of the data: the data is at least as new.

    It is a time of the server's clock, as the events are: ours if it agrees with the server's `Date` (RFC 9110, section
    6.6.1), whose resolution is a second; otherwise that `Date`, less the duration of the request.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    asked_at: datetime


class Client:
    """The client of one aggregator's API. It follows no redirects, because a redirect would leak the API key."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        transport: httpx.BaseTransport | None = None,
        timeout: httpx.Timeout | float = TIMEOUT,
    ) -> None:
        self._client = httpx.Client(base_url=base_url, headers=dict(headers), timeout=timeout, transport=transport)

    def fetch(self, request: Request) -> HttpResponse:
        """Sends a request. Network errors do not raise; they are statuses, see `_send`."""
        headers = {} if request.body is None else {"Content-Type": "application/json"}
        outgoing = self._client.build_request(
            request.method, request.path, params=dict(request.query), content=request.body, headers=headers
        )
        return _send(self._client, outgoing, MAX_RESPONSE_BYTES)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


def addresses(host: str) -> Sequence[str]:
    """All addresses of a host; empty if the name cannot be resolved. Blocks until the system's resolver answers."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


def is_public(address: str) -> bool:
    """Whether an IP address is globally reachable unicast: no loopback, private, link-local or metadata address."""
    found = ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None) or found
    return bool(mapped.is_global and not mapped.is_multicast)


class Files:
    """Downloads from URLs in webhook payloads: https only, listed hosts, public addresses, no redirects.

    The client connects to the address that was checked, because a second lookup could return another one (OWASP:
    Server Side Request Forgery Prevention). The certificate is checked against the host name.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        *,
        resolve: Callable[[str], Sequence[str]] = addresses,
        may_reach: Callable[[str], bool] = is_public,
        client: httpx.Client | None = None,
    ) -> None:
        self._hosts, self._max_bytes = hosts, max_bytes
        self._resolve, self._may_reach = resolve, may_reach
        # The environment's proxy is ignored: it would resolve the name again.
        self._client = client or httpx.Client(timeout=TIMEOUT, trust_env=False)

    def fetch(self, url: str) -> HttpResponse:
        """Downloads a URL. Raises Unprocessable for a URL that is not permitted. Network errors are statuses."""
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL:
            raise Unprocessable("the announced URL is not a valid URL") from None
        host, is_valid_port = target.host.lower(), (target.port or 443) <= 65535
        is_listed = any(_matches(host, pattern) for pattern in self._hosts)
        if target.scheme != "https" or target.userinfo or not is_valid_port or not is_listed:
            raise Unprocessable("the announced URL is not https, or not of a host in HEADRACE_DOWNLOAD_HOSTS")
        found = self._resolve(host)
        if not all(self._may_reach(address) for address in found):
            raise Unprocessable("the host of the announced URL has an address that is not public")
        if not found:
            return HttpResponse(NO_ANSWER, {}, b"", datetime.now(UTC))
        request = self._client.build_request(
            "GET",
            target.copy_with(host=found[0]),
            headers={"Host": target.netloc.decode("ascii")},
            extensions={"sni_hostname": host},
        )
        return _send(self._client, request, self._max_bytes)


def _began(date: str, asked_at: datetime) -> datetime:
    """When the request began by the server's clock. A `Date` of the future would win over all later versions.

    Where both clocks agree, ours orders two requests of one second; by the `Date` alone, the later one may seem older.
    """
    now = datetime.now(UTC)
    try:
        answered = parsedate_to_datetime(date).astimezone(UTC)
    except (ValueError, OverflowError):
        return asked_at
    is_same_clock = asked_at - RESOLUTION < answered <= now
    return asked_at if is_same_clock or answered > now + MAX_AHEAD else answered - (now - asked_at)


def _matches(host: str, pattern: str) -> bool:
    return host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _send(client: httpx.Client, request: httpx.Request, max_bytes: int) -> HttpResponse:
    """Returns 413 for a body over `max_bytes`, 504 after a read timeout, NO_ANSWER after any other network error.

    504 is what a gateway returns for a slow request; the date range of the next request is then halved.
    """
    asked_at = datetime.now(UTC)
    try:
        with contextlib.closing(client.send(request, stream=True)) as response:
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if len(body) > max_bytes:
                    return HttpResponse(413, {}, b"", asked_at)
            began = _began(response.headers.get("Date", ""), asked_at)
            return HttpResponse(response.status_code, response.headers, bytes(body), began)
    except httpx.ReadTimeout:
        return HttpResponse(504, {}, b"", asked_at)
    except httpx.HTTPError:
        return HttpResponse(NO_ANSWER, {}, b"", asked_at)
