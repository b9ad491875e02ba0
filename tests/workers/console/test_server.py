"""The console's server: a request is read within limits before it takes a thread."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from flask import Flask, request
from granian.rsgi import ProtocolClosed  # type: ignore[attr-defined]

from tests.support.rsgi import Exchange, Headers, Scope
from workers.console import server
from workers.console.server import ConsoleServer

HEADERS = Headers([("host", "127.0.0.1:5556"), ("content-type", "application/x-www-form-urlencoded")])


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture
def served(gate: threading.Event) -> Iterator[ConsoleServer]:
    """An application that repeats a field, and one route that waits for the gate."""
    flask = Flask("tests")
    flask.add_url_rule("/", "echo", lambda: request.form["name"], methods=["POST"])
    flask.add_url_rule("/wait", "wait", lambda: str(gate.wait(20)), methods=["POST"])
    one = ConsoleServer(flask, body_seconds=0.2)
    yield one
    gate.set()
    loop = asyncio.new_event_loop()
    one.__rsgi_del__(loop)
    loop.close()


def send(served: ConsoleServer, exchange: Exchange, path: str = "/") -> Exchange:
    asyncio.run(served.__rsgi__(Scope(HEADERS, path=path, server="127.0.0.1:5556"), exchange))
    return exchange


def test_a_form_is_passed_on_also_without_a_length(served: ConsoleServer) -> None:
    done = send(served, Exchange([b"name=", b"ada"]))
    assert (done.status, done.answer) == (200, b"ada")


def test_a_slow_a_large_and_a_cut_request_are_refused(served: ConsoleServer) -> None:
    """Breaks if a sender holds a thread while its body arrives, or fills the memory."""
    assert send(served, Exchange([b"name=a"] * 100, wait=0.02)).status == 408
    large = send(served, Exchange([b"x" * 10_000] * 100))
    assert (large.status, large.read) == (413, 7)
    assert send(served, Exchange([b"name="], then=ProtocolClosed())).status == 400


def test_a_failure_of_the_application_is_a_500_without_its_text(served: ConsoleServer) -> None:
    done = send(served, Exchange([], then=ValueError("sesame")))
    assert done.status == 500
    assert b"sesame" not in done.answer


def test_too_many_waiting_requests_are_refused(
    served: ConsoleServer, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if requests pile up without limit while PostgreSQL is slow."""
    monkeypatch.setattr(server, "MAX_WAITING", 5)
    exchanges = [Exchange([b"name=a"]) for _ in range(8)]

    async def crowd() -> None:
        scope = Scope(HEADERS, path="/wait", server="127.0.0.1:5556")
        tasks = [asyncio.create_task(served.__rsgi__(scope, one)) for one in exchanges]
        await asyncio.sleep(0.3)
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(crowd())
    assert sorted(one.status for one in exchanges) == [200] * 5 + [503] * 3


def test_livez_is_answered_while_every_thread_is_busy(served: ConsoleServer, gate: threading.Event) -> None:
    """Breaks if Kubernetes restarts the console during long actions, or if the route needs a host or a login."""
    exchange = Exchange([])

    async def busy() -> None:
        scope = Scope(HEADERS, path="/wait", server="127.0.0.1:5556")
        tasks = [asyncio.create_task(served.__rsgi__(scope, Exchange([b"name=a"]))) for _ in range(server.THREADS)]
        await asyncio.sleep(0.2)
        await asyncio.wait_for(served.__rsgi__(Scope(Headers([("host", "10.0.0.7")]), "GET", "/livez"), exchange), 5)
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(busy())
    assert (exchange.status, exchange.answer) == (200, b"ok\n")
