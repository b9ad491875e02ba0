"""Accounts of the console: their roles, and their passwords as scrypt hashes."""

import base64
import hashlib
import hmac
import re
import secrets
from typing import Literal, NamedTuple

Role = Literal["viewer", "operator", "privacy"]
ROLES: tuple[Role, ...] = ("viewer", "operator", "privacy")  # each includes those before it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
# 32 MB and about 0.1 s. The hash has no `$`, `:` and `,`, which environment files and compose files interpret.
LOG_N, R, P = 15, 8, 1
SALT_BYTES, HASH_BYTES = 16, 32
HASH = re.compile(r"scrypt\.(1[4-7])\.(8)\.([1-4])\.([A-Za-z0-9_-]{22,44})\.([A-Za-z0-9_-]{43})")
MIN_PASSWORD = 12  # characters
MAX_PASSWORD = 1024  # bytes


class Account(NamedTuple):
    name: str
    hash: str
    role: Role

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def line(self) -> str:
        return f"{self.name}:{self.hash}:{self.role}"


def read_accounts(value: str) -> tuple[Account, ...]:
    """Accounts as NAME:HASH:ROLE, separated by commas or white space. Raises ValueError."""
    found = []
    for line in re.split(r"[\s,]+", value.strip(", \t\r\n")):
        name, password_hash, role = line.split(":")
        known = next((one for one in ROLES if one == role), None)
        if known is None or not NAME.fullmatch(name) or not HASH.fullmatch(password_hash):
            raise ValueError
        found.append(Account(name, password_hash, known))
    if len({one.name for one in found}) < len(found):
        raise ValueError
    return tuple(found)


def hash_password(password: str) -> str:
    """A new hash, with a random salt."""
    salt = secrets.token_bytes(SALT_BYTES)
    return f"scrypt.{LOG_N}.{R}.{P}.{_encoded(salt)}.{_encoded(_scrypt(password, salt, LOG_N, R, P))}"


def is_password(password: str, password_hash: str) -> bool:
    found = HASH.fullmatch(password_hash)
    if found is None or len(password.encode()) > MAX_PASSWORD:
        return False
    log_n, r, p = (int(found[number]) for number in (1, 2, 3))
    computed = _scrypt(password, base64.urlsafe_b64decode(found[4] + "=="), log_n, r, p)
    return hmac.compare_digest(_encoded(computed), found[5])


def _scrypt(password: str, salt: bytes, log_n: int, r: int, p: int) -> bytes:
    memory = 128 * r * (2**log_n + p + 2) + 1024 * 1024
    return hashlib.scrypt(password.encode(), salt=salt, n=2**log_n, r=r, p=p, maxmem=memory, dklen=HASH_BYTES)


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")
