"""URLs of a Redis or Valkey behind Sentinel: sentinel://user:password@host1:26379,host2:26379/0?master=NAME.

User, password and database belong to the data nodes. Kombu's form, in which every host repeats the scheme, is also
read: sentinel://host1:26379;sentinel://host2:26379/0?master=NAME. Kombu takes the rest from its transport options.
"""

import re
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

SCHEME = "sentinel"
WANT = "sentinel://host1:26379,host2:26379/0?master=NAME"
DEFAULT_PORT = 26379
BOOLEANS = {"true": True, "false": False}
FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
VERIFICATION = ("none", "optional", "required")
OPTIONS = {*FILES, "master", "sentinel_password", "sentinel_ssl", "sentinel_username", "ssl"}
OPTIONS |= {"ssl_cert_reqs", "ssl_check_hostname"}
Tls = tuple[tuple[str, str | bool], ...]  # redis-py's options for TLS
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """Sentinels, the primary that they monitor, and how to log in. Its repr omits the passwords."""

    sentinels: tuple[tuple[str, int], ...]
    master: str
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: Tls | None = None  # of the data nodes; None: no TLS
    sentinel_tls: Tls | None = None

    @property
    def name(self) -> str:
        """The sentinels and the primary, without user and password."""
        return f"{','.join(f'{host}:{port}' for host, port in self.sentinels)}/{self.master}"

    @property
    def first(self) -> str:
        """A URL with one sentinel, for Celery: kombu would replace the transport to try a second one."""
        host, port = self.sentinels[0]
        login = f"{quote(self.username or '', safe='')}:{quote(self.password or '', safe='')}@"
        host = f"[{host}]" if ":" in host else host
        return f"{SCHEME}://{login if login != ':@' else ''}{host}:{port}/{self.database}"


def is_sentinel(url: str) -> bool:
    return url.startswith(f"{SCHEME}://")


def read(value: str) -> SentinelUrl:
    """Raises ValueError unless the text is a sentinel:// URL without unknown or repeated options."""
    if not is_sentinel(value):
        raise ValueError
    addresses, _, query = value.partition("?")
    parts = [urlsplit("//" + one.removeprefix(f"{SCHEME}://")) for one in re.split("[;,]", addresses)]
    options = _options(query)
    user, password = _only({(one.username, one.password) for one in parts} - {(None, None)}, (None, None))
    database = _only({one.path.strip("/") for one in parts} - {""}, "0")
    if not re.fullmatch(r"[0-9]{1,6}", database):
        raise ValueError
    tls = _tls(options)
    return SentinelUrl(
        sentinels=tuple(map(_address, parts)),
        master=_name(options.get("master", "")),
        database=int(database),
        username=unquote(user) if user else None,
        password=unquote(password) if password else None,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
        tls=tls if BOOLEANS[options.get("ssl", "false")] else None,
        sentinel_tls=tls if BOOLEANS[options.get("sentinel_ssl", options.get("ssl", "false"))] else None,
    )


def _only(found: set[T], default: T) -> T:
    """The only member. Raises ValueError if there are several."""
    (one,) = found or {default}
    return one


def _address(part: SplitResult) -> tuple[str, int]:
    if not part.hostname or part.port == 0 or part.fragment:
        raise ValueError
    return part.hostname, part.port or DEFAULT_PORT


def _name(master: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", master):  # the characters that Sentinel accepts
        raise ValueError
    return master


def _options(query: str) -> dict[str, str]:
    pairs = parse_qsl(query, strict_parsing=True)
    options = dict(pairs)
    if len(options) < len(pairs) or not options.keys() <= OPTIONS:
        raise ValueError
    return options


def _tls(options: dict[str, str]) -> Tls:
    """Certificates are verified unless `ssl_cert_reqs=none` is set."""
    verification = options.get("ssl_cert_reqs", "required")
    if verification not in VERIFICATION:
        raise ValueError
    checks_host = BOOLEANS[options.get("ssl_check_hostname", "true")] and verification != "none"
    files = tuple((name, options[name]) for name in FILES if name in options)
    return (*files, ("ssl_cert_reqs", verification), ("ssl_check_hostname", checks_host))
