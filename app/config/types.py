"""The types of settings: how the text of an environment variable becomes a value."""

import base64
import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from app.accounts import read_accounts
from app.catalogue import catalogue
from app.config import database_url, sentinel_url

MIN_SECRET_BYTES = 16
MIN_LEDGER_DAYS = 40
MAX_DEADLINE_SECONDS = 4.0  # every request is answered within five
MAX_BYTES = 1024**3
MAX_DAYS = 36_500  # 100 years: a date of the year 1 cannot be subtracted from
MAX_TOLERANCE_SECONDS = 24 * 3600  # as long as Terra retries; a captured request could be sent again within this time


class Type(NamedTuple):
    """The form that a text must have, for messages, and its reader, which raises ValueError or LookupError."""

    want: str
    read: Callable[[str], Any]


def _need(is_valid: object) -> None:
    if not is_valid:
        raise ValueError


def text(want: str) -> Type:
    return Type(want, str)


def number(unit: str, low: int = 0, high: int | None = None) -> Type:
    """A whole number from `low` to `high`, in ASCII digits: int() would also read 1_000 and digits of other scripts."""

    def read(value: str) -> int:
        _need(re.fullmatch(r"[0-9]{1,18}", value))
        found = int(value)
        _need(found >= low and (high is None or found <= high))
        return found

    limit = f"{low} or more" if high is None else f"{low} to {high}"
    return Type(f"a number of {unit}, {limit}" if unit else f"a number, {limit}", read)


def one_of(*words: str) -> Type:
    """One of these words, in upper or lower case."""
    known = {word.lower(): word for word in words}
    return Type(" or ".join(words), lambda value: known[value.lower()])


def url(want: str, *schemes: str) -> Type:
    def read(value: str) -> str:
        parts = urlsplit(value)
        _need(parts.scheme in schemes and parts.hostname and parts.port != 0)  # `port` checks the rest
        return value

    return Type(want, read)


def _redis_url(value: str) -> str:
    if sentinel_url.is_sentinel(value):
        sentinel_url.read(value)
        return value
    _need(";" not in value)  # several brokers, for which kombu would replace our transport by one that loses messages
    return str(url("", "redis", "rediss").read(value))


def _broker_url(value: str) -> str:
    return _redis_url(value) if value.startswith(("redis", sentinel_url.SCHEME)) else str(AMQP_URL.read(value))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback, which other machines cannot observe."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _api_url(value: str) -> str:
    """The base URL of an API. Every request has an API key, so http is only for a simulator on this machine."""
    parts = urlsplit(URL.read(value))
    _need(parts.scheme == "https" or is_loopback(parts.hostname or ""))
    _need(parts.username is None and not parts.query and not parts.fragment)
    _need(not {".", ".."} & set(parts.path.split("/")))
    return value


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _lower_names(value: str) -> tuple[str, ...]:
    return _names(value.lower())


def _resources(value: str) -> tuple[str, ...]:
    """A stream includes the resource of its records, because these show which streams exist."""
    found = [catalogue()[name] for name in _lower_names(value)]
    return tuple(dict.fromkeys(name for one in found for name in (one.name, one.of) if name))


def _hosts(value: str) -> tuple[str, ...]:
    hosts = _lower_names(value)
    _need(all(re.fullmatch(r"(\*\.)?([a-z0-9-]+\.)+[a-z0-9-]+", host) for host in hosts))
    return hosts


def _deadline(value: str) -> float:
    found = float(value)
    _need(0 < found <= MAX_DEADLINE_SECONDS)
    return found


def _retention(value: str) -> tuple[tuple[str, int], ...]:
    pairs = [part.partition("=") for part in _lower_names(value)]
    found = tuple((name.strip(), DAYS.read(days)) for name, _, days in pairs)
    _need(all(name in catalogue() or name in ("*", "daily") for name, _ in found))
    return found


def _ledger_days(value: str) -> int:
    """Reconciliation searches 35 days for days without deliveries; with a shorter ledger it would find false ones."""
    found: int = DAYS.read(value)
    _need(found == 0 or found >= MIN_LEDGER_DAYS)
    return found


def _rate(value: str) -> str:
    _need(re.fullmatch(r"[1-9]\d*/(second|minute|hour)", value))
    return value


def _boolean(value: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]


def _junction_secrets(value: str) -> tuple[str, ...]:
    """Svix signing secrets: `whsec_` and base64, decoded strictly, because a lenient decoder accepts typing errors."""
    for secret in _names(value):
        raw = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        _need(secret.startswith("whsec_") and len(raw) >= MIN_SECRET_BYTES)
    return _names(value)


def _terra_secrets(value: str) -> tuple[str, ...]:
    _need(all(len(secret) >= MIN_SECRET_BYTES for secret in _names(value)))
    return _names(value)


def _encryption_keys(value: str) -> tuple[bytes, ...]:
    keys = tuple(base64.b64decode(part, validate=True) for part in _names(value))
    _need(keys and all(len(key) == 32 and len(set(key)) > 1 for key in keys))  # 32 equal bytes are a placeholder
    return keys


ADDRESS = text("an address")
BOOLEAN = Type("true or false", _boolean)
BYTES = number("bytes", 1, MAX_BYTES)
DAYS = number("days", 0, MAX_DAYS)
DAYS_FROM_1 = number("days", 1, MAX_DAYS)
HOURS = number("hours", 0, 24 * MAX_DAYS)
TOLERANCE = number("seconds", 1, MAX_TOLERANCE_SECONDS)
VISIBILITY = number("seconds", 1, 24 * 3600)
PROCESSES = number("processes", 1, 1000)
PORT = number("", 1, 65_535)
PORT_OR_NONE = number("", 0, 65_535)
DEADLINE = Type("a number of seconds, more than 0 and at most 4", _deadline)
RATE = Type("a rate such as 50/second", _rate)
URL = url("a URL, https://host", "http", "https")
API_URL = Type("a URL, https://host (http:// for this machine only), without user, query and fragment", _api_url)
REDIS_URL = Type(f"redis://host:6379/0, rediss://host or {sentinel_url.WANT}", _redis_url)
AMQP_URL = url("amqp://user:password@host/vhost or amqps://...", "amqp", "amqps")
BROKER_URL = Type(f"redis://host:6379/0, rediss://, amqp:// or amqps://host, or {sentinel_url.WANT}", _broker_url)
DATABASE_URL = Type(
    "postgresql://user:password@host/database, or several hosts (h1:5432,h2:5432), "
    "with target_session_attrs=read-write or another of libpq's values",
    database_url.read,
)
JUNCTION_SECRETS = Type("the endpoint's signing secret: whsec_ and at least 16 bytes in base64", _junction_secrets)
TERRA_SECRETS = Type("the signing secret, at least 16 characters", _terra_secrets)
ENCRYPTION_KEYS = Type(
    "32 random bytes in base64 (python3 -c 'import base64,os; print(base64.b64encode(os.urandom(32)).decode())')",
    _encryption_keys,
)
RESOURCES = Type("names of the catalogue, such as workouts,sleep,heartrate", _resources)
PROVIDERS = Type("names of providers, such as garmin,oura", _lower_names)
HOSTS = Type("host names, such as bucket.s3.eu-west-2.amazonaws.com or *.amazonaws.com", _hosts)
RETENTION = Type("days by resource, such as heartrate=365,workouts=0,*=3650", _retention)
LEDGER_DAYS = Type("a number of days, 40 or more, or 0", _ledger_days)
CONSOLE_USERS = Type("accounts as `headrace console passwd` prints them, comma-separated", read_accounts)
