"""The generator of mutated events: a seed repeats a run, and the mutations are as hostile as they claim to be."""

import random
from datetime import UTC, datetime

from werkzeug.datastructures import Headers

from app.config.settings import Settings
from app.signatures import VERIFIERS
from tests.support.fuzzing import Mutator, junction_events, junction_headers, terra_events, terra_headers

COUNT = 1_000


def bodies(seed: int) -> list[bytes]:
    """Mutated events of both aggregators."""
    mutator = Mutator(random.Random(seed), junction_events() + terra_events(), ["somebody-else"])
    return [mutator.body() for _ in range(COUNT)]


def test_a_seed_repeats_a_run() -> None:
    """Breaks if a failure cannot be repeated with the seed that it prints."""
    assert bodies(3) == bodies(3)
    assert bodies(3) != bodies(4)


def test_mutations_contain_what_parsers_confuse() -> None:
    """Breaks if the fuzzers no longer try numbers out of range, lone surrogates, NUL, nesting and ids of others."""
    found = bodies(5)
    wanted = (b"1e999", b"NaN", b"\\ud800", b"\\u0000", b"[" * 1000, b"somebody-else", b"1" * 400, b"1773469800")
    assert [one for one in wanted if not any(one in body for body in found)] == []
    assert len(set(found)) > COUNT * 0.9
    assert sum(body.count(b'"user_id"') + body.count(b'"us\\u0065r') > 1 for body in found) > 10


def test_any_bytes_can_be_signed(plain_settings: Settings) -> None:
    """Breaks if the signatures of the fuzzers are invalid, so that no mutated body reaches a parser."""
    now = datetime.now(UTC)
    for name, signed in (("junction", junction_headers), ("terra", terra_headers)):
        for body in (b"", b"{", b"null", "é".encode()):
            headers = Headers(signed(body, "msg_1", int(now.timestamp())))
            VERIFIERS[name](headers, body, plain_settings, now)
