"""Correctly signed requests with mutated bodies, from the endpoint to PostgreSQL: each gets 202 and then an outcome.

A sender with the secret can be wrong in any way: other types, numbers, sizes, nesting, text and structure, repeated
names, ids of other people. 100,000 such requests per seed with `--full`; by default the first thousand.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery, pack
from app.web.app import create_app
from app.web.batcher import Batcher
from app.web.publishing import in_thread
from app.web.rsgi import Server
from tests.support import apply, delivery, event, heartrate, message_id, rows, workout
from tests.support.fuzzing import Mutator, junction_events, junction_headers, odd, terra_events, terra_headers
from tests.support.rsgi import Exchange, Headers, Scope
from tests.support.terra import USER, item
from tests.support.terra import event as terra_event
from workers.ingest.apply import Applier

FEW, MANY = 570, 50_000  # per aggregator and seed
VARIANTS, GOOD = 95, 5  # per message
PERSON = "0f1e2d3c-person-of-the-other-aggregator"
PEOPLE = (PERSON, "0aaca0c5-ccf3-5e68-9bfe-e22fa6a0d79a", "5f0f5c0e-6f0b-4e0d-9d39-0c7a1a9e1c01", "t1", "u1", "")
EVENTS = {"junction": junction_events, "terra": terra_events}
UNSIGNED = ("x-terra-ordering-timestamp", "terra-reference", "x-terra-trace-id")
MOMENT = "2026-03-14T06:30:00+00:00"
VIEWS = ("workouts", "heartrate", "connections")
Request = tuple[str, dict[str, str], bytes]


class Endpoint:
    """The web application, without sockets. Published deliveries are collected."""

    def __init__(self, settings: Settings) -> None:
        self.published: list[Delivery] = []
        batcher = Batcher(settings, in_thread(self.published.extend))
        self._server = Server(create_app(settings, batcher, lambda: None), batcher, settings)
        self._loop = asyncio.Runner()

    def send(self, requests: Sequence[Request]) -> list[int]:
        """The statuses of the requests, which are sent at the same time."""
        return self._loop.run(self._send(requests))

    async def _send(self, requests: Sequence[Request]) -> list[int]:
        exchanges: list[Any] = [Exchange([body]) for _, _, body in requests]
        scopes = [Scope(Headers(headers.items()), path=f"/webhooks/{name}") for name, headers, _ in requests]
        await asyncio.gather(*(self._server.__rsgi__(*pair) for pair in zip(scopes, exchanges, strict=True)))
        return [exchange.status for exchange in exchanges]

    def close(self) -> None:
        """Closes the event loop."""
        self._loop.close()


@pytest.fixture(autouse=True)
def few_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Skips the warnings about dead deliveries, which pytest would collect by the ten thousand."""
    caplog.set_level(logging.ERROR)


@pytest.fixture
def endpoint(plain_settings: Settings) -> Iterator[Endpoint]:
    """An endpoint with the secrets and the key of the tests."""
    found = Endpoint(plain_settings)
    yield found
    found.close()


def variants(dice: random.Random, aggregator: str) -> Iterator[Request]:
    """Signed requests without end. No body is repeated, because equal bodies of one second may be one delivery."""
    mutator, seen = Mutator(dice, EVENTS[aggregator](), PEOPLE), set[int]()
    while True:
        body, now = mutator.body(), datetime.now(UTC)
        if hash(body) not in seen:
            seen.add(hash(body))
            name, seconds = message_id(now, dice.getrandbits(100)), int(now.timestamp())
            signed = junction_headers if aggregator == "junction" else terra_headers
            more = {} if aggregator == "junction" else unsigned_headers(dice)
            yield aggregator, signed(body, name, seconds) | more | {"content-length": str(len(body))}, body


def unsigned_headers(dice: random.Random) -> dict[str, str]:
    """Headers that Terra's signature does not cover: a client that replays a captured request can change them."""
    values = {name: str(odd(dice))[:8000] for name in UNSIGNED if dice.random() < 0.3}
    return {name: "".join(one for one in value if " " <= one <= "~") for name, value in values.items()}


def good(number: int) -> Request:
    """A valid workout of a person whom no mutation names."""
    now = datetime.now(UTC)
    body = msgspec.json.encode(workout(f"good-{number % 50}", f"w{number}"))
    headers = junction_headers(body, message_id(now), int(now.timestamp()))
    return "junction", headers | {"content-length": str(len(body))}, body


def is_expected(status: int, request: Request) -> bool:
    """202 for every signed request; Svix signs text, so its library rejects a body that is not UTF-8."""
    try:
        request[2].decode()
    except UnicodeDecodeError:
        return status == 202 or (status == 401 and request[0] == "junction")
    return status == 202


def run(applier: Applier, deliveries: Sequence[Delivery], seed: int) -> Counter[str]:
    """The outcomes of one message. Fails with the ids of deliveries that raise or get no outcome."""
    try:
        applied = applier.apply(pack(deliveries))
    except Exception as error:
        culprits = [one.message_id for one in deliveries if raises(applier, one)]
        raise AssertionError(f"{type(error).__name__} with seed {seed} by {culprits[:5]}: {error}") from error
    answered = {row.message_id for row in applied.settled} | {one.message_id for one in applied.for_download}
    missing = {one.message_id for one in deliveries} - answered
    assert not missing, f"no outcome with seed {seed}: {sorted(missing)[:5]}"
    return Counter(row.outcome for row in applied.settled) + Counter(url=len(applied.for_download))


def raises(applier: Applier, one: Delivery) -> bool:
    """Whether a delivery raises an exception when it is applied alone."""
    try:
        applier.apply(pack([one]))
    except Exception:  # noqa: BLE001 - any exception is a finding
        return True
    return False


def of_the_other(aggregator: str) -> list[Delivery]:
    """A workout, heart rates and a connection of PERSON, sent by the other aggregator."""
    if aggregator == "terra":
        connection = event("provider.connection.created", PERSON, {"provider": {"slug": "garmin"}})
        return [delivery(one) for one in (workout(PERSON), heartrate(PERSON, {0: 61.0, 5: 64.0}), connection)]
    user = USER | {"user_id": PERSON}
    beats = {"detailed": {"hr_samples": [{"timestamp": MOMENT, "bpm": 61}]}}
    activity = terra_event("activity", item(heart_rate_data=beats), user=user)
    return [delivery(one, aggregator="terra", name=f"other-{n}") for n, one in enumerate((activity, auth(user)))]


def auth(user: dict[str, str]) -> dict[str, Any]:
    """Terra's event of a new connection."""
    return {"type": "auth", "status": "success", "user": user}


def stored(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """The stored data of PERSON."""
    query = "SELECT * FROM health.{} WHERE user_id = :user ORDER BY 1, 2, 3, 4, 5"
    return {view: rows(engine, query.format(view), user=PERSON) for view in VIEWS}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("aggregator", ["junction", "terra"])
def test_every_signed_body_gets_an_outcome(
    engine: Engine, settings: Settings, endpoint: Endpoint, aggregator: str, fuzz_seed: int, *, full: bool
) -> None:
    """Breaks if a signed body gets another answer than 202, raises in the worker, has no outcome, or holds a good
    event in the same message; or if one aggregator changes the data of a person of the other.
    """
    apply(engine, settings, *of_the_other(aggregator))
    before, applier = stored(engine), Applier(engine, settings)
    requests, outcomes = variants(random.Random(fuzz_seed), aggregator), Counter[str]()
    messages = -(-(MANY if full else FEW) // VARIANTS)
    for number in range(messages):
        batch = [next(requests) for _ in range(VARIANTS)]
        batch += [good(number * GOOD + n) for n in range(GOOD)]
        statuses = endpoint.send(batch)
        assert all(map(is_expected, statuses, batch)), (Counter(statuses), fuzz_seed)
        outcomes += run(applier, endpoint.published, fuzz_seed)
        endpoint.published.clear()
    print(f"{aggregator}, seed {fuzz_seed}: {dict(outcomes)}")
    found = rows(engine, "SELECT count(*) AS n FROM health.workouts WHERE user_id LIKE 'good-%'")
    assert found == [{"n": messages * GOOD}]
    assert {"applied", "dead"} <= set(outcomes)
    assert all(before.values())
    assert stored(engine) == before, f"data of a person of the other aggregator was changed, with seed {fuzz_seed}"
