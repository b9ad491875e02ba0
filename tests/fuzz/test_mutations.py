"""Thousands of mutated requests: each is answered 401.

A hundred thousand per seed with `--full`; by default the first few thousand of them.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from app.config.settings import Settings
from app.delivery import Delivery
from app.web.app import create_app
from app.web.batcher import Batcher
from app.web.publishing import in_thread
from app.web.rsgi import Server
from tests.support import signed, workout
from tests.support.fuzzing_requests import Pairs, mutated
from tests.support.rsgi import Exchange, Headers, Scope
from tests.support.terra import terra_signed

FEW, MANY = 2_000, 50_000  # per aggregator
BODY = json.dumps(workout("u1")).encode()


def is_same_junction(headers: Pairs, body: bytes, good: Pairs) -> bool:
    """Whether the signed parts are unchanged and a valid signature is present: such a request is valid."""
    texts = {name: headers.get(name, "") for name in good}
    signatures = texts["svix-signature"].split(" ")
    try:
        moment = int(float(texts["svix-timestamp"]))
    except (ValueError, OverflowError):
        return False
    same = (body, texts["svix-id"], str(moment)) == (BODY, good["svix-id"], good["svix-timestamp"])
    return same and good["svix-signature"].strip() in signatures


def is_same_terra(headers: Pairs, body: bytes, good: Pairs) -> bool:
    """The same for Terra: body, time and signature are unchanged. The trace id is not signed."""
    parts = {part.strip() for part in headers.get("x-terra-signature", "").split(",")}
    wanted = {part.strip() for part in good["x-terra-signature"].split(",")}
    return body == BODY and {part.lower() for part in wanted} <= {part.lower() for part in parts}


def statuses(
    settings: Settings,
    path: str,
    sign: Callable[[], Pairs],
    is_same: Callable[[Pairs, bytes, Pairs], bool],
    *,
    count: int,
    seed: int,
) -> Counter[int]:
    """The statuses of `count` mutations, without those that are still valid."""
    accepted: list[Delivery] = []
    batcher = Batcher(settings, in_thread(accepted.extend))
    app = Server(create_app(settings, batcher, lambda: None), batcher, settings)
    dice, found = random.Random(seed), Counter[int]()

    async def send_all() -> None:
        good, until = sign(), time.monotonic() + 60
        for _ in range(count):
            if time.monotonic() > until:  # an old signature would be rejected for its age
                good, until = sign(), time.monotonic() + 60
            headers, body = mutated(dice, good, BODY)
            if is_same(headers, body, good):
                continue
            exchange: Any = Exchange([body])
            pairs = [(name.lower(), value) for name, value in headers.items()]
            await app.__rsgi__(Scope(Headers(pairs), path=path), exchange)
            found[exchange.status] += 1
            assert exchange.status == 401, (seed, headers, good, body == BODY)

    asyncio.run(send_all())
    assert not accepted
    return found


@pytest.fixture(scope="module")
def count(*, full: bool) -> int:
    """The number of mutations of a request."""
    return MANY if full else FEW


def test_no_mutation_of_a_junction_request_is_accepted(plain_settings: Settings, count: int, fuzz_seed: int) -> None:
    """Breaks if a mutated request is accepted or causes a server error."""
    found = statuses(
        plain_settings, "/webhooks/junction", lambda: signed(BODY), is_same_junction, count=count, seed=fuzz_seed
    )
    assert set(found) == {401}
    assert found[401] > count * 0.9


def test_no_mutation_of_a_terra_request_is_accepted(plain_settings: Settings, count: int, fuzz_seed: int) -> None:
    """Breaks if a mutated request of Terra is accepted or causes a server error."""
    found = statuses(
        plain_settings, "/webhooks/terra", lambda: terra_signed(BODY), is_same_terra, count=count, seed=fuzz_seed
    )
    assert set(found) == {401}
    assert found[401] > count * 0.5


def test_the_original_is_accepted(plain_settings: Settings) -> None:
    """Breaks if the unmutated request is rejected, so that the tests above cannot fail."""
    for path, headers in (("/webhooks/junction", signed(BODY)), ("/webhooks/terra", terra_signed(BODY))):
        accepted: list[Delivery] = []
        batcher = Batcher(plain_settings, in_thread(accepted.extend))
        exchange: Any = Exchange([BODY])
        pairs = [(name.lower(), value) for name, value in headers.items()]
        app = Server(create_app(plain_settings, batcher, lambda: None), batcher, plain_settings)
        asyncio.run(app.__rsgi__(Scope(Headers(pairs), path=path), exchange))
        assert (exchange.status, len(accepted)) == (202, 1)
