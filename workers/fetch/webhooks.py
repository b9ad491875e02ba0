"""The HTTP client of notifications: posts to the URLs of subscribers, with the address checks of downloads."""

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Self

import httpx

from app.errors import Unprocessable
from workers.fetch.http import addresses, is_public, pinned
from workers.fetch.retry import NO_ANSWER, describe, retry_after

TIMEOUT = httpx.Timeout(10.0, connect=5.0)
MAX_POST_SECONDS = 10.0  # in total: name, connection, request and the headers of the response
MAX_ADDRESSES = 3  # of a host that are tried, IPv4 first, until one accepts a connection
# getaddrinfo cannot be cancelled: names whose servers are silent hold a thread each, for longer than MAX_POST_SECONDS.
RESOLVER_THREADS = 64
LOOPBACK = tuple(map(ip_network, ("127.0.0.0/8", "::1/128")))
# RFC 1918, RFC 6598 and RFC 4193. Not link-local addresses, which serve the credentials of cloud machines.
PRIVATE = (*LOOPBACK, *map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")))
REFUSED_ADDRESS = "the host has an address that is not public (--allow-private permits private networks)"


@dataclass(frozen=True)
class PostResult:
    """The status of a response, or NO_ANSWER. `error` is empty after a 2xx; it holds no part of the response."""

    status: int
    error: str = ""
    retry_after: float | None = None  # seconds that the response asks for


def check_url(url: str) -> httpx.URL:
    """The parsed URL. Raises Unprocessable unless it is https, or http to `localhost` or a loopback address."""
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise Unprocessable("the URL is not valid") from None
    if not target.host or target.scheme not in ("https", "http"):
        raise Unprocessable("the URL must begin with https:// and name a host")
    if target.userinfo or target.fragment:
        raise Unprocessable("the URL must have no user, password or fragment")
    if target.scheme == "http" and not _is_loopback(target.host):
        raise Unprocessable("the URL must be https; http is accepted for localhost and loopback addresses only")
    return target


def may_reach(host: str, address: str, *, allow_private: bool) -> bool:
    """Whether a post to this host may connect to this address of it.

    A loopback host may only have loopback addresses. Any other host must have public ones, or with `allow_private`
    private ones.
    """
    found = ip_address(address)
    if _is_loopback(host):
        return any(found in network for network in LOOPBACK)
    return is_public(address) or (allow_private and any(found in network for network in PRIVATE))


def check_addresses(host: str, found: Sequence[str], *, allow_private: bool) -> None:
    """Raises Unprocessable if one of the addresses of a host must not be reached."""
    if not all(may_reach(host, one, allow_private=allow_private) for one in found):
        raise Unprocessable(REFUSED_ADDRESS)


class Poster:
    """Posts to subscribers inside an `async with`: no redirects, no proxy, no kept connection, no body is read."""

    def __init__(
        self,
        *,
        resolve: Callable[[str], Sequence[str]] = addresses,
        trusted: ssl.SSLContext | None = None,
        max_seconds: float = MAX_POST_SECONDS,
    ) -> None:
        self._resolve, self._max_seconds = resolve, max_seconds
        self._client = httpx.AsyncClient(
            timeout=TIMEOUT,
            trust_env=False,
            verify=trusted or _tls(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self._resolver = ThreadPoolExecutor(RESOLVER_THREADS, "resolver")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)
        await self._client.aclose()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, *, allow_private: bool) -> PostResult:
        """Posts a body. Errors of the network and a URL or address that is not permitted do not raise."""
        try:
            async with asyncio.timeout(self._max_seconds):
                return await self._post(check_url(url), headers, body, allow_private=allow_private)
        except (TimeoutError, httpx.TimeoutException):
            return PostResult(NO_ANSWER, "timeout")
        except Unprocessable as reason:
            return PostResult(NO_ANSWER, str(reason))
        except (httpx.HTTPError, OSError, ValueError) as error:  # ValueError: a name that IDNA cannot encode
            return PostResult(NO_ANSWER, type(error).__name__)

    async def _post(
        self, target: httpx.URL, headers: Mapping[str, str], body: bytes, *, allow_private: bool
    ) -> PostResult:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._resolver, self._resolve, target.host)
        if not found:
            return PostResult(NO_ANSWER, "the host name cannot be resolved")
        check_addresses(target.host, found, allow_private=allow_private)
        # IPv4 first: many machines have no IPv6 route, although names have IPv6 addresses.
        *others, last = sorted(found, key=lambda one: ip_address(one).version)[:MAX_ADDRESSES]
        for address in others:
            try:
                return await self._send(target, address, headers, body)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._send(target, last, headers, body)

    async def _send(self, target: httpx.URL, address: str, headers: Mapping[str, str], body: bytes) -> PostResult:
        parameters = pinned(target, address, {**headers, "User-Agent": "headrace"})
        request = self._client.build_request("POST", content=body, **parameters)
        response = await self._client.send(request, stream=True)
        await response.aclose()
        if response.is_success:
            return PostResult(response.status_code)
        seconds = retry_after(response.headers.get("retry-after"), datetime.now(UTC))
        return PostResult(response.status_code, describe(response.status_code), seconds)


@cache
def _tls() -> ssl.SSLContext:
    """The trusted certificates, loaded once per process: 15 ms."""
    return httpx.create_ssl_context()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or any(ip_address(host) in network for network in LOOPBACK)
    except ValueError:
        return False
