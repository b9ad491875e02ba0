"""DATABASE_URL: reads libpq's and SQLAlchemy's forms, with one host or several, and returns a URL for SQLAlchemy."""

import re
from collections.abc import Mapping
from urllib.parse import parse_qs, quote, urlencode

SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
SESSION_KINDS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
TARGET = "target_session_attrs"
# A host (name, IPv4 address, IPv6 address in brackets, or directory of a socket) and a port.
SERVER = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|/[^,]*|[^\[\]:,/]+)(:(?P<port>[0-9]+))?")


def read(value: str) -> str:
    """The URL with SQLAlchemy's scheme. Raises ValueError.

    Several hosts become `?host=h1,h2&port=5432,5433`, which SQLAlchemy, psycopg and libpq all read: SQLAlchemy cannot
    read libpq's `h1:5432,h2:5433`, nor IPv6 addresses in its own `?host=h1:5432&host=h2:5433`. With several hosts,
    `target_session_attrs` defaults to read-write, because a standby accepts connections but no writes.
    """
    scheme, separator, rest = value.partition("://")
    place, _, query = rest.partition("#")[0].partition("?")
    login, at, hosts = place.partition("/")[0].rpartition("@")
    options = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query))
    if scheme not in SCHEMES or not separator or any(kind not in SESSION_KINDS for kind in options.get(TARGET, ())):
        raise ValueError
    servers = _servers(hosts, options)
    if len(servers) == 1:
        return f"postgresql+psycopg://{rest}"
    names, ports = zip(*servers, strict=True)
    listed = {"host": [",".join(names)], "port": [",".join(ports)]}
    named = listed | {name: texts for name, texts in options.items() if name not in listed}
    named.setdefault(TARGET, ["read-write"])
    database = place.partition("/")[2]
    query = urlencode(named, doseq=True, safe=",:/", quote_via=quote)
    return f"postgresql+psycopg://{login}{at}/{database}?{query}"


def _servers(hosts: str, options: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """Hosts and ports. The query's replace the ones before the path, as in libpq. Raises ValueError."""
    listed = [_bracketed(part) for text in options.get("host", ()) for part in text.split(",")] or hosts.split(",")
    found = [SERVER.fullmatch(part) for part in listed]
    ports = [part for text in options.get("port", ()) for part in text.split(",")] or [""]
    if len(ports) == 1:
        ports *= len(listed)
    servers = [
        (match["host"].strip("[]"), match["port"] or port or "5432")
        for match, port in zip(found, ports, strict=True)
        if match
    ]
    if len(servers) < len(listed) or not all(port.isascii() and 0 < int(port) < 2**16 for _, port in servers):
        raise ValueError
    return servers


def _bracketed(host: str) -> str:
    """The host in brackets if it is an IPv6 address, which libpq's query has without them."""
    return f"[{host}]" if host.count(":") > 1 and "[" not in host else host
