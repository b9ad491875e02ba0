"""How the text of an environment variable becomes a value: each reader raises ValueError or LookupError."""

import base64
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from app.catalogue import catalogue

MIN_SECRET_BYTES = 16
MIN_LEDGER_DAYS = 40
MAX_DEADLINE_SECONDS = 4.0  # every request is answered within five
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def text(value: str) -> str:
    return value


def name_list(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def whole_number(value: str) -> int:
    number = int(value)
    if number < 0:
        raise ValueError
    return number


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError
    return number


def port(value: str) -> int:
    number = int(value)
    if not 0 < number < 65_536:
        raise ValueError
    return number


def port_or_none(value: str) -> int:
    return 0 if value == "0" else port(value)


def log_level(value: str) -> str:
    return LOG_LEVELS[LOG_LEVELS.index(value.upper())]


def log_format(value: str) -> str:
    return LOG_FORMATS[LOG_FORMATS.index(value.lower())]


def resources(value: str) -> tuple[str, ...]:
    """Names of the catalogue. With streams come the records they belong to: without, nobody knows which there are."""
    found = [catalogue()[name] for name in name_list(value.lower())]
    return tuple(dict.fromkeys(name for one in found for name in (one.name, one.of) if name))


def providers(value: str) -> tuple[str, ...]:
    return name_list(value.lower())


def hosts(value: str) -> tuple[str, ...]:
    hosts = name_list(value.lower())
    if not all(re.fullmatch(r"(\*\.)?([a-z0-9-]+\.)+[a-z0-9-]+", host) for host in hosts):
        raise ValueError
    return hosts


def seconds(value: str) -> float:
    number = float(value)
    if not 0 < number <= MAX_DEADLINE_SECONDS:
        raise ValueError
    return number


def retention(value: str) -> tuple[tuple[str, int], ...]:
    """`heartrate=365,*=3650`: days by resource, `*` being all others; 0 is for ever."""
    pairs = [part.partition("=") for part in name_list(value.lower())]
    if any(name.strip() not in catalogue() and name.strip() != "*" for name, _, _ in pairs):
        raise ValueError
    return tuple((name.strip(), whole_number(days)) for name, _, days in pairs)


def ledger_days(value: str) -> int:
    """The reconciliation looks back 35 days for days without any delivery, and would take a shorter ledger for one."""
    number = whole_number(value)
    if 0 < number < MIN_LEDGER_DAYS:
        raise ValueError
    return number


def rate(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d*/(second|minute|hour)", value):
        raise ValueError
    return value


def boolean(value: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]


def url(*schemes: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in schemes or not parts.hostname or parts.port == 0:  # `port` checks itself
            raise ValueError
        return value

    return check


def database_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("postgresql", "postgres", "postgresql+psycopg") or parts.port == 0:
        raise ValueError
    if not parts.hostname and "host=" not in parts.query:  # a socket's folder stands in the query
        raise ValueError
    return "postgresql+psycopg://" + value.partition("://")[2]


def junction_secrets(value: str) -> tuple[str, ...]:
    """Svix signing secrets: base64 behind `whsec_`. Strictly decoded, because a lenient reader takes typing errors."""
    for secret in name_list(value):
        raw = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        if not secret.startswith("whsec_") or len(raw) < MIN_SECRET_BYTES:
            raise ValueError
    return name_list(value)


def terra_secrets(value: str) -> tuple[str, ...]:
    if any(len(secret) < MIN_SECRET_BYTES for secret in name_list(value)):
        raise ValueError
    return name_list(value)


def encryption_keys(value: str) -> tuple[bytes, ...]:
    keys = tuple(base64.b64decode(part, validate=True) for part in name_list(value))
    if not keys or any(len(key) != 32 for key in keys):
        raise ValueError
    return keys
