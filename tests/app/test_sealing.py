"""Sealing: a sealed body opens only with the key and for its own delivery."""

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import NotAuthentic, TooLarge, Unprocessable
from app.sealing import COMPRESS_FROM, DEFLATED, LARGEST, Sealer
from tests.support.cases import Failures

OLD, NEW = bytes(range(32)), bytes(range(1, 33))
BODY = b'{"event_type":"daily.data.heartrate.created","heart":"canary"}'
BODIES = st.one_of(
    st.binary(max_size=64),
    st.binary(min_size=1, max_size=64).map(lambda part: (part * COMPRESS_FROM)[: COMPRESS_FROM + 1]),
    st.sampled_from([b"x" * (COMPRESS_FROM - 1), b"x" * COMPRESS_FROM, b"x" * (COMPRESS_FROM + 1)]),
)


@given(body=BODIES, aad=st.binary(max_size=300), keys=st.lists(st.binary(min_size=32, max_size=32), max_size=3))
def test_a_sealed_body_opens_again(body: bytes, aad: bytes, keys: list[bytes]) -> None:
    """Breaks if a body, compressed or not, changes."""
    sealer = Sealer(keys)
    assert sealer.open(sealer.seal(body, aad), aad, b"old") == body


@given(body=BODIES)
def test_a_sealed_body_is_not_readable(body: bytes) -> None:
    """Breaks if a sealed body with a key contains the plain or compressed text."""
    sealed = Sealer([NEW]).seal(body, b"junction:m1")
    assert len(body) < 4 or body not in sealed
    assert len(body) < 4 or zlib.compress(body, 1) not in sealed


def test_the_same_body_is_sealed_differently_each_time() -> None:
    """Breaks if a nonce is reused, which breaks AES-GCM."""
    sealed = {Sealer([NEW]).seal(BODY, b"junction:m1") for _ in range(1000)}
    assert len({one[5:17] for one in sealed}) == 1000


def test_a_large_body_shrinks() -> None:
    """Breaks if large bodies are no longer compressed before they are encrypted."""
    assert len(Sealer([NEW]).seal(BODY * 1000, b"a")) < len(BODY) * 100


@pytest.mark.parametrize("aad", [b"junction:m2", b"terra:m1", b"", b"junction:m1 "])
def test_a_body_cannot_be_passed_off_as_anothers(aad: bytes) -> None:
    """Breaks if a sealed body opens as that of another delivery."""
    sealer = Sealer([NEW])
    with pytest.raises(Unprocessable, match="damaged or belongs to another"):
        sealer.open(sealer.seal(BODY, b"junction:m1"), aad, b"junction:m1")


@given(position=st.integers(17, 17 + len(BODY) + 15), bit=st.integers(0, 7))
def test_damage_to_an_encrypted_body_is_refused(position: int, bit: int) -> None:
    """Breaks if a flipped bit of the ciphertext or the tag is not detected."""
    sealer = Sealer([NEW])
    sealed = bytearray(sealer.seal(BODY, b"a"))
    sealed[position] ^= 1 << bit
    with pytest.raises(Unprocessable, match="damaged"):
        sealer.open(bytes(sealed), b"a", b"old")


@pytest.mark.parametrize("position", [1, 4, 5, 16])
def test_damage_to_key_id_or_nonce_is_refused(position: int) -> None:
    """Breaks if a damaged header is not detected."""
    sealer = Sealer([NEW])
    sealed = bytearray(sealer.seal(BODY, b"a"))
    sealed[position] ^= 1
    with pytest.raises(Unprocessable, match=r"damaged|with a key"):
        sealer.open(bytes(sealed), b"a", b"old")


@pytest.mark.parametrize("length", [1, 3, 13, 17, 20])
def test_a_truncated_body_is_refused(length: int) -> None:
    """Breaks if a truncated body is not detected."""
    sealer = Sealer([NEW])
    with pytest.raises(Unprocessable):
        sealer.open(sealer.seal(BODY, b"a")[:length], b"a", b"old")


@pytest.mark.parametrize(
    ("keys", "sealed"),
    [
        pytest.param([], b"", id="nothing"),
        pytest.param([NEW], Sealer([NEW]).seal(BODY, b"a")[:5], id="no nonce"),
        pytest.param([NEW], Sealer([NEW]).seal(BODY, b"a")[:12], id="half a nonce"),
        pytest.param([], bytes([DEFLATED]) + b"no such stream", id="not compressed"),
        pytest.param([], Sealer([]).seal(BODY * 100, b"a")[:-6], id="compressed, cut short"),
    ],
)
def test_every_other_damage_is_a_dead_letter_too(keys: list[bytes], sealed: bytes) -> None:
    """Breaks if damage raises another error than Unprocessable, or yields half a body."""
    with pytest.raises(Unprocessable):
        Sealer(keys).open(sealed, b"a", b"old")


def test_damage_to_the_flags_is_refused() -> None:
    """Breaks if a flipped bit of the first byte yields encrypted or compressed bytes."""
    failures = Failures()
    for flags in (0b01, 0b100, 0b1000_0000):
        for body in (BODY, BODY * 100):
            with failures.of(flags, body):
                sealer = Sealer([NEW])
                sealed = bytearray(sealer.seal(body, b"a"))
                sealed[0] ^= flags
                with pytest.raises(Unprocessable):
                    sealer.open(bytes(sealed), b"a", b"old")
    assert failures == {}


def test_rotation_seals_with_the_first_key_and_opens_with_all() -> None:
    """Breaks if queued bodies cannot be opened after a new first key was added."""
    before, during, after = Sealer([OLD]), Sealer([NEW, OLD]), Sealer([NEW])
    waiting, fresh = before.seal(BODY, b"a"), during.seal(BODY, b"a")
    opened = [sealer.open(one, b"a", b"old") for sealer, one in ((during, waiting), (during, fresh), (after, fresh))]
    assert opened == [BODY] * 3
    with pytest.raises(Unprocessable):
        before.open(fresh, b"a", b"old")


def test_an_unknown_key_is_named_by_its_id() -> None:
    """Breaks if the error of a missing key does not name the variable, or shows a key."""
    with pytest.raises(Unprocessable, match="HEADRACE_ENCRYPTION_KEY") as refused:
        Sealer([OLD]).open(Sealer([NEW]).seal(BODY, b"a"), b"a", b"old")
    assert NEW.hex() not in str(refused.value)


def test_without_keys_an_encrypted_body_is_refused() -> None:
    """Breaks if a worker without the key returns encrypted bytes."""
    with pytest.raises(Unprocessable, match="HEADRACE_ENCRYPTION_KEY"):
        Sealer([]).open(Sealer([NEW]).seal(BODY, b"a"), b"a", b"old")


def test_a_body_sealed_without_a_key_still_opens_with_one() -> None:
    """Breaks if bodies that were queued without a key cannot be opened once there is one."""
    for body in (BODY, BODY * 100):
        assert Sealer([NEW]).open(Sealer([]).seal(body, b"a"), b"a", b"old") == body


@pytest.mark.parametrize("excess", [1, 300])
def test_a_bomb_is_refused(excess: int) -> None:
    """Breaks if a few kilobytes can decompress without limit."""
    packer = zlib.compressobj(9)
    megabyte = packer.compress(bytes(1024 * 1024)) + packer.flush(zlib.Z_FULL_FLUSH)  # a block that may be repeated
    header, block = megabyte[:2], megabyte[2:]
    end = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    checksum = (((LARGEST + excess) % 65521 << 16) + 1).to_bytes(4)  # Adler-32 of so many zeros
    bomb = header + block * (LARGEST // (1024 * 1024)) + end.compress(bytes(excess)) + end.flush() + checksum
    assert len(bomb) < LARGEST // 500
    with pytest.raises(Unprocessable, match="256 MiB"):
        Sealer([]).open(bytes([DEFLATED]) + bomb, b"a", b"old")


@pytest.mark.parametrize("body", [b"x" * 5000, b"x" * 100], ids=["deflated", "plain"])
def test_a_reader_may_limit_the_body(body: bytes) -> None:
    """Breaks if a lane inflates a body that it does not apply, or passes on one that is not authentic."""
    sealer = Sealer([NEW])
    sealed = sealer.seal(body, b"a")
    assert sealer.open(sealed, b"a", b"old", len(body)) == body
    with pytest.raises(TooLarge):
        sealer.open(sealed, b"a", b"old", len(body) - 1)
    with pytest.raises(NotAuthentic):
        sealer.open(sealed, b"another", b"old", len(body) - 1)
