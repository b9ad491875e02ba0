"""The only HTTP clients: ask a provider, or fetch what waits at a URL, and hand back what came, whatever it was."""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address

import httpx

from app.errors import Unprocessable
from workers.aggregators.requests import Request
from workers.fetch.retry import NO_ANSWER

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
MAX_RESPONSE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class HttpResponse:
    """An answer. `asked_at` is the version of what it holds: a page is at least as new as the asking."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    asked_at: datetime


class Client:
    """One aggregator's API. Redirects are not followed: a key must not go where somebody else points."""

    def __init__(self, base_url: str, headers: Mapping[str, str], transport: httpx.BaseTransport | None = None) -> None:
        self._client = httpx.Client(base_url=base_url, headers=dict(headers), timeout=TIMEOUT, transport=transport)

    def fetch(self, request: Request) -> HttpResponse:
        """Never raises for what the network or the aggregator does."""
        kind = {} if request.body is None else {"Content-Type": "application/json"}
        asked = self._client.build_request(
            request.method, request.path, params=dict(request.query), content=request.body, headers=kind
        )
        return _send(self._client, asked, MAX_RESPONSE_BYTES)

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()


Resolve = Callable[[str], Sequence[str]]


def addresses(host: str) -> Sequence[str]:
    """All addresses of a host, none if it has no name. May take as long as the system's resolver does."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        return []


def is_public(address: str) -> bool:
    """Whether an address is one that anybody may reach: not of this machine, its network or its cloud."""
    found = ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None) or found
    return bool(mapped.is_global and not mapped.is_multicast)


class Files:
    """Fetches from URLs that somebody else gives: by https, from listed hosts, from public addresses, no redirects.

    The address that was looked at is the one that is connected to: a name may resolve to another a moment later
    (OWASP: Server Side Request Forgery Prevention). The certificate is checked against the name.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        *,
        resolve: Resolve = addresses,
        may_reach: Callable[[str], bool] = is_public,
        client: httpx.Client | None = None,
    ) -> None:
        self._hosts, self._max_bytes = hosts, max_bytes
        self._resolve, self._may_reach = resolve, may_reach
        # No proxy of the environment: it would resolve the name again.
        self._client = client or httpx.Client(timeout=TIMEOUT, trust_env=False)

    def fetch(self, url: str) -> HttpResponse:
        """Raises Unprocessable for a URL that is not to be followed. Never raises for what the network does."""
        try:
            target = httpx.URL(url)
            host, port = target.host.lower(), target.port or 443
        except httpx.InvalidURL:
            raise Unprocessable("the announced URL is none") from None
        if (
            port > 65535
            or target.scheme != "https"
            or target.userinfo
            or not any(_matches(host, one) for one in self._hosts)
        ):
            raise Unprocessable("the announced URL is not https, or not of a host in HEADRACE_DOWNLOAD_HOSTS")
        found = self._resolve(host)
        if not all(self._may_reach(address) for address in found):
            raise Unprocessable("the announced URL leads to an address that is not public")
        if not found:
            return HttpResponse(NO_ANSWER, {}, b"", datetime.now(UTC))
        request = self._client.build_request(
            "GET",
            target.copy_with(host=found[0]),
            headers={"Host": target.netloc.decode("ascii")},
            extensions={"sni_hostname": host},
        )
        return _send(self._client, request, self._max_bytes)

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()


def _matches(host: str, pattern: str) -> bool:
    return host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _send(client: httpx.Client, request: httpx.Request, max_bytes: int) -> HttpResponse:
    """What came back; 413 if that was too much, 504 if it took too long, 0 if nothing came."""
    asked_at = datetime.now(UTC)
    response: httpx.Response | None = None
    try:
        response = client.send(request, stream=True)
        body = bytearray()
        for part in response.iter_bytes():
            body += part
            if len(body) > max_bytes:
                return HttpResponse(413, {}, b"", asked_at)
        return HttpResponse(response.status_code, response.headers, bytes(body), asked_at)
    except httpx.ReadTimeout:
        return HttpResponse(504, {}, b"", asked_at)  # as a gateway would say: too slow, so less is to be asked for
    except httpx.HTTPError:
        return HttpResponse(NO_ANSWER, {}, b"", asked_at)
    finally:
        if response is not None:
            response.close()
