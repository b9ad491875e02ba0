"""Malformed and hostile bodies: a dead letter or tolerated, never another error, and no value in the reason."""

import json
import random
import time
from itertools import product
from typing import Any

import msgspec

from app.errors import Unprocessable
from tests.support.cases import MALFORMED, Failures, each
from tests.support.terra import NAMES, RECORDED, USER, dead, event, item, of, parsed, recorded
from workers.actions import Parsed, Samples

STRANGE: list[bytes] = [
    b"1e400", b"-1e400", b"1" + b"0" * 400, b"NaN", b"Infinity", b"-0", b"1e-400", b"true", b'"canary"', b"[]", b"{}",
    b'"\\ud800"', b'"\\u0000"', b'"\xff"', b"[[[[]]]]", b'"' + b"9" * 5000 + b'"', b"99999999999999999999", b"null",
    b'"0000-00-00T00:00:00Z"', b'"0001-01-01T00:00:00+14:00"', b'"9999-12-31T23:59:59.999999-14:00"', b'"2026-03-14"',
    b'"2026-W11-6T10:00:00"', b'"20260314T100000"', b'"now"', b'"infinity"', b'"2026-03-14T24:00:00Z"',
    b'"2026-03-14T10:00:00+25:00"', b'{"a":' * 500 + b"1" + b"}" * 500,
]  # fmt: skip
DEEP = b"[" * 100_000
MARK = b'"put something here"'


def understood(body: bytes) -> Parsed | None:
    """The parsed event, or None for a dead letter whose reason quotes no value."""
    try:
        return parsed(body)
    except Unprocessable as error:
        reason = str(error)
    assert "canary" not in reason
    assert len(reason) < 300
    return None


def places(given: Any) -> list[tuple[Any, ...]]:
    """The paths of everything in an object."""
    found: list[tuple[Any, ...]] = []
    for name, value in given.items() if isinstance(given, dict) else enumerate(given):
        found.append((name,))
        if isinstance(value, dict | list):
            found += [(name, *path) for path in places(value)]
    return found


def with_mark(given: Any, path: tuple[Any, ...]) -> bytes:
    """The object with a mark at a path."""
    thing = json.loads(json.dumps(given))
    owner = thing
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = "put something here"
    return msgspec.json.encode(thing)


def with_anything_anywhere(bodies: dict[str, Any], count: int) -> Failures:
    """Parses each body with a number of invalid values in every place."""
    failures, dice = Failures(), random.Random(7)
    for name, body in bodies.items():
        with failures.of(name):
            for path in places(body):
                marked = with_mark(body, path)
                for strange in dice.sample(STRANGE, count):
                    understood(marked.replace(MARK, strange))
    return failures


def test_anything_anywhere_in_an_event(full: bool) -> None:
    """Breaks if some value in some place raises an unexpected error, or is in the reason."""
    names = sorted(path.stem for path in (RECORDED / "events").glob("*.json"))
    events = {name: recorded(f"events/{name}") for name in names}
    assert with_anything_anywhere(events, len(STRANGE) if full else 8) == {}


def test_anything_anywhere_in_a_full_object(full: bool) -> None:
    """Breaks if a field that the recorded events lack is read less carefully."""
    events = {name: event(name, recorded(f"generated/{name}.full")) for name in NAMES}
    assert with_anything_anywhere(events, 6 if full else 2) == {}


@each(*MALFORMED, *(b'{"type":%s}' % value for value in (b"null", b"1", b'{"canary":1}', b'"x","data":' + DEEP)))
def test_an_invalid_event_is_a_dead_letter(body: bytes) -> None:
    """Breaks if a strange body raises an unexpected error, or a part of it is quoted."""
    assert dead(body).startswith("not a Terra event")


NOBODY = [
    *(None, "canary", 1, {}, {"user_id": "canary"}, {"user_id": "t1", "provider": ""}),
    *({"user_id": user_id, "provider": "X"} for user_id in (None, "", "u" * 300, ["canary"], {"canary": 1})),
]


@each(*product(NAMES, NOBODY))
def test_data_without_a_user_is_a_dead_letter(name: str, user: Any) -> None:
    """Breaks if data without an owner is stored under an empty name, or the reason names the sender."""
    assert dead(event(name, recorded(f"generated/{name}.bare"), user=user)).startswith(f"{name}: ")


@each("auth", "deauth", "access_revoked", "connection_error", "large_request_sending")
def test_a_connection_without_a_user_is_a_dead_letter(name: str) -> None:
    """Breaks if an event without a user changes a connection."""
    assert dead({"type": name, "status": "success", "reference": "r1"}).startswith(f"{name}: ")
    assert dead({"type": "user_reauth", "old_user": USER}).startswith("user_reauth: ")


@each(
    b'{"type":"activity","type":"sleep"}',
    b'{"type":"daily","user":{"user_id":"a","user_id":"b","provider":"X"},"data":[]}',
    b'{"type":"daily","data":[],"user":{"user_id":"a","provider":"X"},"data":[]}',
)
def test_a_duplicate_name_is_rejected(body: bytes) -> None:
    """Breaks if one reader's person is another's."""
    assert dead(body) == "not a Terra event: an object repeats a name"


def test_ten_megabytes_are_read_in_a_moment() -> None:
    """Breaks if reading loops over dictionaries: one event would block a lane for seconds."""
    beats = [{"timestamp": f"2026-03-14T{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}.{s:06}+01:00", "bpm": 60 + n % 90}
             for n in range(86_400) for s in (0, 500_000)]  # fmt: skip
    body = msgspec.json.encode(event("daily", item(heart_rate_data={"detailed": {"hr_samples": beats}})))
    assert len(body) > 9_000_000
    began = time.process_time()
    found = parsed(body)
    assert time.process_time() - began < 4
    assert len(of(Samples, found)[0].rows) == len(beats) == 172_800
