"""Flask on the event loop: limits on bodies, and waiting for the broker."""

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]
from prometheus_client import REGISTRY

from app.config.settings import Settings
from app.delivery import Delivery
from app.errors import PublishFailed
from app.observability import metrics
from app.signatures import VERIFIERS
from app.web import rsgi
from app.web.app import create_app
from app.web.batcher import Batcher
from app.web.publishing import in_thread
from app.web.rsgi import INLINE_BYTES, SMALL_BYTES, Server
from tests.support import signed, workout
from tests.support.rsgi import SLASHED, Exchange, Headers, Scope

BODY = json.dumps(workout("u1")).encode()
MIB = 1024 * 1024


@pytest.fixture
def taken() -> list[Delivery]:
    """The published deliveries."""
    return []


def server(settings: Settings, publish: Any) -> Server:
    """The endpoint with a given publish function."""
    batcher = Batcher(settings, in_thread(publish))
    return Server(create_app(settings, batcher, lambda: None), batcher, settings)


def counted(name: str, **labels: str) -> float:
    """The value of a counter of the endpoint for Junction."""
    return REGISTRY.get_sample_value(name, {"aggregator": "junction"} | labels) or 0


def forged(body: bytes = BODY) -> dict[str, str]:
    """Well-formed headers with a signature of another body."""
    return signed(body + b" ")


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


def test_a_body_that_is_announced_far_too_large_is_not_read(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if a body of more than twice the limit is read, or its 413 counts for alerts."""
    before = counted("headrace_answers_total", status="413"), counted("headrace_unverified_total", status="413")
    app = server(replace(plain_settings, max_body_bytes=SMALL_BYTES), taken.extend)
    exchange = ask(app, Exchange([BODY]), {**signed(BODY), "content-length": str(2 * SMALL_BYTES + 1)})
    assert (exchange.status, exchange.read, taken) == (413, 0, [])
    after = counted("headrace_answers_total", status="413"), counted("headrace_unverified_total", status="413")
    assert after == (before[0], before[1] + 1)


@pytest.mark.parametrize("length", [str(1000), str(64 * 1024 * 1024), None])
def test_headers_that_no_body_can_fit_are_refused_before_the_body(
    plain_settings: Settings, taken: list[Delivery], length: str | None
) -> None:
    """Breaks if an unsigned sender can fill the memory, or gets another answer than 401."""
    app = server(plain_settings, taken.extend)
    old = signed(BODY, at=datetime.now(UTC) - timedelta(hours=1))
    for headers in ({}, signed(BODY) | {"svix-signature": "v1,junk"}, *([] if length == "1000" else [old])):
        before = counted("headrace_refused_total", reason="stale")
        exchange = Exchange([b"x" * 100] * 10)
        ask(app, exchange, headers | ({"content-length": length} if length else {}))
        assert (exchange.status, exchange.headers["Connection"]) == (401, "close")
        assert exchange.read == (10 if length == "1000" else 0)  # the end of a small body is awaited
        assert counted("headrace_refused_total", reason="stale") == before  # the signature was not checked
    assert taken == []


def test_a_refused_sender_of_a_slow_small_body_is_answered_soon(plain_settings: Settings) -> None:
    """Breaks if a sender without a signature keeps its connection by sending a byte now and then."""
    began = time.monotonic()
    exchange = Exchange([b"x"] * 1000, wait=0.05)
    assert ask(server(plain_settings, lambda _: None), exchange, {"content-length": "1000"}).status == 401
    assert time.monotonic() - began < 3


def test_an_arbitrary_path_is_no_label(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if a request for an unknown path is counted under its path."""
    app = server(replace(plain_settings, max_body_bytes=10), taken.extend)
    assert ask(app, Exchange([]), {"content-length": "11"}, path="/webhooks/somebody").status == 404
    assert "somebody" not in metrics.exposition().decode()


def test_a_body_that_grows_too_large_is_read_no_further(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if an oversized chunked body is read to its end, or a wrong length is believed."""
    app = server(replace(plain_settings, max_body_bytes=100), taken.extend)
    exchange = ask(app, Exchange([b"x" * 60] * 50), signed(BODY))
    assert (exchange.status, exchange.read, taken) == (413, 4, [])
    assert (ask(app, Exchange([b"x" * 60] * 50), signed(BODY) | {"content-length": "60"}).status, taken) == (401, [])


@pytest.mark.parametrize(("headers", "status", "metric"), [(signed, 413, "answers"), (forged, 401, "answers")])
def test_the_signature_of_an_oversized_body_is_checked(
    plain_settings: Settings, taken: list[Delivery], headers: Any, status: int, metric: str
) -> None:
    """Breaks if a forged body raises the alert for bodies over the limit, or a signed one does not."""
    app = server(replace(plain_settings, max_body_bytes=INLINE_BYTES), taken.extend)
    body = b"x" * (INLINE_BYTES + 1000)
    before = counted(f"headrace_{metric}_total", status=str(status))
    for length in ({}, {"content-length": str(len(body))}):
        exchange = ask(app, Exchange([body[:1000], body[1000:]]), headers(body) | length)
        assert (exchange.status, exchange.headers["Connection"], taken) == (status, "close", [])
    assert counted(f"headrace_{metric}_total", status=str(status)) == before + 2
    small = server(replace(plain_settings, max_body_bytes=1000), taken.extend)
    assert ask(small, Exchange([b"x" * 1500]), headers(b"x" * 1500) | {"content-length": "1500"}).status == status


@pytest.mark.parametrize("size", [100, SMALL_BYTES * 2])
def test_a_body_that_never_ends_times_out(
    plain_settings: Settings, taken: list[Delivery], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Breaks if a slow body has no time limit, or counts as a fault of the broker."""
    before = counted("headrace_unverified_total", status="408")
    monkeypatch.setattr(rsgi, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(rsgi, "SMALL_BODY_SECONDS", 0.05)
    app = server(plain_settings, taken.extend)
    exchange = ask(app, Exchange([b"x" * size] * 1000, wait=0.01), signed(BODY) | {"content-length": "1000000"})
    assert (exchange.status, exchange.headers["Connection"]) == (408, "close")
    assert exchange.read < 1000
    small = ask(app, Exchange([b"x"] * 1000, wait=0.01), signed(BODY) | {"content-length": "1000"})
    assert small.status == 408
    assert counted("headrace_unverified_total", status="408") == before + 2


def test_a_large_body_may_take_longer_than_a_small_one(
    plain_settings: Settings, taken: list[Delivery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a large body of a slow network is cut off at the time limit of a small one."""
    monkeypatch.setattr(rsgi, "SMALL_BODY_SECONDS", 0.1)
    app = server(plain_settings, taken.extend)
    body = json.dumps(workout("u1", title="x" * SMALL_BYTES * 4)).encode()
    parts = [body[start : start + SMALL_BYTES] for start in range(0, len(body), SMALL_BYTES)]
    headers = signed(body) | {"content-length": str(len(body))}
    assert ask(app, Exchange(parts, wait=0.04), headers).status == 202


def test_bodies_have_a_budget_together(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if senders exceed the memory budget together, their share is not released, or alerts count the 503."""
    before = counted("headrace_answers_total", status="503"), counted("headrace_unverified_total", status="503")
    settings = replace(plain_settings, max_body_bytes=MIB, body_memory_bytes=4 * MIB, web_processes=2)
    app = server(settings, taken.extend)
    slow = [Exchange([b"x" * (MIB - 1), b"x"], wait=0.02) for _ in range(5)]

    async def together() -> None:
        scope = Scope(Headers(signed(BODY).items()))
        await asyncio.gather(*(app.__rsgi__(scope, one) for one in slow))

    asyncio.run(together())
    assert sorted(one.status for one in slow) == [401, 401, 503, 503, 503]
    after = counted("headrace_answers_total", status="503"), counted("headrace_unverified_total", status="503")
    assert after == (before[0], before[1] + 3)
    assert app.budget.used == 0
    assert ask(app, Exchange([BODY]), signed(BODY)).status == 202


def test_the_budget_is_held_until_the_answer(plain_settings: Settings) -> None:
    """Breaks if a body leaves the budget when it has arrived: sealing and publishing hold it in memory as well."""
    body = json.dumps(workout("u1", title="x" * INLINE_BYTES)).encode()
    used: list[int] = []
    app = server(plain_settings, lambda _: used.append(app.budget.used))
    assert ask(app, Exchange([body]), signed(body)).status == 202
    assert used == [len(body)]
    assert app.budget.used == 0


@pytest.mark.parametrize("declared", [len(BODY), 1_000_000])
def test_a_cut_connection_publishes_nothing(plain_settings: Settings, taken: list[Delivery], declared: int) -> None:
    """Breaks if a cut connection ends the process, half a body is published, or alerts count the answer."""
    before = counted("headrace_unverified_total", status="400")
    app = server(plain_settings, taken.extend)
    length = {"content-length": str(declared)}
    for cut in (ProtocolClosed("cut"), None) if declared > len(BODY) else (ProtocolClosed("cut"),):
        exchange = ask(app, Exchange([BODY[:10]], then=cut), signed(BODY) | length)
        assert (exchange.status, exchange.headers["Connection"], taken) == (400, "close", [])
        before += 1
    assert counted("headrace_unverified_total", status="400") == before
    assert ask(app, Exchange([BODY]), signed(BODY)).status == 202


def test_only_a_sender_with_a_valid_signature_keeps_its_connection(plain_settings: Settings) -> None:
    """Breaks if senders that do not authenticate can hold connections, or a valid one has to connect each time."""

    def refuse(_: Sequence[Delivery]) -> None:
        raise PublishFailed("as asked")

    app = server(plain_settings, refuse)
    valid = ask(app, Exchange([BODY]), signed(BODY))
    assert (valid.status, valid.headers.get("Connection")) == (503, None)
    assert ask(app, Exchange([BODY]), forged()).headers["Connection"] == "close"
    assert ask(app, Exchange([]), {}, method="GET", path="/nowhere").headers["Connection"] == "close"
    assert "Connection" not in ask(app, Exchange([]), {}, method="GET", path="/livez").headers


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

    def fail(*_: object) -> None:
        raise ZeroDivisionError("canary")

    receiver = app._receivers["/webhooks/junction"]
    receiver._verify = fail
    before = counted("headrace_answers_total", status="503"), counted("headrace_unverified_total", status="503")
    exchange = ask(app, Exchange([BODY]), signed(BODY))
    assert (exchange.status, exchange.headers["Retry-After"]) == (503, "5")
    receiver._verify, receiver._sealer.seal = VERIFIERS["junction"], fail
    assert ask(app, Exchange([BODY]), signed(BODY)).status == 503
    after = counted("headrace_answers_total", status="503"), counted("headrace_unverified_total", status="503")
    assert after == (before[0] + 1, before[1] + 1)
    assert "unexpected ZeroDivisionError on /webhooks/junction" in caplog.text
    assert "canary" not in caplog.text


def test_the_other_routes_answer(plain_settings: Settings, taken: list[Delivery]) -> None:
    """Breaks if probes fail, the metrics are public, or a path is decoded otherwise than under WSGI."""
    app = server(plain_settings, taken.extend)
    assert ask(app, Exchange([]), {}, method="GET", path="/livez").answer == b"up\n"
    assert ask(app, Exchange([]), {}, method="GET", path="/readyz").status == 200
    assert ask(app, Exchange([]), {}, method="GET", path="/metrics").status == 404
    assert ask(app, Exchange([]), {}, method="GET", path="/nowhere").status == 404
    assert "POST" in ask(app, Exchange([]), {}, method="OPTIONS").headers["Allow"]
    assert ask(app, Exchange([BODY]), signed(BODY), path="/webhooks/%6aunction").status == 202
