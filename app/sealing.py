"""Sealing of bodies on the queue and at rest: compression, and encryption if a key is configured."""

import hashlib
import os
import zlib
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import NotAuthentic, TooLarge, Unprocessable

PLAIN, DEFLATED, ENCRYPTED, BOUND = 0, 1, 2, 4  # bits of the first byte
DAMAGED = "the sealed body is damaged or belongs to another delivery"
# Compression of smaller bodies is not worth its time: a workout of 1.1 kB shrinks by 450 bytes in 20 us. A thousand
# samples shrink tenfold.
COMPRESS_FROM = 2048
MIB = 1024 * 1024
LARGEST = 256 * MIB
KEY_ID_BYTES, NONCE_BYTES = 4, 12


class Sealer:
    """Seals with the first key and opens with any; without keys it only compresses.

    A sealed body is one byte of flags and, if encrypted, a 4-byte key id, a 12-byte nonce and the AES-256-GCM
    ciphertext with its tag (NIST SP 800-38D). The flags and `aad` are authenticated, so that a body cannot be opened as
    another delivery's. Without BOUND, the body was sealed by version 0.2 or older, whose `aad` was shorter.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._ciphers = {hashlib.sha256(key).digest()[:KEY_ID_BYTES]: AESGCM(key) for key in keys}
        self._first = next(iter(self._ciphers), None)

    def seal(self, body: bytes, aad: bytes) -> bytes:
        """The sealed body, bound to `aad`."""
        flags = PLAIN
        if len(body) >= COMPRESS_FROM:
            flags, body = DEFLATED, zlib.compress(body, 1)
        if self._first is None:
            return bytes([flags]) + body
        nonce = os.urandom(NONCE_BYTES)
        first = bytes([flags | ENCRYPTED | BOUND])
        return first + self._first + nonce + self._ciphers[self._first].encrypt(nonce, body, first + aad)

    def require(self, sealed: bytes, flags: int) -> None:
        """Raises NotAuthentic if a key is configured and the body was sealed without one of these flags."""
        if self._first is not None and (not sealed or sealed[0] & flags != flags):
            raise NotAuthentic("the body is not sealed with a key, or its headers are not authenticated")

    def open(self, sealed: bytes, aad: bytes, old_aad: bytes, limit: int = LARGEST) -> bytes:
        """The body of at most `limit` bytes. `old_aad` is that of a body without BOUND.

        Raises NotAuthentic if the body was changed or is bound to another `aad`, TooLarge, and Unprocessable if its key
        is not configured, or for any other damage.
        """
        first, body = sealed[:1], sealed[1:]
        if not first or first[0] > DEFLATED | ENCRYPTED | BOUND:
            raise Unprocessable(DAMAGED)
        if first[0] & ENCRYPTED:
            body = self._decrypt(body, first + (aad if first[0] & BOUND else old_aad))
        elif first[0] & BOUND:
            raise NotAuthentic(DAMAGED)
        body = _inflate(body, limit) if first[0] & DEFLATED else body
        if len(body) > limit:
            raise TooLarge(f"the body is larger than {limit // MIB} MiB")
        return body

    def _decrypt(self, text: bytes, aad: bytes) -> bytes:
        key_id, rest = text[:KEY_ID_BYTES], text[KEY_ID_BYTES:]
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise Unprocessable(f"sealed with a key (id {key_id.hex()}) that HEADRACE_ENCRYPTION_KEY does not hold")
        try:
            return cipher.decrypt(rest[:NONCE_BYTES], rest[NONCE_BYTES:], aad)
        except (InvalidTag, ValueError):  # ValueError: truncated
            raise NotAuthentic(DAMAGED) from None


def is_encrypted(sealed: bytes) -> bool:
    """Whether a sealed body, of which the first byte suffices, was encrypted."""
    return bool(sealed[:1] and sealed[0] & ENCRYPTED)


def _inflate(body: bytes, limit: int) -> bytes:
    """The inflated body, or its first bytes if it is larger than the limit."""
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise Unprocessable(DAMAGED) from None
    if not inflater.eof and len(inflated) <= limit:
        raise Unprocessable(DAMAGED)
    return inflated
