"""The HTTP clients of aggregator APIs and of downloads from announced URLs. `webhooks` has that of notifications."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import IPv6Network, ip_address, ip_network
from typing import Any

import httpx

from app.errors import Unprocessable
from workers.aggregators.requests import Request
from workers.fetch.retry import NO_ANSWER

TIMEOUT = httpx.Timeout(30.0, connect=5.0)  # of each read: a server that sends a byte at a time never reaches it
MAX_REQUEST_SECONDS = 120.0  # in total; 256 MiB at 2 MB/s
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
        self._client.close()


def addresses(host: str) -> Sequence[str]:
    """All addresses of a host; empty if the name cannot be resolved. Blocks until the system's resolver answers."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


# The only IPv6 range that is assigned as global unicast (RFC 4291, IANA). Outside of it are the addresses that a
# translator delivers to the IPv4 address in them: NAT64 (64:ff9b::/96, 64:ff9b:1::/48), IPv4-mapped (::ffff:a.b.c.d)
# and IPv4-compatible (::a.b.c.d). Inside are two such tunnels: Teredo (RFC 4380), with all of 2001::/23, and 6to4
# (RFC 3056). Python 3.11 calls several of them global, and most of 192.0.0.0/24 (RFC 6890).
UNICAST = IPv6Network("2000::/3")
RESERVED = tuple(map(ip_network, ("2001::/23", "2002::/16", "192.0.0.0/24", "192.88.99.0/24")))


def is_public(address: str) -> bool:
    """Whether an IP address is globally reachable unicast: no loopback, private, link-local or metadata address.

    An IPv6 address that contains an IPv4 address is not public, whatever that address is.
    """
    found = ip_address(address)
    if (found.version == 6 and found not in UNICAST) or any(found in network for network in RESERVED):
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def pinned(target: httpx.URL, address: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The parameters of a request to this URL that connects to this address of its host, which was checked before.

    A second lookup could return another address (OWASP: Server Side Request Forgery Prevention). The certificate is
    checked against the host name.
    """
    return {
        "url": target.copy_with(host=address),
        "headers": {**(headers or {}), "Host": target.netloc.decode("ascii")},
        "extensions": {"sni_hostname": target.host.lower()},
    }


def download_client(trusted: ssl.SSLContext | None = None) -> httpx.Client:
    """The client of downloads.

    It ignores the environment's proxy, which would resolve the name again. It keeps no connection: a later request to
    the same address but another name would use it, although the certificate was checked against the first name.
    """
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(timeout=TIMEOUT, trust_env=False, verify=trusted or True, limits=limits)


class Files:
    """Downloads from URLs in webhook payloads: https on port 443, listed hosts, public addresses, no redirects."""

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        *,
        resolve: Callable[[str], Sequence[str]] = addresses,
        may_reach: Callable[[str], bool] = is_public,
        ports: Collection[int] = (443,),
        client: httpx.Client | None = None,
        max_seconds: float = MAX_REQUEST_SECONDS,
    ) -> None:
        self._hosts, self._ports, self._max_bytes, self._max_seconds = hosts, ports, max_bytes, max_seconds
        self._resolve, self._may_reach = resolve, may_reach
        self._client = client or download_client()

    def fetch(self, url: str) -> HttpResponse:
        """Downloads a URL. Raises Unprocessable for a URL that is not permitted. Network errors are statuses."""
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL:
            raise Unprocessable("the announced URL is not a valid URL") from None
        host, is_valid_port = target.host.lower(), (443 if target.port is None else target.port) in self._ports
        is_listed = any(_matches(host, pattern) for pattern in self._hosts)
        if target.scheme != "https" or target.userinfo or not is_valid_port or not is_listed:
            raise Unprocessable(
                "the announced URL is not https on port 443, or not of a host in HEADRACE_DOWNLOAD_HOSTS"
            )
        found = self._resolve(host)
        if not all(self._may_reach(address) for address in found):
            raise Unprocessable("the host of the announced URL has an address that is not public")
        if not found:
            return HttpResponse(NO_ANSWER, {}, b"", datetime.now(UTC))
        request = self._client.build_request("GET", **pinned(target, found[0]))
        return _send(self._client, request, self._max_bytes, self._max_seconds)


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


@contextlib.contextmanager
def _deadline(request: httpx.Request, seconds: float) -> Iterator[threading.Event]:
    """Sets the event after `seconds` and shuts down the connections of this request, so that a blocked read ends.

    httpx has timeouts for each read only. Checking the time after each part of a body would not end a response whose
    headers arrive byte by byte. On a connection that was kept from an earlier request, only the body has this limit.
    """
    found: list[Any] = []
    is_over = threading.Event()

    def observe(event: str, info: Mapping[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            found.append(info["return_value"].get_extra_info("socket"))
            if is_over.is_set():
                shut_down()

    def shut_down() -> None:
        is_over.set()
        for one in found:
            with contextlib.suppress(OSError):  # closed, or replaced by its TLS socket
                socket.socket.shutdown(one, socket.SHUT_RDWR)

    request.extensions["trace"] = observe
    timer = threading.Timer(seconds, shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield is_over
    finally:
        timer.cancel()


def _send(
    client: httpx.Client, request: httpx.Request, max_bytes: int, max_seconds: float = MAX_REQUEST_SECONDS
) -> HttpResponse:
    """Returns 413 for a body over `max_bytes`, 504 after a read timeout or `max_seconds`, NO_ANSWER after other errors.

    504 is what a gateway returns for a slow request; the date range of the next request is then halved.
    """
    asked_at = datetime.now(UTC)
    with _deadline(request, max_seconds) as is_over:
        try:
            with contextlib.closing(client.send(request, stream=True)) as response:
                body = bytearray()
                for part in response.iter_bytes():
                    body += part
                    if len(body) > max_bytes:
                        return HttpResponse(413, {}, b"", asked_at)
                    if is_over.is_set():
                        return HttpResponse(504, {}, b"", asked_at)
                began = _began(response.headers.get("Date", ""), asked_at)
                return HttpResponse(response.status_code, response.headers, bytes(body), began)
        except httpx.ReadTimeout:
            return HttpResponse(504, {}, b"", asked_at)
        except httpx.HTTPError:
            return HttpResponse(504 if is_over.is_set() else NO_ANSWER, {}, b"", asked_at)
