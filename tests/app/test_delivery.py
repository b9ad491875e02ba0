"""Deliveries and the message that carries them."""

import base64
import hashlib
import math
import time

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from app.delivery import (
    EARLIEST,
    MAX_AHEAD_SECONDS,
    MAX_NAME,
    MESSAGE_VERSION,
    OLD_VERSION,
    Delivery,
    Receipt,
    pack,
    seal,
    sealed_again,
    unpack,
    unpack_stored,
)
from app.errors import NotAuthentic, Unprocessable
from app.sealing import BOUND, ENCRYPTED, Sealer
from tests.support.cases import Failures

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=80)
DELIVERIES = st.builds(
    Delivery,
    aggregator=st.sampled_from(["junction", "terra"]),
    message_id=NAMES,
    received_at=st.floats(EARLIEST, 1_773_512_408),
    sealed=st.binary(max_size=200),
    ordering_ms=st.none() | st.integers(0, 10**15 - 1),
    reference=st.none() | NAMES,
    digest=st.none() | st.binary(min_size=16, max_size=16),
)
ONE = Delivery("junction", "msg_1", 1_773_512_408.5, b"sealed")


def packed(value: object) -> str:
    """A value in the packing of a message."""
    return base64.b64encode(msgspec.msgpack.encode(value)).decode()


@given(deliveries=st.lists(DELIVERIES, max_size=5))
def test_packed_deliveries_are_unpacked(deliveries: list[Delivery]) -> None:
    """Breaks if a delivery changes on its way through the broker."""
    assert unpack(pack(deliveries)) == deliveries


def test_a_message_is_ascii() -> None:
    """Breaks if a message needs escaping in JSON."""
    assert pack([ONE]).isascii()


def test_a_foreign_message_is_a_dead_letter() -> None:
    """Breaks if a foreign message raises another error than Unprocessable, or is quoted in its text."""
    failures = Failures()
    for case, message in {
        "empty": "",
        "text": "hello, world",
        "not ASCII": "\u00e9",
        "nothing": None,
        "a number": 17,
        "a list": ["x"],
        "an object": {"x": 1},
        "a packed object": packed({"version": 1}),
        "an empty list": packed([]),
        "a packed number": packed(1),
        "a packed text": packed("canary"),
        "no deliveries": packed([MESSAGE_VERSION]),
        "half a delivery": packed([MESSAGE_VERSION, [["junction"]]]),
        "a number as id": packed([MESSAGE_VERSION, [["junction", 1, 1.0, b""]]]),
        "cut short": pack([ONE])[:-8],
        "too long": pack([ONE]) + "AAAA",
    }.items():
        with failures.of(case):
            with pytest.raises(Unprocessable, match="message") as refused:
                unpack(message)  # type: ignore[arg-type]
            assert refused.value.__cause__ is None
            assert len(str(refused.value)) < 100
    assert failures == {}


REFUSED = {
    "message_id": ["", "x" * (MAX_NAME + 1), "a\0b", "a\nb", "\x7f", 7, None],
    "reference": ["", "x" * (MAX_NAME + 1), "a\0b", 7],
    "aggregator": ["", "Terra", "a\0", "x" * 33, "terra\n", None],
    "received_at": [math.nan, math.inf, -math.inf, 1e300, -1.0, 0.0, EARLIEST - 1, 5e9, "now", None],
    "ordering_ms": [-1, 10**15, 1e300, math.nan, 1.5, "1"],
    "digest": [b"", bytes(15), bytes(17), 7],
    "sealed": [7, None],
}


def test_a_value_out_of_range_is_refused() -> None:
    """Breaks if PostgreSQL, or a comparison of times, is the first to meet NaN, 1e300 or U+0000 in a message."""
    failures = Failures()
    known = dict(zip(Delivery.__struct_fields__, msgspec.structs.astuple(ONE), strict=True))
    assert unpack(packed([MESSAGE_VERSION, [list(known.values())]])) == [ONE]
    for name, values in REFUSED.items():
        for value in values:
            with failures.of(name, value), pytest.raises(Unprocessable, match="not a message of deliveries"):
                unpack(packed([MESSAGE_VERSION, [list((known | {name: value}).values())]]))
    assert failures == {}


def test_a_delivery_of_tomorrow_is_refused() -> None:
    """Breaks if a message can make its data newer than all that arrives until that time."""
    soon, tomorrow = (msgspec.structs.replace(ONE, received_at=time.time() + after) for after in (60, 86_400))
    assert unpack(pack([soon])) == [soon]
    with pytest.raises(Unprocessable, match="in the future"):
        unpack(pack([soon, tomorrow]))
    assert tomorrow.received_at - time.time() > MAX_AHEAD_SECONDS


@pytest.mark.parametrize("version", [0, 1, 3, 99])
def test_a_message_of_another_version_is_reported(version: int) -> None:
    """Breaks if an older worker reads a message of a newer version as its own."""
    with pytest.raises(Unprocessable, match=f"version {version}; this worker reads version {MESSAGE_VERSION}"):
        unpack(packed([version, [["something", "new"]], {}]))


def test_a_message_nested_without_end_is_a_dead_letter() -> None:
    """Breaks if a deeply nested message raises another error than Unprocessable."""
    with pytest.raises(Unprocessable):
        unpack(base64.b64encode(b"\x91" * 100_000).decode())


def test_a_sealed_delivery_opens_with_its_own_metadata() -> None:
    """Breaks if a worker cannot open what the endpoint sealed, or the receipt's parts are lost."""
    sealer, before = Sealer([bytes(32)]), time.time()
    sent = seal("terra", Receipt("trace", 17, "reference"), b"body", sealer)
    assert (sent.aggregator, sent.message_id, sent.ordering_ms, sent.reference) == ("terra", "trace", 17, "reference")
    assert before <= sent.received.timestamp() <= time.time()
    assert sent.key == "terra:trace"
    assert sent.open(sealer) == sent.open_received(sealer) == b"body"


@given(one=DELIVERIES.filter(lambda one: one.digest), data=st.data())
def test_no_field_of_a_sealed_delivery_can_be_changed(one: Delivery, data: st.DataObject) -> None:
    """Breaks if the broker can change what decides about a delivery: its id, its times, its reference, its digest."""
    sealer = Sealer([bytes(32)])
    sealed = one.with_body(b"body", sealer)
    name = data.draw(st.sampled_from(sorted({*Delivery.__struct_fields__} - {"sealed"})))
    other = getattr(data.draw(DELIVERIES), name)
    forged = msgspec.structs.replace(sealed, **{name: other})
    if name == "received_at" and round(other * 1e6) == round(one.received_at * 1e6):
        return
    if other == getattr(one, name):
        assert forged.open_received(sealer) == b"body"
        return
    with pytest.raises(NotAuthentic):
        forged.open_received(sealer)


@pytest.mark.parametrize("moment", [1_773_512_408.0000005, 1_773_512_408.9999996, 1_773_512_408.123_456_7])
def test_a_time_of_receipt_is_in_microseconds(moment: float) -> None:
    """Breaks if a delivery cannot be opened after PostgreSQL has rounded its time to microseconds."""
    sealer = Sealer([bytes(32)])
    sent = seal("junction", Receipt("m"), b"body", sealer, received_at=moment)
    assert sent.received.timestamp() == sent.received_at
    stored = msgspec.structs.replace(sent, received_at=sent.received.timestamp())
    assert stored.open_received(sealer) == b"body"


def sealed_by_an_old_version(one: Delivery, body: bytes, key: bytes) -> Delivery:
    """A body as 0.2 sealed it: bound to the aggregator and the id, without the flag BOUND."""
    first, nonce = bytes([ENCRYPTED]), bytes(12)
    text = AESGCM(key).encrypt(nonce, body, first + one.key.encode())
    return msgspec.structs.replace(one, sealed=first + hashlib.sha256(key).digest()[:4] + nonce + text)


def test_a_body_that_an_old_version_sealed_opens_from_the_database_only() -> None:
    """Breaks if the archive cannot be replayed after an upgrade, or the broker can use the old form of sealing."""
    sealer = Sealer([bytes(32)])
    old = sealed_by_an_old_version(ONE, b"body", bytes(32))
    assert old.open(sealer) == b"body"
    with pytest.raises(NotAuthentic):
        old.open_received(sealer)
    message = base64.b64encode(msgspec.msgpack.encode([OLD_VERSION, [msgspec.structs.astuple(old)[:6]]])).decode()
    with pytest.raises(Unprocessable, match="version 1"):
        unpack(message)
    (found,) = unpack_stored(message)
    assert found == old
    again = sealed_again(found, sealer)
    assert again.open_received(sealer) == b"body"
    assert again.sealed[0] & BOUND


def test_a_body_without_encryption_is_refused_from_the_broker() -> None:
    """Breaks if anybody who can write to the broker can write health data although a key is set."""
    bare = seal("junction", Receipt("m"), b"body", Sealer([]))
    assert bare.open_received(Sealer([])) == b"body"
    sealer = Sealer([bytes(32)])
    assert bare.open(sealer) == b"body"  # of the archive, stored before the key was set
    for sealed in (bare.sealed, b"", b"\x04"):
        forged = msgspec.structs.replace(bare, sealed=sealed)
        with pytest.raises(NotAuthentic):
            forged.open_received(sealer)
        with pytest.raises(NotAuthentic):
            sealed_again(forged, sealer)
    for sealed in (b"\x06", b"\x06" + bare.sealed * 9, b"\x02" + bare.sealed * 9):
        with pytest.raises(Unprocessable):
            sealed_again(msgspec.structs.replace(bare, sealed=sealed), sealer)


def test_a_delivery_is_sealed_again_for_another_id_or_time() -> None:
    """Breaks if a delivery that gets the id or the time of its first arrival cannot be opened any more."""
    sealer = Sealer([bytes(32)])
    sent = seal("terra", Receipt("second", 17, "reference", bytes(16)), b"body", sealer)
    found = sent.with_fields(sealer, message_id="first", received_at=EARLIEST)
    assert (found.message_id, found.received_at, found.open_received(sealer)) == ("first", EARLIEST, b"body")


def test_an_id_is_made_up_where_the_sender_gave_none() -> None:
    """Breaks if two deliveries without an id count as one."""
    sealer = Sealer([])
    first, second = (seal("terra", Receipt(""), b"body", sealer) for _ in range(2))
    assert first.message_id.startswith("unnamed-")
    assert first.message_id != second.message_id
    assert first.open(sealer) == b"body"


def test_deliveries_without_an_id_are_named_by_their_digest() -> None:
    """Breaks if a captured request is a new delivery each time when its unsigned id is removed."""
    one, same, other = (seal("terra", Receipt("", digest=bytes([n]) * 16), b"", Sealer([])) for n in (1, 1, 2))
    assert one.message_id == same.message_id != other.message_id
