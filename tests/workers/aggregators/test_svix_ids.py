"""The time inside a message id."""

from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.support import message_id
from tests.support.cases import each
from workers.aggregators.svix_ids import ALPHABET, KSUID_EPOCH, created_at


@each(
    # The example of the KSUID reference implementation, with its documented time.
    ("0ujtsYcgvSTl8PAuAdqWYSMnLOv", datetime(2017, 10, 10, 4, 0, 47, tzinfo=UTC)),
    ("msg_0ujtsYcgvSTl8PAuAdqWYSMnLOv", datetime(2017, 10, 10, 4, 0, 47, tzinfo=UTC)),
    ("msg_" + "0" * 27, KSUID_EPOCH),
    ("aWgEPTl1tmebfsQzFP4bxwgy80V", KSUID_EPOCH + timedelta(seconds=2**32 - 1)),
)
def test_known_ids(name: str, moment: datetime) -> None:
    """Breaks if the clock is read from the wrong bytes, in the wrong alphabet or from the wrong epoch."""
    found = created_at(name)
    assert found is not None
    assert timedelta() <= found - moment < timedelta(seconds=1)


@given(
    moment=st.datetimes(datetime(2014, 5, 14), datetime(2150, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - the timezone comes along
    tail=st.integers(0, 2**120 - 1),
)
def test_the_time_comes_back_to_four_milliseconds(moment: datetime, tail: int) -> None:
    """Breaks if two deliveries that were made in one order are put in the other."""
    found = created_at(message_id(moment, tail))
    assert found is not None
    assert timedelta() <= moment - found < timedelta(milliseconds=4)


@given(tail=st.integers(0, 2**120 - 1), step=st.integers(0, 255))
def test_an_ordinary_ksuid_errs_by_less_than_a_second(tail: int, step: int) -> None:
    """Breaks if a random byte where the 4-ms steps are pushes the time into another second."""
    moment = datetime(2026, 3, 14, 6, 30, tzinfo=UTC)
    found = created_at(message_id(moment + step * timedelta(milliseconds=4), tail))
    assert found is not None
    assert timedelta() <= found - moment < timedelta(seconds=2)
    number = (int((moment - KSUID_EPOCH).total_seconds()) << 128) | (step << 120) | tail
    digits = ""
    for _ in range(27):
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    found = created_at(digits)
    assert found is not None
    assert timedelta() <= found - moment < timedelta(seconds=1)


@each(
    "",
    "msg_",
    "msg_1",
    "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "unnamed-0e3d1f5e-0000-4000-8000-000000000001",
    "0e3d1f5e-0000-4000-8000-000000000001",
    "msg_" + "z" * 27,
    "aWgEPTl1tmebfsQzFP4bxwgy80W",
    "msg_" + "0" * 26,
    "msg_" + "0" * 28,
    "msg_" + "0" * 26 + "-",
    "msg_" + "0" * 26 + "\u00e9",
    "msg_" + "\u0660" * 27,
    "msg_msg_" + "0" * 27,
    " " + "0" * 26,
)
def test_other_ids_have_no_time(name: Any) -> None:
    """Breaks if an id of another form gets a time that it does not hold, and wins or loses by it."""
    assert created_at(name) is None


@given(name=st.text(max_size=40) | st.text(ALPHABET, min_size=27, max_size=27))
def test_no_id_raises(name: str) -> None:
    """Breaks if a hostile id makes a worker fail."""
    found = created_at(name)
    assert found is None or found >= KSUID_EPOCH
