"""Flask on the event loop: limits on bodies, and waiting for the broker."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import PublishFailed
from app.observability import metrics
from app.web.app import create_app, make_batcher
from app.web.rsgi import BUFFERED_BODIES, INLINE_BYTES, Server
from tests.support import signed, workout
from tests.support.rsgi import SLASHED, Exchange, Headers, Scope

BODY = json.dumps(workout("u1")).encode()
SMALLEST_BUFFER = 1024 * 1024


@pytest.fixture
def taken() -> list[Delivery]:
    """The published deliveries."""
    return []


def server(settings: Settings, publish: Any, **options: Any) -> Server:
    """The endpoint with a given publish function."""
    batcher = make_batcher(settings, publish)
    return Server(create_app(settings, batcher, lambda: None), batcher, settings, **options)


def ask(app: Server, exchange: Exchange, headers: dict[str, str], **scope: Any) -> Exchange:
    asyncio.run(app.__rsgi__(Scope(Headers(headers.items()), **scope), exchange))
    return exchange


@pytest.mark.parametrize("parts", [[BODY], [BODY[:1], BODY[1:100], b"", BODY[100:]]])
def test_a_signed_body_is_accepted_in_any_number_of_parts(
    plain_settings: Settings, taken: list[Delivery], parts: list[bytes]
) -> None:
    """Breaks if a body in several parts is not verified as a whole."""
    assert ask(server(plain_settings, taken.extend), Exchange(parts), signed(BODY)).status == 202
    assert [one.message_id for one in taken] == ["msg_1"]


def test_a_large_body_is_verified_in_a_thread(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if a body that is verified in a thread is lost."""
    body = json.dumps(workout("u1", title="x" * INLINE_BYTES)).encode()
    assert ask(server(plain_settings, taken.extend), Exchange([body]), signed(body)).status == 202
    assert len(taken) == 1


@pytest.mark.parametrize("path", SLASHED)
def test_additional_slashes_are_ignored(plain_settings: Settings, taken: list[Delivery], path: str) -> None:
    """Breaks if a sender whose base URL ends with a slash is redirected or refused: senders follow no redirect."""
    app = server(plain_settings, taken.extend)
    assert ask(app, Exchange([BODY]), signed(BODY), path=path).status == 202
    assert len(taken) == 1
    assert ask(app, Exchange([BODY]), signed(BODY), path="/webhooks/nobody/").status == 404
    assert ask(app, Exchange([BODY]), signed(BODY), path="/livez/", method="GET").status == 404


def test_a_wrong_signature_is_refused(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if the event loop skips the verification."""
    assert ask(server(plain_settings, taken.extend), Exchange([BODY + b" "]), signed(BODY)).status == 401
    assert taken == []


def test_a_duplicate_header_is_rejected(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if one of two ids is verified and the other one used."""
    pairs = [*signed(BODY).items(), ("svix-id", "msg_2")]
    exchange = Exchange([BODY])
    asyncio.run(server(plain_settings, taken.extend).__rsgi__(Scope(Headers(pairs)), exchange))
    assert (exchange.status, taken) == (401, [])


def test_a_body_that_is_announced_too_large_is_not_read(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if a body that is too large is read before it is rejected."""
    app = server(replace(plain_settings, max_body_bytes=100), taken.extend)
    exchange = ask(app, Exchange([BODY]), {**signed(BODY), "content-length": "101"})
    assert (exchange.status, exchange.read, taken) == (413, 0, [])


def test_requests_rejected_unread_are_counted(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if rejected webhooks are not counted, or an arbitrary path becomes a label."""
    counted = 'headrace_answers_total{aggregator="junction",status="413"}'

    def count() -> float:
        return sum(float(line.split()[1]) for line in metrics.exposition().decode().splitlines() if counted in line)

    before = count()
    app = server(replace(plain_settings, max_body_bytes=10), taken.extend)
    for path in ("/webhooks/junction", "/webhooks/somebody"):
        ask(app, Exchange([]), {"content-length": "11"}, path=path)
    assert count() - before == 1
    assert "somebody" not in metrics.exposition().decode()


def test_a_body_that_grows_too_large_is_read_no_further(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if an oversized chunked body is read to its end, or a wrong length is believed."""
    app = server(replace(plain_settings, max_body_bytes=100), taken.extend)
    exchange = ask(app, Exchange([b"x" * 60] * 50), {})
    assert (exchange.status, exchange.read, taken) == (413, 2, [])
    assert (ask(app, Exchange([b"x" * 60] * 50), {"content-length": "60"}).status, taken) == (413, [])


def test_a_body_that_never_ends_times_out(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if a slow body has no time limit."""
    app = server(plain_settings, taken.extend, body_seconds=0.05)
    exchange = ask(app, Exchange([b"x"] * 1000, wait=0.01), signed(BODY))
    assert (exchange.status, exchange.headers["Retry-After"]) == (503, "5")
    assert exchange.read < 1000


def test_bodies_that_are_arriving_have_a_budget_together(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if slow senders exceed the memory budget, or their share is not released."""
    settings = replace(plain_settings, max_body_bytes=SMALLEST_BUFFER)
    app = server(settings, taken.extend)
    slow = [Exchange([b"x" * (SMALLEST_BUFFER - 1)] + [b"x"] * 5, wait=0.02) for _ in range(BUFFERED_BODIES + 3)]

    async def together() -> None:
        scope = Scope(Headers(signed(BODY).items()))
        await asyncio.gather(*(app.__rsgi__(scope, one) for one in slow))

    asyncio.run(together())
    statuses = sorted(one.status for one in slow)
    assert statuses.count(503) == 3
    assert set(statuses) == {413, 503}
    assert ask(app, Exchange([BODY]), signed(BODY)).status == 202


def test_a_cut_connection_publishes_nothing(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if a cut connection ends the process, or half a body is published."""
    app = server(plain_settings, taken.extend)
    exchange = ask(app, Exchange([BODY[:10]], then=ConnectionError("cut")), signed(BODY))
    assert (exchange.status, taken) == (503, [])
    assert ask(app, Exchange([BODY]), signed(BODY)).status == 202


def test_no_202_before_the_broker_has_it(plain_settings: Settings) -> None:
    """Breaks if a request is answered before its message is published."""
    release, seen = threading.Event(), []

    def publish(deliveries: Sequence[Delivery]) -> None:
        release.wait(10)
        seen.extend(deliveries)

    app, exchange = server(plain_settings, publish), Exchange([BODY])

    async def follow() -> None:
        request = asyncio.create_task(app.__rsgi__(Scope(Headers(signed(BODY).items())), exchange))
        await asyncio.sleep(0.1)
        assert (exchange.status, seen) == (0, [])
        release.set()
        await request

    asyncio.run(follow())
    assert (exchange.status, len(seen)) == (202, 1)


def test_a_broker_that_refuses_or_hangs_is_503(plain_settings: Settings) -> None:
    """Breaks if a request waits longer than the deadline, or gets a 202 without a confirmation."""

    def refuse(_: Sequence[Delivery]) -> None:
        raise PublishFailed("as asked")

    hang = threading.Event()
    settings = replace(plain_settings, enqueue_deadline_seconds=0.1)
    for publish in (refuse, lambda _: hang.wait(10) and None):
        exchange = ask(server(settings, publish), Exchange([BODY]), signed(BODY))
        assert (exchange.status, exchange.headers["Retry-After"]) == (503, "5")
    hang.set()


def test_an_unexpected_error_is_503_and_its_text_is_not_logged(
    plain_settings: Settings, taken: list[Delivery], caplog: pytest.LogCaptureFixture
) -> None:
    """Breaks if an error of a receiver, which Flask does not handle on the event loop, is a 500 or quotes a body."""
    app = server(plain_settings, taken.extend)

    def fail(_headers: Any, _body: bytes) -> None:
        raise ZeroDivisionError("canary")

    app._receivers["/webhooks/junction"] = fail
    exchange = ask(app, Exchange([BODY]), signed(BODY))
    assert (exchange.status, exchange.headers["Retry-After"]) == (503, "5")
    assert "unexpected ZeroDivisionError on /webhooks/junction" in caplog.text
    assert "canary" not in caplog.text


def test_the_other_routes_answer(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if probes or metrics fail, or a path is decoded otherwise than under WSGI."""
    app = server(plain_settings, taken.extend)
    assert ask(app, Exchange([]), {}, method="GET", path="/livez").answer == b"up\n"
    assert ask(app, Exchange([]), {}, method="GET", path="/readyz").status == 200
    assert b"headrace_answers_total" in ask(app, Exchange([]), {}, method="GET", path="/metrics").answer
    assert ask(app, Exchange([]), {}, method="GET", path="/nowhere").status == 404
    assert "POST" in ask(app, Exchange([]), {}, method="OPTIONS").headers["Allow"]
    assert ask(app, Exchange([BODY]), signed(BODY), path="/webhooks/%6aunction").status == 202
