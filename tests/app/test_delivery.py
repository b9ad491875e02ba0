"""Deliveries and the message that carries them."""

import base64
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.delivery import MESSAGE_VERSION, Delivery, Receipt, pack, seal, unpack
from app.errors import Unprocessable
from app.sealing import Sealer
from tests.support.cases import Failures

DELIVERIES = st.builds(
    Delivery,
    aggregator=st.sampled_from(["junction", "terra"]),
    message_id=st.text(max_size=80),
    received_at=st.floats(0, 4e9),
    sealed=st.binary(max_size=200),
    ordering_ms=st.none() | st.integers(0, 10**15),
    reference=st.none() | st.text(max_size=80),
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


@pytest.mark.parametrize("version", [0, 2, 99])
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
    assert sealer.open(sent.sealed, sent.key) == b"body"


def test_an_id_is_made_up_where_the_sender_gave_none() -> None:
    """Breaks if two deliveries without an id count as one."""
    sealer = Sealer([])
    first, second = (seal("terra", Receipt(""), b"body", sealer) for _ in range(2))
    assert first.message_id.startswith("unnamed-")
    assert first.message_id != second.message_id
    assert sealer.open(first.sealed, first.key) == b"body"
